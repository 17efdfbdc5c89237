"""The options of a solver, as they stand under ``solver`` in a config."""

from dataclasses import dataclass

from lit_parallel.options import option

SOLVER_NAMES = ("sequential", "jacobi", "jacobi_gs", "gs_jacobi")
CACHED_SEQUENTIAL = "cached_sequential"
"""Ordinary sequential sampling with every activation computed once: the honest rival."""

AUTO = "auto"
"""Not a solver: the fastest one for sampling a model here, as measured."""


@dataclass
class SolverOptions:
    """Which solver, its block or window, and when to stop."""

    name: str = option(
        "gs_jacobi",
        "the schedule of equations (cached_sequential: one after another, from caches; auto: the fastest here, as "
        "measured)",
        choices=(AUTO, *SOLVER_NAMES, CACHED_SEQUENTIAL),
    )
    block_size: int | None = option(
        None, "jacobi_gs: equations per block (null: the system's choice, such as a row)", minimum=1
    )
    window: int | None = option(
        None, "gs_jacobi: equations in the sliding window (null: the system's choice; kernel: 2^k <= 128)", minimum=1
    )
    max_iterations: int | None = option(
        None, "stop after so many iterations (null: T, which always suffices)", minimum=1
    )
    absolute_tolerance: float | None = option(
        None,
        "an equation counts as unchanged below this change (0: exact equality; null: 0, but 0.01 levels for "
        "sampling.coupling=paper)",
        minimum=0,
    )
    relative_tolerance: float = option(0.0, "the same, relative to the size of the value", minimum=0)
    certify: bool = option(True, "confirm the result by one full reference evaluation; go on until it is confirmed")
    cuda_graph: bool = option(True, "on a GPU, replay one captured CUDA graph per iteration")
    measure_seconds: float = option(20.0, "auto: after so many seconds the fastest so far is taken", above=0)
    remeasure: bool = option(False, "auto: measure again, whatever an earlier measurement has left in the user's cache")
