"""Lets recurrent layers backpropagate in parallel over time while a Trainer trains."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from torch import nn

from lit_parallel.errors import UserError
from lit_parallel.recurrent import BackwardRecord, RecurrentOptions, parallelize, records, restore
from lit_parallel.recurrent.state import set_state, state_of

# What is logged of a backward pass, by the names of a record's attributes.
_OF_THIS_BATCH = {
    "iterations": "iterations",
    "sweeps": "sweeps",
    "residual": "residual",
    "error": "estimated_error",
    "block": "block",
    "halo": "halo",
    "rank": "rank",
    "forward_ms": "forward_ms",
    "backward_ms": "backward_ms",
}
_OF_THE_FORWARD_PASS = {
    "iterations": "forward_iterations",
    "sweeps": "forward_sweeps",
    "residual": "forward_residual",
    "error": "forward_estimated_error",
    "block": "forward_block",
    "halo": "forward_halo",
}
_OF_THE_PROBE = {
    "probe_error": "probe_error",
    "probe_speedup": "backward_speedup",
    "step_speedup": "step_speedup",
}


class JacobiBackprop(pl.Callback):
    """Swaps the backward pass of every recurrent layer for one that is parallel in time, for as long as training runs.

    With ``forward=True`` the forward passes too, also those of validation meanwhile, where that is faster.

    Works on any LightningModule with ``nn.RNN``, ``nn.GRU``, ``nn.LSTM`` or
    :class:`~lit_parallel.networks.rnn.Recurrence` at any depth. Parameters, their names, checkpoints, validation and
    testing stay as they are, and so does the module once training has ended, by an exception too.

    Logged under ``jacobi_backprop/``, every ``log_every_n_steps`` of the Trainer: for each recurrent module
    ``<name>/parallel``, 1 or 0, whether this batch's backward pass was parallel; for each of its layers and directions
    (``<name>.l0``, ``<name>.l0_reverse``, of a cell of one's own ``<name>.cell``), if it was, ``iterations``,
    ``sweeps``, ``residual``, ``estimated_error`` (both only where a tolerance is checked), ``block``, ``halo``,
    ``rank``, ``forward_ms``, ``backward_ms``, if the forward pass was parallel ``forward_iterations``,
    ``forward_sweeps``, ``forward_residual``, ``forward_estimated_error``, ``forward_block``, ``forward_halo``; and of
    the newest comparison with the ordinary backward pass ``probe_error``, ``backward_speedup``, ``step_speedup``.

    Args:
        options: How the backward pass is solved.
        **chosen: Single options, such as ``solver="two_level"``.

    Raises:
        UserError: An option is unknown or out of range.
    """

    def __init__(self, options: RecurrentOptions | None = None, **chosen: Any) -> None:
        parallelize(nn.Module(), options, **chosen)  # of nothing: only the options are checked
        self.options, self.chosen = options, chosen
        self._tallies: dict[str, dict[str, _Tally]] | None = None  # by module, then by layer; None: not training
        self._seen: dict[str, BackwardRecord] = {}
        self._uncounted: dict[str, BackwardRecord] = {}
        self._batches = 0
        self._trained: nn.Module | None = None
        self._learnt: dict[str, Any] = {}

    def check(self, module: nn.Module) -> None:
        """Raise a `UserError` if there is nothing in a module that could be parallel."""
        self._parallelize(module)
        restore(module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # By now a weight average has its copy of the plain module, and torch.compile has not seen it yet.
        self._tallies = {name: {} for name in self._parallelize(pl_module)}
        self._seen, self._uncounted, self._batches = {}, {}, 0
        self._trained = pl_module
        set_state(pl_module, self._learnt)
        self._learnt = {}

    def state_dict(self) -> dict[str, Any]:
        """What the layers have learnt, such as their halos: with it training goes on as if it had never stopped."""
        return {} if self._trained is None else {"learnt": state_of(self._trained)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """For the training that starts next."""
        self._learnt = state_dict["learnt"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert self._tallies is not None
        logs = bool(trainer.loggers) and _logs_this_step(trainer)
        # A record that is the one of the batch before: the layer went the ordinary way, and it says nothing of it.
        before, self._seen = self._seen, records(pl_module, wait=logs)
        new = {name: record for name, record in self._seen.items() if record is not before.get(name)}
        self._batches += 1
        self._count()
        self._uncounted = new
        if logs:
            # Not through pl_module.log: it repeats values of earlier batches, and reads all of them from the device.
            for logger in trainer.loggers:
                logger.log_metrics(self._values(new), step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        records(pl_module)
        self._count()
        for module, tallies in (self._tallies or {}).items():
            for name in sorted(tallies) or [module]:
                rank_zero_info(f"JacobiBackprop: {name}: {self._summary(name, tallies.get(name))}.")
        self._undo(pl_module)

    def _count(self) -> None:
        """The passes of the batch before: the device need not be waited for."""
        for name, record in self._uncounted.items():
            assert self._tallies is not None
            self._tallies[_module_of(name)].setdefault(name, _Tally()).add(record)
        self._uncounted = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo(pl_module)  # a fit that had nothing left to train has no on_train_end

    def _parallelize(self, module: nn.Module) -> list[str]:
        names = parallelize(module, self.options, **self.chosen)
        if not names:
            # An error, not a warning: whoever asks for it would otherwise wait for a speedup that cannot come.
            raise UserError(
                "JacobiBackprop needs an nn.RNN, nn.GRU, nn.LSTM or Recurrence that it can make parallel, and "
                f"{type(module).__name__} has none: leave it out (callbacks.jacobi_backprop.enabled=false)."
            )
        return names

    def _undo(self, module: nn.Module) -> None:
        if self._tallies is not None:  # what somebody else has made parallel stays so
            restore(module)
            self._tallies, self._seen, self._trained = None, {}, None

    def _values(self, new: Collection[str]) -> dict[str, float]:
        assert self._tallies is not None
        modules = {_module_of(name) for name in new}
        values = {f"jacobi_backprop/{name}/parallel": float(name in modules) for name in self._tallies}
        for name, record in self._seen.items():
            shown = _OF_THIS_BATCH | _OF_THE_PROBE if name in new else _OF_THE_PROBE
            found = [(metric, getattr(record, attribute)) for attribute, metric in shown.items()]
            if name in new and record.forward is not None:
                of_forward = _OF_THE_FORWARD_PASS.items()
                found += [(metric, getattr(record.forward, attribute)) for attribute, metric in of_forward]
            for metric, value in found:
                if value is not None and math.isfinite(value):
                    values[f"jacobi_backprop/{name}/{metric}"] = float(value)
        return values

    def _summary(self, name: str, tally: _Tally | None) -> str:
        if tally is None:
            return "ordinary backward pass throughout"
        newest = self._seen[name]
        text = (
            f"{newest.solver}, {tally.iterations / tally.batches:.1f} parallel iterations for "
            f"{tally.length / tally.batches:.0f} steps on average"
        )
        if tally.batches < self._batches:
            text += f" in {tally.batches} of {self._batches} batches, in the others the ordinary backward pass"
        if newest.forward is not None:
            text += f"; forward pass in {newest.forward.iterations} at last"
        if newest.probe_speedup is not None and newest.step_speedup is not None:
            text += (
                f"; when compared, backward {newest.probe_speedup:.2f} and forward and backward "
                f"{newest.step_speedup:.2f} times as fast as the ordinary way"
            )
        return text


@dataclass
class _Tally:
    """What the backward passes of one layer took in all."""

    batches: int = 0
    iterations: int = 0
    length: int = 0

    def add(self, record: BackwardRecord) -> None:
        self.batches += 1
        self.iterations += record.iterations
        self.length += record.length


def _module_of(name: str) -> str:
    """The recurrent module to which a record belongs."""
    return name.rpartition(".")[0]


def _logs_this_step(trainer: pl.Trainer) -> bool:
    """Whether Lightning logs the values of this batch, the last of an optimiser's step."""
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()
