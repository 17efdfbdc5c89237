"""Gradients that are not finite, or zero: in exactly the places where autograd has them."""

import copy
import math

import pytest
import torch
from recurrent_helpers import CELLS, SOLVERS, build
from torch import nn

from lit_parallel.networks.rnn import Recurrence, SoftplusCell
from lit_parallel.recurrent import parallelize, records


def leaf_gradients(module, x, of_output):
    x = x.clone().requires_grad_()
    output, _ = module(x)
    leaves = {"input": x, **dict(module.named_parameters())}
    found = torch.autograd.grad(output, list(leaves.values()), of_output)
    return dict(zip(leaves, found, strict=True))


def assert_same(module, solver, x, of_output):
    expected = leaf_gradients(module, x, of_output)
    twin = copy.deepcopy(module)
    parallelize(twin, SOLVERS[solver])
    ours = leaf_gradients(twin, x, of_output)
    for name, grad in expected.items():
        assert torch.equal(ours[name].isfinite(), grad.isfinite()), name
        finite = grad.isfinite()
        torch.testing.assert_close(ours[name][finite], grad[finite], rtol=1e-9, atol=1e-12)
        if not isinstance(module, nn.GRU):  # PyTorch's has inf - inf z where inf (1 - z) would do
            torch.testing.assert_close(ours[name][~finite], grad[~finite], equal_nan=True)
    return ours, records(twin)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cell", CELLS)
def test_one_step_of_one_sequence(cell, solver, value):
    module = build(cell, 3, 5).double()
    x, of_output = torch.randn(2, 24, 3, 3, dtype=torch.float64).unbind()
    of_output = torch.randn(24, 3, 5, dtype=torch.float64)
    of_output[13, 1, 2] = value
    ours, _ = assert_same(module, solver, x, of_output)
    assert ours["input"][14:].isfinite().all()  # what comes after it in time
    assert ours["input"][:, [0, 2]].isfinite().all()  # and the other sequences


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_overflowing_recurrence(solver):
    """Gradients of a relu network of weights 1e4 overflow after some steps, hidden states do not."""
    module = nn.RNN(1, 3, nonlinearity="relu")
    nn.init.eye_(module.weight_hh_l0)
    module.weight_hh_l0.data *= 1e4
    x = torch.zeros(24, 2, 1)
    nn.init.constant_(module.bias_ih_l0, 0.0)
    nn.init.constant_(module.bias_hh_l0, 0.0)
    x[0], module.weight_ih_l0.data[:] = 1e-30, 1.0
    x[12:] = -1e30  # from here on nothing is active, and the gradient begins before
    of_output = torch.zeros(24, 2, 3)
    of_output[11, 0] = 1.0
    ours, _ = assert_same(module, solver, x, of_output)
    assert not ours["input"][:1, 0].isfinite().all()
    assert ours["input"][:, 1].isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_zero_gradient(cell, solver):
    module = build(cell, 3, 5).double()
    ours, _ = assert_same(module, solver, torch.randn(24, 3, 3).double(), torch.zeros(24, 3, 5).double())
    assert all((grad == 0).all() for grad in ours.values())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_zero_gradient_of_one_sequence(cell, solver):
    module = build(cell, 3, 5).double()
    of_output = torch.randn(24, 3, 5).double()
    of_output[:, 1] = 0
    ours, _ = assert_same(module, solver, torch.randn(24, 3, 3).double(), of_output)
    assert (ours["input"][:, 1] == 0).all()


@pytest.mark.parametrize("solver", ["jacobi", "jacobi_gs", "two_level"])
def test_what_is_not_finite_goes_one_step_after_the_other(solver):
    of_output = torch.ones(24, 1, 5).double()
    of_output[20] = torch.nan
    _, found = assert_same(build("gru", 3, 5).double(), solver, torch.randn(24, 1, 3).double(), of_output)
    assert found["l0"].solver == "sequential"
    assert found["l0"].iterations >= 24


def test_an_own_cell():
    module = Recurrence(SoftplusCell(3, 5), 5).double()
    of_output = torch.randn(24, 3, 5, dtype=torch.float64)
    of_output[13, 1, 2] = torch.inf
    assert_same(module, "jacobi_gs", torch.randn(24, 3, 3).double(), of_output)


@pytest.mark.parametrize("solver", ["jacobi", "jacobi_gs", "two_level", "auto"])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_states_that_are_not_finite_give_autograds_gradients_and_spoil_nothing_later(cell, solver):
    torch.manual_seed(0)
    module = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cell](2, 4).double()
    bad, good = torch.randn(2, 40, 2, 2).double()
    bad[20, 1] = math.nan

    def found(x):
        output, _ = module(x)
        return torch.autograd.grad(output.sum(), list(module.parameters()))

    expected_bad, expected_good = found(bad), found(good)
    parallelize(module, solver=solver, probe_every=0)
    for ours, theirs in zip(found(bad), expected_bad, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    for ours, theirs in zip(found(good), expected_good, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
