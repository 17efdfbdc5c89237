"""Gradients of parallel layers are autograd's, whatever the layer, its inputs, and what is asked of it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_helpers import CELLS, SOLVERS, build, covering, gradients, largest_error, states_of

from lit_parallel.recurrent import parallelize

OUTPUTS = (("output",), ("h_n", "c_n"), ("output", "h_n", "c_n"), ("c_n",), ("output", "h_n"))
FROZEN = ((), ("input",), ("weight", "bias"), ("weight_hh_l0", "bias_ih"), ("weight_ih", "bias_hh", "h_0"))

CASES = list(
    covering(
        {
            "cell": CELLS,
            "solver": list(SOLVERS),
            "layers": (1, 2, 3),
            "bidirectional": (False, True),
            "batch_first": (False, True),
            "bias": (False, True),
            "length": (1, 2, 7, 23, 48),
            "batch": (None, 1, 3),
            "given": (False, True),
            "of": OUTPUTS,
            "frozen": FROZEN,
        }
    )
)


def name_of(case) -> str:
    words = [f"{name}={value}" if not isinstance(value, str) else value for name, value in case.items()]
    return "-".join(words).replace(" ", "")


def build_case(cell, solver, layers, bidirectional, batch_first, bias, length, batch, given, of, frozen):
    """A layer, and the arguments of :func:`gradients`."""
    module = build(cell, 3, 6, layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias).double()
    shape = [length, 3] if batch is None else [batch, length, 3] if batch_first else [length, batch, 3]
    states = states_of(module, batch) if given else ()
    of = of if cell == "lstm" or of != ("c_n",) else ("h_n",)
    return module, (torch.randn(shape, dtype=torch.float64), states, of, frozen)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradients_are_autograds(case):
    module, arguments = build_case(**case)
    expected = gradients(module, *arguments)
    parallelize(module, SOLVERS[case["solver"]])
    ours = gradients(module, *arguments)
    assert ours.keys() == expected.keys()
    assert all(ours[name].shape == expected[name].shape and ours[name].dtype == torch.float64 for name in ours)
    assert largest_error(ours, expected) < 1e-10


@pytest.mark.parametrize("case", CASES[::3], ids=name_of)
def test_float32_gradients_are_as_good_as_autograds(case):
    module, (x, states, of, frozen) = build_case(**case)
    exact = gradients(module, x, states, of, frozen)
    module, x, states = module.float(), x.float(), tuple(state.float() for state in states)
    autograds = gradients(module, x, states, of, frozen)
    parallelize(module, SOLVERS[case["solver"]])
    ours = gradients(module, x, states, of, frozen)
    # What cancels is as uncertain in PyTorch's own backward pass.
    assert largest_error(ours, exact) < 1e-6 + 3 * largest_error(autograds, exact)


@given(
    cell=st.sampled_from(CELLS),
    solver=st.sampled_from(["jacobi", "jacobi_gs", "two_level"]),
    length=st.integers(1, 40),
    batch=st.integers(1, 4),
    input_size=st.integers(1, 4),
    hidden=st.integers(1, 7),
    block=st.integers(1, 45),
    rank=st.integers(1, 9),
    given=st.booleans(),
    scale=st.sampled_from([0.3, 1.0, 2.0]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_gradients_of_any_shape_are_autograds(
    cell, solver, length, batch, input_size, hidden, block, rank, given, scale
):
    torch.manual_seed(length)
    module = build(cell, input_size, hidden).double()
    module.weight_hh_l0.data *= scale
    arguments = torch.randn(length, batch, input_size).double(), states_of(module, batch) if given else ()
    expected = gradients(module, *arguments)
    chosen = {} if solver == "jacobi" else {"block_size": block}
    chosen |= {"rank": rank} if solver in ("two_level", "auto") else {}
    parallelize(module, solver=solver, probe_every=0, **chosen)
    for _ in range(2):  # from what was measured, and from what was learnt
        ours = gradients(module, *arguments)
        # Of each layer together: a dying gradient, such as an initial state's, is exact to the layer's own size.
        size = max(float(grad.norm()) for grad in expected.values())
        assert ours.keys() == expected.keys()
        assert max(float((ours[name] - expected[name]).norm()) for name in ours) <= 1e-10 * size


def test_gradients_accumulate():
    module = build("gru", 3, 6).double()
    twin = copy.deepcopy(module)
    parallelize(module, SOLVERS["jacobi_gs"])
    for model in (module, twin):
        torch.manual_seed(1)
        for _ in range(3):
            output, _ = model(torch.randn(11, 2, 3, dtype=torch.float64))
            output.square().sum().backward()
    for ours, expected in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12, 1e25])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_size_of_a_gradient_does_not_matter(solver, scale):
    """Squares of float32 numbers below 1e-23 are zero, and above 1e19 infinite."""
    module = build("gru", 3, 6)
    module.weight_hh_l0.data *= 2
    x = torch.randn(80, 2, 3)

    def found(scale):
        output, _ = module(x)
        grads = torch.autograd.grad(output[-3:], list(module.parameters()), torch.full_like(output[-3:], scale))
        return torch.cat([grad.flatten() for grad in grads]).double() / scale

    expected = found(1.0)
    parallelize(module, SOLVERS[solver])
    assert float((found(scale) - expected).norm() / expected.norm()) < 2e-6
