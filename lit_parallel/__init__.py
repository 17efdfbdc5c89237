"""Feedforward computation as a triangular system of equations, solved in parallel, with the same result.

Example:
    >>> import lit_parallel
    >>> model = lit_parallel.load("runs/made_mnist5k/2026-01-01_12-00-00/checkpoints/last.ckpt")
    >>> images, solution = lit_parallel.sample(model, 64, solver="gs_jacobi", seed=7)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_parallel.checkpoint import load
    from lit_parallel.conditionals import Categorical, Conditional, DiscretizedLogisticMixture, Logistic
    from lit_parallel.modules.conditional import ConditionalModule
    from lit_parallel.networks.rnn import Recurrence
    from lit_parallel.recurrent import RecurrentOptions, parallelize, restore
    from lit_parallel.sampling.autoregressive import Given
    from lit_parallel.sampling.causality import check_causality
    from lit_parallel.sampling.options import SamplingOptions
    from lit_parallel.sampling.sampler import sample
    from lit_parallel.solution import Solution, Status
    from lit_parallel.solvers import SolverLoop, SolverOptions, Stopping, solve
    from lit_parallel.systems import Evaluation, TensorSystem, TriangularSystem

_HOMES = {
    "load": "lit_parallel.checkpoint",
    "sample": "lit_parallel.sampling.sampler",
    "SamplingOptions": "lit_parallel.sampling.options",
    "Given": "lit_parallel.sampling.autoregressive",
    "check_causality": "lit_parallel.sampling.causality",
    "ConditionalModule": "lit_parallel.modules.conditional",
    "Conditional": "lit_parallel.conditionals",
    "Categorical": "lit_parallel.conditionals",
    "DiscretizedLogisticMixture": "lit_parallel.conditionals",
    "Logistic": "lit_parallel.conditionals",
    "Solution": "lit_parallel.solution",
    "Status": "lit_parallel.solution",
    "SolverLoop": "lit_parallel.solvers",
    "SolverOptions": "lit_parallel.solvers",
    "Stopping": "lit_parallel.solvers",
    "solve": "lit_parallel.solvers",
    "Evaluation": "lit_parallel.systems",
    "TensorSystem": "lit_parallel.systems",
    "TriangularSystem": "lit_parallel.systems",
    "Recurrence": "lit_parallel.networks.rnn",
    "RecurrentOptions": "lit_parallel.recurrent",
    "parallelize": "lit_parallel.recurrent",
    "restore": "lit_parallel.recurrent",
}

__all__ = [
    "Categorical",
    "Conditional",
    "ConditionalModule",
    "DiscretizedLogisticMixture",
    "Evaluation",
    "Given",
    "Logistic",
    "Recurrence",
    "RecurrentOptions",
    "SamplingOptions",
    "Solution",
    "SolverLoop",
    "SolverOptions",
    "Status",
    "Stopping",
    "TensorSystem",
    "TriangularSystem",
    "check_causality",
    "load",
    "parallelize",
    "restore",
    "sample",
    "solve",
]


def __getattr__(name: str) -> Any:
    # Imported when first used, so that --help need not wait for torch and Lightning.
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_parallel' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
