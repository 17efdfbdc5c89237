"""Evaluates a DenseNet's batches: by the solver that was asked for, or by what was measured to be the fastest.

A way to evaluate belongs to one kind of batch: its shape, type and device, and the type that is computed in. It is
chosen, measured and captured with the first batch of the kind, and adapts to the batches that follow.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_parallel.dense.evaluation import EvaluationRecord, PlainEvaluation
from lit_parallel.dense.options import DenseOptions
from lit_parallel.dense.structure import Structure, structure_of
from lit_parallel.dense.ways import (
    Fused,
    Ordinary,
    Padded,
    Plain,
    Way,
    first_plan,
    kernels_run_on,
    median_seconds,
    runs_fused,
)
from lit_parallel.errors import UserError, first_line
from lit_parallel.recurrent.stopwatch import seconds_of
from lit_parallel.tf32 import convolutions_may_use_tf32

if TYPE_CHECKING:
    from lit_parallel.dense.fused import FusedWeights, Plan

logger = logging.getLogger(__name__)

WINDOWS = (4, 8, 16)
"""Layers in the windows of GS-Jacobi that ``auto`` tries beside all layers of a block (Jacobi) and one (sequential)."""

_WORTH_IT = 1.05  # times faster than the ordinary forward, or auto takes that
_CLEARLY = 0.98  # part of the best time so far that another plan may take: less would be noise
_HOPELESS = 1.5  # times as slow as the ordinary forward: Jacobi iterations, which are more work, are not even tried
_LOSS = 2.0  # times the ordinary forward's own distance from float64's logits, that others may have
_COMPARED = 16  # images whose logits auto compares with float64's
_CURVE_OF = 8  # images whose changes are followed through all iterations
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
        self._weights: dict[tuple[torch.dtype, torch.device, str], FusedWeights] = {}
        self._newest: Kind | None = None
        self._probed: set[Kind] = set()
        self._is_usual: bool | None = None  # not known yet
        self._fits_kernels: bool | None = None
        self._draws_curve = True

    def refresh(self) -> None:
        """To be called after weights have changed."""
        self._draws_curve = True
        for weights in self._weights.values():
            weights.refresh()
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
            if self._is_usual is None:
                return way
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
        finite = images[images.isfinite().flatten(1).all(1)]
        if self._is_usual is None:
            self._is_usual = self._computes_the_usual(finite[:2])  # of two, it may look at both at once
        if not self._is_usual:
            return self.ordinary
        options = self.options
        fusible = options.fused and runs_fused(options) and kernels_run_on(images.device)
        if fusible and self._fits_kernels is None:
            self._fits_kernels = self._kernels_compute_it(finite[:1])
        fusible = fusible and bool(self._fits_kernels)
        if options.solver == "auto":
            return _Choice(self, images).fastest(fusible)
        if fusible:
            try:
                return self.fused(options.solver, first_plan(self.structure, options), images)
            except (torch.cuda.OutOfMemoryError, UserError) as error:
                self._warn_of_no_kernels(first_line(error))
        return Plain(self.structure, options)

    def fused(self, solver: str, plan: Plan, images: Tensor) -> Fused:
        """The kernels' way by a plan."""
        from lit_parallel.dense.fused import FusedWeights, compute_type
        from lit_parallel.kernels.dense_block import product_of

        dtype = compute_type(self.structure, images.device)
        product = product_of(dtype, images.device)
        key = dtype, images.device, product
        if key not in self._weights:
            self._weights[key] = FusedWeights(self.structure, dtype, product)
        return Fused(self.structure, solver, plan, images, self.options, self._weights[key])

    def _computes_the_usual(self, images: Tensor) -> bool | None:
        """Whether the network's forward is the usual one: a user's class may end in something else.

        Returns:
            ``None`` where there is no image with finite logits, which alone can tell.
        """
        if len(images) == 0:
            return None
        found, usual = self.ordinary(images)[0], self.structure.ordinary(images)
        finite = usual.isfinite().all(1)
        if not bool(finite.any()):
            return None
        same_shape = isinstance(found, Tensor) and found.shape == usual.shape
        if same_shape and relative_error(found[finite], usual[finite]) <= max(_rounding_of(found), _rounding_of(usual)):
            return True
        logger.warning(f"{shown(self.name)} has a forward that is not the usual DenseNet's, and is evaluated by it.")
        return False

    def _kernels_compute_it(self, images: Tensor) -> bool | None:
        """Whether the kernels' steps are what the network's own layers do, which may be a user's: in float64.

        Returns:
            ``None`` where there is no finite image.
        """
        from lit_parallel.dense.fused import FusedEvaluation, Plan

        def by_kernels(images: Tensor) -> Tensor:
            return FusedEvaluation(self.structure, Plan.sequential(self.structure), images).run(images)[0]

        if len(images) == 0:
            return None
        try:
            expected = in_float64(self.structure, images)
            error = relative_error(in_float64(self.structure, images, by_kernels), expected)
            if error <= _rounding_of(expected):
                return True
            reason = f"their logits would be {error:.2g} off, as a part of it is not the usual one"
        except (RuntimeError, UserError) as error:  # a part may be for one type only
            reason = first_line(error)
        self._warn_of_no_kernels(reason)
        return False

    def _warn_of_no_kernels(self, reason: str) -> None:
        logger.warning(f"{shown(self.name)} is evaluated by its own layers, without kernels (fused=false): {reason}.")

    def _with_curve(self, record: EvaluationRecord, way: Way, images: Tensor) -> EvaluationRecord:
        """The record with residuals of all iterations, of some images, which kernels do not keep."""
        way = way.way if isinstance(way, Padded) else way
        if not isinstance(way, Fused) or way.solver == "sequential":
            return record
        window = max((block.window for block in way.plan.blocks if block.iterations is not None), default=1)
        options = DenseOptions(
            solver="gs_jacobi", window=window, tolerance=self.options.tolerance, guess=self.options.guess
        )
        _, plain = PlainEvaluation(self.structure, options)(images[:_CURVE_OF])
        pairs = zip(record.blocks, plain.blocks, strict=True)
        blocks = [dataclasses.replace(block, residual=other.residual) for block, other in pairs]
        return dataclasses.replace(record, blocks=blocks)


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
            self.told.append(f"less than {_WORTH_IT:g} times as fast is not worth it")
            way, seconds = self.ordinary, ordinary_seconds
        dtype = str(self.expected.dtype).removeprefix("torch.")
        logger.info(
            f"{shown(self.evaluator.name)}: {list(self.images.shape)} on {self.images.device}, {dtype}: takes {way}, "
            f"{1000 * seconds:.3g} ms ({'; '.join(self.told)})."
        )
        return way

    def _try_kernels(self) -> None:
        from lit_parallel.dense.fused import Plan

        structure, ordinary_seconds = self.evaluator.structure, self.best[1]
        sequential = self.evaluator.fused("sequential", Plan.sequential(structure), self.images)
        if self._try(sequential) > _HOPELESS * ordinary_seconds:
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
        seconds, objection = self._until_accurate(way)
        is_better = not objection and seconds < _CLEARLY * self.best[1]
        if tell or is_better:
            self._tell(way, seconds, objection)
        if is_better:
            way.instead = self._exact_way
            self.best = way, seconds

    def _until_accurate(self, way: Fused) -> tuple[float, str]:
        """Add iterations until tolerance and logits hold, unless it takes longer than the best way before that.

        Returns:
            Seconds, and what is to be said against the logits even so.
        """
        while True:
            logits, relative = way.run(self.images)
            seconds = median_seconds(way.run, self.images)
            plan = way.grown(relative, self.images)
            objection = self._objection(logits) if plan is None else ""
            if objection:
                plan = way.with_more(True for _ in way.layers)
            if plan is None or seconds >= self.best[1]:
                return seconds, objection
            way.adopt(plan, self.images)

    def _try_plainly(self) -> None:
        """By the network's own layers: no solver takes less time than one Jacobi iteration, which is measured first."""
        structure, options = self.evaluator.structure, self.evaluator.options
        once = Plain(structure, DenseOptions(solver="jacobi", iterations=1, guess=options.guess))
        if self._measure(once, "one plain iteration") >= self.best[1]:
            return
        for solver in ("gs_jacobi", "jacobi"):
            self._try(Plain(structure, DenseOptions(solver=solver, tolerance=options.tolerance, guess=options.guess)))

    def _try(self, way: Way) -> float:
        """Take a way as it is, if it is the fastest so far; its seconds."""
        seconds = median_seconds(way, self.images)
        is_faster = seconds < self.best[1]
        objection = self._objection(way(self.images)[0]) if is_faster else ""
        self._tell(way, seconds, objection)
        if is_faster and not objection:
            self.best = way, seconds
        return seconds

    def _measure(self, way: Way, name: str = "") -> float:
        seconds = median_seconds(way, self.images)
        self._tell(name or way, seconds)
        return seconds

    def _tell(self, what: object, seconds: float, objection: str = "") -> None:
        self.told.append(f"{what} {1000 * seconds:.3g} ms{objection and f', refused: {objection}'}")

    def _objection(self, logits: Tensor) -> str:
        """What is to be said against logits: that they are too far from the ordinary ones, and from float64's.

        What rounding does to one image, or to the worst of a few, is chance. Their root mean square over all logits of
        the images is compared, which scatters the less, the more logits there are.
        """
        if relative_error(logits, self.expected) <= self.evaluator.options.tolerance:
            return ""
        error, ordinary_error = (rms_error(x[:_COMPARED], self._exact) for x in (logits, self.expected))
        if error <= _LOSS * ordinary_error:
            return ""
        return (
            f"its logits are {error:.2g} off float64's in root mean square, more than {_LOSS:g} times the ordinary "
            f"forward's {ordinary_error:.2g}"
        )

    @functools.cached_property
    def _exact(self) -> Tensor:
        return in_float64(self.evaluator.structure, self.images[:_COMPARED])


