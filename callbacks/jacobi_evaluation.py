"""Lets DenseNets be evaluated in parallel over their layers while a Trainer validates, tests or predicts."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from lit_parallel.dense import DenseOptions, EvaluationRecord, evaluate_in_parallel, records, restore
from lit_parallel.dense.structure import find_dense_nets
from lit_parallel.dense.swap import ParallelForward, parallel_forwards
from lit_parallel.errors import UserError
from lit_parallel.tracking import log_curve

_WAYS = ("fused", "plain", "ordinary")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class JacobiEvaluation(pl.Callback):
    """Swaps the forward of every DenseNet for a parallel one, for as long as validation, test or prediction runs.

    Works on any LightningModule with a DenseNet at any depth, torchvision's too. Metrics are those of the parallel
    forward's logits. Training, parameters, their names and checkpoints stay as they are, and so does the module
    afterwards, by an exception too.

    Logged at the end of an epoch under ``jacobi_evaluation/<part>/`` (``val``, ``test`` or ``predict``), for each
    network:

    - ``<network>/plain``, ``fused``, ``ordinary``: the part of the batches that was evaluated in this way;
    - ``<network>/top1_agreement``, ``top5_agreement`` and the largest ``relative_logit_error``, all against the
      ordinary forward, and ``wall_clock_speedup`` over it (eager, as the module itself runs it; the median), of every
      ``probe_every``-th batch;
    - ``<network>.<block>/iterations_mean``, ``iterations_max`` and ``work``, layers evaluated relative to ordinary
      evaluation;
    - in Weights & Biases ``solver/residual/<part>/<network>.<block>`` against ``solver/iteration``: the largest
      relative change of the features in each parallel iteration, in the last epoch of a run; of up to 8 images where
      kernels did the work, which keep no curve.

    With several processes (DDP), these are numbers of all their data; the residuals are the first one's.

    Args:
        options: How a network is evaluated.
        **chosen: Single options, such as ``solver="gs_jacobi"``.

    Raises:
        UserError: An option is unknown or out of range.
    """

    def __init__(self, options: DenseOptions | None = None, **chosen: Any) -> None:
        evaluate_in_parallel(nn.Module(), options, **chosen)  # of nothing: only the options are checked
        self.options, self.chosen = options, chosen
        self._tallies: dict[str, _Tally] | None = None  # by network; None: nothing is swapped
        self._last: dict[str, _Tally] = {}  # of the last epoch
        self._last_part = ""
        self._seen: dict[str, EvaluationRecord] = {}
        self._known: dict[str, ParallelForward] = {}  # of the epoch before, with what they have learnt

    def check(self, module: nn.Module) -> None:
        """Raise a `UserError` if there is nothing in a module that could be evaluated in parallel."""
        self._swap(module)
        restore(module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._note(pl_module)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._note(pl_module)

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._note(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module, "test")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, pl_module, "predict")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._summarise(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo(pl_module)
        self._known, self._last = {}, {}

    def _swap(self, module: nn.Module) -> list[str]:
        names = evaluate_in_parallel(module, self.options, **self.chosen)
        if not names:
            # An error, not a warning: whoever asks for it would otherwise wait for a speedup that cannot come.
            if unusual := find_dense_nets(module):
                raise UserError(
                    f"JacobiEvaluation can evaluate none of the DenseNets of {type(module).__name__} "
                    f"({', '.join(unusual)}) in parallel, as the warnings before say: leave it out "
                    "(callbacks.jacobi_evaluation.enabled=false)."
                )
            convolutional = any(isinstance(part, _CONVOLUTIONS) for part in module.modules())
            raise UserError(
                "JacobiEvaluation needs a DenseNet that it can evaluate in parallel (with features.denseblock1 and so "
                f"on, as torchvision names them), and {type(module).__name__} has "
                f"{'convolutions but no dense block' if convolutional else 'none'}: leave it out "
                "(callbacks.jacobi_evaluation.enabled=false)."
            )
        return names

    def _begin(self, module: nn.Module) -> None:
        self._tallies = {name: _Tally() for name in self._swap(module)}
        self._seen = {}
        for name, forward in parallel_forwards(module).items():
            forward.learn_from(self._known.get(name))

    def _note(self, module: nn.Module) -> None:
        assert self._tallies is not None
        before, self._seen = self._seen, records(module)
        for name, record in self._seen.items():
            if record is not before.get(name):  # or else the network was not asked in this batch
                self._tallies[name].add(record)

    def _end(self, trainer: pl.Trainer, module: nn.Module, part: str) -> None:
        assert self._tallies is not None
        if not trainer.sanity_checking:
            self._last, self._last_part = _of_all_processes(self._tallies), part
            if trainer.is_global_zero:
                values = {
                    _join("jacobi_evaluation", part, name): value
                    for network, tally in self._last.items()
                    for name, value in tally.values(network).items()
                }
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        self._known = parallel_forwards(module)
        self._undo(module)
        if trainer.state.fn != "fit":  # while it trains, a line for every epoch would be too much
            self._summarise(trainer)

    def _undo(self, module: nn.Module) -> None:
        if self._tallies is not None:  # what somebody else has made parallel stays so
            restore(module)
            self._tallies, self._seen = None, {}

    def _summarise(self, trainer: pl.Trainer) -> None:
        """Tell of the last epoch, and draw its residuals: those of every epoch would lie on top of one another."""
        for network, tally in self._last.items():
            if not tally.ways:  # nobody asked it
                continue
            rank_zero_info(f"JacobiEvaluation: {network or 'the network'}: {tally.summary()}.")
            for block, residual in tally.residuals.items():
                name = _join("solver/residual", self._last_part, _join(network, block, separator="."))
                for logger in trainer.loggers if trainer.is_global_zero else ():
                    log_curve(logger, name, residual.float().amax(dim=1).tolist())


@dataclass
class _Tally:
    """What the evaluations of one network took in an epoch."""

    ways: Counter[str] = field(default_factory=Counter)
    layers: dict[str, int] = field(default_factory=dict)
    iterations: dict[str, list[Tensor]] = field(default_factory=dict)  # of each block, batch by batch
    evaluations: dict[str, list[Tensor]] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)  # the newest curve of each block
    probes: list[EvaluationRecord] = field(default_factory=list)
    solvers: set[str] = field(default_factory=set)

    def add(self, record: EvaluationRecord) -> None:
        self.ways[record.way] += 1
        self.solvers.add(record.solver)
        for block in record.blocks:
            self.layers[block.name] = block.layers
            self.iterations.setdefault(block.name, []).append(block.iterations)
            self.evaluations.setdefault(block.name, []).append(block.evaluations)
            if block.residual is not None and len(block.residual) > 0:
                self.residuals[block.name] = block.residual
        if record.relative_logit_error is not None:
            self.probes.append(replace(record, blocks=[]))  # only how it compares is told

    def join(self, other: _Tally) -> None:
        """Add what another process has counted."""
        self.ways += other.ways
        self.solvers |= other.solvers
        self.layers |= other.layers
        self.probes += other.probes
        for mine, theirs in ((self.iterations, other.iterations), (self.evaluations, other.evaluations)):
            for block, numbers in theirs.items():
                mine.setdefault(block, []).extend(numbers)
        self.residuals = other.residuals | self.residuals

    def values(self, network: str) -> dict[str, float]:
        """What is logged, by names without the callback's."""
        batches = sum(self.ways.values())
        values = {_join(network, way): self.ways[way] / batches for way in _WAYS if batches}
        for block, layers in self.layers.items():
            iterations, evaluations = torch.cat(self.iterations[block]), torch.cat(self.evaluations[block])
            name = _join(network, block, separator=".")
            values[f"{name}/iterations_mean"] = float(iterations.double().mean())
            values[f"{name}/iterations_max"] = float(iterations.max())
            values[f"{name}/work"] = float(evaluations.double().mean()) / layers
        for name, value in self._compared().items():
            if math.isfinite(value):
                values[_join(network, name)] = value
        return values

    def _compared(self) -> dict[str, float]:
        """What probes found."""

        def found(name: str) -> list[float]:
            return [value for probe in self.probes if (value := getattr(probe, name)) is not None]

        means = {name: statistics.mean(found(name)) for name in ("top1_agreement", "top5_agreement") if found(name)}
        if errors := found("relative_logit_error"):
            means["relative_logit_error"] = max(errors)
        if speedups := found("speedup"):
            means["wall_clock_speedup"] = statistics.median(speedups)
        return means

    def summary(self) -> str:
        """A line for the terminal."""
        batches = sum(self.ways.values())
        if self.ways["ordinary"] == batches:
            return "ordinary forward throughout"
        taken = {block: torch.cat(found).double().mean() for block, found in self.iterations.items()}
        text = (
            f"{', '.join(sorted(self.solvers))}, {' + '.join(f'{mean:.1f}' for mean in taken.values())} parallel "
            f"iterations for {' + '.join(str(self.layers[block]) for block in taken)} layers on average"
        )
        if ordinary := self.ways["ordinary"]:
            text += f" in {batches - ordinary} of {batches} batches, in the others the ordinary forward"
        compared = self._compared()
        if "top1_agreement" in compared:
            text += (
                f"; when compared with the ordinary forward, the same class for {compared['top1_agreement']:.1%} of "
                f"the images, logits within {compared['relative_logit_error']:.1e}"
            )
        if "wall_clock_speedup" in compared:
            text += f", {compared['wall_clock_speedup']:.2f} times as fast"
        return text


def _of_all_processes(tallies: dict[str, _Tally]) -> dict[str, _Tally]:
    """The tallies of all processes that evaluate together, as one, for each network."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return tallies
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, tree_map_only(Tensor, Tensor.cpu, {n: vars(t) for n, t in tallies.items()}))
    first, *others = ({name: _Tally(**values) for name, values in part.items()} for part in found)
    for name, tally in first.items():
        for other in others:
            tally.join(other[name])
    return first


def _join(*parts: str, separator: str = "/") -> str:
    return separator.join(part for part in parts if part)
