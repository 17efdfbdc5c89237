"""Ways to evaluate a batch by a DenseNet, for the benchmark of DenseNets: the usual ones, and ours.

A way is a function from images to logits, which may lie in a buffer that its next call writes over.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_parallel.dense.auto import Evaluator
from lit_parallel.dense.evaluation import EvaluationRecord
from lit_parallel.dense.fused import FusedEvaluation, FusedWeights, Plan
from lit_parallel.dense.options import DenseOptions
from lit_parallel.dense.structure import Structure, structure_of
from lit_parallel.kernels.dense_block import collect, grow, places, sum_type
from lit_parallel.recurrent.stopwatch import seconds_of, synchronize

Way = Callable[[Tensor], Tensor]

_WARM_UP = 3
_IN_A_ROW = 20  # calls that are queued without waiting


def time_way(way: Way, images: Tensor, repeats: int, seconds: float) -> dict[str, float]:
    """Milliseconds of a call.

    Args:
        way: What is called, with images that lie on its device, of its shape and type.
        images: A batch.
        repeats: Timed calls.
        seconds: Fewer of slow ones (3 at least) after so long.

    Returns:
        ``ms``: from the call until the device has finished, the median. ``queued_ms``: of each of many calls that are
        not waited for, unless the way itself waits.
    """
    device = images.device
    times: list[float] = []
    for _ in range(_WARM_UP):
        way(images)
    began = time.perf_counter()
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() - began < seconds):
        times.append(seconds_of(lambda: way(images), device))
    in_a_row = min(_IN_A_ROW, repeats)
    queued = seconds_of(lambda: [way(images) for _ in range(in_a_row)] and None, device) / in_a_row
    return {"ms": 1e3 * statistics.median(times), "queued_ms": 1e3 * queued}


@torch.no_grad()
def captured(forward: Way, images: Tensor) -> Way:
    """A function in one CUDA graph for batches of one shape."""
    buffer = images.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            forward(buffer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = forward(buffer)

    def replay(batch: Tensor) -> Tensor:
        buffer.copy_(batch)
        graph.replay()
        return logits

    return replay


def laid_out(network: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The network with its convolutions' weights laid out so."""
    return network.to(memory_format=layout)  # type: ignore[call-overload]


def plans(structure: Structure, settings: list[tuple[int, int]], jacobi: list[int]) -> dict[str, Plan]:
    """What the kernels are timed with, by the label of the row.

    Args:
        structure: Of the network.
        settings: Windows of GS-Jacobi and iterations in each.
        jacobi: Iterations of all layers of a block at once.
    """
    most = max(len(block.layers) for block in structure.blocks)
    return {
        "fused sequential": Plan.sequential(structure),
        **{
            f"fused gs_jacobi, windows of {window}, {iterations} iterations": Plan.gs_jacobi(
                structure, window, iterations
            )
            for window, iterations in settings
            if window < most
        },
        **{f"fused jacobi, {iterations} iterations": Plan.jacobi(structure, iterations) for iterations in jacobi},
    }


class Fused:
    """The kernels by a plan, unchecked."""

    def __init__(self, structure: Structure, plan: Plan, images: Tensor, weights: FusedWeights) -> None:
        self._evaluation = FusedEvaluation(structure, plan, images, weights=weights)
        self.largest_change = 0.0

    def __call__(self, images: Tensor) -> Tensor:
        return self._evaluation.run(images)[0]

    def check(self, images: Tensor) -> None:
        """Keep the largest relative change of the last iterations, in any batch that is checked."""
        change = float(self._evaluation.run(images)[1].relative.amax())
        self.largest_change = max(self.largest_change, change)


class Auto:
    """What ``auto`` does, its check of every batch included.

    Attributes:
        told: What it measured when it chose.
        record: Of the newest batch.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self._evaluator = Evaluator(network, "", DenseOptions(), network)
        self.record: EvaluationRecord | None = None
        with _messages() as told:
            self(images)
        self.told = told

    def __call__(self, images: Tensor) -> Tensor:
        logits, self.record = self._evaluator(images)
        return logits

    def took(self) -> dict[str, Any]:
        """The way that was taken with the newest batch."""
        assert self.record is not None
        return {
            "way": self.record.way,
            "solver": self.record.solver,
            "iterations": [int(block.iterations.max()) for block in self.record.blocks],
            "told": self.told,
        }


@contextlib.contextmanager
def _messages() -> Iterator[list[str]]:
    """What ``auto`` says meanwhile."""
    logger, told = logging.getLogger("lit_parallel.dense.auto"), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    level, passes = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield told
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passes


def kernels_launched(way: Way, images: Tensor) -> int:
    """Kernels and copies on the device in one call."""
    from torch.profiler import ProfilerActivity, profile

    way(images)
    synchronize(images.device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        way(images)
        synchronize(images.device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


@torch.no_grad()
def iteration_costs(structure: Structure, images: Tensor, weights: FusedWeights, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of one Jacobi iteration of all layers of each block, at the features of a batch.

    On a GPU many of them are captured in a CUDA graph, and replayed.
    """
    costs = []
    x = structure.stem(images)
    for index, block in enumerate(structure.blocks):
        if index > 0:
            x = structure.transition(index - 1, x)
        x = structure.all_features(index, x)
        iterate = _iteration(structure, index, x, weights)
        in_a_row = _IN_A_ROW if x.is_cuda else 1
        steps = functools.partial(_repeat, iterate, in_a_row)
        found = time_way(captured(steps, images) if x.is_cuda else steps, images, repeats, 1.0)
        rows = len(images) * x.shape[2] * x.shape[3]
        costs.append(
            {"block": index + 1, "layers": len(block.layers), "pixels": rows, "channels": block.channels}
            | {"ms": found["queued_ms"] / in_a_row}
        )
    return costs


