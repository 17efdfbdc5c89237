"""A recurrence with a cell of one's own, whose adjoint is made of the cell's own backward pass."""

import copy

import pytest
import torch
from recurrent_helpers import gradients, largest_error, relative_error
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.errors import UserError
from lit_parallel.networks.rnn import Recurrence, SoftplusCell
from lit_parallel.recurrent import RecurrentOptions, parallelize, records

SOLVERS = {
    "jacobi": RecurrentOptions(solver="jacobi", probe_every=0),
    "jacobi_gs": RecurrentOptions(solver="jacobi_gs", block_size=4, probe_every=0),
    "two_level": RecurrentOptions(solver="two_level", block_size=5, rank=3, probe_every=0),
    "auto": RecurrentOptions(probe_every=0),
}


class Leaky(nn.Module):
    """Remembers: a slow average of a small network, which is frozen in part."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
        self.inner[0].requires_grad_(False)
        self.rate = nn.Parameter(torch.tensor(0.05))

    def forward(self, x_t, h):
        return h + self.rate * (self.inner(torch.cat([x_t, h], dim=-1)) - 0.1 * h)


class IgnoresInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x_t, h):
        return torch.tanh(self.linear(h))


class IgnoresState(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x_t, h):
        return torch.tanh(self.linear(x_t))


class NoParameters(nn.Module):
    def forward(self, x_t, h):
        return torch.sin(h + F.pad(x_t, (0, 2)))


CELLS = {
    "softplus": lambda: SoftplusCell(3, 5),
    "gru": lambda: nn.GRUCell(3, 5),
    "leaky": Leaky,
    "ignores input": IgnoresInput,
    "ignores state": IgnoresState,
    "no parameters": NoParameters,
}


def exists(grads):
    """Without those that are zero, which autograd calls None."""
    return {name: grad for name, grad in grads.items() if bool((grad != 0).any())}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_autograds(cell, solver):
    module = Recurrence(CELLS[cell](), 5).double()
    x, h_0 = torch.randn(23, 3, 3, dtype=torch.float64), torch.randn(1, 3, 5, dtype=torch.float64)
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    frozen = [name for name, _ in module.named_parameters() if name not in trainable]
    expected = gradients(module, x, (h_0,), frozen=frozen)
    parallelize(module, SOLVERS[solver])
    for _ in range(2):
        ours = gradients(module, x, (h_0,), frozen=frozen)
        assert largest_error(exists(ours), exists(expected)) < 1e-9
    assert not {name for name in ours if name.startswith("cell")} - trainable


@pytest.mark.parametrize("length", [1, 2, 7, 24])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("frozen", [(), ("input",), ("cell",), ("cell", "input")])
def test_layouts(length, batch_first, batch, given, frozen):
    if frozen == ("cell", "input") and not given:
        return  # nothing needs a gradient
    module = Recurrence(SoftplusCell(3, 5), 5, batch_first=batch_first).double()
    shape = [length, 3] if batch is None else [batch, length, 3] if batch_first else [length, batch, 3]
    states = (torch.randn([n for n in (1, batch, 5) if n is not None], dtype=torch.float64),) if given else ()
    arguments = torch.randn(shape, dtype=torch.float64), states, ("output", "h_n")[length % 2 :], frozen
    expected = gradients(module, *arguments)
    expected_output = module(arguments[0], *states)
    parallelize(module, SOLVERS["jacobi_gs"])
    for ours, theirs in zip(module(arguments[0], *states), expected_output, strict=True):
        assert torch.equal(ours, theirs)
    assert largest_error(gradients(module, *arguments), expected) < 1e-10


def test_a_cell_that_ignores_everything_that_has_a_gradient():
    module = Recurrence(IgnoresInput(), 5).requires_grad_(False)
    parallelize(module, SOLVERS["jacobi_gs"])
    x = torch.randn(9, 2, 3, requires_grad=True)
    output, _ = module(x)
    assert torch.autograd.grad(output.sum(), x, allow_unused=True) == (None,)


def test_float32():
    module, x = Recurrence(SoftplusCell(3, 5), 5), torch.randn(40, 2, 3)
    exact = gradients(copy.deepcopy(module).double(), x.double())
    autograds = gradients(module, x)
    parallelize(module, SOLVERS["jacobi_gs"])
    assert largest_error(gradients(module, x), exact) < 1e-6 + 3 * largest_error(autograds, exact)


def test_fixed_iterations_are_truncated_backpropagation():
    """The gradient of x_t is that of the next three losses."""
    module = Recurrence(SoftplusCell(3, 5), 5).double()
    x = torch.randn(9, 1, 3, dtype=torch.float64, requires_grad=True)
    losses = module(x)[0].square().sum((1, 2))
    expected = torch.stack([torch.autograd.grad(losses[t : t + 3].sum(), x, retain_graph=True)[0][t] for t in range(9)])
    parallelize(module, solver="jacobi", iterations=3, probe_every=0)
    (ours,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    torch.testing.assert_close(ours, expected)
    record = records(module)["cell"]
    assert (record.solver, record.iterations, record.sweeps, record.length) == ("jacobi", 3, 1, 9)


def test_wrong_shapes_get_the_modules_own_messages():
    module = Recurrence(SoftplusCell(3, 5), 5)
    mistakes = [
        (torch.zeros(5),),
        (torch.zeros(5, 2, 4),),
        (torch.zeros(0, 2, 3),),
        (torch.zeros(5, 2, 3), torch.zeros(1, 2, 6)),
        (torch.zeros(5, 2, 3), torch.zeros(2, 2, 5)),
        (torch.zeros(5, 2, 3), torch.zeros(1, 5)),
        (torch.zeros(5, 3), torch.zeros(2, 5)),
    ]

    def message(arguments):
        with pytest.raises(UserError) as caught:
            module(*arguments)
        return str(caught.value)

    expected = [message(arguments) for arguments in mistakes]
    parallelize(module, SOLVERS["jacobi_gs"])
    assert [message(arguments) for arguments in mistakes] == expected


class Dropping(SoftplusCell):
    def forward(self, x_t, h):
        return super().forward(F.dropout(x_t, 0.5, self.training), h)


class Normalising(SoftplusCell):
    def forward(self, x_t, h):
        return F.batch_norm(super().forward(x_t, h), None, None, training=True)


@pytest.mark.parametrize("cell", [Dropping, Normalising])
def test_a_cell_that_does_not_repeat_itself_is_refused(cell):
    module = Recurrence(cell(3, 5), 5)
    parallelize(module, SOLVERS["jacobi_gs"])
    output, _ = module(torch.randn(9, 4, 3))
    with pytest.raises(UserError, match="must follow from x_t and h alone") as caught:
        output.sum().backward()
    assert "\n" not in str(caught.value)


def test_a_cell_that_drops_nothing_in_eval_mode_is_fine():
    module = Recurrence(Dropping(3, 5), 5).eval()
    x = torch.randn(9, 4, 3)
    expected = gradients(module, x)
    parallelize(module, SOLVERS["jacobi_gs"])
    assert relative_error(gradients(module, x)["input"], expected["input"]) < 1e-5


@pytest.mark.parametrize("solver", ["jacobi_gs", "auto"])
def test_hooks_of_parameters_see_the_gradient_once(solver):
    module, seen = Recurrence(SoftplusCell(2, 3), 3).double(), []
    x = torch.randn(12, 2, 2).double()
    module(x)[0].sum().backward()
    expected = module.cell.weight_hh.grad.clone()
    module.zero_grad()
    module.cell.weight_hh.register_hook(lambda grad: seen.append(grad) or 0.5 * grad)
    parallelize(module, solver=solver)
    module(x)[0].sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(module.cell.weight_hh.grad, 0.5 * expected)
