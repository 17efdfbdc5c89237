"""The linearised step of each cell, and the scan that rebuilds an LSTM's cell states."""

import pytest
import torch
from recurrent_helpers import CELLS, build, layer_after_forward, outputs_of
from torch.nn import functional as F  # noqa: N812

from lit_parallel.recurrent.cells import cell_of, linear_scan

TIME, BATCH, HIDDEN = 5, 3, 4


def one_step(cell, x, h, c, weights):
    """PyTorch's own cell."""
    module = build(cell, x.shape[1], h.shape[1]).double()
    states = (h[None],) if c is None else (h[None], c[None])
    parameters = dict(zip((name for name, _ in module.named_parameters()), weights, strict=True))
    hx = states if len(states) == 2 else states[0]
    _, last = torch.func.functional_call(module, parameters, (x[None], hx))
    return [state[0] for state in last] if isinstance(last, tuple) else [last[0]]


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_is_the_cells_vector_jacobian_product(cell):
    layer, kind = layer_after_forward(cell, TIME, BATCH, HIDDEN, scale=2.0), cell_of(cell)
    factors, before = kind.linearise(layer), layer.previous()
    assert factors.shape == (TIME, BATCH, kind.factors, HIDDEN)
    assert layer.weight_hh.shape == (kind.gates * HIDDEN, HIDDEN)
    c = layer.c_0
    for t in range(TIME):
        h = before[t].requires_grad_()
        cells = [] if c is None else [c.detach().requires_grad_()]
        bias = [layer.bias_ih.clone().requires_grad_(), layer.bias_hh.clone().requires_grad_()]
        after = one_step(cell, layer.input[t], h, *(cells or [None]), [layer.weight_ih, layer.weight_hh, *bias])
        v, source = torch.randn(BATCH, kind.states * HIDDEN).double(), torch.randn(BATCH, HIDDEN).double()
        p, earlier = kind.step(factors[t], v, source, layer.weight_hh)
        of_after = [part + (source if i == 0 else 0) for i, part in enumerate(v.split(HIDDEN, dim=-1))]
        expected = torch.autograd.grad(after, [h, *cells, *bias], of_after)
        torch.testing.assert_close(earlier, torch.cat(expected[: kind.states], dim=-1))
        of_biases = kind.rows_from_input(kind.of_input(p, HIDDEN).sum(0)), kind.of_hidden(p, HIDDEN).sum(0)
        torch.testing.assert_close(of_biases, expected[kind.states :])
        homogeneous, again = kind.step(factors[t], v, None, layer.weight_hh)
        torch.testing.assert_close(again, kind.step(factors[t], v, 0 * source, layer.weight_hh)[1])
        assert p.shape == homogeneous.shape == (BATCH, kind.pre_activations * HIDDEN)
        c = after[1] if c is not None else None


@pytest.mark.parametrize("cell", CELLS)
def test_the_rows_of_a_weight_come_back_in_their_order(cell):
    kind = cell_of(cell)
    weight = torch.randn(kind.gates * HIDDEN, 2)
    assert torch.equal(kind.rows_from_input(kind.rows_of_input(weight)), weight)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 12, 17, 30])
def test_a_scan_solves_its_triangular_system(length):
    a, b, first = torch.randn(length, 2), torch.randn(length, 2), torch.randn(2)
    a, b, first = a.double(), b.double(), first.double()
    for column in range(2):
        matrix = torch.eye(length).double() - torch.diag(a[1:, column], -1)
        right = b[:, column] + F.pad(first[column : column + 1] * a[0, column], (0, length - 1))
        expected = torch.linalg.solve(matrix, right)
        torch.testing.assert_close(linear_scan(a, b, first)[:, column], expected)


def test_a_scan_keeps_what_nothing_forgets():
    ones = torch.ones(400, 1, dtype=torch.float64)
    torch.testing.assert_close(linear_scan(ones, ones, ones[0]), torch.arange(2.0, 402, dtype=torch.float64)[:, None])


def test_the_cell_states_of_an_lstm_are_rebuilt():
    layer = layer_after_forward("lstm", 40, BATCH, HIDDEN)
    factors = cell_of("lstm").linearise(layer)
    module = build("lstm", 3, HIDDEN).double()
    for name, weight in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), layer.weights, strict=True):
        getattr(module, f"{name}_l0").data = weight
    with torch.no_grad():
        found = outputs_of(module, layer.input, (layer.h_0[None], layer.c_0[None]))
    gates = layer.add_from_hidden(layer.from_input())[-1]
    _, _, _, o = gates.chunk(4, dim=-1)
    expected = torch.sigmoid(o) * (1 - torch.tanh(found["c_n"][0]) ** 2)  # the last step's first factor shows c
    torch.testing.assert_close(factors[-1, :, 0], expected)
