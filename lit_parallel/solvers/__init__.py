"""Solvers of triangular systems: schedules of equations, and the one loop that runs them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_parallel.solvers.books import Stopping
    from lit_parallel.solvers.loop import SolverLoop, solve
    from lit_parallel.solvers.options import AUTO, SOLVER_NAMES, SolverOptions
    from lit_parallel.solvers.schedules import GSJacobi, Jacobi, JacobiGS, Sequential, Solver, build_solver

_HOMES = {
    "Stopping": "books",
    "SolverLoop": "loop",
    "solve": "loop",
    "AUTO": "options",
    "SOLVER_NAMES": "options",
    "SolverOptions": "options",
    "GSJacobi": "schedules",
    "Jacobi": "schedules",
    "JacobiGS": "schedules",
    "Sequential": "schedules",
    "Solver": "schedules",
    "build_solver": "schedules",
}

__all__ = [
    "AUTO",
    "SOLVER_NAMES",
    "GSJacobi",
    "Jacobi",
    "JacobiGS",
    "Sequential",
    "Solver",
    "SolverLoop",
    "SolverOptions",
    "Stopping",
    "build_solver",
    "solve",
]


def __getattr__(name: str) -> Any:
    # Imported when first used: the config needs the options alone, and --help need not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_parallel.solvers' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"lit_parallel.solvers.{_HOMES[name]}"), name)
