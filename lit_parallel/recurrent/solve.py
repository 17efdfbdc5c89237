"""Solve a chain in parallel until its error is within a tolerance, by blocks with a halo and a coarse correction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_parallel.recurrent.chain import Chain, Walk, blocks_of
from lit_parallel.recurrent.coarse import CoarseSpace, coarse_space

_TINY = 1e-30
_FEWEST_STEPS = 16  # over which growth is measured: in a single step a vector may grow that is forgotten soon
SAFETY = 2.0  # a random direction need not be the worst


@dataclass
class Plan:
    """How a chain is solved.

    Attributes:
        block: Steps per block.
        halo: Steps that each block walks before its own.
        rank: Columns of the coarse correction; 0: none.
        tolerance: Largest error relative to the norm of what is computed, per sequence; None: one walk, no check.
        sweeps: At most so many, then the chain is walked as one block; None: as many as there are blocks.
        calm, spare: Passes that a shorter halo would have been enough for, and by how many steps at least.
    """

    block: int
    halo: int
    rank: int = 0
    tolerance: float | None = None
    sweeps: int | None = None
    calm: int = 0
    spare: int = 0


@dataclass
class Gain:
    """How errors at the borders grow, as measured on a chain.

    Attributes:
        amplification: Norm of the error inside a block, for an error of norm 1 at its border.
        per_step: Factor per step by which an error grows (above 1) or is forgotten, over a halo and a block.
    """

    amplification: float
    per_step: float

    def of_border_errors(self, block: int, blocks: int) -> float:
        """Largest error inside the blocks for a residual of norm 1 at the borders, carried through all of them."""
        logarithm = block * math.log(max(self.per_step, _TINY))  # of the growth from one border to the next
        if logarithm * blocks > 100:
            return math.inf
        growth = math.exp(logarithm)
        carried = blocks if growth == 1 else (growth**blocks - 1) / (growth - 1)
        return self.amplification * carried


@dataclass
class Outcome:
    """What solving a chain took and how well it was solved.

    Attributes:
        initial: What arrives before the first step, ``[batch, state_size]``.
        iterations: Steps that were walked one after another: parallel iterations of the Jacobi-Gauss-Seidel method.
        sweeps: Walks over all blocks, the first included.
        residual: Largest norm, over sequences, of the mismatch at the borders relative to the solution; NaN: unchecked.
        error: The residual times the measured amplification: the estimated relative error.
        at_rounding: Whether borders agree to the last bits, so that the estimated error is one of rounding, which
            sequential evaluation has too.
        reductions: Factors by which the estimated error fell per sweep.
        sequential: Whether it ended as one block, such as for values that are not finite; a chain that leaves the rest
            is then not solved.
        space: The coarse space that was used.
        block, halo, rank: Of the plan.
    """

    initial: Tensor
    iterations: int
    sweeps: int = 1
    residual: float = math.nan
    error: float = math.nan
    at_rounding: bool = False
    reductions: list[float] = field(default_factory=list)
    sequential: bool = False
    space: CoarseSpace | None = None
    block: int = 0
    halo: int = 0
    rank: int = 0


def measure_gain(chain: Chain, plan: Plan) -> Gain:
    """Walk random vectors through halo and block: what survives the halo is what an error at a border looks like.

    A halo may also let nothing through, and a later one may be shorter: the vectors go through the blocks alone, too.
    """
    block = max(plan.block, min(_FEWEST_STEPS, chain.length))
    blocks = blocks_of(chain.length, block)
    generator = torch.Generator(chain.last.device).manual_seed(1)
    shape = (blocks, chain.batch, 1, chain.state_size)
    start = torch.randn(shape, generator=generator, dtype=chain.last.dtype, device=chain.last.device)
    halo = max(plan.halo, block)
    walk = chain.walk(block, halo, start, source=False)
    inside = torch.maximum(_inside(walk), _inside(chain.walk(block, 0, start, source=False)))
    # A block walks the whole halo, or what there is of it up to the end of the chain.
    ends = torch.arange(1, blocks + 1, device=start.device) * block + halo
    steps = ends.clamp_max(chain.length) - ends + halo + block
    growth = (_norms(walk.left) / _norms(start)).clamp_min(_TINY)  # forgotten altogether, but not in one step
    per_step = torch.where(steps >= min(halo, chain.length // 2), growth.amax((1, 2)) ** (1 / steps), 0).amax()
    # Over halo and block together, what is forgotten at once hides what stays: of that, only the block is looked at.
    arrived, own = _norms(walk.arrived), torch.clamp(chain.length - (ends - halo - block), max=block)
    of_block = torch.where(arrived > _TINY, _norms(walk.left) / arrived.clamp_min(_TINY), 0).amax((1, 2))
    per_step = torch.maximum(per_step, torch.where(own >= block, of_block ** (1 / block), 0).amax())
    numbers = torch.stack([inside, per_step]).tolist()
    return Gain(SAFETY * numbers[0], numbers[1])


def _inside(walk: Walk) -> Tensor:
    """Largest norm of what a block's steps leave behind, relative to what arrived at its border."""
    arrived = _norms(walk.arrived)
    return torch.where(arrived > _TINY, walk.energy.sqrt() / arrived.clamp_min(_TINY), 0).amax()


