"""Options of parallel evaluation: what fits together."""

import pytest

from lit_parallel.dense.options import DenseOptions, check_dense_options
from lit_parallel.errors import UserError


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "sequential", "stop": "exact"},
        {"solver": "gs_jacobi", "window": 4, "iterations": 2},
        {"solver": "jacobi_gs", "block_size": 3, "max_iterations": 7},
        {"solver": "jacobi", "scope": "network", "stop": "top_k", "top_k": 1},
    ],
)
def test_what_fits_together_is_accepted(options):
    check_dense_options(DenseOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "jakobi"}, "Did you mean 'jacobi'"),
        ({"tolerance": 0.0}, "'tolerance' must be > 0"),
        ({"probe_every": -1}, "'probe_every' must be >= 0"),
        ({"solver": "jacobi", "block_size": 2}, "block_size belongs to solver=jacobi_gs, not jacobi"),
        ({"window": 2}, "window belongs to solver=gs_jacobi, not auto"),
        ({"solver": "jacobi", "stop": "top_k"}, "needs scope=network"),
        ({"solver": "sequential", "scope": "network", "stop": "top_k"}, "stop=top_k belongs to a solver that iterates"),
        ({"scope": "network"}, "name a solver"),
        ({"stop": "exact"}, "name a solver"),
        ({"iterations": 2}, "iterations belongs to a solver that iterates, not to solver=auto"),
        ({"solver": "sequential", "max_iterations": 2}, "max_iterations belongs .* not to solver=sequential"),
        ({"solver": "jacobi", "iterations": 2, "max_iterations": 3}, "leave one of them out"),
        ({"solver": "jacobi", "iterations": 2, "stop": "exact"}, "stop=exact a check"),
    ],
)
def test_what_does_not_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        check_dense_options(DenseOptions(**options))
