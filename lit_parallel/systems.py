"""The problem: a triangular system of equations ``x_t = h_t(u, x_0 .. x_{t-1})`` for a batch of samples.

Any feedforward computation has this form (Song et al., ICML 2021, section 2, https://arxiv.org/abs/2002.03629).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_parallel.errors import UserError
from lit_parallel.kernels import triton_runs_on

Equations = int | Tensor | None
"""Which equations an iteration evaluates.

``None``: all of them. An ``int``: one, the same for every sample and known on the host. An integer tensor ``[width]``:
the same for every sample, known on the device. ``[batch, width]``: chosen per sample. An index may occur twice, side
by side; it then counts once.
"""


@dataclass
class FusedBooks:
    """The books of an evaluation that ran many parallel iterations at once, until every sample was finished.

    It keeps them by the loop's own rule. All are ``[batch]`` but the last two.

    Attributes:
        iterations: Parallel iterations.
        evaluations: Equations evaluated in them.
        frontier: Leading equations that are final.
        failed: Whether the equation behind the frontier, all its inputs being final, is not finite.
        changed_in: ``[batch, length]`` the iteration in which each equation changed last.
        residual: ``[iterations, batch]`` largest change in each iteration, or ``None``.
    """

    iterations: Tensor
    evaluations: Tensor
    frontier: Tensor
    failed: Tensor
    changed_in: Tensor
    residual: Tensor | None = None


@dataclass
class Evaluation:
    """What one parallel iteration did.

    Attributes:
        equations: The equations that were really evaluated; may be more than were asked for.
        change: ``[batch, width]`` distance between the old and the new value of each, not-a-number where the new value
            was not finite (and the iterate was therefore reset to the initial guess). Not looked at when a single
            equation, an ``int``, is evaluated in a predetermined sweep.
        value: ``[batch, width, ...]`` the new values, against which a relative tolerance is measured, or ``None`` if
            the system has no notion of their size.
        fused: Books of an evaluation that ran to the end; then nothing else counts.
        settled: ``[batch]`` samples whose result is good enough by the system's own measure, whatever still changes,
            or ``None`` if it has no such measure, as the system's :meth:`TriangularSystem.reference` should not.
    """

    equations: Equations
    change: Tensor
    value: Tensor | None = None
    fused: FusedBooks | None = None
    settled: Tensor | None = None

    def size(self) -> Tensor:
        """``[batch, width]`` largest absolute value of each equation's value."""
        if self.value is None:
            raise UserError("this system has no relative tolerance: set solver.relative_tolerance=0")
        return _over_items(self.value.abs(), torch.amax)


