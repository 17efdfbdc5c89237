"""Cells, recurrence, and the networks made of them."""

import math

import pytest
import torch
from torch import nn

from lit_parallel.errors import UserError
from lit_parallel.modules.options import CELLS
from lit_parallel.networks.rnn import LastState, NextLevel, Recurrence, SoftplusCell, build_recurrence, keep_state

TIME, BATCH, INPUT, HIDDEN = 5, 3, 2, 4


def refusal(function, *arguments, **options) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the cell ---------------------------------------------------------------------------------------------------------


def test_the_softplus_cell_is_the_papers_equation():
    cell = SoftplusCell(INPUT, HIDDEN, dtype=torch.float64)
    assert {name: [*p.shape] for name, p in cell.named_parameters()} == {
        "weight_ih": [HIDDEN, INPUT],
        "weight_hh": [HIDDEN, HIDDEN],
        "bias": [HIDDEN],
    }
    x, h = torch.rand(BATCH, INPUT, dtype=torch.float64), torch.rand(BATCH, HIDDEN, dtype=torch.float64)
    expected = torch.stack(
        [(1 + (cell.weight_ih @ x[i] + cell.bias + cell.weight_hh @ h[i]).exp()).log() for i in range(BATCH)]
    )
    torch.testing.assert_close(cell(x, h), expected)


def test_the_softplus_cell_starts_like_pytorchs_cells():
    cell = SoftplusCell(3, 400)
    for parameter in cell.parameters():
        assert parameter.abs().max() <= 1 / math.sqrt(400)
        assert float(parameter.detach().std()) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.1)


# -- recurrence -------------------------------------------------------------------------------------------------------


class Tanh(nn.Module):
    """A cell with the parameters of an ``nn.RNN``."""

    def __init__(self, like: nn.RNN) -> None:
        super().__init__()
        self.cell = nn.RNNCell(like.input_size, like.hidden_size, dtype=torch.float64)
        for name, parameter in self.cell.named_parameters():
            parameter.data = getattr(like, f"{name}_l0").data

    def forward(self, x_t, h):
        return self.cell(x_t, h)


@pytest.mark.parametrize("given", [False, True], ids=["", "h_0"])
@pytest.mark.parametrize("shape", [(TIME, BATCH, INPUT), (BATCH, TIME, INPUT), (TIME, INPUT)], ids=str)
def test_recurrence_does_what_pytorchs_does(shape, given):
    batch_first = shape[0] == BATCH
    like = nn.RNN(INPUT, HIDDEN, batch_first=batch_first, dtype=torch.float64)
    recurrence = Recurrence(Tanh(like), HIDDEN, batch_first=batch_first)
    x = torch.rand(shape, dtype=torch.float64)
    h_0 = torch.rand((1, BATCH, HIDDEN) if len(shape) == 3 else (1, HIDDEN), dtype=torch.float64) if given else None
    for found, expected in zip(recurrence(x, h_0), like(x, h_0), strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected)


def test_recurrence_passes_gradients_to_everything():
    cell = SoftplusCell(INPUT, HIDDEN, dtype=torch.float64)
    recurrence = Recurrence(cell, HIDDEN)
    x = torch.rand(TIME, BATCH, INPUT, dtype=torch.float64, requires_grad=True)
    h_0 = torch.rand(1, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(recurrence, (x, h_0))
    recurrence(x, h_0)[1].sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in cell.parameters())


def test_recurrence_says_what_it_is():
    recurrence = Recurrence(SoftplusCell(INPUT, HIDDEN), HIDDEN, batch_first=True)
    assert (recurrence.hidden_size, recurrence.batch_first) == (HIDDEN, True)
    assert [name for name, _ in recurrence.named_children()] == ["cell"]
    assert "hidden_size=4, batch_first=True" in str(recurrence)


@pytest.mark.parametrize(
    ("shape", "h_0", "message"),
    [
        ((TIME,), None, "needs input of 3 dimensions, or 2 if unbatched, not of shape [5]"),
        ((1, 1, TIME, INPUT), None, "needs input of 3 dimensions"),
        ((0, BATCH, INPUT), None, "at least one time step, and input of shape [0, 3, 2] has none"),
        ((TIME, BATCH, INPUT), (BATCH, HIDDEN), "h_0 must be of shape [1, 3, 4] for input of shape [5, 3, 2]"),
        ((TIME, BATCH, INPUT), (1, 1, HIDDEN), "not of shape [1, 1, 4]"),
        ((TIME, INPUT), (1, 1, HIDDEN), "h_0 must be of shape [1, 4]"),
        ((TIME, BATCH, 3), None, "SoftplusCell reads 2 features, and input of shape [5, 3, 3] has 3."),
    ],
)
def test_shapes_that_do_not_fit_are_told(shape, h_0, message):
    recurrence = Recurrence(SoftplusCell(INPUT, HIDDEN), HIDDEN)
    assert message in refusal(recurrence, torch.rand(shape), None if h_0 is None else torch.rand(h_0))


