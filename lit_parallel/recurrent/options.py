"""The options of parallel backpropagation, as they stand under ``callbacks.jacobi_backprop`` in a config."""

from dataclasses import dataclass

from lit_parallel.errors import UserError
from lit_parallel.options import check_options, option

RECURRENT_SOLVERS = ("auto", "jacobi", "jacobi_gs", "two_level", "sequential")
RECURRENT_PRECISIONS = ("full", "half")


@dataclass
class RecurrentOptions:
    """How the passes of recurrent layers are solved, and when they are good enough."""

    solver: str = option(
        "auto",
        "how the chain of gradients is solved (auto: the fastest of them, as measured)",
        choices=RECURRENT_SOLVERS,
    )
    forward: bool = option(
        False, "whether the forward pass is parallel in time too (solver=auto: only where that is faster, as measured)"
    )
    iterations: int | None = option(
        None,
        "stop after so many parallel iterations, unchecked: truncated backpropagation (null: when tolerance holds)",
        minimum=1,
    )
    tolerance: float | None = option(
        None,
        "largest relative error of a layer's gradient and states, checked in every pass (null: 1e-6, in float64 1e-10)",
        above=0,
    )
    block_size: int | None = option(None, "steps per block (null: chosen)", minimum=1)
    rank: int | None = option(None, "two_level: columns of the coarse correction (null: chosen)", minimum=1)
    precision: str = option(
        "full", "products with W_hh, on a GPU (half: in 16 bits, errors of 1e-3)", choices=RECURRENT_PRECISIONS
    )
    probe_every: int = option(
        200, "steps between two comparisons with the ordinary backward pass (0: none but auto's first)", minimum=0
    )


def check_recurrent_options(options: RecurrentOptions) -> None:
    """Check every option, and that they go together.

    Raises:
        UserError: If not.
    """
    check_options(options)
    solver = options.solver
    if options.forward and solver == "sequential":
        raise UserError("solver=sequential is the ordinary way: leave forward=true out, or choose another solver.")
    if options.iterations is not None and solver not in ("jacobi", "jacobi_gs"):
        raise UserError(
            f"iterations belongs to solver=jacobi or jacobi_gs; solver={solver} iterates as tolerance says."
        )
    if options.iterations is not None and options.tolerance is not None:
        raise UserError("Either iterations (unchecked) or tolerance (checked) can be set: leave one of them out.")
    if options.rank is not None and solver not in ("two_level", "auto"):
        raise UserError(
            f"rank belongs to solver=two_level, and solver={solver} has no coarse correction: leave it out."
        )
    if options.block_size is not None and solver in ("jacobi", "sequential"):
        raise UserError(f"block_size belongs to solver=jacobi_gs or two_level, not {solver}: leave it out.")
