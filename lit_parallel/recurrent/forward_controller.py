"""How one layer's forward passes are solved: in parallel where that is wanted, possible and, with ``auto``, faster."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_parallel.errors import UserError
from lit_parallel.recurrent.chain import Chain
from lit_parallel.recurrent.comparison import median_seconds_of
from lit_parallel.recurrent.forward_pass import ForwardPass, StateChain, measure_state_gain
from lit_parallel.recurrent.layers import Task
from lit_parallel.recurrent.options import RecurrentOptions
from lit_parallel.recurrent.solve import Gain, Outcome, Plan
from lit_parallel.recurrent.stopwatch import seconds_of
from lit_parallel.recurrent.tuning import WARM, Shape, Tuner, _Tuned, shape_of

logger = logging.getLogger(__name__)

_WORTH_IT = 1.05  # times as fast as the ordinary way, or auto takes that: measurements scatter
_SOLVER = "jacobi_gs"
_LONGEST_WALK = 0.25  # of the sequence, step by step: beyond it, PyTorch's own way is faster

States = tuple[Tensor, Tensor, Tensor | None]


@dataclass
class ForwardRecord:
    """What the newest parallel forward pass of a layer took.

    Attributes:
        iterations: Parallel iterations: steps that were walked one after another.
        sweeps: Walks over all blocks.
        residual: Mismatch at the borders, relative to the states.
        error: The residual times the measured amplification: the estimated relative error of the states.
        block, halo: Of the blocks.
    """

    iterations: int
    sweeps: int
    residual: float
    error: float
    block: int
    halo: int

    @classmethod
    def of(cls, outcome: Outcome) -> ForwardRecord:
        """What an outcome says."""
        x = outcome
        return cls(x.iterations, x.sweeps, x.residual, x.error, x.block, x.halo)


class ForwardController(Tuner):
    """Solves the forward passes of one layer in one direction.

    Args:
        name: Of the layer, for messages.
        options: What the user asked for.
    """

    def __init__(self, name: str, options: RecurrentOptions) -> None:
        super().__init__(name, options)
        self.enabled = options.forward
        #: Set to let the next pass look again at what is faster.
        self.recheck = False
        self._newest: Outcome | None = None
        self._shape: Shape | None = None  # of the newest pass
        self._told: dict[Shape | None, str] = {}

    @property
    def newest(self) -> Outcome | None:
        """Of the newest pass, not settled perhaps; None if that was an ordinary one."""
        return self._newest

    def expected_seconds(self, shape: Shape) -> float | None:
        """How long a pass takes; None if that was not measured."""
        times, tuned = self.seconds(shape), self._tuned.get(shape)
        if times is None or tuned is None:
            return None
        return times[0] if _is_ordinary(tuned, shape[0]) else times[1]

    def is_ordinary(self, shape: Shape) -> bool:
        """Whether passes of a shape are known to go the ordinary way, and nobody has asked to look again."""
        if not self.enabled:
            return True
        tuned = self._tuned.get(shape)
        return tuned is not None and not self.recheck and _is_ordinary(tuned, shape[0])

    def skips(self, shape: Shape) -> bool:
        """The same for a pass that is run now, one of some that look again."""
        if not self.is_ordinary(shape):
            return False
        if self.enabled:
            tuned, every = self._tuned[shape], self.options.probe_every
            if every > 0 and (tuned.calls + 1) % every == 0:
                return False
            tuned.calls += 1
        return True

    def forward(self, task: ForwardPass) -> States:
        """The output ``[time, batch, hidden]`` and the last h and c, ``[1, batch, hidden]``."""
        states = self._in_parallel(task)
        self._newest = None if states is None else self._tuned[shape_of(task.input)].outcome
        return task.ordinary() if states is None else states

    def _in_parallel(self, task: ForwardPass) -> States | None:
        """The same; None if the ordinary way is to be taken."""
        if not self.enabled or task.input.shape[0] == 1:
            return None
        if task.input.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UserError(
                f"{self.name}: a parallel forward pass is checked on the host, for which a CUDA graph cannot wait; set "
                "forward=false, or leave this layer out."
            )
        shape = shape_of(task.input)
        tuned = self._find(shape) or self._tuned.setdefault(shape, _Tuned(_SOLVER))
        tuned.calls += 1
        self._shape, every = shape, self.options.probe_every
        untried = self.options.solver == "auto" and not _is_ordinary(tuned, shape[0])  # such as after a bad batch
        new = math.isnan(tuned.ordinary_seconds) and (tuned.calls == 1 or untried)
        again = self.recheck or (every > 0 and tuned.calls % every == 0)
        self.recheck = False
        if new or (again and _is_ordinary(tuned, shape[0])):
            self._choose(tuned, task)
        if _is_ordinary(tuned, shape[0]):
            return None
        states = self._states(tuned, task)
        if states is None:
            return None
        assert tuned.outcome is not None
        if self.options.solver == "auto" and tuned.outcome.iterations > 2 * tuned.iterations_at_probe:
            self._choose(tuned, task)  # it remembers more than when it was tried
        return states

    def _states(self, tuned: _Tuned, task: ForwardPass) -> States | None:
        """The results of a parallel pass; None if that ended without any."""
        output, h, c, _ = self._run(tuned, task)
        outcome, plan = tuned.outcome, tuned.plans[_SOLVER]
        assert outcome is not None
        assert output is not None
        assert h is not None
        if outcome.sequential:
            if math.isfinite(outcome.residual) and plan.block < len(task.input):
                why = f"blocks still disagree after {outcome.sweeps} sweeps (residual {outcome.residual:.0e})"
                self._give_up(tuned, len(task.input), why)
            return None
        if plan.halo > len(task.input) // 2:
            self._give_up(tuned, len(task.input), f"more than half of {len(task.input)} steps would be halo")
        return output, h[None], None if c is None else c[None]

    def _replay(self, tuned: _Tuned, task: Task) -> tuple[Tensor | None, ...] | None:
        graph = tuned.captured
        if graph is not None and isinstance(task, ForwardPass) and graph.linearises and task.factors is None:
            return None  # an evaluation between training steps: their graph stays
        return super()._replay(tuned, task)

    def _choose(self, tuned: _Tuned, task: ForwardPass) -> None:
        """See how far the layer remembers and, with ``auto``, which way is faster."""
        for learnt in (tuned.plans, tuned.gains, tuned.ages):
            learnt.clear()
        device, auto = task.input.device, self.options.solver == "auto"
        states = self._states(tuned, task)
        if states is None:
            return
        assert tuned.outcome is not None
        tuned.iterations_at_probe = tuned.outcome.iterations
        if not auto:
            return
        with torch.no_grad():
            task.ordinary()
            tuned.ordinary_seconds = median_seconds_of(task.ordinary, device)
            tuned.parallel_seconds = seconds_of(lambda: self._states(tuned, task), device)
            if tuned.parallel_seconds < 3 * tuned.ordinary_seconds:
                for _ in range(WARM):
                    self._states(tuned, task)
                tuned.parallel_seconds = median_seconds_of(lambda: self._states(tuned, task), device)
                tuned.iterations_at_probe = tuned.outcome.iterations
        times = f"{1000 * tuned.parallel_seconds:.2f} ms against {1000 * tuned.ordinary_seconds:.2f} ms"
        if _is_ordinary(tuned, len(task.input)):
            self._say("ordinary forward pass", f"it is as fast or faster ({times})")
        else:
            self._say("parallel forward pass", times)

    def _give_up(self, tuned: _Tuned, length: int, why: str) -> None:
        """From the next pass on, until it is tried again."""
        tuned.plans[_SOLVER].block, tuned.captured = length, None
        self._say("ordinary forward pass", why)

    def _say(self, what: str, why: str) -> None:
        """Tell what is done from now on for such inputs."""
        if self._told.get(self._shape) != what:
            self._told[self._shape] = what
            logger.info("%s: %s: %s.", self.name, what, why)

    def _measure_gain(self, chain: Chain, plan: Plan) -> Gain:
        assert isinstance(chain, StateChain)
        return measure_state_gain(chain, plan)

    def _first_plan(self, solver: str, chain: Chain) -> Plan:
        plan = super()._first_plan(solver, chain)
        if self.options.iterations is not None:  # of the backward pass alone
            block = chain.preferred_block(plan.halo)
            plan = Plan(block, plan.halo, 0, self.tolerance(chain))
        return plan

    def _first_halo(self, plan: Plan, gain: Gain, chain: Chain) -> None:
        super()._first_halo(plan, gain, chain)
        if plan.block >= chain.length > 1:
            why = f"after a step {gain.per_step:.3f} of an error is left, so that a halo would be too long"
            self._say("ordinary forward pass", why)
        elif self.options.solver == "auto":
            plan.sweeps = max(2, 1 + int(_LONGEST_WALK * chain.length - plan.halo) // plan.block)


def _is_ordinary(tuned: _Tuned, length: int) -> bool:
    plan = tuned.plans.get(_SOLVER)
    if plan is not None and plan.block >= length:
        return True
    return _WORTH_IT * tuned.parallel_seconds > tuned.ordinary_seconds  # NaN if not measured