def test_a_cell_of_another_size_is_refused():
    message = "SoftplusCell has hidden_size=4, not 5."
    assert refusal(Recurrence, SoftplusCell(INPUT, HIDDEN), 5) == message


class Returns(nn.Module):
    """A cell that returns something else than the next state."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x_t, h):
        return self.function(h)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda h: (h, h), "Returns must return the next state, of shape [3, 4], not something of type tuple."),
        (lambda h: h[:, 1:], "Returns must return the next state, of shape [3, 4], not something of shape [3, 3]."),
    ],
)
def test_a_cell_that_returns_something_else_is_named(function, message):
    assert refusal(Recurrence(Returns(function), HIDDEN), torch.rand(TIME, BATCH, INPUT)) == message


# -- networks by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_has_its_network(cell):
    network = build_recurrence(cell, INPUT, HIDDEN)
    output, _ = network(torch.rand(BATCH, TIME, INPUT))
    assert output.shape == (BATCH, TIME, HIDDEN)
    kinds = {"softplus": Recurrence, "rnn": nn.RNN, "rnn_relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
    assert type(network) is kinds[cell]
    assert getattr(network, "nonlinearity", None) == {"rnn": "tanh", "rnn_relu": "relu"}.get(cell)


def test_options_reach_the_network():
    network = build_recurrence("gru", INPUT, HIDDEN, layers=2, dropout=0.25, bidirectional=True)
    assert (network.num_layers, network.dropout, network.bidirectional) == (2, 0.25, True)


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        ("softplus", {"layers": 2}, "model.cell=softplus has one layer and one direction"),
        ("softplus", {"bidirectional": True}, "model.cell=softplus has one layer and one direction"),
        ("lstm", {"dropout": 0.5}, "model.dropout acts between layers: set model.layers=2 or more"),
        ("rnn", {"forget_bias": 1.0}, "model.cell=rnn has no gates"),
        ("softplus", {"forget_bias": 0.0}, "model.cell=softplus has no gates"),
    ],
)
def test_networks_that_do_not_exist_are_told(cell, options, message):
    assert message in refusal(build_recurrence, cell, INPUT, HIDDEN, **options)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_forget_bias_keeps_the_state(cell):
    """Of a state, the share that the gate keeps is left, in every layer and direction, and little is added."""
    steps, bias = 20, 5.0
    network = build_recurrence(cell, INPUT, 200, layers=2, bidirectional=True, forget_bias=bias)
    h_0 = torch.full((4, 1, 200), 0.1)
    x = torch.zeros(1, steps, INPUT)
    with torch.no_grad():
        _, last = network(x, (h_0 * 0, h_0)) if cell == "lstm" else network(x, h_0)
    state = last[1] if cell == "lstm" else last
    for kept in state:
        assert float(kept.mean()) / 0.1 == pytest.approx((1 + math.exp(-bias)) ** -steps, abs=0.03)


def test_a_forget_bias_leaves_the_other_gates_alone():
    torch.manual_seed(1)
    plain = build_recurrence("gru", INPUT, HIDDEN)
    torch.manual_seed(1)
    keeping = build_recurrence("gru", INPUT, HIDDEN, forget_bias=3.0)
    for name, parameter in keeping.named_parameters():
        changed = (parameter != dict(plain.named_parameters())[name]).nonzero()[:, 0].tolist()
        assert changed == ([*range(HIDDEN, 2 * HIDDEN)] if "bias" in name else [])
    network = nn.GRU(INPUT, HIDDEN, bias=False)
    keep_state(network, 3.0)  # nothing to set, nothing broken


# -- read-outs --------------------------------------------------------------------------------------------------------


def test_the_next_level_is_predicted_from_the_level_before_and_0_at_first():
    network = NextLevel(build_recurrence("rnn", 1, HIDDEN)).double()
    levels = torch.randint(0, 256, (BATCH, TIME))
    expected = []
    for row in levels.tolist():
        read = torch.tensor([0, *row[:-1]], dtype=torch.float64) / 255
        expected.append(network.output(network.recurrence(read[:, None])[0]))
    found = network(levels)
    assert found.shape == (BATCH, TIME, 256)
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_the_answer_comes_from_the_last_states_of_the_last_layer(cell, bidirectional):
    network = LastState(build_recurrence(cell, INPUT, HIDDEN, layers=2, bidirectional=bidirectional), 3)
    x = torch.rand(BATCH, TIME, INPUT)
    states, _ = network.recurrence(x)
    last = states[:, -1]
    if bidirectional:  # the second direction ends at the first time step
        last = torch.cat([states[:, -1, :HIDDEN], states[:, 0, HIDDEN:]], dim=1)
    torch.testing.assert_close(network(x), network.output(last))
