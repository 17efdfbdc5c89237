"""How a chain of one shape is solved: plans, measures how errors grow, adapts from step to step, replays graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_parallel.recurrent.chain import Chain, blocks_of
from lit_parallel.recurrent.coarse import next_basis
from lit_parallel.recurrent.layers import LayerTask, Task, can_be_captured
from lit_parallel.recurrent.options import RecurrentOptions
from lit_parallel.recurrent.solve import Gain, Outcome, Plan, measure_gain, solve_chain

if TYPE_CHECKING:
    from lit_parallel.recurrent.captured import CapturedPass

_GAIN_EVERY = 50  # passes between two measurements of how errors grow
_GUESSED_HALO = 32  # fresh weights forget within so many steps
_CALM = 4  # passes that would have done with less, until the halo is shortened towards the longest of them
_AIM = 0.2  # part of the tolerance that halos are chosen for
_REJECTIONS = 8  # of a graph's results, one after another, until it is given up
_FORGETFUL = 0.85  # what is left of a vector after a step: a sixth of it per step is gone
_SHAPES = 4  # of input, that are tuned one by one
_MOST_SHAPES = 64  # that are remembered
_NOTHING = torch.empty(0)
_TINY = 1e-30
WARM = 2  # passes before one is captured: kernels are compiled, the halo has settled
_GOOD_REDUCTION = 0.02  # of the error per sweep; a basis that does so is kept

Shape = tuple[int, int, torch.device, torch.dtype]  # time, batch


@dataclass
class _Tuned:
    """What was learnt about one shape of input."""

    solver: str
    plans: dict[str, Plan] = field(default_factory=dict)
    gains: dict[str, Gain] = field(default_factory=dict)
    ages: dict[str, int] = field(default_factory=dict)
    basis: Tensor | None = None
    calls: int = 0
    sweeps_at_probe: int = 1
    iterations_at_probe: int = 0
    halo_of_gain: int = 0
    ordinary_seconds: float = math.nan
    parallel_seconds: float = math.nan
    outcome: Outcome | None = None
    captured: CapturedPass | None = None
    rejected: int = 0
    #: Whether one walk was enough, when the host last looked at it itself.
    in_one_walk: bool = False
    pending: _Pending | None = None


@dataclass
class _Pending:
    """A pass whose graph has been launched, and of which nobody has asked yet how it went."""

    graph: CapturedPass
    plan: Plan
    gain: Gain
    amplification: float
    length: int
    outcome: Outcome


class Tuner:
    """Solves the chains of one layer in one direction, either forward or backward.

    Args:
        name: Of the layer, for messages.
        options: What the user asked for.
    """

    def __init__(self, name: str, options: RecurrentOptions) -> None:
        self.name, self.options = name, options
        self._tuned: dict[Shape, _Tuned] = {}

    def _find(self, shape: Shape) -> _Tuned | None:
        """What was learnt about a shape; with many shapes, a new one goes by what is known of the one nearest to it."""
        if shape in self._tuned:
            return self._tuned[shape]
        alike = [known for known in self._tuned if known[2:] == shape[2:]]
        if len(alike) < _SHAPES:
            return None
        nearest = min(alike, key=lambda known: abs(math.log((known[0] * known[1]) / (shape[0] * shape[1]))))
        theirs = self._tuned[nearest]
        copy = _Tuned(theirs.solver, sweeps_at_probe=theirs.sweeps_at_probe)
        copy.iterations_at_probe = theirs.iterations_at_probe
        copy.ordinary_seconds, copy.parallel_seconds = theirs.ordinary_seconds, theirs.parallel_seconds
        if len(self._tuned) >= _MOST_SHAPES:
            self._tuned.pop(next(iter(self._tuned)))
        self._tuned[shape] = copy
        return copy

    def seconds(self, shape: Shape) -> tuple[float, float] | None:
        """Measured time of the ordinary and of the parallel way, forward passes included; None if not measured."""
        tuned = self._find(shape)
        if tuned is None or math.isnan(tuned.ordinary_seconds):
            return None
        return tuned.ordinary_seconds, tuned.parallel_seconds

    def _run(self, tuned: _Tuned, task: Task) -> tuple[Tensor | None, ...]:
        """The results of a pass."""
        self._settle(tuned)
        replayed = self._replay(tuned, task)
        return replayed or task.solved(lambda *arguments: self._solve(tuned, *arguments))

    def _replay(self, tuned: _Tuned, task: Task) -> tuple[Tensor | None, ...] | None:
        """The results by a captured graph; None if there is none."""
        plan, gain, length = tuned.plans.get(tuned.solver), tuned.gains.get(tuned.solver), task.input.shape[0]
        if plan is None or gain is None or plan.tolerance is None or plan.rank or not tuned.in_one_walk:
            return None
        if not WARM <= tuned.ages.get(tuned.solver, 0) < _GAIN_EVERY or plan.block >= length:
            return None
        if plan.halo > 1.3 * tuned.halo_of_gain:  # it remembers longer than when its gain was measured
            tuned.ages[tuned.solver] = _GAIN_EVERY
            return None
        if tuned.rejected >= _REJECTIONS or (tuned.captured is None and not can_be_captured(task)):
            return None
        assert isinstance(task, LayerTask)
        results = task.new_results()
        captured = self._graph_for(tuned, task, results, remembers(plan, gain))
        if captured is None:
            return None
        amplification = gain.of_border_errors(plan.block, blocks_of(length, plan.block))
        captured.start(task, results, plan.halo, min(plan.tolerance / max(amplification, _TINY), 1.0))
        tuned.ages[tuned.solver] += 1
        tuned.outcome = Outcome(_NOTHING, plan.block + plan.halo, block=plan.block, halo=plan.halo)
        tuned.pending = _Pending(captured, plan, gain, amplification, length, tuned.outcome)
        return results

    def settle(self, *, wait: bool = True) -> None:
        """Ask how the newest passes went.

        Args:
            wait: For the device; if not, only what it has finished is asked for.
        """
        for tuned in self._tuned.values():
            if tuned.pending is not None and (wait or tuned.pending.graph.told()):
                self._settle(tuned)

    def _settle(self, tuned: _Tuned) -> None:
        """Complete the outcome of a graph's newest pass, and learn from it."""
        done, tuned.pending = tuned.pending, None
        if done is None:
            return
        plan, outcome = done.plan, done.outcome
        assert plan.tolerance is not None
        outcome.residual, second = done.graph.residuals()
        outcome.error = outcome.residual * done.amplification
        if math.isfinite(outcome.error):
            adapt_halo(plan, outcome, done.gain, done.length)
        if outcome.error <= plan.tolerance:
            tuned.rejected = 0
            return
        longer = min(2 * outcome.halo + outcome.block, done.length)  # as in LaunchedChain.walk_until_right
        outcome.iterations += outcome.block + longer
        outcome.sweeps, outcome.residual, outcome.error = 2, second, second * done.amplification
        if outcome.error <= plan.tolerance:
            tuned.rejected = 0
            return
        outcome.iterations += done.length
        outcome.sweeps, outcome.residual, outcome.error, outcome.sequential = 3, 0.0, 0.0, True
        tuned.in_one_walk = False  # the host looks at the next pass
        tuned.rejected += 1
        if tuned.rejected >= _REJECTIONS:  # it would go on for ever
            tuned.captured = None

    def _graph_for(
        self, tuned: _Tuned, task: LayerTask, results: tuple[Tensor | None, ...], careful: bool
    ) -> CapturedPass | None:
        """A graph that fits a pass, if need be captured anew; None if there is no memory for one."""
        block, before = tuned.plans[tuned.solver].block, tuned.captured
        if before is not None and before.fits(task, results, block, careful):
            return before
        from lit_parallel.recurrent.captured import CapturedPass

        moves = None if before is None else before.moves(task, results)
        del before
        for other in self._tuned.values():
            other.captured = None  # one graph per layer: its memory is not free
        try:
            tuned.captured = CapturedPass(task, results, block, careful, moves)
        except torch.cuda.OutOfMemoryError:
            tuned.rejected = _REJECTIONS
        return tuned.captured

    def _solve(self, tuned: _Tuned, chain: Chain, into: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        """Solve a chain by the chosen solver and learn from how it went."""
        solver = tuned.solver
        plan = tuned.plans.get(solver)
        if plan is None:
            plan = tuned.plans[solver] = self._first_plan(solver, chain)
        checked = plan.tolerance is not None and plan.rank == 0 and plan.block < chain.length
        if checked and tuned.ages.get(solver, _GAIN_EVERY) >= _GAIN_EVERY:
            new, gain = solver not in tuned.gains, self._measure_gain(chain, plan)
            if not math.isfinite(gain.amplification + gain.per_step):  # states are not finite
                tuned.outcome = solve_chain(chain, Plan(chain.length, 0, 0, plan.tolerance), None, into)
                tuned.outcome.sequential, tuned.in_one_walk = True, False
                meanwhile()
                return tuned.outcome.initial
            tuned.gains[solver], tuned.ages[solver] = gain, 0
            if new:
                self._first_halo(plan, tuned.gains[solver], chain)
            tuned.halo_of_gain = plan.halo
        chain.careful = remembers(plan, tuned.gains.get(solver))
        tuned.ages[solver] = tuned.ages.get(solver, 0) + 1
        basis = tuned.basis if plan.rank else None
        outcome = solve_chain(chain, plan, tuned.gains.get(solver), into, basis, meanwhile)
        if outcome.sweeps > 1:
            meanwhile()
        tuned.outcome = outcome
        tuned.in_one_walk = outcome.sweeps == 1 and not outcome.sequential
        if plan.tolerance is not None:
            if plan.rank:
                self._adapt_rank(tuned, plan, outcome, chain)
            elif solver in tuned.gains:
                adapt_halo(plan, outcome, tuned.gains[solver], chain.length)
        return outcome.initial

    def _measure_gain(self, chain: Chain, plan: Plan) -> Gain:
        return measure_gain(chain, plan)

    def tolerance(self, chain: Chain) -> float:
        """The largest estimated error."""
        return self.options.tolerance or (1e-10 if chain.last.dtype == torch.float64 else 1e-6)

    def _first_plan(self, solver: str, chain: Chain) -> Plan:
        options, length, tolerance = self.options, chain.length, self.tolerance(chain)
        iterations = options.iterations
        checked = None if iterations is not None else tolerance
        if solver == "two_level":
            block = options.block_size or chain.preferred_coarse_block()
            rank = min(options.rank or 32, chain.state_size)
            return Plan(min(block, length), 0, rank, tolerance)
        block = 1
        if solver == "jacobi_gs":
            chosen = chain.preferred_block(_GUESSED_HALO)
            block = options.block_size or (chosen if iterations is None else max(1, min(chosen, iterations // 2)))
        if iterations is not None:
            block = min(block, iterations)
        block = min(block, length)
        halo = _GUESSED_HALO if iterations is None else max(0, iterations - block)
        return Plan(block, min(halo, length - block), 0, checked)

    def _first_halo(self, plan: Plan, gain: Gain, chain: Chain) -> None:
        """As far as the chain remembers; where that is most of its length, one block is cheapest."""
        assert plan.tolerance is not None
        halo = forgetting_steps(_AIM * plan.tolerance, gain.per_step, chain.length)
        if plan.block > 1 and self.options.block_size is None:
            plan.block = chain.length if halo > chain.length // 2 else chain.preferred_block(halo)
        plan.halo = min(halo, max(0, chain.length - plan.block))

    def _adapt_rank(self, tuned: _Tuned, plan: Plan, outcome: Outcome, chain: Chain) -> None:
        if outcome.space is None:
            return
        if tuned.basis is None or max(outcome.reductions, default=0) > _GOOD_REDUCTION:
            tuned.basis = next_basis(outcome.space.image)
        if self.options.rank is not None or outcome.sequential:
            return
        if outcome.sweeps > 7 and plan.rank < chain.state_size:
            plan.rank, tuned.basis = min(chain.state_size, plan.rank + 16), None
        elif outcome.sweeps <= 4 and plan.rank > 16:
            plan.rank -= 16
            tuned.basis = tuned.basis[:, :, : plan.rank].contiguous()


def shape_of(input: Tensor) -> Shape:
    """What decides how a layer is solved, of its input ``[time, batch, input]``."""
    return input.shape[0], input.shape[1], input.device, input.dtype


def forgetting_steps(target: float, per_step: float, length: int) -> int:
    """Steps after which a unit vector is smaller than ``target``, at most ``length``."""
    if per_step <= 0:
        return 0
    if per_step >= 1:
        return length
    return min(length, math.ceil(math.log(min(target, 1.0)) / math.log(per_step)))


def remembers(plan: Plan, gain: Gain | None) -> bool:
    """Whether so many steps are remembered that the rounding of each matters."""
    return plan.rank > 0 or (gain is not None and gain.per_step > _FORGETFUL)


def adapt_halo(plan: Plan, outcome: Outcome, gain: Gain, length: int) -> None:
    """Let the next halo be as long as the error of this one says: longer at once, shorter after passes that agree.

    Batches differ: a halo that is too short costs a further walk, one that is longer by a step next to nothing.
    """
    assert plan.tolerance is not None
    if plan.block >= length or outcome.sequential:
        return
    walked = outcome.iterations - plan.block  # a further sweep is as good as a halo longer by a block
    if not outcome.error > 0:
        wanted = int(0.9 * walked)
    else:
        per_step = min(max(gain.per_step, 0.1), 0.999)
        wanted = walked + math.ceil(math.log(_AIM * plan.tolerance / outcome.error) / math.log(per_step))
    if wanted >= plan.halo:
        plan.halo, plan.calm = min(max(wanted, 1), length - plan.block), 0
        return
    spare = plan.halo - max(wanted, 1)
    plan.spare = min(plan.spare, spare) if plan.calm else spare
    plan.calm += 1
    if plan.calm >= _CALM:
        plan.halo, plan.calm = plan.halo - min(plan.spare, max(1, plan.halo // 4)), 0
