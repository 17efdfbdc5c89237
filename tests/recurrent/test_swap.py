"""Swapping in and out: nothing but the backward pass changes, and it changes back."""

import copy
import io
import logging
import pickle

import pytest
import torch
from recurrent_helpers import CELLS, SOLVERS, build, gradients, largest_error, outputs_of, states_of
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lit_parallel.errors import UserError
from lit_parallel.networks.rnn import Recurrence, SoftplusCell
from lit_parallel.recurrent import RecurrentOptions, parallelize, records, restore

JACOBI_GS = SOLVERS["jacobi_gs"]


class Model(nn.Module):
    """Several recurrent layers at several depths, one of them in two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(3, 4, bidirectional=True)
        self.inner = nn.Sequential(nn.Linear(8, 4), nn.ModuleDict({"gru": nn.GRU(4, 4, 2)}))
        self.shared = self.inner[1]["gru"]
        self.own = Recurrence(SoftplusCell(4, 4), 4)

    def forward(self, x):
        x = self.inner[0](self.first(x)[0])
        return self.own(self.shared(self.inner[1]["gru"](x)[0])[0])


NAMES = ["first", "inner.1.gru", "own"]
RECORDS = {"first.l0", "first.l0_reverse", "inner.1.gru.l0", "inner.1.gru.l1", "own.cell"}


def model_and_input():
    return Model().double(), torch.randn(13, 2, 3, dtype=torch.float64)


def is_parallel(module):
    return [name for name, layer in module.named_modules() if "forward" in layer.__dict__]


def test_nested_and_shared_layers_are_found_once():
    model, x = model_and_input()
    expected = gradients(model, x, of=("output",))
    assert parallelize(model, JACOBI_GS) == NAMES
    assert is_parallel(model) == NAMES
    assert records(model) == {}  # nothing has run
    assert largest_error(gradients(model, x, of=("output",)), expected) < 1e-9
    assert records(model).keys() == RECORDS


def test_nothing_but_the_backward_pass_changes():
    model, x = model_and_input()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, modules, output = dict(model.named_parameters()), dict(model.named_modules()), model(x)[0]
    for change in (lambda: parallelize(model, JACOBI_GS), lambda: restore(model)):
        change()
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert dict(model.named_modules()) == modules
        torch.testing.assert_close(model(x)[0], output, rtol=1e-12, atol=1e-14)
    assert is_parallel(model) == []
    assert all("forward" not in module.__dict__ for module in modules.values())
    assert records(model) == {}
    restore(model)  # twice does no harm
    parallelize(model, JACOBI_GS)
    Model().double().load_state_dict(model.state_dict())


@pytest.mark.parametrize("cell", CELLS)
def test_a_forward_pass_is_pytorchs_own(cell):
    module = build(cell, 3, 5, 2, bidirectional=True)
    x, states = torch.randn(9, 2, 3), states_of(module, 2)
    expected = outputs_of(module, x, states)
    parallelize(module, JACOBI_GS)
    for name, value in outputs_of(module, x, states).items():
        assert torch.equal(value, expected[name])


def test_a_module_that_is_a_recurrent_layer_itself():
    module = nn.GRU(3, 4).double()
    assert parallelize(module, JACOBI_GS) == [""]
    gradients(module, torch.randn(9, 2, 3, dtype=torch.float64))
    assert records(module).keys() == {"l0"}


def test_parallel_twice_is_an_error_that_changes_nothing():
    model, _ = model_and_input()
    parallelize(model.own, JACOBI_GS)
    with pytest.raises(UserError, match=r"'own' is parallel already.*restore") as caught:
        parallelize(model)
    assert "\n" not in str(caught.value)
    assert is_parallel(model) == ["own"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "saved"])
def test_copies_are_parallel_and_on_their_own(copied):
    model, x = model_and_input()
    expected = gradients(model, x, of=("output",))
    parallelize(model, JACOBI_GS)
    gradients(model, x, of=("output",))
    if copied == "saved":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copied(model)
    assert is_parallel(twin) == NAMES
    assert records(twin) == {}
    assert largest_error(gradients(twin, x, of=("output",)), expected) < 1e-9
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert largest_error(gradients(twin, x, of=("output",)), expected) < 1e-9  # with its own weights
    restore(model)
    assert is_parallel(twin) == NAMES
    restore(twin)
    assert is_parallel(twin) == []


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        output, last = super().forward(input, hx)
        return 2 * output, last


class OwnRecurrence(Recurrence):
    def forward(self, input, h_0=None):
        output, last = super().forward(input, h_0)
        return 2 * output, last


class Subclass(nn.GRU):
    """One that leaves forward alone."""


@pytest.mark.parametrize("layer", [OwnForward(3, 4), OwnRecurrence(SoftplusCell(3, 4), 4)])
def test_a_subclass_with_a_forward_of_its_own_is_left_alone(layer):
    model = nn.ModuleDict({"mine": layer, "other": Subclass(3, 4)})
    x = torch.randn(5, 2, 3)
    expected = layer(x)[0]
    with pytest.warns(UserWarning, match="'mine' has a forward of its own and keeps its backward pass") as caught:
        assert parallelize(model) == ["other"]
    assert len(caught) == 1
    assert torch.equal(layer(x)[0], expected)


def test_a_forward_that_someone_else_has_replaced_is_left_alone():
    layer = nn.GRU(3, 4)
    layer.forward = replaced = lambda x: x
    with pytest.warns(UserWarning, match="The module has a forward of its own"):
        assert parallelize(layer) == []
    restore(layer)
    assert layer.forward is replaced


def test_projections_are_left_alone():
    model = nn.ModuleDict({"small": nn.LSTM(3, 4, proj_size=2)})
    with pytest.warns(UserWarning, match="'small' has proj_size=2 and keeps its backward pass") as caught:
        assert parallelize(model) == []
    assert len(caught) == 1


def test_packed_sequences_keep_their_backward_pass(caplog):
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 4).double()})
    packed = pack_padded_sequence(torch.randn(7, 3, 3, dtype=torch.float64), torch.tensor([7, 5, 2]))

    def found():
        output, _ = model["rnn"](packed)
        return torch.autograd.grad(output.data.square().sum(), list(model.parameters()))

    expected = found()
    parallelize(model, JACOBI_GS)
    for _ in range(2):
        for ours, theirs in zip(found(), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert [record.message for record in caplog.records] == [
        "'rnn' was given a packed sequence and keeps its backward pass."
    ]
    assert records(model) == {}


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}])
@pytest.mark.parametrize("cell", CELLS)
def test_wrong_arguments_get_pytorchs_own_messages(cell, options):
    module = build(cell, 3, 4, **options)
    state, wrong = torch.zeros(2, 2, 4), torch.zeros(2, 2, 5)
    mistakes = [
        (torch.zeros(5, 2, 2),),
        (torch.zeros(5, 2),),
        (torch.zeros(5, 2, 3, 1),),
        (torch.zeros(5, 2, 3), (wrong, wrong)),
        (torch.zeros(5, 2, 3), wrong),
        (torch.zeros(5, 2, 3), state[:, :1].repeat(2, 3, 1)),
        (torch.zeros(5, 3), state),
        (torch.zeros(5, 2, 3).double(),),
    ]

    def message(arguments):
        try:
            module(*arguments)
        except Exception as error:
            return type(error), str(error)

    expected = [message(arguments) for arguments in mistakes]
    assert expected.count(None) <= 1  # a tensor of two states is what an LSTM may be given
    parallelize(module, JACOBI_GS)
    assert [message(arguments) for arguments in mistakes] == expected


@pytest.mark.parametrize("chosen", [{}, {"solver": "sequential"}])
def test_without_gradients_nothing_is_parallel(chosen):
    module = nn.LSTM(3, 4)
    parallelize(module, **chosen)
    with torch.no_grad():
        module(torch.randn(5, 2, 3))
    module.requires_grad_(False)
    output, _ = module.eval()(torch.randn(5, 2, 3))
    assert not output.requires_grad
    assert records(module) == {}


def test_sequential_is_the_ordinary_way():
    module = nn.GRU(3, 4)
    parallelize(module, solver="sequential")
    output, _ = module(torch.randn(5, 2, 3))
    assert not output.grad_fn.name().startswith("_Layer")
    (first,) = torch.autograd.grad(output.square().sum(), module.weight_hh_l0, create_graph=True)
    first.sum().backward()
    assert records(module) == {}


def test_eval_mode_is_differentiable():
    module = nn.GRU(3, 4, 2, dropout=0.9).double().eval()
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    expected = gradients(module, x)
    parallelize(module, JACOBI_GS)
    assert largest_error(gradients(module, x), expected) < 1e-10


def test_dropout_between_layers():
    """As many values are dropped, and what remains is as much larger, as PyTorch's own."""
    module = nn.RNN(2, 500, 2, nonlinearity="relu", dropout=0.25)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_ih_l0.fill_(1.0)
        module.weight_ih_l1.copy_(torch.eye(500))
    parallelize(module, JACOBI_GS)
    output, last = module(torch.zeros(8, 5, 2))
    values, counts = output.detach().unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.75]))
    assert float(counts[0] / counts.sum()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(last[1], output[-1])
    assert (last[0] == 1).all()  # before it
    (grad,) = torch.autograd.grad(output.sum(), module.bias_ih_l1)
    assert torch.equal(grad, (output.detach() > 0).float().sum((0, 1)))


def test_weights_that_change_before_the_backward_pass_are_noticed():
    for module in (nn.LSTM(3, 4), Recurrence(SoftplusCell(3, 4), 4)):
        parallelize(module, JACOBI_GS)
        output, _ = module(torch.randn(5, 2, 3))
        with torch.no_grad():
            next(module.parameters()).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_hooks_still_run():
    module, seen = nn.GRU(3, 4), []
    module.register_forward_hook(lambda module, inputs, output: seen.append(output[0].shape))
    parallelize(module, JACOBI_GS)
    module(torch.randn(5, 2, 3))
    assert seen == [(5, 2, 4)]


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        ({"solver": "jacoby"}, "Option 'solver' cannot be 'jacoby'. Did you mean 'jacobi'?"),
        ({"iterations": 0}, "Option 'iterations' must be >= 1, not 0."),
        ({"tolerance": 0.0}, "Option 'tolerance' must be > 0, not 0.0."),
        ({"tolerance": float("nan")}, "Option 'tolerance' must be a finite number, not nan."),
        ({"block_size": 0}, "Option 'block_size' must be >= 1, not 0."),
        ({"rank": -1}, "Option 'rank' must be >= 1, not -1."),
        ({"probe_every": -1}, "Option 'probe_every' must be >= 0, not -1."),
        ({"precision": "single"}, "Option 'precision' cannot be 'single'. Known: full, half."),
        ({"iteration": 3}, "There is no option 'iteration' of parallel backpropagation. Did you mean 'iterations'?"),
    ],
)
def test_mistaken_options_get_one_clear_line(chosen, line):
    module = nn.GRU(3, 4)
    with pytest.raises(UserError) as caught:
        parallelize(module, **chosen)
    assert str(caught.value) == line
    assert is_parallel(module) == []


