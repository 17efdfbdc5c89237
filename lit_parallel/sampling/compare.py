"""One batch sampled by several solvers from the same noise: how long each takes, and whether the bits agree."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_parallel.sampling.sampler import Sampler, SamplingModel, What
from lit_parallel.solution import Solution
from lit_parallel.solvers import SolverOptions

_SLOW_SECONDS = 10.0
_ENOUGH_SECONDS = 30.0


@dataclass
class Measurement:
    """One solver on one batch.

    Attributes:
        solver: Its name.
        solution: What it found (of the last run; all runs agree or ``repeatable`` is false).
        seconds: Wall-clock time of every run, the certificate included, the first run and its set-up excluded.
        repeatable: Whether every run gave the same bits.
        pixel_map: ``[batch, height, width]`` for each pixel the iteration in which it took its final value (0: it was
            given); ``None`` for sequential solvers.
        equal: Whether the result equals the plain sequential one bit for bit; ``None`` if that was not run.
        largest_difference: Largest distance to the plain sequential result; ``None`` if that was not run.
        speedup: Wall-clock speedup over each baseline, by its name.
    """

    solver: str
    solution: Solution
    seconds: list[float]
    repeatable: bool
    pixel_map: Tensor | None = None
    equal: bool | None = None
    largest_difference: float | None = None
    speedup: dict[str, float] = field(default_factory=dict)

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> dict[str, Any]:
        """Flat, plain values for a table."""
        row = self.solution.summary()
        status = row["status"]
        row.update(seconds=self.median_seconds, seconds_of_runs=str([round(s, 6) for s in self.seconds]))
        row.update(solved=sum(status.get(name, 0) for name in ("converged", "settled")))
        row.update({f"speedup_over_{name}": value for name, value in self.speedup.items()})
        row.update(
            bitwise_equal_to_sequential=self.equal,
            largest_difference=self.largest_difference,
            repeatable=self.repeatable,
        )
        return row


def compare(
    model: SamplingModel,
    solvers: Sequence[SolverOptions | str],
    baselines: Sequence[str],
    *,
    batch_size: int,
    what: What,
    indices: Sequence[int],
    repeats: int = 3,
) -> list[Measurement]:
    """Sample one batch with every solver and every baseline.

    The runs of the solvers take turns, so that a slow moment of the machine does not hit one solver alone; a first
    run of each is not timed (allocation, CUDA graph capture), unless it takes longer than 10 seconds, beside which
    those do not count. A solver is not run again once its runs add up to 30 seconds.

    Args:
        model: The model, on its device.
        solvers: What is measured.
        baselines: Names of baselines; the speedups are over these.
        batch_size: Samples per evaluation of the network.
        what: What is sampled.
        indices: Sample indices of the batch.
        repeats: Timed runs, of which the median counts.
    """
    samplers = [Sampler(model, solver, batch_size, what) for solver in (*solvers, *baselines)]
    values: list[list[Tensor]] = [[] for _ in samplers]
    seconds: list[list[float]] = [[] for _ in samplers]
    solutions: dict[int, Solution] = {}
    for run in range(repeats + 1):
        for number, (sampler, times, results) in enumerate(zip(samplers, seconds, values, strict=True)):
            if len(times) == repeats or sum(times) > _ENOUGH_SECONDS or (run and times and times[0] > _SLOW_SECONDS):
                continue
            solution = solutions[number] = sampler.batch(indices)[1]
            results.append(solution.value)
            if run > 0 or solution.seconds > _SLOW_SECONDS:
                times.append(solution.seconds)
    measurements = [
        Measurement(
            sampler.name,
            solutions[number],
            seconds[number],
            repeatable=all(torch.equal(values[number][0], other) for other in values[number][1:]),
            pixel_map=sampler.pixel_map(solutions[number]),
        )
        for number, sampler in enumerate(samplers)
    ]
    by_name = {measurement.solver: measurement for measurement in measurements[len(solvers) :]}
    sequential = by_name.get("sequential")
    for measurement in measurements:
        if sequential is not None:
            if measurement.solution.all_solved and sequential.solution.all_solved:
                measurement.equal = torch.equal(measurement.solution.value, sequential.solution.value)
            difference = measurement.solution.value.double() - sequential.solution.value.double()
            measurement.largest_difference = float(difference.abs().max())
        # What was not solved has no speedup; nor has what is partly given, which a sequential sampler could skip.
        measurement.speedup = {
            name: baseline.median_seconds / measurement.median_seconds
            if measurement.solution.all_solved and baseline.solution.all_solved and what.given is None
            else float("nan")
            for name, baseline in by_name.items()
        }
    return measurements


@dataclass(frozen=True)
class Trace:
    """The iterates of one solver on one batch.

    Attributes:
        solver: Its name.
        error: ``[iterations + 1]`` mean distance to the solution over samples and equations, from the guess on.
        change: ``[iterations]`` mean change in each iteration.
        frames: ``[iterations + 1, shown, channels, height, width]`` uint8, the iterates of the first samples.
    """

    solver: str
    error: Tensor
    change: Tensor
    frames: Tensor


def trace(
    model: SamplingModel,
    solver: SolverOptions | str,
    *,
    batch_size: int,
    what: What,
    indices: Sequence[int],
    exact: Tensor,
    shown: int = 3,
) -> Trace:
    """Look at every iterate of a solver.

    Args:
        model: The model, on its device.
        solver: What is looked at.
        batch_size: Samples per evaluation of the network.
        what: What is sampled.
        indices: Sample indices of the batch.
        exact: ``[len(indices), length, ...]`` the solution.
        shown: Samples whose images are kept.
    """
    sampler = Sampler(model, solver, batch_size, what)
    errors: list[float] = []
    changes: list[float] = []
    frames: list[Tensor] = []
    previous: list[Tensor] = []

    def observe(iteration: int, value: Tensor) -> None:
        value = value[: len(indices)]
        errors.append(float((value.double() - exact.double()).abs().mean()))
        if previous:
            changes.append(float((value.double() - previous.pop().double()).abs().mean()))
        previous.append(value)
        frames.append(model.images(sampler.system, value[:shown]).cpu())

    if sampler.loop.solver.predetermined:
        # No need to run it: after k iterations the first k equations are solved and the others still the guess.
        sampler.load(indices)
        guess = sampler.system.value(sampler.system.new_state())[: len(indices)]
        for solved in range(sampler.loop.limit + 1):
            observe(solved, torch.cat([exact[:, :solved], guess[:, solved:]], dim=1))
    else:
        sampler.batch(indices, observer=observe)
    return Trace(sampler.name, torch.tensor(errors), torch.tensor(changes), torch.stack(frames))
