"""Evaluates a DenseNet's batches: by the solver that was asked for, or by what was measured to be the fastest.

A way to evaluate belongs to one kind of batch: its shape, type and device, and the type that is computed in. It is
chosen, measured and captured with the first batch of the kind, and adapts to the batches that follow.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_parallel.dense.evaluation import BlockRecord, EvaluationRecord, PlainEvaluation
from lit_parallel.dense.options import DenseOptions
from lit_parallel.dense.structure import Structure, structure_of
from lit_parallel.errors import UserError, first_line
from lit_parallel.kernels import triton_runs_on
from lit_parallel.recurrent.stopwatch import synchronize

if TYPE_CHECKING:
    from lit_parallel.dense.fused import FusedWeights, Plan

logger = logging.getLogger(__name__)

WINDOWS = (4, 8, 16)
"""Layers in the windows of GS-Jacobi that ``auto`` tries beside all layers of a block (Jacobi) and one (sequential)."""

_WINDOW = 8  # of gs_jacobi, where none is named
_WORTH_IT = 1.05  # times faster than the ordinary forward, or auto takes that
_CLEARLY = 0.98  # part of the best time so far that another plan may take: less would be noise
_HOPELESS = 1.5  # times as slow as the ordinary forward: Jacobi iterations, which are more work, are not even tried
_LOSS = 2.0  # times the ordinary forward's own distance from float64's logits, that others may have
_OWN_FORWARD = 0.05  # relative difference of the logits that rounding does not explain
_COMPARED = 16  # images that auto compares with what float64 gives
_CURVE_OF = 8  # images whose changes are followed through all iterations
_REPEATS = 5
_LONG = 0.2  # seconds that are measured once
_MOST_KINDS = 8  # of batches that are remembered: a captured graph keeps its memory

Kind = tuple[Any, ...]  # the number of images first
T = TypeVar("T")


class Evaluator:
    """Evaluates batches of one DenseNet.

    Args:
        network: The DenseNet, in evaluation mode.
        name: What messages call it.
        options: How it is evaluated.
        ordinary: Its ordinary forward.

    Raises:
        UserError: If it is no DenseNet.
    """

    def __init__(
        self, network: nn.Module, name: str, options: DenseOptions, ordinary: Callable[[Tensor], Tensor]
    ) -> None:
        self.structure = structure_of(network)
        self.name, self.options, self.ordinary = name, options, Ordinary(ordinary)
        self._ways: dict[Kind, Way] = {}
        self._weights: dict[tuple[torch.dtype, torch.device], FusedWeights] = {}
        self._newest: Kind | None = None
        self._probed: set[Kind] = set()
        self._is_usual: bool | None = None  # not known yet
        self._draws_curve = True

    def refresh(self) -> None:
        """To be called after weights have changed."""
        self._draws_curve = True
        for way in self._ways.values():
            way.refresh()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, EvaluationRecord]:
        """Logits ``[batch, classes]`` of images ``[batch, channels, height, width]``, and what they took."""
        return self._way_for(images)(images)

    @torch.no_grad()
    def probe(self, images: Tensor) -> tuple[Tensor, EvaluationRecord]:
        """The same, compared with the ordinary forward: its logits, and its wall-clock time."""
        way, device, kind = self._way_for(images), images.device, _kind_of(images, self.structure)
        (logits, record), seconds = timed(lambda: way(images), device)
        if record.way == "ordinary":
            return logits, record
        (expected, _), ordinary_seconds = timed(lambda: self.ordinary(images), device)
        if kind not in self._probed:  # a first call does more than any later one
            self._probed.add(kind)
            _, seconds = timed(lambda: way(images), device)
            _, ordinary_seconds = timed(lambda: self.ordinary(images), device)
        record = dataclasses.replace(
            record,
            top1_agreement=agreement(logits, expected, 1),
            top5_agreement=agreement(logits, expected, 5) if expected.shape[1] > 5 else None,
            relative_logit_error=relative_error(logits, expected),
            speedup=ordinary_seconds / seconds,
        )
        if self._draws_curve:
            self._draws_curve = False
            record = self._with_curve(record, way, images)
        return logits, record

    def _way_for(self, images: Tensor) -> Way:
        kind, newest = _kind_of(images, self.structure), self._newest
        self._newest = kind
        way = self._ways.get(kind)
        if way is None and kind != newest:
            way = self._larger(kind)
        if way is None:
            way = self._choose(images)
            if len(self._ways) >= _MOST_KINDS:
                self._ways.pop(next(iter(self._ways)))
            self._ways[kind] = way
        return way

    def _larger(self, kind: Kind) -> Way | None:
        """A known way for more images of the same kind: it takes the last batch of an epoch too, padded if need be."""
        for other, way in self._ways.items():
            if other[1:] == kind[1:] and other[0] > kind[0]:
                return Padded(way, other[0]) if way.captured else way
        return None

    def _choose(self, images: Tensor) -> Way:
        if self._is_usual is None:
            self._is_usual = self._computes_the_usual(images[:1])
        if not self._is_usual:
            return self.ordinary
        options = self.options
        fusible = options.fused and runs_fused(options) and kernels_run_on(images.device)
        if options.solver == "auto":
            return _Choice(self, images).fastest(fusible)
        if fusible:
            try:
                return self.fused(options.solver, first_plan(self.structure, options), images)
            except (torch.cuda.OutOfMemoryError, UserError) as error:
                logger.warning(f"{shown(self.name)} is evaluated without kernels: {first_line(error)}.")
        return Plain(self.structure, options)

    def fused(self, solver: str, plan: Plan, images: Tensor) -> Fused:
        """The kernels' way by a plan."""
        from lit_parallel.dense.fused import FusedWeights, compute_type

        key = compute_type(self.structure, images.device), images.device
        if key not in self._weights:
            with torch.autocast(images.device.type, enabled=False):
                self._weights[key] = FusedWeights(self.structure, key[0])
        return Fused(self.structure, solver, plan, images, self.options, self._weights[key])

    def _computes_the_usual(self, images: Tensor) -> bool:
        """Whether the network's forward is the usual one: a user's class may end in something else."""
        expected, found = self.ordinary(images)[0], self.structure.ordinary(images)
        same_shape = isinstance(expected, Tensor) and expected.shape == found.shape
        if same_shape and relative_error(found, expected) <= _OWN_FORWARD:
            return True
        logger.warning(f"{shown(self.name)} has a forward that is not the usual DenseNet's, and is evaluated by it.")
        return False

    def _with_curve(self, record: EvaluationRecord, way: Way, images: Tensor) -> EvaluationRecord:
        """The record with residuals of all iterations, of some images, which kernels do not keep."""
        way = way.way if isinstance(way, Padded) else way
        if not isinstance(way, Fused) or way.solver == "sequential":
            return record
        window = max(block.window for block in way.plan.blocks if block.iterations is not None)
        options = DenseOptions(
            solver="gs_jacobi", window=window, tolerance=self.options.tolerance, guess=self.options.guess
        )
        _, plain = PlainEvaluation(self.structure, options)(images[:_CURVE_OF])
        pairs = zip(record.blocks, plain.blocks, strict=True)
        blocks = [dataclasses.replace(block, residual=other.residual) for block, other in pairs]
        return dataclasses.replace(record, blocks=blocks)


