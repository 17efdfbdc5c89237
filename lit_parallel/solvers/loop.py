"""The one loop of the library: it iterates, keeps the books, stops, certifies and times.

How it knows which equations are final: see ``books.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_parallel.cuda_graphs import capturing
from lit_parallel.solution import Solution, Status
from lit_parallel.solvers.books import FAILED, LIMIT, RUNNING, SETTLED, SOLVED, Books, Stopping
from lit_parallel.solvers.polling import replay_until_finished
from lit_parallel.solvers.schedules import Jacobi, Solver
from lit_parallel.systems import Equations, Evaluation, TriangularSystem

Observer = Callable[[int, Tensor], None]
"""Called with the iteration's number, from 0 (the initial guess), and the iterate ``[batch, length, ...]``."""


class SolverLoop:
    """A solver applied to a system, ready to run any number of times.

    On a GPU the first run captures one iteration in a CUDA graph (for a predetermined schedule: the whole sweep, if
    the system unrolls it); every run replays it, with no host synchronisation per iteration: the host looks at a flag
    in pinned memory while the next iteration is already under way, so at most one surplus iteration is launched. On a
    CPU the same functions run eagerly.

    Args:
        system: The system to solve. Its inputs may be changed in place between runs.
        solver: Which equations each iteration evaluates.
        stopping: When an equation counts as unchanged, and when to give up.
        certify: Confirm the result by one full evaluation of ``system.reference()``, bit for bit; where it does not
            reproduce the result, iterate on with the reference until it does.
        record_residual: Keep the largest change of every iteration.
        cuda_graph: On a GPU, capture the iteration in a CUDA graph; elsewhere without effect.
    """

    def __init__(
        self,
        system: TriangularSystem,
        solver: Solver,
        stopping: Stopping | None = None,
        *,
        certify: bool = False,
        record_residual: bool = False,
        cuda_graph: bool = True,
    ) -> None:
        self.system = system
        self.solver = solver
        self.stopping = stopping or Stopping()
        self.certify = certify
        self.limit = min(self.stopping.max_iterations or system.length, system.length)
        self.record_residual = record_residual and not solver.predetermined
        self.cuda_graph = cuda_graph and system.device.type == "cuda"
        self._may_pace_itself = cuda_graph  # a system that replays graphs of its own must not where none are wanted
        self._fused = False
        self._state: Any = None
        self._books: Books | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._certifier: SolverLoop | None = None

    @torch.no_grad()
    def run(self, start: Tensor | None = None, observer: Observer | None = None) -> Solution:
        """Solve, from the initial guess or from a given iterate.

        Args:
            start: ``[batch, length, ...]`` iterate to start from.
            observer: Called with every iterate; slow (it runs eagerly), meant for pictures.
        """
        began = time.perf_counter()
        if self._books is None:
            willing = observer is None and (self._may_pace_itself or not self.system.self_paced)
            self._fused = willing and self.system.prepare(
                self.solver, self.limit, exact=self.stopping.exact, record_residual=self.record_residual
            )
            self._state = self.system.new_state()
            self._books = Books(self.system, self.limit, exact=self.stopping.exact, record=self.record_residual)
        if observer is not None and self._fused:
            raise ValueError("this loop solves in one evaluation and has no iterates to observe: make a new loop")
        at_once = self._fused and self.system.self_paced
        graphed = self.cuda_graph and observer is None and not at_once
        if graphed and self._graph is None:
            self._capture()
        self._synchronize()
        setup_seconds = time.perf_counter() - began

        began = time.perf_counter()
        self._restart(start)
        if graphed:
            self._replay()
        elif at_once:
            self._iteration()
        else:
            self._iterate(observer)
        self._synchronize()
        seconds = time.perf_counter() - began
        solution = self._solution(seconds, setup_seconds)
        return self._certify(solution) if self.certify else solution

    # -- iterating ----------------------------------------------------------------------------------------------

    def _restart(self, start: Tensor | None) -> None:
        assert self._books is not None
        self.system.reset(self._state, start)
        self._books.reset()
        self._flag.zero_()

    def _iteration(self) -> None:
        books = self._books
        assert books is not None
        equations = self.solver.equations(self.system, books.frontier, books.step)
        running = books.status == RUNNING
        books.enter(self.system.evaluate(self._state, equations, books.frontier, running), running, self.stopping)

    def _predetermined_iteration(self, step: int | Tensor) -> Evaluation:
        books = self._books
        assert books is not None
        equations: Equations = self.solver.equations(self.system, books.frontier, step)
        return self.system.evaluate(self._state, equations, books.frontier, None)

    def _predetermined_device_iteration(self) -> None:
        """The same with the step on the device, so that one captured evaluation serves all steps."""
        books = self._books
        assert books is not None
        change = self._predetermined_iteration(books.step).change
        books.non_finite.index_copy_(1, books.step, change.isnan())  # such a value did not enter the iterate
        books.step += 1

    def _iterate(self, observer: Observer | None) -> None:
        """Run eagerly."""
        assert self._books is not None
        if observer is not None:
            observer(0, self.system.value(self._state))
        for step in range(self.limit):
            if self.solver.predetermined:
                self._predetermined_iteration(step)
            else:
                self._iteration()
            if observer is not None:
                observer(step + 1, self.system.value(self._state))
            if not self.solver.predetermined and int(self._books.progress) % 2:
                break

    def _sweep(self) -> None:
        for step in range(self.limit):
            self._predetermined_iteration(step)

    def _capture(self) -> None:
        """Record one iteration (or the whole predetermined sweep) after a warm-up on a side stream."""
        assert self._books is not None
        self._flag = torch.zeros(1, dtype=torch.int64).pin_memory()
        stream = torch.cuda.Stream(self.system.device)
        stream.wait_stream(torch.cuda.current_stream(self.system.device))
        with torch.cuda.stream(stream):
            for step in range(min(3, self.limit)):
                if self.solver.predetermined:
                    self._predetermined_iteration(step)
                else:
                    self._iteration()
            if self.solver.predetermined and not self.system.unroll:
                self._predetermined_device_iteration()
        torch.cuda.current_stream(self.system.device).wait_stream(stream)
        self._synchronize()
        torch.cuda.empty_cache()  # the graph keeps memory of its own
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, stream):
            if self.solver.predetermined and self.system.unroll:
                self._sweep()
            elif self.solver.predetermined:
                self._predetermined_device_iteration()
            else:
                self._iteration()
                self._flag.copy_(self._books.progress, non_blocking=True)
        self._graph = graph

    def _replay(self) -> None:
        assert self._graph is not None
        if self._fused or (self.solver.predetermined and self.system.unroll):  # one replay is the whole solve
            self._graph.replay()
            return
        if self.solver.predetermined:
            for _ in range(self.limit):
                self._graph.replay()
            return
        replay_until_finished(self._graph.replay, self._flag, self.limit, self.system.device)

    def _synchronize(self) -> None:
        if self.system.device.type == "cuda":
            torch.cuda.synchronize(self.system.device)

    # -- what came out ------------------------------------------------------------------------------------------

    def _solution(self, seconds: float, setup_seconds: float) -> Solution:
        books = self._books
        assert books is not None
        batch, length = self.system.batch_size, self.system.length
        value = self.system.value(self._state)
        if self.solver.predetermined:
            books.close_predetermined(value, self.limit)
            value = torch.where(value.isfinite(), value, 0) if value.is_floating_point() else value
        iterations = books.iterations.clone()
        solved = Status.CONVERGED if self.stopping.exact or self.solver.predetermined else Status.SETTLED
        limit = Status.ITERATION_LIMIT
        if self.stopping.exact and self.limit == length:
            limit = Status.NOT_TRIANGULAR
        names = {
            RUNNING: limit,
            SOLVED: solved,
            FAILED: Status.NON_FINITE,
            LIMIT: limit,
            SETTLED: Status.SETTLED,
        }
        return Solution(
            value=value,
            status=[names[code] for code in books.status.tolist()],
            iterations=iterations,
            evaluations=books.evaluations.clone(),
            frontier=books.frontier.clone(),
            certified=torch.zeros(batch, dtype=torch.bool, device=value.device),
            certificate_iterations=torch.zeros_like(iterations),
            seconds=seconds,
            certificate_seconds=0.0,
            setup_seconds=setup_seconds,
            length=length,
            solver=self.solver.name,
            final_iteration=None if self.solver.predetermined else books.changed_in.clone(),
            residual=None if books.residual is None else books.residual[: int(iterations.max())].clone(),
        )

    def _certify(self, solution: Solution) -> Solution:
        """One Jacobi iteration of the reference from the result; more of them where it changes anything."""
        if self._certifier is None:
            self._certifier = SolverLoop(self.system.reference(), Jacobi(), cuda_graph=self.cuda_graph)
        check = self._certifier.run(start=solution.value)
        # Only results are certified; the best iterate of a sample that failed stays as it is.
        results = [status in (Status.CONVERGED, Status.SETTLED) for status in solution.status]
        checked = torch.tensor(results, device=solution.value.device)
        keep = checked.reshape(-1, *[1] * (solution.value.dim() - 1))
        solution.value = torch.where(keep, check.value, solution.value)
        solution.frontier = torch.where(checked, check.frontier, solution.frontier)
        solution.status = [
            new if result else old for result, new, old in zip(results, check.status, solution.status, strict=True)
        ]
        solution.certified = checked & (check.frontier == check.length)
        solution.certificate_iterations = torch.where(checked, check.iterations, 0)
        if solution.final_iteration is not None and check.final_iteration is not None:
            repaired = (check.final_iteration > 0) & checked[:, None]
            later = solution.iterations[:, None] + check.final_iteration
            solution.final_iteration = torch.where(repaired, later, solution.final_iteration)
        solution.certificate_seconds = check.seconds
        solution.seconds += check.seconds
        solution.setup_seconds += check.setup_seconds
        return solution


def solve(
    system: TriangularSystem,
    solver: Solver,
    stopping: Stopping | None = None,
    *,
    certify: bool = False,
    record_residual: bool = False,
    cuda_graph: bool = True,
    start: Tensor | None = None,
    observer: Observer | None = None,
) -> Solution:
    """Solve a triangular system once; see :class:`SolverLoop` for the arguments and for solving many of one kind.

    Example:
        >>> solution = solve(system, Jacobi(), certify=True)
        >>> solution.status[0], solution.iterations, solution.certified
    """
    loop = SolverLoop(
        system,
        solver,
        stopping,
        certify=certify,
        record_residual=record_residual,
        cuda_graph=cuda_graph,
    )
    return loop.run(start, observer)