class TriangularSystem(ABC):
    """A batch of independent triangular systems of the same length.

    The iterate ("state") is opaque to the solver loop: whatever :meth:`new_state` returns is handed back to
    :meth:`evaluate`, which changes it in place. The unique solution of a triangular system is the result of ordinary
    sequential evaluation; a state that one full evaluation leaves unchanged therefore *is* that result.

    Attributes:
        length: Number of equations, T.
        batch_size: Number of samples.
        device: Where the iterate lives.
        window: How many equations a sliding window should hold when the user names none.
        windows: Sizes of the window that are worth measuring, where the fastest is looked for.
        block_size: How many equations a block of Jacobi-GS should hold when the user names none.
        tolerance: Below which change an equation counts as unchanged when the user says nothing; 0: exact equality.
        unroll: Whether a predetermined sweep is captured as one CUDA graph of T different evaluations. Otherwise one
            evaluation is captured, which gets its equation as a tensor, and replayed T times.
        self_paced: Whether an evaluation that runs to the end replays CUDA graphs of its own: the loop captures none.
    """

    length: int
    batch_size: int
    device: torch.device
    unroll: bool = True
    self_paced: bool = False

    @property
    def window(self) -> int:
        return max(1, -(-self.length // 8))

    @property
    def windows(self) -> list[int]:
        return [self.window]

    @property
    def block_size(self) -> int:
        return max(1, round(self.length**0.5))

    @property
    def tolerance(self) -> float:
        return 0.0

    def prepare(self, solver: object, limit: int, *, exact: bool, record_residual: bool) -> bool:
        """Told once, before the first evaluation, who will ask: a chance to choose a faster evaluation.

        Args:
            solver: The :class:`lit_parallel.solvers.Solver`.
            limit: Most iterations.
            exact: Whether equations count as unchanged only at exact equality.
            record_residual: Whether the largest change of every iteration is wanted.

        Returns:
            Whether one evaluation runs to the end (and returns :class:`FusedBooks`).
        """
        return False

    @abstractmethod
    def new_state(self) -> Any:
        """Allocate an iterate and set it to the initial guess."""

    @abstractmethod
    def reset(self, state: Any, value: Tensor | None = None) -> None:
        """Set the iterate, in place, to the initial guess or to a given value ``[batch, length, ...]``."""

    @abstractmethod
    def evaluate(self, state: Any, equations: Equations, frontier: Tensor, running: Tensor | None) -> Evaluation:
        """Evaluate (at least) the named equations from the current iterate and write the results into it.

        All equations read the iterate as it was before the call. A value that is not finite must not enter the
        iterate: beyond the frontier it would poison everything behind it (0 * inf), although the solution is finite.
        (In a predetermined sweep, ``int`` equations, this cannot happen: nothing is read before it is final.)
        On a GPU the call is captured in a CUDA graph: no synchronisation, static shapes, no new inputs from the host.

        Args:
            state: The iterate.
            equations: Which equations to evaluate.
            frontier: ``[batch]`` number of leading equations that are known to be final.
            running: ``[batch]`` which samples are still being solved (``None``: all). The values of the others must
                not change any more, so that a sample's result never depends on its neighbours.
        """

    @abstractmethod
    def value(self, state: Any) -> Tensor:
        """The iterate as a tensor ``[batch, length, ...]``, detached from later changes."""

    def reference(self) -> TriangularSystem:
        """The same equations evaluated the plain way, against which a result is certified."""
        return self


class TensorSystem(TriangularSystem):
    """A system whose iterate is one tensor ``[batch, length, ...]``; a subclass gives the right-hand side.

    Args:
        guess: ``[batch, length, ...]`` finite initial guess; its shape, dtype and device are those of the iterate.
    """

    def __init__(self, guess: Tensor) -> None:
        if guess.dim() < 2 or guess.numel() == 0:
            raise ValueError(
                f"the initial guess must be [batch, length, ...] and not empty, got shape {list(guess.shape)}"
            )
        if not bool(guess.isfinite().all()):
            raise ValueError("the initial guess must be finite: it replaces values that are not")
        self.guess = guess
        self.batch_size, self.length = guess.shape[:2]
        self.device = guess.device

    @abstractmethod
    def function(self, x: Tensor) -> Tensor:
        """All right-hand sides: ``h(x)``, ``[batch, length, ...] -> [batch, length, ...]``."""

    def new_state(self) -> Tensor:
        return self.guess.clone()

    def reset(self, state: Tensor, value: Tensor | None = None) -> None:
        if value is None:
            state.copy_(self.guess)
        else:
            state.copy_(torch.where(value.isfinite(), value, self.guess))

    def value(self, state: Tensor) -> Tensor:
        return state.clone()

    def evaluate(self, state: Tensor, equations: Equations, frontier: Tensor, running: Tensor | None) -> Evaluation:
        new = select(self.function(state), equations)
        if new.dtype != state.dtype:
            raise TypeError(f"function() returned {new.dtype} for an iterate of {state.dtype}: they must agree")
        return write(state, equations, new, select(self.guess, equations), running)


def select(x: Tensor, equations: Equations) -> Tensor:
    """Take the named equations' values: ``[batch, length, ...] -> [batch, width, ...]``."""
    if equations is None:
        return x
    if isinstance(equations, int):
        return x[:, equations : equations + 1]
    if equations.dim() == 1:
        return x.index_select(1, equations)
    return x.gather(1, _expand(equations, x))


def write(state: Tensor, equations: Equations, new: Tensor, guess: Tensor, running: Tensor | None) -> Evaluation:
    """Write new values of the named equations into the iterate; reset to the guess what is not finite.

    Args:
        state: ``[batch, length, ...]`` the iterate, changed in place.
        equations: Which equations the new values belong to.
        new: ``[batch, width, ...]`` their new values.
        guess: ``[batch, width, ...]`` what replaces a value that is not finite.
        running: ``[batch]`` samples whose values may change (``None``: all).
    """
    if isinstance(equations, int):  # sequential evaluation: nothing behind it is read before it is overwritten
        state[:, equations : equations + 1] = new
        return Evaluation(equations, new)
    if equations is None and running is not None and triton_runs_on(state.device):
        from lit_parallel.kernels import books

        if books.covers(state, new, guess, running):
            return Evaluation(None, books.write_all(state, new, guess, running), state)
    old = select(state, equations)
    finite = None
    if new.is_floating_point():
        finite = _over_items((new - new) == 0, torch.all)  # inf - inf and nan - nan are not 0
        new = torch.where(_like(finite, new), new, guess)
    if running is not None:
        new = torch.where(_like(running, new), new, old)
    if finite is not None:
        distance = (new - old).abs()
        # -0.0 equals 0.0 but is another value: what reads it may tell them apart.
        tiny = torch.finfo(distance.dtype).tiny
        distance = torch.where(new.signbit() != old.signbit(), distance.clamp(min=tiny), distance)
        change = _over_items(distance, torch.amax).masked_fill(~finite, float("nan"))
    else:
        # In float64, where large integers may round to the same number: what differs, differs by at least 1.
        distance = torch.where(new != old, (new.double() - old.double()).abs().clamp(min=1), 0.0)
        change = _over_items(distance, torch.amax)
    if equations is None:
        state.copy_(new)
    elif equations.dim() == 1:
        state.index_copy_(1, equations, new)
    else:
        state.scatter_(1, _expand(equations, state), new)
    return Evaluation(equations, change, new)


def _expand(equations: Tensor, x: Tensor) -> Tensor:
    return equations.reshape(*equations.shape, *[1] * (x.dim() - 2)).expand(*equations.shape, *x.shape[2:])


def _over_items(x: Tensor, reduce: Any) -> Tensor:
    return reduce(x.flatten(2), dim=2) if x.dim() > 2 else x


def _like(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(*x.shape, *[1] * (like.dim() - x.dim()))
