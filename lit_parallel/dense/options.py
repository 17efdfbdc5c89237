"""The options of parallel evaluation of DenseNets, as they stand under ``callbacks.jacobi_evaluation`` in a config."""

from dataclasses import dataclass

from lit_parallel.errors import UserError
from lit_parallel.options import check_options, option
from lit_parallel.solvers.options import SOLVER_NAMES

DENSE_SOLVERS = ("auto", *SOLVER_NAMES)
DENSE_SCOPES = ("block", "network")
DENSE_STOPS = ("change", "top_k", "exact")
DENSE_GUESSES = ("mean", "zero")


@dataclass
class DenseOptions:
    """How the layers of dense blocks are evaluated in parallel, and when the result is good enough."""

    solver: str = option(
        "auto", "the schedule of layers (auto: the fastest of them, as measured)", choices=DENSE_SOLVERS
    )
    scope: str = option(
        "block",
        "what is solved at once: one dense block after the other, or all layers of the network",
        choices=DENSE_SCOPES,
    )
    block_size: int | None = option(
        None, "jacobi_gs: layers per block of the solver (null: the system's choice)", minimum=1
    )
    window: int | None = option(None, "gs_jacobi: layers in the sliding window (null: the system's choice)", minimum=1)
    iterations: int | None = option(
        None,
        "so many parallel iterations per dense block, for gs_jacobi per window, unchecked (null: as stop says)",
        minimum=1,
    )
    stop: str = option(
        "change",
        "when to stop: change (of the features, below tolerance), top_k (of the logits is stable), exact (equality)",
        choices=DENSE_STOPS,
    )
    tolerance: float = option(
        1e-3, "stop=change: largest change of a layer's features, relative to the largest of them", above=0
    )
    top_k: int = option(5, "stop=top_k: how many of the highest logits must keep their order", minimum=1)
    patience: int = option(2, "stop=top_k: for so many iterations in a row", minimum=1)
    max_iterations: int | None = option(
        None, "give up after so many iterations (null: the number of layers, which always suffices)", minimum=1
    )
    guess: str = option(
        "mean", "features before the first iteration: mean (as batch norm knows them) or zero", choices=DENSE_GUESSES
    )
    fused: bool = option(True, "on a GPU, by kernels within one CUDA graph (false: by the network's own layers)")
    probe_every: int = option(10, "batches between two comparisons with the ordinary forward (0: none)", minimum=0)


def check_dense_options(options: DenseOptions) -> None:
    """Check every option, and that they go together.

    Raises:
        UserError: If not.
    """
    check_options(options)
    solver = options.solver
    if options.block_size is not None and solver != "jacobi_gs":
        raise UserError(f"block_size belongs to solver=jacobi_gs, not {solver}: leave it out.")
    if options.window is not None and solver != "gs_jacobi":
        raise UserError(f"window belongs to solver=gs_jacobi, not {solver}: leave it out.")
    if options.stop == "top_k" and options.scope != "network":
        raise UserError("stop=top_k looks at the logits in every iteration and so needs scope=network.")
    if options.stop == "top_k" and solver == "sequential":
        raise UserError("stop=top_k belongs to a solver that iterates, not to solver=sequential: leave it out.")
    if solver == "auto" and (options.scope != "block" or options.stop != "change"):
        raise UserError(
            "solver=auto chooses among solvers with scope=block and stop=change: name a solver for anything else."
        )
    for name in ("iterations", "max_iterations"):
        if getattr(options, name) is not None and solver in ("auto", "sequential"):
            raise UserError(f"{name} belongs to a solver that iterates, not to solver={solver}: leave it out.")
    if options.iterations is not None and options.max_iterations is not None:
        raise UserError("Either iterations (unchecked) or max_iterations (checked) can be set: leave one of them out.")
    if options.iterations is not None and options.stop != "change":
        raise UserError(f"iterations is a fixed number, unchecked, and stop={options.stop} a check: leave one out.")
