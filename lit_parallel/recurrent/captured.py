"""A whole pass of a layer, forward or backward, as one CUDA graph: all its launches cost the host one.

At the sizes that parallel recurrence is for, the device is done sooner than the host can launch twenty kernels.
The graph holds a walk over all blocks, what it needs (the linearisation, the input's products), the comparison of the
blocks' borders, and all products that follow. It also holds the walks that are needed where borders disagree, which end
at once where they agree: so the host never waits to know. It reads what became of a pass before it launches the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from lit_parallel.cuda_graphs import capturing
from lit_parallel.kernels.recurrent import LaunchedChain, prepare
from lit_parallel.recurrent.chain import Chain
from lit_parallel.recurrent.layers import LayerTask, given

_MOVES = 3  # of a tensor, each of which costs a new graph, until it is copied
_SETTLED = 1000  # passes of a graph, after which earlier moves are forgotten

Moves = tuple[list[int], list[int]]  # of the tensors that are read, and of those that are written


class CapturedPass:
    """The passes of a layer in one direction for one shape of input, block size and set of wanted results.

    The graph reads tensors and writes results where they lie: parameters are updated in place, and from step to step
    an allocator gives the same memory again. What has moved several times is copied from, or to, a place of its own.
    """

    def __init__(
        self, task: LayerTask, results: Sequence[Tensor | None], block: int, careful: bool, moves: Moves | None = None
    ) -> None:
        """Capture a pass, which must have run before without a graph.

        Args:
            task: Later ones must fit.
            results: From :meth:`LayerTask.new_results`; those of later passes must fit.
            block: Steps per block.
            careful: See :class:`~lit_parallel.recurrent.chain.Chain`.
            moves: As far as an earlier graph has seen them.
        """
        self.block, self._key = block, (block, careful, task.variant())
        #: Whether it reads or writes the factors of the adjoint, too.
        self.linearises = task.factors is not None
        of_read, of_written = moves or (None, None)
        self._read, self._written = _Places(task.tensors(), of_read), _Places(given(results), of_written)
        self._device = task.input.device
        self._halo = torch.zeros(1, dtype=torch.int32, device=self._device)
        self._limit = torch.zeros(1, device=self._device)
        self._halo_set, self._limit_set = 0, 0.0
        self._passes = 0
        self._worst = torch.zeros(2, pin_memory=True)
        self._compared = torch.cuda.Event(external=True)
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.current_stream(self._device)
        prepare(self._device, task.input.shape[1])
        torch.cuda.synchronize(self._device)
        if torch.cuda.mem_get_info(self._device)[0] < 2 * task.memory():
            torch.cuda.empty_cache()  # not always: what the next step gets would move
        with capturing(self._graph, torch.cuda.Stream(self._device)):
            self._run(task.with_tensors(self._read.instead_of(task.tensors())), given(results))

    def _run(self, task: LayerTask, results: list[Tensor]) -> None:
        into = self._written.instead_of(results)
        for to, result in zip(into, task.solved_near(self._solve, into), strict=True):
            if to.data_ptr() != result.data_ptr():
                to.copy_(result)

    def _solve(self, chain: Chain, into: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        assert isinstance(chain, LaunchedChain)
        chain.careful = self._key[1]
        worst = torch.empty(2, device=self._device)
        walk = chain.walk_until_right(self.block, self._halo, self._limit, into, worst)
        self._worst.copy_(worst, non_blocking=True)
        self._compared.record()
        meanwhile()
        return walk.left[0, :, 0]

    def fits(self, task: LayerTask, results: Sequence[Tensor | None], block: int, careful: bool) -> bool:
        """Whether a pass of the same layer and the same shape of input is like the captured one."""
        same = self._key == (block, careful, task.variant())
        return same and self._read.hold(task.tensors()) and self._written.hold(given(results))

    def moves(self, task: LayerTask, results: Sequence[Tensor | None]) -> Moves | None:
        """How often tensors have moved, for the graph of a pass that does not fit; None: that begins anew."""
        if self._passes >= _SETTLED or task.variant() != self._key[2]:
            return None
        return self._read.moves(task.tensors()), self._written.moves(given(results))

    def start(self, task: LayerTask, results: Sequence[Tensor | None], halo: int, largest_residual: float) -> None:
        """Launch a pass that fits.

        Args:
            task: What it reads.
            results: What it writes.
            halo: Of the first walk.
            largest_residual: What neighbours may disagree about, relative to the solution.
        """
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:  # where copies of the last pass may still be on their way
            stream.wait_stream(self._stream)
            self._stream = stream
        if halo != self._halo_set:
            self._halo.fill_(halo)
            self._halo_set = halo
        if largest_residual != self._limit_set:
            self._limit.fill_(largest_residual**2)
            self._limit_set = largest_residual
        if self._read.copied:
            self._read.copy_from(task.tensors())
        self._graph.replay()
        self._passes += 1
        if self._written.copied:
            self._written.copy_to(given(results))

    def told(self) -> bool:
        """Whether :meth:`residuals` would not wait."""
        return self._compared.query()

    def residuals(self) -> tuple[float, float]:
        """What neighbours disagreed about in the newest pass, relative to the solution, after its two first walks.

        Infinity where that is not known; the second means nothing if the first is small enough.
        """
        self._compared.synchronize()
        first, second = self._worst.tolist()
        return math.sqrt(first), math.sqrt(second)


class _Places:
    """Where a graph finds a list of tensors: where they lie, or copies of those that have moved several times.

    It does not keep the memory of what is not copied: whoever comes next may have been given it.
    """

    def __init__(self, tensors: list[Tensor], moves: list[int] | None) -> None:
        self._moves = moves or [0] * len(tensors)
        self._own = {
            i: x.clone(memory_format=torch.contiguous_format)
            for i, (x, n) in enumerate(zip(tensors, self._moves, strict=True))
            if n >= _MOVES
        }
        self._places = self._of(tensors)

    @property
    def copied(self) -> int:
        """How many are copied."""
        return len(self._own)

    def instead_of(self, tensors: list[Tensor]) -> list[Tensor]:
        """What a graph is to work on."""
        return [self._own.get(i, x) for i, x in enumerate(tensors)]

    def hold(self, tensors: list[Tensor]) -> bool:
        """Whether tensors lie where they must."""
        return self._places == self._of(tensors)

    def moves(self, tensors: list[Tensor]) -> list[int]:
        """How often each tensor has moved, with these."""
        return [n + (old != new) for n, old, new in zip(self._moves, self._places, self._of(tensors), strict=True)]

    def copy_from(self, tensors: list[Tensor]) -> None:
        """Fill the copies."""
        torch._foreach_copy_(list(self._own.values()), [tensors[i] for i in self._own])

    def copy_to(self, tensors: list[Tensor]) -> None:
        """Give back what stands in the copies."""
        torch._foreach_copy_([tensors[i] for i in self._own], list(self._own.values()))

    def _of(self, tensors: list[Tensor]) -> list[Hashable]:
        return [
            (x.shape, x.dtype) if i in self._own else (x.data_ptr(), x.stride(), x.shape, x.dtype)
            for i, x in enumerate(tensors)
        ]
