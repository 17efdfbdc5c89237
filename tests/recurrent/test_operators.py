"""Parallel layers among PyTorch's own machinery: the compiler, autocast, threads, second derivatives."""

import threading

import pytest
import torch
from recurrent_helpers import CELLS, SOLVERS, build, gradients, largest_error, relative_error, states_of
from torch import nn

from lit_parallel.errors import UserError
from lit_parallel.networks.rnn import Recurrence, SoftplusCell
from lit_parallel.recurrent import RecurrentOptions, parallelize, records, restore
from lit_parallel.recurrent.controller import Controller
from lit_parallel.recurrent.operators import register


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, *states):
        return self.layer(torch.tanh(x), *states)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.usefixtures("compiler")
def test_a_compiled_module_is_one_graph(cell, given):
    model = Wrapped(build(cell, 3, 5, 2, bidirectional=True)).double()
    x, states = torch.randn(2, 3, 9, 2, 3).double(), states_of(model.layer, 2) if given else ()
    hx = (states,) if cell == "lstm" and given else states
    x = x[0, 0]

    def found(model):
        leaf = x.clone().requires_grad_()
        output, _ = model(leaf, *hx)
        return torch.autograd.grad(output.square().sum(), [leaf, *model.parameters()])

    expected = found(model)
    parallelize(model, SOLVERS["jacobi_gs"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for ours, theirs in zip(found(compiled), expected, strict=True):
            assert relative_error(ours, theirs) < 1e-10
    assert records(model)["layer.l1_reverse"].sweeps >= 1


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_the_operators_keep_their_contracts(cell, frozen):
    controller = Controller("checked", RecurrentOptions(solver="jacobi_gs", probe_every=0))
    number = register(controller)
    module = build(cell, 3, 4).double()
    weights = [parameter.detach().requires_grad_(not frozen) for parameter in module.parameters()]
    x, h_0 = torch.randn(9, 2, 3).double().requires_grad_(), torch.randn(1, 2, 4).double()
    c_0 = torch.randn(1, 2, 4).double().requires_grad_() if cell == "lstm" else None
    arguments = (x, h_0, c_0, *weights)
    torch.library.opcheck(torch.ops.lit_parallel.recurrent_layer.default, (*arguments, cell, number))
    output, h, c = torch.ops.lit_parallel.recurrent_layer(*arguments, cell, number)
    given = [value.detach() for value in (torch.randn_like(output), h, c)]
    needed = [value is not None and value.requires_grad for value in arguments]
    values = [value if value is None else value.detach() for value in arguments]
    torch.library.opcheck(
        torch.ops.lit_parallel.recurrent_layer_backward.default,
        (*given, *values, output.detach(), needed, cell, number),
    )


@pytest.mark.parametrize("cell", [*CELLS, "own"])
def test_autocast(cell):
    module = Recurrence(SoftplusCell(3, 8), 8) if cell == "own" else build(cell, 3, 8, 2, bidirectional=True)
    x = torch.randn(30, 2, 3)

    def found(x):
        with torch.autocast("cpu", torch.bfloat16):
            output, last = module(x)
        last = last if isinstance(last, tuple) else (last,)
        grads = torch.autograd.grad(output.float().square().sum(), list(module.parameters()))
        return [output, *last], grads

    for given in (x, x.bfloat16()):
        expected, of_expected = found(given)
        parallelize(module, SOLVERS["jacobi_gs"])
        ours, of_ours = found(given)
        assert [value.dtype for value in ours] == [value.dtype for value in expected]
        assert all(relative_error(a, b) < 2e-2 for a, b in zip(ours, expected, strict=True))
        assert all(grad.dtype == torch.float32 for grad in of_ours)
        assert all(relative_error(a, b) < 3e-2 for a, b in zip(of_ours, of_expected, strict=True))
        restore(module)


@pytest.mark.parametrize("cell", CELLS)
def test_a_backward_pass_under_autocast_is_in_full_precision(cell):
    module, x = build(cell, 3, 8), torch.randn(30, 2, 3)
    parallelize(module, SOLVERS["jacobi_gs"])
    loss = module(x)[0].square().sum()
    outside = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(loss, list(module.parameters()))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(inside, outside, strict=True))


def test_second_derivatives_are_refused():
    for module in (nn.LSTM(3, 4), Recurrence(SoftplusCell(3, 4), 4)):
        parallelize(module, SOLVERS["jacobi_gs"])
        output, _ = module(torch.randn(5, 2, 3))
        with pytest.raises(UserError, match=r"no second derivative .*restore\(module\)") as caught:
            torch.autograd.grad(output.sum(), list(module.parameters()), create_graph=True)
        assert "\n" not in str(caught.value)


def test_a_graph_that_is_kept_can_be_used_again():
    module = nn.GRU(3, 4)
    parallelize(module, SOLVERS["jacobi_gs"])
    output, _ = module(torch.randn(9, 2, 3))
    first = torch.autograd.grad(output.sum(), module.weight_hh_l0, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), module.weight_hh_l0), first, rtol=1e-5, atol=1e-6)


def test_a_backward_pass_in_another_thread():
    module, x = nn.LSTM(3, 4, 2).double(), torch.randn(12, 2, 3, dtype=torch.float64)
    expected = gradients(module, x, of=("output",))
    parallelize(module, SOLVERS["jacobi_gs"])
    found = []
    threads = [threading.Thread(target=lambda: found.append(gradients(module, x, of=("output",)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(largest_error(ours, expected) < 1e-10 for ours in found)
