"""The outcome of a solve: value, status, and the three speeds that are never mixed."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Status(enum.Enum):
    """How the solve of one sample ended; the value is the sentence a user reads."""

    CONVERGED = "converged: every equation was evaluated after the last change of all before it"
    SETTLED = (
        "settled: no equation changed by more than the tolerance, or what the system itself watches stayed the same "
        "(this bounds the change, not the error)"
    )
    ITERATION_LIMIT = "hit the iteration limit before every equation was final"
    NOT_TRIANGULAR = (
        "not settled after T iterations, which always suffice: some equation depends on itself or a later one, if only "
        "by its rounding; for a network, lit_parallel.check_causality finds which"
    )
    NON_FINITE = "an equation whose inputs are all final has a value that is not finite"


class SolverError(RuntimeError):
    """Raised by :meth:`Solution.raise_if_failed`."""


@dataclass
class Solution:
    """What :func:`lit_parallel.solvers.solve` returns.

    Attributes:
        value: ``[batch, length, ...]`` the final iterate; for a sample that failed, the best one there is.
        status: One :class:`Status` per sample.
        iterations: ``[batch]`` parallel iterations until the sample was known to be solved; where samples share a
            window (``IncrementalMadeSystem``), those in which it waited for its neighbours too.
        evaluations: ``[batch]`` equations evaluated in them (the work; sequential evaluation needs ``length``).
        frontier: ``[batch]`` number of leading equations known to be final; after a tolerance, only settled.
        certified: ``[batch]`` whether one full evaluation of the reference system reproduced the value bit for bit.
        certificate_iterations: ``[batch]`` reference evaluations that took (1: reproduced at once; more: repaired).
        seconds: Wall-clock time of the iterations and the certificate, without :attr:`setup_seconds`.
        certificate_seconds: The certificate's part of :attr:`seconds`.
        setup_seconds: Time to allocate and to capture the CUDA graph, if one was used; paid once per loop.
        length: Number of equations, T.
        solver: Name of the solver.
        given: Whether some equations were given. They cost nothing, so there is no speedup to speak of.
        final_iteration: ``[batch, length]`` the iteration in which each equation changed last, which is when it took
            its final value (the iteration map; 0: it had it from the start); ``None`` for the sequential solver, where
            it is ``t + 1``. The certificate's iterations count on from the solver's.
        residual: ``[iterations, batch]`` largest change in each iteration (not an error), if recorded. Infinite where
            a value beyond the frontier was not finite.
    """

    value: Tensor
    status: list[Status]
    iterations: Tensor
    evaluations: Tensor
    frontier: Tensor
    certified: Tensor
    certificate_iterations: Tensor
    seconds: float
    certificate_seconds: float
    setup_seconds: float
    length: int
    solver: str
    given: bool = False
    final_iteration: Tensor | None = None
    residual: Tensor | None = None

    @property
    def total_iterations(self) -> Tensor:
        """``[batch]`` solver iterations and the reference evaluations of the certificate together."""
        return self.iterations + self.certificate_iterations

    @property
    def iteration_speedup(self) -> Tensor:
        """``[batch]`` T over all iterations, the certificate's included. Says nothing about time."""
        return self.length / self.total_iterations.clamp(min=1)

    @property
    def work(self) -> Tensor:
        """``[batch]`` equation evaluations, the certificate's included, relative to sequential evaluation."""
        return self.evaluations / self.length + self.certificate_iterations

    @property
    def all_solved(self) -> bool:
        return all(status in (Status.CONVERGED, Status.SETTLED) for status in self.status)

    def first(self, count: int) -> Solution:
        """The solution of the first samples of the batch."""
        return self._map(lambda x: x[:count], lambda x: x[:, :count])

    def cpu(self) -> Solution:
        """The same with all tensors on the CPU."""
        return self._map(Tensor.cpu, Tensor.cpu)

    def _map(self, per_sample: Callable[[Tensor], Tensor], residual: Callable[[Tensor], Tensor]) -> Solution:
        changes: dict[str, Any] = {
            name: per_sample(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        changes["status"] = self.status[: len(changes["iterations"])]
        if self.residual is not None:
            changes["residual"] = residual(self.residual)
        return dataclasses.replace(self, **changes)

    def raise_if_failed(self) -> None:
        """Raise :class:`SolverError` that names the samples which were not solved."""
        bad = [i for i, status in enumerate(self.status) if status not in (Status.CONVERGED, Status.SETTLED)]
        if bad:
            first = bad[0]
            raise SolverError(
                f"{len(bad)} of {len(self.status)} samples were not solved; sample {first}, equation "
                f"{int(self.frontier[first])} of {self.length}: {self.status[first].value}"
            )

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a report: iterations, work and time, kept apart."""
        total = float(self.total_iterations.double().mean())
        return {
            "solver": self.solver,
            "equations": self.length,
            "samples": len(self.status),
            "iterations_mean": float(self.iterations.double().mean()),
            "iterations_max": int(self.iterations.max()),
            "certificate_iterations_max": int(self.certificate_iterations.max()),
            # What was not solved has no speedup.
            "iteration_speedup": (
                self.length / max(total, 1.0) if self.all_solved and not self.given else float("nan")
            ),
            "work": float(self.work.double().mean()),
            "seconds": self.seconds,
            "certificate_seconds": self.certificate_seconds,
            "setup_seconds": self.setup_seconds,
            "certified": bool(self.certified.all()),
            "status": {status.name.lower(): self.status.count(status) for status in Status if status in self.status},
        }


def concatenate(solutions: list[Solution]) -> Solution:
    """Join the solutions of several batches of the same system into one; seconds add up."""
    if not solutions:
        raise ValueError("there is no solution to join")

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(solution, name) for solution in solutions])

    first = solutions[0]
    maps = [solution.final_iteration for solution in solutions if solution.final_iteration is not None]
    return Solution(
        value=joined("value"),
        status=[status for solution in solutions for status in solution.status],
        iterations=joined("iterations"),
        evaluations=joined("evaluations"),
        frontier=joined("frontier"),
        certified=joined("certified"),
        certificate_iterations=joined("certificate_iterations"),
        seconds=sum(solution.seconds for solution in solutions),
        certificate_seconds=sum(solution.certificate_seconds for solution in solutions),
        setup_seconds=sum(solution.setup_seconds for solution in solutions),
        length=first.length,
        solver=first.solver,
        given=first.given,
        final_iteration=torch.cat(maps) if len(maps) == len(solutions) else None,
        residual=_join_residuals([s.residual for s in solutions if s.residual is not None], len(solutions)),
    )


def _join_residuals(residuals: list[Tensor], expected: int) -> Tensor | None:
    """Pad with zeros (nothing changes after the last iteration) and join along the batch."""
    if len(residuals) != expected:
        return None
    longest = max(residual.shape[0] for residual in residuals)
    return torch.cat(
        [torch.nn.functional.pad(residual, (0, 0, 0, longest - residual.shape[0])) for residual in residuals], dim=1
    )
