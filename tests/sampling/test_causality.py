"""The check for causality: accepts what is causal, and names what a network sees that it must not."""

from types import SimpleNamespace

import pytest
import torch
from small_models import MaskedNetwork, categorical, pixelcnnpp
from torch import nn

import lit_parallel
from lit_parallel.conditionals import Categorical, DiscretizedLogisticMixture, Logistic
from lit_parallel.errors import UserError
from lit_parallel.modules.conditional import ConditionalModule
from lit_parallel.networks import MADE
from lit_parallel.sampling.causality import check_causality

SHAPE = (1, 4, 8)
LENGTH = 32


class Transformer(nn.Module):
    """Two causal layers over levels, shifted by a start token; ``shift=False`` forgets the shift."""

    def __init__(self, levels: int = 8, shift: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(levels + 1, 16)
        self.place = nn.Parameter(torch.randn(LENGTH, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(16, levels)
        self.start, self.shift = levels, shift

    def forward(self, x):
        if self.shift:
            x = torch.cat([torch.full_like(x[:, :1], self.start), x[:, :-1]], dim=1)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=self.place.dtype)
        return self.output(self.layers(self.embedding(x) + self.place, mask=mask, is_causal=True))


class MeanAndLogScale(nn.Module):
    """A MADE with its two outputs side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.made = MADE(LENGTH, [40])

    def forward(self, x):
        return torch.stack(self.made(x), dim=-1)


class Leaky(nn.Module):
    """A causal network, but one number of the output at a position also sees the value at another."""

    def __init__(self, network, output: int, value: int, parameter: int, strength: float = 1e-3) -> None:
        super().__init__()
        self.network = network
        self.output, self.value, self.parameter, self.strength = output, value, parameter, strength

    def forward(self, x, *labels):
        outputs = self.network(x, *labels).clone()
        if x.dim() == 4:  # the layout "image"; of the channels the last
            seen, into = x[:, -1].flatten(1)[:, self.value], outputs.flatten(2)[:, self.parameter, self.output]
        else:
            seen, into = x.flatten(1)[:, self.value], outputs[:, self.output, self.parameter]
        into += self.strength * seen  # a view
        return outputs


def causal(kind: str) -> ConditionalModule:
    if kind == "masked":
        return categorical(SHAPE, 5)
    if kind == "masked, two levels, labels":
        return categorical(SHAPE, 2, num_classes=3)
    if kind == "transformer":
        return ConditionalModule(Transformer(), Categorical(8), SHAPE)
    if kind == "logistic MADE":
        return ConditionalModule(MeanAndLogScale(), Logistic(), SHAPE)
    if kind == "mixture in a sequence":
        network = Scaled(MaskedNetwork(LENGTH, 256, 6))
        return ConditionalModule(network, DiscretizedLogisticMixture(1, 2), SHAPE)
    classes = 3 if "labels" in kind else None
    return pixelcnnpp((3, *SHAPE[1:]) if "colour" in kind else SHAPE, num_classes=classes, filters=3)


class Scaled(nn.Module):
    """Reads pixels in [-1, 1] instead of levels."""

    def __init__(self, network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(((x[..., 0] + 1) * 127.5).round().long())


KINDS = [
    "masked",
    "masked, two levels, labels",
    "transformer",
    "logistic MADE",
    "mixture in a sequence",
    "PixelCNN++",
    "PixelCNN++, colour, labels",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_causal_is_accepted_and_left_as_it_was(kind):
    model = causal(kind).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    lit_parallel.check_causality(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("output", "value"), [(0, 0), (0, 1), (5, 5), (5, 6), (2, 29), (30, 31), (31, 31)], ids=lambda i: str(i)
)
def test_a_leak_is_found_and_named_exactly(kind, output, value):
    model = causal(kind)
    model.network = Leaky(model.network, output, value, parameter=1)
    with pytest.raises(UserError) as error:
        check_causality(model)
    assert str(error.value) == (
        f"Leaky is not causal: its output at position {output} changes with the value at position {value}, but may "
        f"depend on values before position {output} only (positions count from 0)."
    )


@pytest.mark.parametrize(("output", "value"), [(1, 0), (31, 30), (31, 0), (9, 8)])
def test_reading_earlier_values_is_no_leak(output, value):
    model = categorical(SHAPE, 5)
    model.network = Leaky(model.network, output, value, parameter=1)
    check_causality(model)


def test_a_transformer_without_the_shift_sees_its_own_value():
    with pytest.raises(
        UserError, match=r"Transformer is not causal: its output at position 31 changes .* position 31,"
    ):
        check_causality(ConditionalModule(Transformer(shift=False), Categorical(8), SHAPE))


def test_a_network_that_sees_everything_is_told_its_last_value_and_first_output():
    class Mean(nn.Module):
        def forward(self, x):
            return x.double().mean(dim=1)[:, None, None].expand(-1, LENGTH, 4)

    with pytest.raises(UserError, match=r"Mean is not causal: its output at position 0 changes .* position 31,"):
        check_causality(ConditionalModule(Mean(), Categorical(4), SHAPE))


def test_a_leak_into_a_value_that_is_not_finite_is_a_leak():
    class Explodes(nn.Module):
        def forward(self, x):
            first = (x[:, 9] % 2 == 1) & (x[:, 0] >= 0)
            outputs = torch.zeros(len(x), LENGTH, 4, dtype=torch.float64)
            outputs[:, 3, 2] = torch.where(first, float("nan"), 0.0)
            return outputs

    found = []
    for seed in range(4):
        with pytest.raises(UserError) as error:
            check_causality(ConditionalModule(Explodes(), Categorical(4), SHAPE), seed=seed, trials=8)
        found.append(str(error.value))
    assert any("output at position 3 changes with the value at position 9," in message for message in found)


@pytest.mark.parametrize("seed", range(12))
def test_one_trial_is_enough_for_two_levels(seed):
    """A value that is drawn anew must be another one."""
    model = categorical(SHAPE, 2)
    model.network = Leaky(model.network, 4, 17, parameter=0)
    with pytest.raises(UserError, match="position 4 changes with the value at position 17,"):
        check_causality(model, trials=1, seed=seed)


class Returns(nn.Module):
    def __init__(self, *shape: int, value: float = 0.0) -> None:
        super().__init__()
        self.shape, self.value = shape, value

    def forward(self, x):
        return torch.full((len(x), *self.shape), self.value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("layout", "network", "message"),
    [
        ("sequence", Returns(LENGTH, 7), "= [16, 32, 7] for 16 samples: it must be [16, 32, 6]."),
        ("sequence", Returns(LENGTH), "= [16, 32] for 16 samples: it must be [16, 32, 6]."),
        ("sequence", Returns(6, LENGTH), "= [16, 6, 32] for 16 samples: it must be [16, 32, 6]."),
        ("image", Returns(7, 4, 8), "= [16, 32, 7] for 16 samples: it must be [16, 32, 6]."),
        ("image", Returns(6, 4, 9), "= [16, 36, 6] for 16 samples: it must be [16, 32, 6]."),
        ("image", Returns(6), "= [16, 6] for 16 samples: it must be [16, 32, 6]."),
        ("image", Returns(6, 4, 8, value=float("nan")), "Returns returned values that are not finite"),
    ],
)
def test_outputs_of_another_shape_are_told_in_one_line(layout, network, message):
    model = ConditionalModule(network, DiscretizedLogisticMixture(1, 2), SHAPE, layout=layout)
    with pytest.raises(UserError) as error:
        check_causality(model)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_anything_with_a_network_conditional_and_positions_can_be_checked():
    model = categorical(SHAPE, 5)
    parts = SimpleNamespace(
        network=model.network, conditional=model.conditional, positions=model.positions, num_classes=None
    )
    check_causality(parts)


def test_it_takes_as_many_passes_as_it_says():
    model = categorical(SHAPE, 5)
    rows = []
    model.network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    check_causality(model, trials=3, batch_size=8)
    assert rows == 3 * [8] * (2 + LENGTH // 8)  # the input itself, twice, and the variants
