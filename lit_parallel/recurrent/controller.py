"""How one layer's backward passes are solved: chooses, adapts from step to step, compares, and keeps a record."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_parallel.errors import UserError
from lit_parallel.recurrent.comparison import OrdinaryRun, median_seconds_of, run_ordinary
from lit_parallel.recurrent.forward_controller import ForwardController, ForwardRecord
from lit_parallel.recurrent.forward_pass import ForwardPass
from lit_parallel.recurrent.layers import BackwardPass, LayerPass
from lit_parallel.recurrent.options import RecurrentOptions
from lit_parallel.recurrent.solve import Outcome, Plan
from lit_parallel.recurrent.stopwatch import Stopwatch, seconds_of
from lit_parallel.recurrent.tuning import WARM, Tuner, _Tuned, shape_of

logger = logging.getLogger(__name__)

_KINDS_OF_ZEROS = 4  # that are kept
_SUSPICIOUS = 1e-2  # difference from the ordinary pass, which cuDNN may round to TF32, that cannot be rounding
_HOPELESS = 3  # times as slow as the fastest
_UNTIMED = contextlib.nullcontext()
_TIMED_EVERY = 8  # passes, on a GPU: events cost the host


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
        forward: What the forward pass took, if it was parallel.
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
    forward: ForwardRecord | None = None


@dataclass
class _Newest:
    """What the record of a pass is made of, once that is asked for: it costs the host."""

    solver: str
    plan: Plan
    outcome: Outcome
    forward: Outcome | None
    length: int

    def record(self) -> BackwardRecord:
        record = BackwardRecord(self.solver, self.length)
        self.complete(record)
        return record

    def complete(self, record: BackwardRecord) -> None:
        """Fill in how the pass went, as far as that is known."""
        outcome = self.outcome
        record.solver = "sequential" if outcome.sequential else self.solver
        for name in ("iterations", "sweeps", "residual", "error", "block", "halo", "rank", "at_rounding"):
            setattr(record, name, getattr(outcome, name))
        if self.plan.tolerance is None:
            record.residual = record.error = math.nan
        record.forward = None if self.forward is None else ForwardRecord.of(self.forward)


class Controller(Tuner):
    """Solves the backward passes of one layer in one direction.

    Args:
        name: Of the layer, for messages.
        options: What the user asked for.
    """

    def __init__(self, name: str, options: RecurrentOptions) -> None:
        super().__init__(name, options)
        #: Of the forward passes.
        self.ahead = ForwardController(name, options)
        #: Set to compare the next pass with the ordinary one again.
        self.recheck = False
        self._watches: dict[str, Stopwatch] = {}
        self._times: dict[str, float | None] = {}
        self._passes: dict[str, int] = {}
        self._zeros: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}
        self._probe: tuple[float, float, float] | None = None
        self._newest: _Newest | None = None
        self._recorded: _Newest | None = None
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

    def record(self, *, wait: bool = True) -> BackwardRecord | None:
        """Of the newest pass, the same one until there is another; its times are the newest that the device knows.

        Args:
            wait: For the device to say how the pass went; if not, the record is completed later, once it is asked for
                again or there is another pass.
        """
        self.settle(wait=wait)
        if self._newest is not None:
            self._recorded, self._record, self._newest = self._newest, self._newest.record(), None
            if self._probe is not None:
                self._record.probe_error, self._record.probe_speedup, self._record.step_speedup = self._probe
        if self._record is not None:
            for phase, watch in self._watches.items():
                self._times[phase] = watch.milliseconds() or self._times.get(phase)
            self._record.forward_ms, self._record.backward_ms = self._times.get("forward"), self._times.get("backward")
        return self._record

    def settle(self, *, wait: bool = True) -> None:
        self.ahead.settle(wait=wait)
        super().settle(wait=wait)

    def _settle(self, tuned: _Tuned) -> None:
        super()._settle(tuned)
        if self._recorded is not None and self._recorded.outcome is tuned.outcome:
            assert self._record is not None
            self._recorded.complete(self._record)

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
            return self._run(tuned, task)

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
        self._newest = _Newest(tuned.solver, tuned.plans[tuned.solver], outcome, self.ahead.newest, len(task.input))
        return grads

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
                for _ in range(WARM):  # halo or rank settle, and the last may be captured
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
        tuned.parallel_seconds = self._forward_seconds(task) + ordinary.recording_seconds + backward
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

    def _forward_seconds(self, task: BackwardPass) -> float:
        """How long the forward pass takes, in the way that is chosen for it."""
        forward, shape = task.forward, shape_of(task.input)
        if self.ahead.enabled and isinstance(task, LayerPass):
            measured = self.ahead.expected_seconds(shape)
            if measured is not None:
                return measured
            x = task.layer
            known = task.factors is not None
            again = ForwardPass(task.kind, x.input, x.h_0, x.c_0, x.weights, task.precision, linearised=known)
            forward = functools.partial(self.ahead.forward, again)
        return median_seconds_of(forward, task.input.device)
