"""When an equation is final: the bookkeeping of the solver loop.

The frontier moves by one rule for every solver. For each equation the loop notes in which iteration it was last
evaluated and in which it last changed. An equation is *consistent* if it was evaluated after the last change of
anything before it (strictly: what changed in the same parallel iteration was not seen). The leading consistent
equations are final: the first has no inputs, and each further one was evaluated from final inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_parallel.errors import UserError
from lit_parallel.kernels import triton_runs_on
from lit_parallel.systems import Evaluation, FusedBooks, TriangularSystem


@dataclass(frozen=True)
class Stopping:
    """When an equation counts as unchanged, and when to give up.

    Attributes:
        max_iterations: Iteration limit; by default T, which always suffices for exact equality.
        absolute_tolerance: An equation is unchanged if it moved by at most this much. 0 asks for exact equality. A
            tolerance bounds the change of the last iteration, never the error.
        relative_tolerance: The same, relative to the size of the new value.
    """

    max_iterations: int | None = None
    absolute_tolerance: float = 0.0
    relative_tolerance: float = 0.0

    def __post_init__(self) -> None:
        if self.max_iterations is not None and self.max_iterations < 1:
            raise UserError(f"max_iterations must be at least 1, got {self.max_iterations}")
        for name in ("absolute_tolerance", "relative_tolerance"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be a finite number, 0 or larger, got {getattr(self, name)}")

    @property
    def exact(self) -> bool:
        return self.absolute_tolerance == 0 and self.relative_tolerance == 0


# Status of a sample on the device, while the loop runs.
RUNNING, SOLVED, FAILED, LIMIT, SETTLED = range(5)  # settled: by the system's own measure


class Books:
    """The loop's tensors, all on the system's device and changed in place only (a CUDA graph captures them).

    Attributes:
        step: ``[1]`` parallel iterations done.
        progress: ``[1]`` twice the step, plus one once every sample is finished.
        frontier, status, iterations, evaluations: ``[batch]``, as in :class:`lit_parallel.solution.Solution`.
        evaluated_in, changed_in: ``[batch, length]`` iteration of each equation's last evaluation and last change.
        non_finite: ``[batch, length]`` whether the last evaluation gave a value that is not finite.
        residual: ``[limit, batch]`` largest change in each iteration, or ``None``.
    """

    def __init__(self, system: TriangularSystem, limit: int, *, exact: bool, record: bool) -> None:
        batch, length, device = system.batch_size, system.length, system.device
        # Few buffers, so that starting again takes few launches.
        self._numbers = torch.zeros(2 + 4 * batch, dtype=torch.int64, device=device)
        self._iterations = torch.zeros(2, batch, length, dtype=torch.int32, device=device)
        # progress: step * 2 + finished, in one word, so that the host never sees half an update.
        self.step, self.progress = self._numbers[:1], self._numbers[1:2]
        self.frontier, self.status, self.iterations, self.evaluations = self._numbers[2:].view(4, batch)
        self.evaluated_in, self.changed_in = self._iterations  # 0: never
        # With a tolerance "unchanged" is not "the same": whose fault a value is must be judged by what moved at all.
        self.moved_in = self.changed_in if exact else torch.zeros_like(self.changed_in)
        self.non_finite = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.residual = torch.zeros(limit, batch, device=device) if record else None
        self._positions = torch.arange(length, device=device)
        self._kernels = triton_runs_on(device)

    def reset(self) -> None:
        for tensor in (self._numbers, self._iterations, self.moved_in, self.non_finite, self.residual):
            if tensor is not None:
                tensor.zero_()

    def enter(self, evaluation: Evaluation, running: Tensor, stopping: Stopping) -> None:
        """Enter what an iteration did, move the frontier, and note which samples are finished."""
        if evaluation.fused is not None:
            self._enter_fused(evaluation.fused)
            return
        if self._kernels and evaluation.equations is None and evaluation.settled is None and stopping.exact:
            from lit_parallel.kernels.books import enter_all

            enter_all(self, evaluation.change)
            return
        self.step += 1
        step = self.step.to(torch.int32)
        tolerance: float | Tensor = stopping.absolute_tolerance
        if stopping.relative_tolerance > 0:
            tolerance = tolerance + stopping.relative_tolerance * evaluation.size()
        non_finite = evaluation.change.isnan()
        # The books of a finished sample are closed, whatever its neighbours' iterations still do.
        changed = ~(evaluation.change <= tolerance) & running[:, None]
        equations = evaluation.equations
        if self.residual is not None:
            largest = evaluation.change.masked_fill(non_finite, float("inf")).amax(dim=1)
            row = torch.where(running, largest.to(self.residual.dtype), 0.0)
            self.residual.index_copy_(0, (self.step - 1).clamp(max=self.residual.shape[0] - 1), row[None])
        maps = [(self.changed_in, changed)]
        if self.moved_in is not self.changed_in:
            maps.append((self.moved_in, ~(evaluation.change <= 0) & running[:, None]))
        if equations is None:
            self.evaluated_in.copy_(step.expand_as(self.evaluated_in))
            for latest, now in maps:
                latest.copy_(torch.where(now, step, latest))
            self.non_finite.copy_(non_finite)
            width: int | Tensor = self.changed_in.shape[1]
        else:
            where = _per_sample(equations, evaluation.change)
            self.evaluated_in.scatter_(1, where, step.expand(where.shape))
            for latest, now in maps:
                latest.scatter_(1, where, torch.where(now, step, latest.gather(1, where)))
            self.non_finite.scatter_(1, where, non_finite)
            width = 1 + (where[:, 1:] != where[:, :-1]).sum(dim=1)  # distinct equations
        consistent = self._consistent_since(self.changed_in)
        length = consistent.shape[1]
        first_open = torch.where(consistent & ~self.non_finite, length, self._positions).amin(dim=1)
        # All before the first open equation is final. If it was evaluated from that, its own value is at fault.
        same = consistent if self.moved_in is self.changed_in else self._consistent_since(self.moved_in)
        failed = same.gather(1, first_open.clamp(max=length - 1)[:, None])[:, 0] & (first_open < length)
        failed &= self.non_finite.gather(1, first_open.clamp(max=length - 1)[:, None])[:, 0]
        self.frontier.copy_(torch.where(running, first_open, self.frontier))
        self.iterations += running
        self.evaluations += running * width
        unsolved: int | Tensor = RUNNING
        if evaluation.settled is not None:
            unsolved = torch.where(evaluation.settled, SETTLED, RUNNING)
        outcome = torch.where(failed, FAILED, torch.where(first_open == length, SOLVED, unsolved))
        self.status.copy_(torch.where(running, outcome, self.status))
        finished = (self.status != RUNNING).all()
        self.progress.copy_(self.step * 2 + finished)

    def _consistent_since(self, latest: Tensor) -> Tensor:
        """Whether each equation was evaluated after the latest iteration noted for anything before it."""
        before = torch.nn.functional.pad(latest.cummax(dim=1).values[:, :-1], (1, 0))
        return self.evaluated_in > before

    def _enter_fused(self, fused: FusedBooks) -> None:
        """Take over the books of an evaluation that ran to the end."""
        self.step += 1
        self.iterations.copy_(fused.iterations)
        self.evaluations.copy_(fused.evaluations)
        self.frontier.copy_(fused.frontier)
        self.changed_in.copy_(fused.changed_in)
        if self.residual is not None and fused.residual is not None:
            self.residual.copy_(fused.residual)
        outcome = torch.where(self.frontier == self.changed_in.shape[1], SOLVED, LIMIT)
        self.status.copy_(torch.where(fused.failed != 0, FAILED, outcome))
        self.progress.copy_(self.step * 2 + 1)

    def close_predetermined(self, value: Tensor, limit: int) -> None:
        """The books of a fixed sweep are written once, at the end: only where it went astray matters."""
        finite = value.isfinite().flatten(2).all(dim=2) if value.dim() > 2 else value.isfinite()
        finite = torch.where(self._positions < limit, finite & ~self.non_finite, True)
        length = len(self._positions)
        first_bad = torch.where(finite, length, self._positions).amin(dim=1)
        self.frontier.copy_(first_bad.clamp(max=limit))
        self.status.fill_(SOLVED if limit == length else RUNNING).masked_fill_(first_bad < limit, FAILED)
        self.iterations.fill_(limit)
        self.evaluations.fill_(limit)


def _per_sample(equations: int | Tensor, change: Tensor) -> Tensor:
    index = torch.full((1,), equations, device=change.device) if isinstance(equations, int) else equations
    return index.expand(change.shape)
