"""How one layer's backward passes are solved: chooses, adapts from step to step, compares, and keeps a record."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_parallel.errors import UserError
from lit_parallel.recurrent.chain import Chain, blocks_of
from lit_parallel.recurrent.coarse import next_basis
from lit_parallel.recurrent.comparison import OrdinaryRun, median_seconds_of, run_ordinary
from lit_parallel.recurrent.layers import BackwardPass, LayerPass, can_be_captured
from lit_parallel.recurrent.options import RecurrentOptions
from lit_parallel.recurrent.solve import Gain, Outcome, Plan, measure_gain, solve_chain
from lit_parallel.recurrent.stopwatch import Stopwatch, seconds_of

if TYPE_CHECKING:
    from lit_parallel.recurrent.captured import CapturedPass

logger = logging.getLogger(__name__)

_GAIN_EVERY = 50  # backward passes between two measurements of how errors grow
_GUESSED_HALO = 32  # fresh weights forget within so many steps
_AIM = 0.2  # part of the tolerance that halos are chosen for
_KINDS_OF_ZEROS = 4  # that are kept
_REJECTIONS = 8  # of a graph's results, one after another, until it is given up
_SUSPICIOUS = 1e-2  # difference from the ordinary pass, which cuDNN may round to TF32, that cannot be rounding
_HOPELESS = 3  # times as slow as the fastest
_FORGETFUL = 0.85  # what is left of a vector after a step: a sixth of it per step is gone
_SHAPES = 4  # of input, that are tuned one by one
_MOST_SHAPES = 64  # that are remembered
_NOTHING = torch.empty(0)
_UNTIMED = contextlib.nullcontext()
_TIMED_EVERY = 8  # passes, on a GPU: events cost the host
_WARM = 2  # passes before one is captured: kernels are compiled, the halo has settled
_GOOD_REDUCTION = 0.02  # of the error per sweep; a basis that does so is kept

Shape = tuple[int, int, torch.device, torch.dtype]  # time, batch


@dataclass
class BackwardRecord:
    """What the newest backward pass of a layer took, and the newest comparison with the ordinary one.

    Attributes:
        solver: What solved it.
        iterations: Parallel iterations: steps that were walked one after another, of ``length``.
        length: Steps of the sequence.
        sweeps: Walks over all blocks.
        residual: Mismatch at the borders, relative to the gradient.
        error: The residual times the measured amplification: the estimated relative error of the gradient.
        block, halo, rank: Of the blocks.
        at_rounding: Whether borders agree to the last bits: then the estimated error is one of rounding alone, which
            the ordinary backward pass has too, and may be above the tolerance.
        forward_ms, backward_ms: Milliseconds of this layer's passes; None if not known yet.
        probe_error: Relative difference of the parameters' gradients from the ordinary backward pass.
        probe_speedup: Wall-clock time of the ordinary backward pass over that of the parallel one.
        step_speedup: The same, forward passes included.
    """

    solver: str
    length: int
    iterations: int = 0
    sweeps: int = 0
    residual: float = math.nan
    error: float = math.nan
    block: int = 0
    halo: int = 0
    rank: int = 0
    at_rounding: bool = False
    forward_ms: float | None = None
    backward_ms: float | None = None
    probe_error: float | None = None
    probe_speedup: float | None = None
    step_speedup: float | None = None


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
    halo_of_gain: int = 0
    ordinary_seconds: float = math.nan
    parallel_seconds: float = math.nan
    outcome: Outcome | None = None
    captured: CapturedPass | None = None
    rejected: int = 0


class Controller:
    """Solves the chains of one layer in one direction.

    Args:
        name: Of the layer, for messages.
        options: What the user asked for.
    """

    def __init__(self, name: str, options: RecurrentOptions) -> None:
        self.name, self.options = name, options
        #: Set to compare the next pass with the ordinary one again.
        self.recheck = False
        self._tuned: dict[Shape, _Tuned] = {}
        self._watches: dict[str, Stopwatch] = {}
        self._times: dict[str, float | None] = {}
        self._passes: dict[str, int] = {}
        self._zeros: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}
        self._probe: tuple[float, float, float] | None = None
        self._newest: tuple[str, Plan, Outcome, int] | None = None
        self._record: BackwardRecord | None = None

    def timed(self, phase: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Time a pass, or on a GPU one of some."""
        number = self._passes.get(phase, 0)
        self._passes[phase] = number + 1
        if device.type == "cuda" and number % _TIMED_EVERY:
            return _UNTIMED
        watch = self._watches[phase] = Stopwatch(device)
        return watch

    def given(self, grad: Tensor | None, like: Tensor) -> Tensor:
        """A gradient, or zeros of a shape, the same ones every time."""
        if grad is not None:
            return grad
        key = (like.shape, like.dtype, like.device)
        if key not in self._zeros:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():  # zero only once that graph is replayed
                return torch.zeros_like(like)
            if len(self._zeros) >= _KINDS_OF_ZEROS:
                self._zeros.pop(next(iter(self._zeros)))
            self._zeros[key] = torch.zeros_like(like, memory_format=torch.contiguous_format)
        return self._zeros[key]

    @property
    def record(self) -> BackwardRecord | None:
        """Of the newest pass, the same one until there is another; its times are the newest that the device knows."""
        if self._newest is not None:
            self._record, self._newest = self._record_of(*self._newest), None
        if self._record is not None:
            for phase, watch in self._watches.items():
                self._times[phase] = watch.milliseconds() or self._times.get(phase)
            self._record.forward_ms, self._record.backward_ms = self._times.get("forward"), self._times.get("backward")
        return self._record

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

    def backward(self, task: BackwardPass, *, compare: bool = True) -> tuple[Tensor | None, ...]:
        """All gradients of a layer.

        Args:
            task: The pass.
            compare: Whether it may be compared with the ordinary one; inside a compiled operator it cannot.
        """
        checked = self.options.iterations is None
        if checked and task.input.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UserError(
                f"{self.name}: a tolerance is checked on the host, for which a CUDA graph cannot wait; set "
                "solver=jacobi_gs and iterations=K, or leave this layer out."
            )
        shape = shape_of(task.input)
        known = self._find(shape)
        if known is None:
            known_before, tuned = False, self._tuned.setdefault(shape, _Tuned(self.options.solver))
        else:
            known_before, tuned = True, known
        auto = self.options.solver == "auto"

        def run() -> tuple[Tensor | None, ...]:
            replayed = self._replay(tuned, task)
            return replayed or task.gradients(lambda *arguments: self._solve(tuned, *arguments))

        ordinary = run_ordinary(task) if auto and compare and not known_before else None
        if auto and not known_before:
            self._choose(tuned, run, task.input, ordinary.seconds if ordinary else math.inf)
        with self.timed("backward", task.input.device):
            grads = run()
        tuned.calls += 1
        outcome, every = tuned.outcome, self.options.probe_every
        assert outcome is not None
        again = every > 0 and tuned.calls % every == 0
        harder = auto and outcome.sweeps > 2 * tuned.sweeps_at_probe
        in_one_block = auto and outcome.block >= len(task.input)  # it may have learnt to forget
        if known_before and (harder or (again and in_one_block)):
            self._choose(tuned, run, task.input, tuned.ordinary_seconds)
        due = self.recheck or again or (every > 0 and not known_before)
        if compare and (ordinary or harder or due):
            self.recheck = False
            self._compare(tuned, run, task, grads, ordinary or run_ordinary(task))
        self._newest = (tuned.solver, tuned.plans[tuned.solver], outcome, task.input.shape[0])
        return grads

    def _replay(self, tuned: _Tuned, task: BackwardPass) -> tuple[Tensor | None, ...] | None:
        """The gradients by a captured graph; None if there is none, or if one walk was not enough."""
        plan, gain, length = tuned.plans.get(tuned.solver), tuned.gains.get(tuned.solver), task.input.shape[0]
        if plan is None or gain is None or plan.tolerance is None or plan.rank:
            return None
        if not _WARM <= tuned.ages.get(tuned.solver, 0) < _GAIN_EVERY or plan.block >= length:
            return None
        if plan.halo > 1.3 * tuned.halo_of_gain:  # it remembers longer than when its gain was measured
            tuned.ages[tuned.solver] = _GAIN_EVERY
            return None
        if tuned.rejected >= _REJECTIONS or (tuned.captured is None and not can_be_captured(task)):
            return None
        assert isinstance(task, LayerPass)
        grads = task.new_results()
        captured = self._graph_for(tuned, task, grads, remembers(plan, gain))
        if captured is None:
            return None
        captured.start(task, grads, plan.halo)
        # While the device works:
        tuned.ages[tuned.solver] += 1
        amplification = gain.of_border_errors(plan.block, blocks_of(length, plan.block))
        outcome = Outcome(_NOTHING, plan.block + plan.halo, block=plan.block, halo=plan.halo)
        outcome.residual = captured.residual()
        outcome.error = outcome.residual * amplification
        if not outcome.error <= plan.tolerance:
            tuned.rejected += 1
            if tuned.rejected >= _REJECTIONS:  # such as for a sequence without a gradient: it would go on for ever
                tuned.captured = None
            return None
        tuned.rejected = 0
        tuned.outcome = outcome
        adapt_halo(plan, outcome, gain, length)
        return grads

    def _graph_for(
        self, tuned: _Tuned, task: LayerPass, results: tuple[Tensor | None, ...], careful: bool
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

    def _record_of(self, solver: str, plan: Plan, outcome: Outcome, length: int) -> BackwardRecord:
        record = BackwardRecord(
            "sequential" if outcome.sequential else solver,
            length,
            outcome.iterations,
            outcome.sweeps,
            outcome.residual,
            outcome.error,
            outcome.block,
            outcome.halo,
            outcome.rank,
            outcome.at_rounding,
        )
        if plan.tolerance is None:
            record.residual = record.error = math.nan
        if self._probe is not None:
            record.probe_error, record.probe_speedup, record.step_speedup = self._probe
        return record

    def _solve(self, tuned: _Tuned, chain: Chain, into: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        """Solve a chain by the chosen solver and learn from how it went."""
        solver = tuned.solver
        plan = tuned.plans.get(solver)
        if plan is None:
            plan = tuned.plans[solver] = self._first_plan(solver, chain)
        checked = plan.tolerance is not None and plan.rank == 0 and plan.block < chain.length
        if checked and tuned.ages.get(solver, _GAIN_EVERY) >= _GAIN_EVERY:
            new, gain = solver not in tuned.gains, measure_gain(chain, plan)
            if not math.isfinite(gain.amplification + gain.per_step):  # the forward pass's states are not finite
                tuned.outcome = solve_chain(chain, Plan(chain.length, 0, 0, plan.tolerance), None, into)
                tuned.outcome.sequential = True
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
        if plan.tolerance is not None:
            if plan.rank:
                self._adapt_rank(tuned, plan, outcome, chain)
            elif solver in tuned.gains:
                adapt_halo(plan, outcome, tuned.gains[solver], chain.length)
        return outcome.initial

    def _first_plan(self, solver: str, chain: Chain) -> Plan:
        options, length = self.options, chain.length
        tolerance = options.tolerance or (1e-10 if chain.last.dtype == torch.float64 else 1e-6)
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

    def _choose(self, tuned: _Tuned, run: Callable[[], object], input: Tensor, limit: float) -> None:
        """Try the solvers and keep the fastest; one that takes several times as long as another is soon given up."""
        times: dict[str, float] = {}
        for solver in ("jacobi_gs", "two_level"):
            tuned.solver = solver
            for learnt in (tuned.plans, tuned.gains, tuned.ages):
                learnt.pop(solver, None)
            run()  # compiles and measures
            times[solver] = seconds_of(run, input.device)
            fastest = min(seconds for seconds in (limit, *times.values()) if not math.isnan(seconds))
            if times[solver] < _HOPELESS * fastest:
                for _ in range(_WARM):  # halo or rank settle, and the last may be captured
                    run()
                times[solver] = median_seconds_of(run, input.device)
            if len(input) < 4 * tuned.plans[solver].block:
                break
        tuned.solver = min(times, key=lambda solver: times[solver])
        run()
        assert tuned.outcome is not None
        tuned.sweeps_at_probe = tuned.outcome.sweeps
        logger.info(
            "%s: %s (%s).",
            self.name,
            tuned.solver,
            ", ".join(f"{solver} {1000 * seconds:.2f} ms" for solver, seconds in times.items()),
        )

    def _compare(
        self,
        tuned: _Tuned,
        run: Callable[[], object],
        task: BackwardPass,
        grads: tuple[Tensor | None, ...],
        ordinary: OrdinaryRun,
    ) -> None:
        """Note how far the ordinary backward pass on the same batch is from ours, and how long each takes."""
        device = task.input.device
        backward = median_seconds_of(run, device) + ordinary.autograd_seconds  # which the ordinary one contains
        tuned.ordinary_seconds = ordinary.seconds
        tuned.parallel_seconds = median_seconds_of(task.forward, device) + ordinary.recording_seconds + backward
        distance = ordinary.distance(grads, task.parameters)
        if tuned.plans[tuned.solver].tolerance is not None and distance > _SUSPICIOUS:
            tuned.ages.clear()  # measure anew how errors grow
            logger.warning(
                "%s: gradients differ by %.0e from the ordinary backward pass, more than rounding explains. Please "
                "report it; solver='sequential' is the ordinary pass.",
                self.name,
                distance,
            )
        self._probe = (
            distance,
            ordinary.backward_seconds / backward,
            tuned.ordinary_seconds / tuned.parallel_seconds,
        )


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
    """Let the next halo be as long as the error of this one says: longer at once, shorter by and by."""
    assert plan.tolerance is not None
    if plan.block >= length or outcome.sequential:
        return
    walked = outcome.iterations - plan.block  # a further sweep is as good as a halo longer by a block
    if not outcome.error > 0:
        wanted = int(0.9 * walked)
    else:
        per_step = min(max(gain.per_step, 0.1), 0.999)
        wanted = walked + math.ceil(math.log(_AIM * plan.tolerance / outcome.error) / math.log(per_step))
    wanted = max(wanted, int(0.9 * plan.halo))
    plan.halo = min(max(wanted, 1), length - plan.block)