def shown(name: str) -> str:
    """A network's name for a message."""
    return f"'{name}'" if name else "The network"


def in_float64(structure: Structure, images: Tensor, evaluate: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Logits in float64, ``[batch, classes]``; float32 where a device has none.

    Args:
        structure: The network.
        images: ``[batch, channels, height, width]``.
        evaluate: Another evaluation than the ordinary one, which reads the network's weights when it is called.
    """
    dtype = torch.float64 if images.device.type in ("cpu", "cuda") else torch.float32
    network = structure.network
    tensors = {f"network.{name}": x for name, x in (*network.named_parameters(), *network.named_buffers())}
    wide = {name: x.to(dtype) for name, x in tensors.items() if x.is_floating_point()}
    with torch.autocast(images.device.type, enabled=False):
        return functional_call(_Evaluated(structure.network, evaluate or structure.ordinary), wide, (images.to(dtype),))


class _Evaluated(nn.Module):
    """A network with another forward."""

    def __init__(self, network: nn.Module, evaluate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self._evaluate = network, evaluate

    def forward(self, images: Tensor) -> Tensor:
        return self._evaluate(images)


def _rounding_of(logits: Tensor) -> float:
    """Relative difference of logits that rounding explains, by their type."""
    if logits.dtype == torch.float64:
        return 1e-9
    if logits.dtype == torch.float32:
        return 1e-2 if logits.is_cuda and convolutions_may_use_tf32() else 1e-3
    return 0.05


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest error of an image's logits, relative to the largest of them; the largest of all images.

    Images whose exact logits are not finite do not count.

    Args:
        found: ``[batch, classes]``.
        exact: The same.
    """
    found, exact = _where_finite(found, exact)
    errors = (found - exact).abs().amax(dim=1) / exact.abs().amax(dim=1).clamp(min=1e-30)
    return float(errors.amax()) if len(errors) else 0.0


def rms_error(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the errors of all logits of all images, relative to that of the logits.

    Images whose exact logits are not finite do not count.

    Args:
        found: ``[batch, classes]``.
        exact: The same.
    """
    found, exact = _where_finite(found, exact)
    error, size = (x.square().sum().sqrt() for x in (found - exact, exact))
    return float(error / size.clamp(min=1e-30))


def _where_finite(found: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64, of the images whose exact ones are finite."""
    counts = exact.isfinite().all(dim=1)
    return found[counts].double(), exact[counts].double()


def agreement(found: Tensor, expected: Tensor, k: int) -> float:
    """Part of the images with the same k classes of the highest logits in the same order."""
    best, expected_best = (x.argsort(dim=1, descending=True, stable=True)[:, :k] for x in (found, expected))
    return float((best == expected_best).all(dim=1).double().mean())


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What work gives, and the wall-clock seconds until the device has finished it."""
    results: list[T] = []
    seconds = seconds_of(lambda: results.append(work()), device)
    return results[0], seconds


def _kind_of(images: Tensor, structure: Structure) -> Kind:
    device = images.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    own = next(structure.network.parameters()).dtype
    return (*images.shape, images.dtype, images.device, own, dtype, convolutions_may_use_tf32())
