"""A chain over time, and the one algorithm that solves it: walk all its blocks at once.

The adjoint of a recurrence is a chain, ``v_{t-1} = J_t^T (g_t + v_t)``, solved from the last step to the first. Cut
into blocks of C steps, all blocks can walk at once if each knows what arrives at its border. It starts there from an
estimate: from zero ``halo`` steps later (what lies further away is mostly forgotten), or from what its neighbour has
computed. The paper's solvers are choices of C and halo:

* ``jacobi``, K iterations: blocks of one step, halo K - 1;
* ``jacobi_gs``, K iterations: blocks of C steps, halo K - C;
* sequential: one block.

The forward pass is such a chain too, a nonlinear one (:mod:`lit_parallel.recurrent.forward_pass`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_parallel.recurrent.cells import Cell


class Chain(ABC):
    """``v_{t-1} = J_t^T (g_t + v_t)``, or any other function of v_t, for t = length - 1 .. 0.

    Attributes:
        length: Steps.
        batch: Sequences.
        state_size: Numbers in v, per sequence.
        gradient_size: Numbers that a step leaves behind, per sequence.
        last: What arrives at the last step from outside, ``[batch, state_size]``.
        careful: Whether every sum is to be rounded as its type does: over thousands of steps that are remembered, the
            rounding of faster sums adds up.
        leaves_the_rest: Whether one block of all steps is left to others, who know a faster way to walk it.
    """

    length: int
    batch: int
    state_size: int
    gradient_size: int
    last: Tensor
    careful: bool = False
    leaves_the_rest: bool = False

    #: Seconds that a step takes by itself, and per sequence and block; only their ratio counts.
    step_costs: tuple[float, float] = (1e-4, 1e-6)

    def preferred_block(self, halo: int) -> int:
        """The block for which ``(C + halo) (a + b T B / C)`` is least: few rows of work, in few steps."""
        fixed, per_row = self.step_costs
        block = round(math.sqrt(max(halo, 1) * per_row / fixed * self.length * self.batch))
        return min(max(block, 4), self.length)

    def preferred_coarse_block(self) -> int:
        """The block of the two-level method: as many steps as blocks, as far as that is sensible."""
        return min(max(round(math.sqrt(self.length)), 16), 128)

    @abstractmethod
    def walk(
        self, block: int, halo: int = 0, start: Tensor | None = None, *, source: bool = True, into: Tensor | None = None
    ) -> Walk:
        """Walk all blocks at once.

        Args:
            block: Steps per block, C; the last may be shorter.
            halo: Steps before its own that each block walks as well.
            start: What arrives there, ``[blocks, batch, columns, state_size]``; None: zero, and for blocks that reach
                the end of the chain what arrives there.
            source: Whether the output's gradient is added; without, the chain is homogeneous.
            into: ``[length, batch, gradient_size]``, filled with what the steps leave behind.
        """

    def disagreement(self, walk: Walk) -> Callable[[], Disagreement]:
        """Begin to compare what neighbours found at their borders; the result waits for it."""
        residual = walk.left[1:] - walk.arrived[:-1]
        squared, size = residual.square().sum(-1), walk.left[1:].square().sum(-1)
        ratio = torch.where(squared > 0, squared / size.clamp_min(1e-30), 0)
        energy = walk.energy.sum((0, 2))
        relative = torch.where(energy > 0, squared.sum((0, 2)) / energy, squared.sum((0, 2)))
        relative = torch.where(energy.isfinite(), relative, torch.inf)
        numbers = torch.stack([relative.amax(), ratio.amax()]).sqrt()
        return lambda: Disagreement(*numbers.tolist())


class SteppedChain(Chain):
    """A chain in plain PyTorch: as many steps as a block and its halo have, each one product for all blocks."""

    @abstractmethod
    def step(self, first: int, stride: int, v: Tensor, source: bool) -> tuple[Tensor, Tensor]:
        """Walk one step, at ``first, first + stride, ...`` at once.

        Args:
            first: The step of block 0.
            stride: Steps between two blocks.
            v: What arrives at these steps, ``[blocks, batch, columns, state_size]``.
            source: Whether the output's gradient is added; without, the chain is homogeneous.

        Returns:
            What these steps leave behind, ``[blocks, batch, columns, gradient_size]``, and v one step earlier.
        """

    def walk(
        self, block: int, halo: int = 0, start: Tensor | None = None, *, source: bool = True, into: Tensor | None = None
    ) -> Walk:
        v = (starts(self, block, halo) if start is None else start).clone()
        energy = v.new_zeros(v.shape[:3])
        arrived = v
        for j in range(block + halo - 1, -1, -1):
            if j == block - 1:
                arrived = v.clone()
            blocks = blocks_of(self.length - j, block)  # those for which step n C + j exists
            if blocks <= 0:
                continue
            left_behind, v[:blocks] = self.step(j, block, v[:blocks], source)
            if j < block:
                energy[:blocks] += left_behind.square().sum(-1)
                if into is not None:
                    into[j::block] = left_behind[:, :, 0]
        return Walk(arrived, v, energy)


@dataclass(frozen=True)
class Disagreement:
    """What neighbours disagree about at their borders.

    Attributes:
        of_solution: Norm over a sequence's borders relative to its solution, the largest of all sequences.
        of_border: Norm at a border relative to what is there, the largest of all borders.
    """

    of_solution: float
    of_border: float


@dataclass(frozen=True)
class Walk:
    """What all blocks found.

    Attributes:
        arrived: v at each block's border, when the block itself began, ``[blocks, batch, columns, state_size]``.
        left: v behind each block's first step: what should have arrived at the block before it. Same shape.
        energy: Sum of squares of what a block's steps left behind, ``[blocks, batch, columns]``.
    """

    arrived: Tensor
    left: Tensor
    energy: Tensor


def blocks_of(length: int, block: int) -> int:
    """The number of blocks."""
    return -(-length // block)


def starts(chain: Chain, block: int, halo: int) -> Tensor:
    """Zero, and for blocks whose halo reaches the end of the chain what arrives there."""
    blocks = blocks_of(chain.length, block)
    start = chain.last.new_zeros(blocks, chain.batch, 1, chain.state_size)
    first = max(0, -(-(chain.length - halo) // block) - 1)  # (n + 1) C + halo >= T
    start[first:] = chain.last[None, :, None]
    return start


class CellChain(SteppedChain):
    """The adjoint of an RNN, a GRU or an LSTM."""

    def __init__(self, cell: Cell, factors: Tensor, weight: Tensor, source: Tensor, last: Tensor) -> None:
        """Take what the forward pass left.

        Args:
            cell: The kind.
            factors: ``[time, batch, factors, hidden]``, from :meth:`Cell.linearise`.
            weight: ``weight_hh``, ``[gates * hidden, hidden]``.
            source: Gradient of the output, ``[time, batch, hidden]``.
            last: Gradient of the final state, ``[batch, states * hidden]``.
        """
        self.cell, self.factors, self.weight, self.source, self.last = cell, factors, weight, source, last
        self.length, self.batch, _, self.hidden = factors.shape
        self.state_size = cell.states * self.hidden
        self.gradient_size = cell.pre_activations * self.hidden
        operations = 2 * cell.gates * self.hidden**2
        self.step_costs = (1e-4, operations / 2e13) if last.is_cuda else (6e-5, operations / 3e10)

    def step(self, first: int, stride: int, v: Tensor, source: bool) -> tuple[Tensor, Tensor]:
        factors = self.factors[first::stride][:, :, None]
        return self.cell.step(factors, v, self.source[first::stride][:, :, None] if source else None, self.weight)