def test_options_are_copied():
    options = RecurrentOptions(solver="jacobi")
    module = nn.GRU(3, 4)
    parallelize(module, options, iterations=3)
    assert options == RecurrentOptions(solver="jacobi")
    options.iterations = 5
    gradients(module, torch.randn(9, 2, 3))
    assert records(module)["l0"].iterations == 3


def test_nobody_is_told_anything_where_all_is_well(caplog):
    model, x = model_and_input()
    parallelize(model, JACOBI_GS)
    with caplog.at_level(logging.INFO):
        gradients(model, x, of=("output",))
    assert caplog.records == []


def test_a_module_may_be_restored_before_the_backward_pass():
    module = nn.GRU(2, 3)
    parallelize(module, solver="jacobi_gs")
    loss = module(torch.randn(9, 2))[0].sum()
    restore(module)
    loss.backward()
    assert module.weight_hh_l0.grad is not None


def test_warnings_as_errors_leave_nothing_half_done():
    module = nn.ModuleList([nn.GRU(2, 3), nn.LSTM(2, 3, proj_size=2)])
    with pytest.raises(UserWarning, match="proj_size"):
        parallelize(module)
    assert all("forward" not in layer.__dict__ for layer in module)


def test_an_empty_batch_and_a_list_of_states_are_as_before():
    module = nn.LSTM(2, 3)
    states = [torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)]
    x = torch.randn(5, 4, 2)
    expected = module(x, states)[0]
    parallelize(module)
    assert torch.equal(module(x, states)[0], expected)
    assert module(torch.randn(5, 0, 2))[0].shape == (5, 0, 3)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_last_states_can_be_detached_in_place(cell):
    module = build(cell, 3, 4)
    parallelize(module, SOLVERS["jacobi_gs"])
    hx = None
    for _ in range(2):
        output, hx = module(torch.randn(6, 2, 3), hx)
        output.sum().backward()
        for state in hx if cell == "lstm" else (hx,):
            assert state.shape == (1, 2, 4)
            state.detach_()