class Way(ABC):
    """A way to evaluate batches of one kind.

    Attributes:
        captured: Whether it is for one number of images only.
    """

    captured = False

    @abstractmethod
    def __call__(self, images: Tensor) -> tuple[Tensor, EvaluationRecord]:
        """Logits, and what they took."""

    def refresh(self) -> None:  # noqa: B027 - most ways keep nothing of the weights
        """To be called after weights have changed."""


class Ordinary(Way):
    """The network's own forward."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward

    def __call__(self, images: Tensor) -> tuple[Tensor, EvaluationRecord]:
        return self.forward(images), EvaluationRecord("sequential", "ordinary", [], math.nan)

    def __str__(self) -> str:
        return "the ordinary forward"


class Plain(Way):
    """A solver's loop over the network's own layers."""

    def __init__(self, structure: Structure, options: DenseOptions) -> None:
        self.options = options
        self._evaluation = PlainEvaluation(structure, options)

    def __call__(self, images: Tensor) -> tuple[Tensor, EvaluationRecord]:
        return self._evaluation(images)

    def __str__(self) -> str:
        return f"plain {self.options.solver}"


class Fused(Way):
    """Kernels in one CUDA graph, by a plan that grows until the tolerance holds.

    Every batch is checked: where the features' relative change in the last planned iteration is above the tolerance,
    the batch is evaluated again by a plan with more iterations, at most as many as a window has layers, which is exact;
    the batches that follow start with that plan. The host waits once per batch, and not at all where nothing is to be
    checked.

    Args:
        structure: The network.
        solver: Its name, for records.
        plan: To begin with.
        images: ``[batch, channels, height, width]``: the kind.
        options: With the tolerance; with ``iterations``, nothing is checked.
        weights: Which all ways of the network share.

    Attributes:
        instead: Another way, and its seconds: to be taken where a plan that has grown takes longer.
    """

    captured = True

    def __init__(
        self,
        structure: Structure,
        solver: str,
        plan: Plan,
        images: Tensor,
        options: DenseOptions,
        weights: FusedWeights,
    ) -> None:
        self.structure, self.solver, self.options = structure, solver, options
        self.layers = [len(block.layers) for block in structure.blocks]
        self.instead: tuple[Way, float] | None = None
        self._weights = weights
        self._given_up = False
        self.adopt(plan, images)

    def adopt(self, plan: Plan, images: Tensor) -> None:
        """Evaluate by another plan from now on."""
        from lit_parallel.dense.fused import FusedEvaluation

        self.plan = plan
        self._evaluation = FusedEvaluation(
            self.structure, plan, images, guess=self.options.guess, weights=self._weights
        )
        sizes = list(zip(plan.blocks, self.layers, strict=True))
        iterates = [block.iterations is not None and block.iterations < min(block.window, n) for block, n in sizes]
        self.checked = self.options.iterations is None and any(iterates)
        batch = (len(images),)
        self._blocks = [
            BlockRecord(
                block.name,
                layers,
                iterations=torch.full(batch, planned.iterations_of(layers)),
                evaluations=torch.full(batch, planned.evaluations_of(layers)),
                residual=None,
                seconds=math.nan,
            )
            for block, (planned, layers) in zip(self.structure.blocks, sizes, strict=True)
        ]

    def __call__(self, images: Tensor) -> tuple[Tensor, EvaluationRecord]:
        if self._given_up:
            assert self.instead is not None
            return self.instead[0](images)
        began = time.perf_counter()
        logits, relative = self.run(images)
        while (plan := self.grown(relative, images)) is not None:
            self.adopt(plan, images)
            logits, relative = self.run(images)
            if self.instead is not None and seconds_of(self.run, images) > self.instead[1]:
                self._given_up = True
                return self.instead[0](images)
        return logits, self._record(relative, time.perf_counter() - began if self.checked else math.nan)

    def run(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and ``[blocks, batch]`` what the last iterations changed, on the host, if there is any to check."""
        logits, residuals = self._evaluation.run(images)
        return logits, residuals.relative.cpu() if self.checked else None

    def grown(self, relative: Tensor | None, images: Tensor) -> Plan | None:
        """A plan with more iterations in those blocks that have changed too much; ``None`` if there is no need."""
        if relative is None:
            return None
        if not bool(relative.isfinite().all()):
            # An image that is not finite itself never will be, and must not cost the others their time.
            relative = torch.where(images.isfinite().flatten(1).all(1).cpu(), relative, 0)
        largest = relative.amax(dim=1).tolist()
        return self.with_more(change > self.options.tolerance for change in largest)

    def with_more(self, wanted: Any) -> Plan | None:
        """The plan with more iterations in the wanted blocks, as far as there are any to add."""
        limit = self.options.max_iterations or math.inf
        blocks = list(self.plan.blocks)
        for index, (block, layers, more) in enumerate(zip(self.plan.blocks, self.layers, wanted, strict=True)):
            most = min(block.window, layers)
            if more and block.iterations is not None and block.iterations < most:
                grown = dataclasses.replace(block, iterations=min(most, 1 + block.iterations + block.iterations // 5))
                if grown.iterations_of(layers) <= limit:
                    blocks[index] = grown
        plan = dataclasses.replace(self.plan, blocks=tuple(blocks))
        return None if plan == self.plan else plan

    def refresh(self) -> None:
        self._evaluation.refresh()  # and with it the weights that it shares with the way to be taken instead

    def _record(self, relative: Tensor | None, seconds: float) -> EvaluationRecord:
        blocks = self._blocks
        if relative is not None:
            found = zip(blocks, relative, relative <= self.options.tolerance, strict=True)
            blocks = [dataclasses.replace(block, residual=change[None], solved=ok) for block, change, ok in found]
        return EvaluationRecord(self.solver, "fused", blocks, seconds)

    def __str__(self) -> str:
        if self.solver == "sequential":
            return "fused sequential"
        blocks = list(zip(self.plan.blocks, self.layers, strict=True))
        sizes = [1 if block.iterations is None else block.window for block, _ in blocks]
        is_uniform = all(size == min(max(sizes), layers) for size, layers in zip(sizes, self.layers, strict=True))
        shown_sizes = str(max(sizes)) if is_uniform else " + ".join(map(str, sizes))
        windows = f"windows of {shown_sizes} layers, " if self.solver == "gs_jacobi" else ""
        return f"fused {self.solver}, {windows}{' + '.join(str(b.iterations or n) for b, n in blocks)} iterations"


class Padded(Way):
    """A way for more images than there are: the last one is repeated."""

    captured = True

    def __init__(self, way: Way, batch: int) -> None:
        self.way, self.batch = way, batch

    def __call__(self, images: Tensor) -> tuple[Tensor, EvaluationRecord]:
        count = len(images)
        repeated = images[-1:].expand(self.batch - count, *images.shape[1:])
        logits, record = self.way(torch.cat([images, repeated]))
        blocks = [
            dataclasses.replace(
                block,
                iterations=block.iterations[:count],
                evaluations=block.evaluations[:count],
                residual=None if block.residual is None else block.residual[:, :count],
                solved=None if block.solved is None else block.solved[:count],
            )
            for block in record.blocks
        ]
        return logits[:count], dataclasses.replace(record, blocks=blocks)


class _Choice:
    """Measures the ways to evaluate a batch.

    Args:
        evaluator: Of the network.
        images: The batch.
    """

    def __init__(self, evaluator: Evaluator, images: Tensor) -> None:
        self.evaluator, self.images = evaluator, images
        self.ordinary = evaluator.ordinary
        self.expected, _ = self.ordinary(images)
        self._exact: tuple[Tensor, float] | None = None
        self._exact_way: tuple[Way, float] | None = None  # what needs no tolerance, if one that does becomes slow
        self.told: list[str] = []
        self.best: tuple[Way, float] = (self.ordinary, self._measure(self.ordinary))

    def fastest(self, fusible: bool) -> Way:
        """The fastest way whose logits are as good as the ordinary forward's; says what was measured."""
        ordinary_seconds = self.best[1]
        try:
            if fusible:
                self._try_kernels()
            else:
                self._try_plainly()
        except (torch.cuda.OutOfMemoryError, UserError) as error:  # of a network that the kernels do not know
            self.told.append(first_line(error))
        way, seconds = self.best
        if way is not self.ordinary and seconds * _WORTH_IT > ordinary_seconds:
            way, seconds = self.ordinary, ordinary_seconds
        dtype = str(self.expected.dtype).removeprefix("torch.")
        logger.info(
            f"{shown(self.evaluator.name)}: {list(self.images.shape)} on {self.images.device}, {dtype}: takes {way}, "
            f"{1000 * seconds:.3g} ms ({'; '.join(self.told)})."
        )
        return way

    def _try_kernels(self) -> None:
        from lit_parallel.dense.fused import Plan

        structure, evaluator = self.evaluator.structure, self.evaluator
        ordinary_seconds = self.best[1]
        sequential = evaluator.fused("sequential", Plan.sequential(structure), self.images)
        seconds = self._measure(sequential)
        if self._is_accurate(sequential(self.images)[0]) and seconds < self.best[1]:
            self.best = (sequential, seconds)
        if seconds > _HOPELESS * ordinary_seconds:
            return
        self._exact_way = self.best
        most = max(len(block.layers) for block in structure.blocks)
        for window in (*(window for window in WINDOWS if window < most), most):
            solver = "jacobi" if window == most else "gs_jacobi"
            self._try_plan(solver, Plan.gs_jacobi(structure, window, 2), tell=True)
        if isinstance(self.best[0], Fused):
            self._mix()

    def _mix(self) -> None:
        """Give every block the window that is best for it: their times add up, whatever the others do."""
        from lit_parallel.dense.fused import BlockPlan, Plan

        sequential = Plan.sequential(self.evaluator.structure).blocks
        for index, block in enumerate(self.evaluator.structure.blocks):
            layers = len(block.layers)
            windows = [*(window for window in WINDOWS if window < layers), layers]
            for planned in (sequential[index], *(BlockPlan(window, 2) for window in windows)):
                best = self.best[0]
                assert isinstance(best, Fused)
                blocks = list(best.plan.blocks)
                before, blocks[index] = blocks[index], planned
                if (before.window, before.iterations is None) != (planned.window, planned.iterations is None):
                    self._try_plan("gs_jacobi", Plan(tuple(blocks)), tell=False)

    def _try_plan(self, solver: str, plan: Plan, *, tell: bool) -> None:
        """Take a plan, with as many iterations as it needs, if it is the fastest so far."""
        way = self.evaluator.fused(solver, plan, self.images)
        seconds, is_accurate = self._until_accurate(way)
        is_better = is_accurate and seconds < _CLEARLY * self.best[1]
        if tell or is_better:
            self._tell(way, seconds)
        if is_better:
            way.instead = self._exact_way
            self.best = way, seconds

    def _until_accurate(self, way: Fused) -> tuple[float, bool]:
        """Add iterations until tolerance and logits hold, unless it takes longer than the best way before that."""
        while True:
            logits, relative = way.run(self.images)
            seconds = seconds_of(way.run, self.images)
            plan = way.grown(relative, self.images)
            is_accurate = plan is None and self._is_accurate(logits)
            if plan is None and not is_accurate:
                plan = way.with_more(True for _ in way.layers)
            if plan is None or seconds >= self.best[1]:
                return seconds, is_accurate
            way.adopt(plan, self.images)

    def _try_plainly(self) -> None:
        """By the network's own layers: no solver takes less time than one Jacobi iteration, which is measured first."""
        structure, options = self.evaluator.structure, self.evaluator.options
        once = Plain(structure, DenseOptions(solver="jacobi", iterations=1, guess=options.guess))
        if self._measure(once, "one plain iteration") >= self.best[1]:
            return
        for solver in ("gs_jacobi", "jacobi"):
            way = Plain(structure, DenseOptions(solver=solver, tolerance=options.tolerance, guess=options.guess))
            seconds = self._measure(way)
            if seconds < self.best[1] and self._is_accurate(way(self.images)[0]):
                self.best = (way, seconds)

    def _measure(self, way: Way, name: str = "") -> float:
        seconds = seconds_of(way, self.images)
        self._tell(name or way, seconds)
        return seconds

    def _tell(self, what: object, seconds: float) -> None:
        self.told.append(f"{what} {1000 * seconds:.3g} ms")

    def _is_accurate(self, logits: Tensor) -> bool:
        """Whether logits are within the tolerance of the ordinary ones, or nearly as near to float64's as these are."""
        if relative_error(logits, self.expected) <= self.evaluator.options.tolerance:
            return True
        if self._exact is None:
            exact = in_float64(self.evaluator.structure, self.images[:_COMPARED])
            self._exact = exact, relative_error(self.expected[:_COMPARED], exact)
        exact, distance = self._exact
        return relative_error(logits[:_COMPARED], exact) <= _LOSS * distance


def shown(name: str) -> str:
    """A network's name for a message."""
    return f"'{name}'" if name else "The network"


def kernels_run_on(device: torch.device) -> bool:
    """Whether there are kernels for a device, and it is worth while to use them."""
    return device.type == "cuda" and triton_runs_on(device)


def runs_fused(options: DenseOptions) -> bool:
    """Whether there are kernels for a solver: not for Jacobi-GS, nor for the network as a whole, nor for equality."""
    return options.solver != "jacobi_gs" and options.scope == "block" and options.stop == "change"


def first_plan(structure: Structure, options: DenseOptions) -> Plan:
    """What a named solver begins with: two iterations, of which the second tells what still changes."""
    from lit_parallel.dense.fused import Plan

    if options.solver == "sequential":
        return Plan.sequential(structure)
    if options.solver == "jacobi":
        return Plan.jacobi(structure, options.iterations or 2)
    return Plan.gs_jacobi(structure, options.window or _WINDOW, options.iterations or 2)


def in_float64(structure: Structure, images: Tensor) -> Tensor:
    """Logits of the ordinary evaluation in float64, ``[batch, classes]``; float32 where a device has none."""
    dtype = torch.float64 if images.device.type in ("cpu", "cuda") else torch.float32
    network = structure.network
    tensors = {f"network.{name}": x for name, x in (*network.named_parameters(), *network.named_buffers())}
    wide = {name: x.to(dtype) for name, x in tensors.items() if x.is_floating_point()}
    with torch.autocast(images.device.type, enabled=False):
        return functional_call(_Usual(structure), wide, (images.to(dtype),))


class _Usual(nn.Module):
    """A DenseNet's usual forward, whatever stands in for it just now."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.network, self._structure = structure.network, structure

    def forward(self, images: Tensor) -> Tensor:
        return self._structure.ordinary(images)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest error of an image's logits, relative to the largest of them; the largest of all images.

    Images whose exact logits are not finite do not count.

    Args:
        found: ``[batch, classes]``.
        exact: The same.
    """
    found, exact = found.double(), exact.double()
    errors = (found - exact).abs().amax(dim=1) / exact.abs().amax(dim=1).clamp(min=1e-30)
    errors = errors[exact.isfinite().all(dim=1)]
    return float(errors.amax()) if len(errors) else 0.0


def agreement(found: Tensor, expected: Tensor, k: int) -> float:
    """Part of the images with the same k classes of the highest logits in the same order."""
    best, expected_best = (x.argsort(dim=1, descending=True, stable=True)[:, :k] for x in (found, expected))
    return float((best == expected_best).all(dim=1).double().mean())


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What work gives, and the wall-clock seconds until the device has finished it."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - began


def seconds_of(way: Callable[[Tensor], object], images: Tensor) -> float:
    """Wall-clock time of an evaluation: the median of some, after one that does not count unless it took long."""
    device = images.device
    _, first = timed(lambda: way(images), device)
    if device.type == "cpu" and first > _LONG:
        return first
    return statistics.median(timed(lambda: way(images), device)[1] for _ in range(_REPEATS if first < _LONG else 1))


def _kind_of(images: Tensor, structure: Structure) -> Kind:
    device = images.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    own = next(structure.network.parameters()).dtype
    return (*images.shape, images.dtype, images.device, own, dtype, torch.backends.cudnn.allow_tf32)
