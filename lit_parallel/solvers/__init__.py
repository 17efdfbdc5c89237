"""Solvers of triangular systems: schedules of equations, and the one loop that runs them."""

from lit_parallel.solvers.books import Stopping
from lit_parallel.solvers.loop import SolverLoop, solve
from lit_parallel.solvers.options import SOLVER_NAMES, SolverOptions
from lit_parallel.solvers.schedules import GSJacobi, Jacobi, JacobiGS, Sequential, Solver, build_solver

__all__ = [
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
