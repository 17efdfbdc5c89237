"""A solver is a schedule: it says which equations the next parallel iteration evaluates.

All four share the loop in ``loop.py``; a schedule is a few lines. The names are the paper's (Song et al., 2021,
section 3): ``jacobi_gs`` is its Jacobi-GS, ``gs_jacobi`` its GS-Jacobi.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_parallel.errors import UserError, did_you_mean
from lit_parallel.solvers.options import AUTO, SOLVER_NAMES, SolverOptions
from lit_parallel.systems import Equations, TriangularSystem


class Solver(ABC):
    """Which equations the next parallel iteration evaluates.

    Attributes:
        name: The solver's name in a config.
        predetermined: The schedule is one fixed sweep of T single equations: it is exact after T iterations without
            looking at any value, so the loop spares itself the bookkeeping.
    """

    name: ClassVar[str]
    predetermined: ClassVar[bool] = False

    @abstractmethod
    def equations(self, system: TriangularSystem, frontier: Tensor, step: Any) -> Equations:
        """The equations of one iteration.

        Args:
            system: The system; only its length, batch size and device matter here.
            frontier: ``[batch]`` number of leading equations that are known to be final.
            step: Number of iterations done before this one: an ``int`` for a predetermined schedule, else a tensor
                ``[1]`` on the device.
        """


class Sequential(Solver):
    """Gauss-Seidel, the plain feedforward order: the next equation, T times."""

    name = "sequential"
    predetermined = True

    def equations(self, system: TriangularSystem, frontier: Tensor, step: Any) -> Equations:
        return step


class Jacobi(Solver):
    """All T equations in every iteration. After k iterations the first k are exact."""

    name = "jacobi"

    def equations(self, system: TriangularSystem, frontier: Tensor, step: Any) -> Equations:
        return None


class JacobiGS(Solver):
    """Every block advances by one equation: Gauss-Seidel inside a block, Jacobi across blocks.

    Args:
        block_size: Equations per block; by default the system's own choice (a row of an image).
    """

    name = "jacobi_gs"

    def __init__(self, block_size: int | None = None) -> None:
        self.block_size = _positive("block_size", block_size)

    def equations(self, system: TriangularSystem, frontier: Tensor, step: Any) -> Equations:
        size = min(self.block_size or system.block_size, system.length)
        starts = torch.arange(0, system.length, size, device=system.device)
        # The last block may be shorter: there the last equation is evaluated again, which is harmless.
        return (starts + step % size).clamp(max=system.length - 1)


class GSJacobi(Solver):
    """All equations of a window that slides, per sample, forward past what is final.

    Args:
        window: Equations in the window; by default the system's own choice.
    """

    name = "gs_jacobi"

    def __init__(self, window: int | None = None) -> None:
        self.window = _positive("window", window)

    def equations(self, system: TriangularSystem, frontier: Tensor, step: Any) -> Equations:
        size = min(self.window or system.window, system.length)
        offsets = torch.arange(size, device=system.device)
        # At the end the window holds the last equation several times, which writes the same value.
        return (frontier[:, None] + offsets).clamp(max=system.length - 1)


def _positive(name: str, number: int | None) -> int | None:
    if number is not None and number < 1:
        raise UserError(f"{name} must be at least 1, got {number}")
    return number


def build_solver(options: SolverOptions) -> Solver:
    """Make the solver that the options name.

    Raises:
        UserError: If the name is unknown, or an option belongs to another solver.
    """
    if options.name == AUTO:
        raise UserError(f"solver auto is for sampling a model: name one of {', '.join(SOLVER_NAMES)}")
    if options.name not in SOLVER_NAMES:
        raise UserError(f"unknown solver '{options.name}'.{did_you_mean(options.name, SOLVER_NAMES)}")
    if options.block_size is not None and options.name != "jacobi_gs":
        raise UserError(f"solver.block_size belongs to jacobi_gs, not to {options.name}: leave it out")
    if options.window is not None and options.name != "gs_jacobi":
        raise UserError(f"solver.window belongs to gs_jacobi, not to {options.name}: leave it out")
    default = SolverOptions()
    for name in ("measure_seconds", "remeasure"):
        if getattr(options, name) != getattr(default, name):
            raise UserError(f"solver.{name} belongs to auto, not to {options.name}: leave it out")
    solvers: dict[str, Solver] = {
        "sequential": Sequential(),
        "jacobi": Jacobi(),
        "jacobi_gs": JacobiGS(options.block_size),
        "gs_jacobi": GSJacobi(options.window),
    }
    return solvers[options.name]