def _repeat(step: Callable[[], Tensor], times: int, _: Tensor) -> Tensor:
    for _repeated in range(times - 1):
        step()
    return step()


def _iteration(structure: Structure, index: int, features: Tensor, weights: FusedWeights) -> Callable[[], Tensor]:
    """One iteration of a block: the channels of its own layers are collected, and made anew."""
    block, own = structure.blocks[index], weights.blocks[index]
    at = places(block.channels, block.growth, len(block.layers), features.device)
    x = features.new_zeros(len(features), *features.shape[2:], own.channels)
    x[..., at] = features.permute(0, 2, 3, 1)
    layers, shape = range(own.layers), (own.layers, x.shape[:3].numel(), own.width)
    total, active = features.new_empty(shape, dtype=sum_type(features.dtype)), features.new_empty(shape)
    collect(x, own, layers, 0, own.entry, total=total)

    def iterate() -> Tensor:
        collect(x, own, layers, own.entry, own.channels, base=total, active=active)
        grow(active, own, x, layers)
        return x

    return iterate


class CompiledRival:
    """A network under ``torch.compile`` (default mode) in one CUDA graph, in a process of its own.

    Compilation takes minutes for hundreds of layers, most of them on one core: rivals are compiled side by side, while
    nothing is timed, and asked for their time later.

    Args:
        build: Makes the network; of any weights.
        shape: ``[batch, channels, height, width]`` of the images.
        dtype: Of weights and images.
        layout: Of both.
        device: A GPU; on a CPU there is no CUDA graph.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        layout: torch.memory_format,
        device: str = "cuda",
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, shape, dtype, layout, device))
        self._process.start()
        theirs.close()
        self._state: dict[str, Any] | None = None

    def ready(self, seconds: float) -> dict[str, Any]:
        """Wait for ``compile_seconds`` that it took, or ``failed`` with the reason; then the process is ended."""
        if self._state is None:
            try:
                in_time = self._connection.poll(max(seconds, 0))
                self._state = self._connection.recv() if in_time else {"failed": "not compiled in time"}
            except EOFError:
                self._state = {"failed": "the process ended"}
            if "failed" in self._state:
                self.close()
        return self._state

    def measure(self, network: nn.Module, batches: Tensor, repeats: int, seconds: float) -> dict[str, Any]:
        """:func:`time_way` with the first batch, and the ``logits`` of all, ``[batches, batch, classes]``."""
        self._connection.send_bytes(_packed((network.state_dict(), batches.cpu(), repeats, seconds)))
        result: dict[str, Any] = _unpacked(self._connection.recv_bytes())
        return result

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def _serve(
    connection: Any,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: str,
) -> None:
    os.nice(10)  # meanwhile a network may be training
    began = time.perf_counter()
    try:
        with torch.no_grad():
            network = laid_out(build().to(device, dtype).eval(), layout)
            images = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
            way = torch.compile(network)
            way(images)
            if images.is_cuda:
                way = captured(way, images)
    except Exception as error:  # reported there
        connection.send({"failed": f"{type(error).__name__}: {str(error)[:300]}"})
        return
    connection.send({"compile_seconds": time.perf_counter() - began})
    while True:
        try:
            state, batches, repeats, seconds = _unpacked(connection.recv_bytes())
        except EOFError:  # whoever asked is gone
            return
        with torch.no_grad():
            network.load_state_dict(state)
            given = [batch.contiguous(memory_format=layout) for batch in batches.to(device)]
            result: dict[str, Any] = dict(time_way(way, given[0], repeats, seconds))
            result["logits"] = torch.stack([way(batch).clone() for batch in given]).cpu()
        connection.send_bytes(_packed(result))


def compile_kernels(
    build: Callable[[], nn.Module],
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    settings: list[tuple[int, int]],
    jacobi: list[int],
) -> Any:
    """Let another process compile our kernels, which are then found on disk; returns it."""
    arguments = (build, shapes, dtype, settings, jacobi)
    process = multiprocessing.get_context("spawn").Process(target=_compile_kernels, args=arguments)
    process.start()
    return process


def _compile_kernels(
    build: Callable[[], nn.Module],
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    settings: list[tuple[int, int]],
    jacobi: list[int],
) -> None:
    os.nice(10)
    structure = structure_of(build().to("cuda", dtype).eval())
    weights = FusedWeights(structure, dtype)
    for shape in shapes:
        images = torch.randn(shape, device="cuda").to(dtype)
        for plan in plans(structure, settings, jacobi).values():
            FusedEvaluation(structure, plan, images, weights=weights)
        iteration_costs(structure, images, weights, 3)


def _packed(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _unpacked(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)
