"""The ways to evaluate a batch: the network's own forward, a solver's loop over its layers, or kernels by a plan."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_parallel.dense.evaluation import BlockRecord, EvaluationRecord, PlainEvaluation
from lit_parallel.dense.options import DenseOptions
from lit_parallel.dense.structure import Structure
from lit_parallel.errors import UserError, first_line
from lit_parallel.kernels import triton_runs_on
from lit_parallel.recurrent.stopwatch import seconds_of

if TYPE_CHECKING:
    from lit_parallel.dense.fused import FusedWeights, Plan

logger = logging.getLogger(__name__)

_WINDOW = 8  # of gs_jacobi, where none is named
_REPEATS = 5
_LONG = 0.2  # seconds that are measured once


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
        """To be called after the network's weights have changed, and those that ways share were refreshed."""


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

        self._evaluation = FusedEvaluation(
            self.structure, plan, images, guess=self.options.guess, weights=self._weights
        )
        self.plan = plan
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
        began = time.perf_counter()
        evaluated = None if self._given_up else self._until_solved(images)
        if evaluated is None:
            assert self.instead is not None
            return self.instead[0](images)
        logits, relative = evaluated
        return logits, self._record(relative, time.perf_counter() - began if self.checked else math.nan)

    def _until_solved(self, images: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """As :meth:`run`, by plans that grow; ``None`` if another way is to be taken from now on."""
        try:
            logits, relative = self.run(images)
            while (plan := self.grown(relative, images)) is not None:
                self.adopt(plan, images)
                logits, relative = self.run(images)
                if self.instead is not None and median_seconds(self.run, images) > self.instead[1]:
                    self._given_up = True
                    return None
        except torch.cuda.OutOfMemoryError as error:
            self.instead = self.instead or (Plain(self.structure, self.options), math.inf)
            logger.warning(f"The kernels lack memory ({first_line(error)}): {self.instead[0]} is taken instead.")
            self._given_up = True
            return None
        return logits, relative

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
        self._evaluation.follow_weights()

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


def kernels_run_on(device: torch.device) -> bool:
    """Whether there are kernels for a device, and it is worth while to use them."""
    return device.type == "cuda" and triton_runs_on(device)


def runs_fused(options: DenseOptions) -> bool:
    """Whether there are kernels for a solver: not for Jacobi-GS, nor for the network as a whole, nor for equality."""
    return options.solver != "jacobi_gs" and options.scope == "block" and options.stop == "change"


def first_plan(structure: Structure, options: DenseOptions) -> Plan:
    """What a named solver begins with: two iterations, of which the second tells what still changes.

    Raises:
        UserError: ``max_iterations`` does not suffice for one iteration of every window.
    """
    from lit_parallel.dense.fused import Plan

    if options.solver == "sequential":
        return Plan.sequential(structure)
    iterations, limit = options.iterations or 2, options.max_iterations or math.inf
    layers = [len(block.layers) for block in structure.blocks]
    window = max(layers) if options.solver == "jacobi" else options.window or _WINDOW
    plan = Plan.gs_jacobi(structure, window, iterations)
    exceeding = [block.iterations_of(n) > limit for block, n in zip(plan.blocks, layers, strict=True)]
    blocks = [
        dataclasses.replace(b, iterations=1) if more else b for b, more in zip(plan.blocks, exceeding, strict=True)
    ]
    if any(block.iterations_of(n) > limit for block, n in zip(blocks, layers, strict=True)):
        raise UserError(f"max_iterations={limit} are fewer than there are windows of {window} layers")
    return Plan(tuple(blocks))


def median_seconds(way: Callable[[Tensor], object], images: Tensor) -> float:
    """Wall-clock time of an evaluation: the median of some, after one that does not count unless it took long."""
    device = images.device
    first = seconds_of(lambda: way(images), device)
    if device.type == "cpu" and first > _LONG:
        return first
    return statistics.median(seconds_of(lambda: way(images), device) for _ in range(_REPEATS if first < _LONG else 1))
