"""A whole backward pass of a layer as one CUDA graph: all its launches cost the host one.

At the sizes that parallel backpropagation is for, the device is done sooner than the host can launch twenty kernels.
The graph holds the linearisation, one walk over all blocks, the comparison of their borders and all products. If the
borders agree, that is all; if they do not, the pass is run once more without it, with as many sweeps as it takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lit_parallel.kernels.recurrent import KernelChain, read_sums
from lit_parallel.recurrent.cells import Layer
from lit_parallel.recurrent.chain import Chain, Disagreement
from lit_parallel.recurrent.layers import BackwardPass, LayerPass

_SMALLEST = 1e-20


class CapturedPass:
    """The backward passes of a layer for one shape of input, block size and set of wanted gradients."""

    def __init__(self, task: BackwardPass, block: int, careful: bool) -> None:
        """Capture a pass, which must have run before without a graph.

        Args:
            task: The tensors are copied; later ones must be alike.
            block: Steps per block.
            careful: See :class:`~lit_parallel.recurrent.chain.Chain`.
        """
        self.block, self._key = block, (block, careful, task.needed)
        self._given = [x.clone(memory_format=torch.contiguous_format) for x in _tensors(task)]
        self._device = task.input.device
        self._halo = torch.zeros(1, dtype=torch.int32, device=self._device)
        self._halo_set = 0
        self._sums = torch.zeros(task.input.shape[1], 3, pin_memory=True)
        self._done = torch.cuda.Event()
        self._graph = torch.cuda.CUDAGraph()
        static = _with_tensors(task, self._given)
        torch.cuda.synchronize(self._device)
        stream = torch.cuda.Stream(self._device)  # the default one may be another device's
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._grads = static.gradients(self._first_walk)
        self._kept = [grad for grad in self._grads if grad is not None]

    def run(self, task: BackwardPass, halo: int) -> tuple[tuple[Tensor | None, ...], Disagreement]:
        """The gradients of a pass after one walk, and how well its borders agree."""
        if halo != self._halo_set:
            self._halo.fill_(halo)
            self._halo_set = halo
        torch._foreach_copy_(self._given, _tensors(task))
        self._graph.replay()
        # What the next replay writes over must not be what autograd holds.
        copies = iter(torch._foreach_mul(self._kept, 1.0))
        self._done.record()
        grads = tuple(None if grad is None else next(copies) for grad in self._grads)
        self._done.synchronize()
        if bool((self._sums[:, 1] < _SMALLEST).any()):  # squares that vanish tell nothing
            return grads, Disagreement(math.nan, math.nan)
        return grads, read_sums(self._sums)

    def fits(self, task: BackwardPass, block: int, careful: bool) -> bool:
        """Whether a pass of the same layer and the same shape of input is like the captured one."""
        return (block, careful, task.needed) == self._key

    def _first_walk(self, chain: Chain, into: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        assert isinstance(chain, KernelChain)
        chain.halo, chain.careful = self._halo, self._key[1]
        walk = chain.walk(self.block, into=into)
        self._sums.copy_(chain.border_sums(walk), non_blocking=True)
        meanwhile()
        return walk.left[0, :, 0]


def _tensors(task: BackwardPass) -> list[Tensor]:
    assert isinstance(task, LayerPass)
    layer = task.layer
    found = [getattr(layer, field.name) for field in dataclasses.fields(layer)]
    return [x for x in (*found, *task.grads) if x is not None]


def _with_tensors(task: BackwardPass, tensors: list[Tensor]) -> LayerPass:
    assert isinstance(task, LayerPass)
    given = iter(tensors)
    fields = [field.name for field in dataclasses.fields(task.layer)]
    values = {name: None if getattr(task.layer, name) is None else next(given) for name in fields}
    grads = tuple(None if grad is None else next(given) for grad in task.grads)
    return LayerPass(task.kind, Layer(**values), grads, task.needed, task.precision)  # type: ignore[arg-type]
