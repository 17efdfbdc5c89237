"""The ordinary backward pass on the same batch: how long it takes, and what it finds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_parallel.recurrent.layers import BackwardPass
from lit_parallel.recurrent.stopwatch import seconds_of, synchronize

_REPEATS = 3


@dataclass(frozen=True)
class OrdinaryRun:
    """What PyTorch's own forward and backward pass of a layer took and found.

    Attributes:
        forward_seconds: Of the fastest forward pass.
        backward_seconds: Of the fastest backward pass, by autograd.
        autograd_seconds: What autograd itself takes of it, whatever it calls.
        recording_seconds: What autograd takes to record a forward pass written in Python.
        gradients: In the order of the inputs; None where none is wanted.
    """

    forward_seconds: float
    backward_seconds: float
    autograd_seconds: float
    recording_seconds: float
    gradients: tuple[Tensor | None, ...]

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward_seconds + self.backward_seconds

    def distance(self, gradients: Sequence[Tensor | None], which: slice) -> float:
        """Norm of the difference of some gradients, relative to the norm of the ordinary ones."""
        pairs = zip(gradients[which], self.gradients[which], strict=True)
        found = [(a, b) for a, b in pairs if a is not None and b is not None]
        return relative_error([a for a, _ in found], [b for _, b in found])


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Norm of the difference of all tensors together, relative to the norm of the exact ones; in float64."""
    distance = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, exact, strict=True))
    size = sum(float(b.double().square().sum()) for b in exact)
    return math.sqrt(distance / size) if size > 0 else math.sqrt(distance)


def run_ordinary(task: BackwardPass) -> OrdinaryRun:
    """Run the ordinary way, some times."""
    device = task.input.device
    forward, backward = [], []
    for _ in range(_REPEATS):
        synchronize(device)
        began = time.perf_counter()
        outputs, inputs, given = task.ordinary_forward()
        synchronize(device)
        between = time.perf_counter()
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        found = torch.autograd.grad(outputs, wanted, given, allow_unused=True)
        synchronize(device)
        forward.append(between - began)
        backward.append(time.perf_counter() - between)
    with torch.enable_grad():
        results = _Known.apply(found, outputs, *wanted)
        recording = median_seconds_of(lambda: _Known.apply(found, outputs, *wanted), device)
    by_itself = median_seconds_of(
        lambda: torch.autograd.grad(results, wanted, given, allow_unused=True, retain_graph=True), device
    )
    each = iter(found)
    gradients = tuple(next(each) if x is not None and x.requires_grad else None for x in inputs)
    return OrdinaryRun(min(forward), min(backward), by_itself, recording, gradients)


def median_seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Median time of some runs."""
    return statistics.median(seconds_of(run, device) for _ in range(_REPEATS))


class _Known(torch.autograd.Function):
    """Something whose gradients are known: what is left is what autograd itself takes."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor | None], outputs: Sequence[Tensor], *inputs: Tensor) -> Any:
        ctx.gradients = gradients
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, None, *ctx.gradients