def solve_chain(
    chain: Chain,
    plan: Plan,
    gain: Gain | None,
    into: Tensor,
    basis: Tensor | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Outcome:
    """Solve a chain.

    The first walk starts from a halo. As long as the estimated error is too large, the borders are corrected (by what
    the neighbours found, or by the coarse correction of it) and the blocks are walked again. With one level, sweep m
    makes the m last blocks exact, so there are at most as many sweeps as blocks.

    Args:
        chain: The chain.
        plan: Block, halo, rank, tolerance.
        gain: Of this chain or one like it; needed where a tolerance is to be held without coarse correction.
        into: ``[length, batch, gradient_size]``, filled.
        basis: For the coarse correction, from an earlier chain.
        meanwhile: Called while the device compares the borders of the first walk.
    """
    blocks = blocks_of(chain.length, plan.block)
    if blocks == 1 and chain.leaves_the_rest:
        return Outcome(chain.last, 0, sequential=True, block=plan.block)
    walk = chain.walk(plan.block, plan.halo, into=into)
    outcome = Outcome(walk.left[0, :, 0], plan.block + plan.halo, block=plan.block, halo=plan.halo, rank=plan.rank)
    if blocks == 1 or plan.tolerance is None:
        meanwhile()
        if blocks == 1:
            outcome.residual = outcome.error = 0.0
        return outcome
    pending = chain.disagreement(walk)
    if not plan.rank:  # with a coarse correction, hardly ever is the first walk the last
        meanwhile()
    amplification = 1.0 if gain is None else gain.of_border_errors(plan.block, blocks)
    space: CoarseSpace | None = None
    last_sweep = plan.sweeps or blocks + 1  # with one level, all is exact by then
    relative_before = math.nan
    while True:
        found = pending()
        outcome.residual = found.of_solution
        if not math.isfinite(found.of_solution):
            return _sequentially(chain, into, outcome)
        corrected = walk.left[1:]
        if plan.rank and outcome.sweeps == 1 and found.of_solution > 0:
            space = outcome.space = coarse_space(chain, plan.block, plan.rank, basis)
            outcome.iterations += plan.block * (1 if basis is not None else 2)
            amplification = SAFETY * float(space.amplification)
        relative = found.of_solution
        if space is not None:
            errors = space.errors((corrected - walk.arrived[:-1])[:, :, 0])[:, :, None]
            corrected = walk.arrived[:-1] + errors
            energy = walk.energy.sum((0, 2))
            norms = errors.square().sum((0, 2, 3))
            relative = math.sqrt(torch.where(energy > 0, norms / energy, norms).amax().item())
        at_rounding = found.of_border <= 8 * torch.finfo(into.dtype).eps and outcome.sweeps > 1
        unseen = (relative == 0 or at_rounding) and _squares_mislead(walk, plan.tolerance)
        if unseen or not math.isfinite(relative):
            return _sequentially(chain, into, outcome)
        if relative_before > 0:
            outcome.reductions.append(relative / relative_before)
        if gain is not None and space is None and outcome.reductions:
            # The sweeps themselves show how slowly errors fade; the gain may be of weights that forgot faster.
            observed = outcome.reductions[-1] ** (1 / plan.block)
            seen = dataclasses.replace(gain, per_step=max(gain.per_step, observed))
            amplification = max(amplification, seen.of_border_errors(plan.block, blocks))
        relative_before, outcome.error = relative, relative * amplification if relative > 0 else 0.0
        # What the first walk misses lies in no subspace. What is at rounding is as good as sequential evaluation.
        measured = space is None or outcome.sweeps > 1 or relative == 0
        if (measured and outcome.error <= plan.tolerance) or at_rounding:
            outcome.at_rounding = at_rounding
            if plan.rank and outcome.sweeps == 1:
                meanwhile()
            return outcome
        if space is not None and outcome.reductions and not outcome.reductions[-1] < 0.7:
            # The subspace misses what matters: from here on one border per sweep.
            space, last_sweep, corrected = None, outcome.sweeps + blocks, walk.left[1:]
            amplification = math.inf
        if outcome.sweeps >= last_sweep:
            return _sequentially(chain, into, outcome)
        walk = chain.walk(plan.block, 0, torch.cat([corrected, chain.last[None, :, None]]), into=into)
        outcome.sweeps += 1
        outcome.iterations += plan.block
        outcome.initial = walk.left[0, :, 0]
        pending = chain.disagreement(walk)


def _sequentially(chain: Chain, into: Tensor, outcome: Outcome) -> Outcome:
    """One block: what is not finite goes where ordinary backpropagation would take it."""
    outcome.sequential = True
    if chain.leaves_the_rest:
        return outcome
    walk = chain.walk(chain.length, 0, into=into)
    outcome.initial = walk.left[0, :, 0]
    outcome.iterations += chain.length
    outcome.sweeps += 1
    outcome.residual = outcome.error = 0.0
    return outcome


def _squares_mislead(walk: Walk, tolerance: float) -> bool:
    """Whether a residual may seem to be nothing because numbers vanish, or overflow, when they are squared."""
    energy = walk.energy.sum((0, 2))
    smallest = torch.finfo(energy.dtype).tiny / tolerance**2
    vanishing = (energy < smallest) & (walk.left != 0).any(-1).any(2).any(0)
    return bool((vanishing | ~energy.isfinite()).any())


def _norms(x: Tensor) -> Tensor:
    return x.square().sum(-1).sqrt()
