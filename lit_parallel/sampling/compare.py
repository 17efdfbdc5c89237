"""One batch sampled by several solvers from the same noise: how long each takes, and whether the bits agree."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_parallel.sampling.sampler import Sampler, SamplingModel
from lit_parallel.solution import Solution
from lit_parallel.solvers import SolverOptions


@dataclass
class Measurement:
    """One solver on one batch.

    Attributes:
        solver: Its name.
        solution: What it found (of the last run; all runs agree or ``repeatable`` is false).
        seconds: Wall-clock time of every run, the certificate included, the first run and its set-up excluded.
        repeatable: Whether every run gave the same bits.
        equal: Whether the result equals the plain sequential one bit for bit; ``None`` if that was not run.
        largest_difference: Largest distance to the plain sequential result; ``None`` if that was not run.
        speedup: Wall-clock speedup over each baseline, by its name.
    """

    solver: str
    solution: Solution
    seconds: list[float]
    repeatable: bool
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
    seed: int,
    indices: Sequence[int],
    repeats: int = 3,
) -> list[Measurement]:
    """Sample one batch with every solver and every baseline.

    The runs of the solvers take turns, so that a slow moment of the machine does not hit one solver alone; a first
    run of each is not timed (allocation, CUDA graph capture).

    Args:
        model: The model, on its device.
        solvers: What is measured.
        baselines: Names of baselines; the speedups are over these.
        batch_size: Samples per evaluation of the network.
        seed: Seed of the noise.
        indices: Sample indices of the batch.
        repeats: Timed runs, of which the median counts.
    """
    samplers = [Sampler(model, solver, batch_size, seed) for solver in (*solvers, *baselines)]
    values: list[list[Tensor]] = [[] for _ in samplers]
    seconds: list[list[float]] = [[] for _ in samplers]
    solutions: list[Solution] = []
    for run in range(repeats + 1):
        solutions = []
        for sampler, times, results in zip(samplers, seconds, values, strict=True):
            solution = sampler.batch(indices)[1]
            solutions.append(solution)
            results.append(solution.value)
            if run > 0:
                times.append(solution.seconds)
    measurements = [
        Measurement(
            sampler.name, solution, times, repeatable=all(torch.equal(results[0], other) for other in results[1:])
        )
        for sampler, solution, times, results in zip(samplers, solutions, seconds, values, strict=True)
    ]
    by_name = {measurement.solver: measurement for measurement in measurements[len(solvers) :]}
    sequential = by_name.get("sequential")
    for measurement in measurements:
        if sequential is not None:
            measurement.equal = torch.equal(measurement.solution.value, sequential.solution.value)
            difference = measurement.solution.value.double() - sequential.solution.value.double()
            measurement.largest_difference = float(difference.abs().max())
        # What was not solved has no speedup.
        solved = measurement.solution.all_solved
        measurement.speedup = {
            name: baseline.median_seconds / measurement.median_seconds if solved else float("nan")
            for name, baseline in by_name.items()
        }
    return measurements


def convergence_curves(
    model: SamplingModel,
    solvers: Sequence[SolverOptions | str],
    *,
    batch_size: int,
    seed: int,
    indices: Sequence[int],
    exact: Tensor,
) -> list[tuple[str, Tensor, Tensor]]:
    """Error and forward difference of every iterate.

    Args:
        model: The model, on its device.
        solvers: What is looked at.
        batch_size: Samples per evaluation of the network.
        seed: Seed of the noise.
        indices: Sample indices of the batch.
        exact: ``[len(indices), length, ...]`` the solution.

    Returns:
        Per solver its name, the mean error ``[iterations + 1]`` (from the initial guess on) and the mean change
        ``[iterations]``, over samples and equations.
    """
    curves = []
    for solver in solvers:
        sampler = Sampler(model, solver, batch_size, seed)
        errors: list[float] = []
        changes: list[float] = []
        previous: list[Tensor] = []

        def observe(
            iteration: int, value: Tensor, errors: Any = errors, changes: Any = changes, previous: Any = previous
        ) -> None:
            value = value[: len(indices)]
            errors.append(float((value.double() - exact.double()).abs().mean()))
            if previous:
                changes.append(float((value.double() - previous.pop().double()).abs().mean()))
            previous.append(value)

        sampler.batch(indices, observer=observe)
        curves.append((sampler.name, torch.tensor(errors), torch.tensor(changes)))
    return curves
