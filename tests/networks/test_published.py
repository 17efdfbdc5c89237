"""Published weights, against a small network of the port's architecture and names, written here for comparison."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.conditionals import DiscretizedLogisticMixture
from lit_parallel.errors import UserError
from lit_parallel.networks.published import from_published

# -- the port's architecture ------------------------------------------------------------------------------------------


class ConvLayer(nn.Module):
    """A convolution by zero padding: (left, right, above, below); its result is moved by `shift` rows or columns."""

    def __init__(self, inputs, outputs, kernel, padding, stride=1, shift=None):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride)
        self.padding, self.shift = padding, shift

    def forward(self, x):
        y = self.conv(F.pad(x, self.padding))
        if self.shift == "down":
            return torch.cat([torch.zeros_like(y[:, :, :1]), y[:, :, :-1]], dim=2)
        if self.shift == "right":
            return torch.cat([torch.zeros_like(y[..., :1]), y[..., :-1]], dim=3)
        return y


def u_conv(inputs, outputs, stride=1):
    return ConvLayer(inputs, outputs, (2, 3), (1, 1, 1, 0), stride)


def ul_conv(inputs, outputs, stride=1):
    return ConvLayer(inputs, outputs, (2, 2), (1, 0, 1, 0), stride)


class DeconvLayer(nn.Module):
    def __init__(self, filters, kernel, crop):
        super().__init__()
        self.deconv = nn.ConvTranspose2d(filters, filters, kernel, 2, output_padding=1)
        self.crop = crop

    def forward(self, x):
        y = self.deconv(x)
        left, right = self.crop
        return y[:, :, : y.shape[2] - 1, left : y.shape[3] - right]


class Nin(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.lin_a = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.lin_a(x.movedim(1, -1)).movedim(-1, 1)


class Gated(nn.Module):
    def __init__(self, filters, convolution, skips):
        super().__init__()
        self.conv_input = convolution(2 * filters, filters)
        if skips:
            self.nin_skip = Nin(2 * skips * filters, filters)
        self.conv_out = convolution(2 * filters, 2 * filters)

    def forward(self, x, skip=None):
        y = self.conv_input(both_signs(x))
        if skip is not None:
            y = y + self.nin_skip(both_signs(skip))
        value, gate = self.conv_out(both_signs(y)).chunk(2, dim=1)
        return x + value * gate.sigmoid()


def both_signs(x):
    return torch.cat([F.elu(x), F.elu(-x)], dim=1)


class Streams(nn.Module):
    def __init__(self, resnets, filters, skips):
        super().__init__()
        self.u_stream = nn.ModuleList(Gated(filters, u_conv, skips) for _ in range(resnets))
        self.ul_stream = nn.ModuleList(Gated(filters, ul_conv, skips + 1) for _ in range(resnets))


class Port(nn.Module):
    def __init__(self, channels, outputs, filters, resnets):
        super().__init__()
        self.down_layers = nn.ModuleList(Streams(resnets + extra, filters, 1) for extra in (0, 1, 1))
        self.up_layers = nn.ModuleList(Streams(resnets, filters, 0) for _ in range(3))
        self.downsize_u_stream = nn.ModuleList(u_conv(filters, filters, 2) for _ in range(2))
        self.downsize_ul_stream = nn.ModuleList(ul_conv(filters, filters, 2) for _ in range(2))
        self.upsize_u_stream = nn.ModuleList(DeconvLayer(filters, (2, 3), (1, 1)) for _ in range(2))
        self.upsize_ul_stream = nn.ModuleList(DeconvLayer(filters, (2, 2), (0, 1)) for _ in range(2))
        self.u_init = ConvLayer(channels + 1, filters, (2, 3), (1, 1, 1, 0), shift="down")
        self.ul_init = nn.ModuleList(
            [
                ConvLayer(channels + 1, filters, (1, 3), (1, 1, 0, 0), shift="down"),
                ConvLayer(channels + 1, filters, (2, 1), (0, 0, 1, 0), shift="right"),
            ]
        )
        self.nin_out = Nin(filters, outputs)

    def forward(self, x):
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        us, uls = [self.u_init(x)], [self.ul_init[0](x) + self.ul_init[1](x)]
        for level, streams in enumerate(self.up_layers):
            for u_resnet, ul_resnet in zip(streams.u_stream, streams.ul_stream, strict=True):
                us.append(u_resnet(us[-1]))
                uls.append(ul_resnet(uls[-1], us[-1]))
            if level < 2:
                us.append(self.downsize_u_stream[level](us[-1]))
                uls.append(self.downsize_ul_stream[level](uls[-1]))
        u, ul = us.pop(), uls.pop()
        for level, streams in enumerate(self.down_layers):
            for u_resnet, ul_resnet in zip(streams.u_stream, streams.ul_stream, strict=True):
                u = u_resnet(u, us.pop())
                ul = ul_resnet(ul, torch.cat([u, uls.pop()], dim=1))
            if level < 2:
                u, ul = self.upsize_u_stream[level](u), self.upsize_ul_stream[level](ul)
        assert not us
        assert not uls
        return self.nin_out(F.elu(ul))


def port(channels=1, mixtures=2, filters=4, resnets=1, dtype=torch.float64):
    """The port with random weights of a size at which every layer matters to the output."""
    network = Port(channels, mixtures * (3 if channels == 1 else 10), filters, resnets).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
    return network


def port_log_prob(outputs, levels, mixtures):
    """The port's likelihood, channel by channel and straight from the definition: ``[batch, height, width]``."""
    x = levels / 127.5 - 1
    total = outputs[:, :mixtures].log_softmax(dim=1)
    for channel in range(x.shape[1]):
        numbers = 3 if x.shape[1] == 3 else 2  # per component: mean, log-scale, and in colour a coefficient
        start = [mixtures * (1 + channel * numbers + number) for number in range(numbers)]
        mean, log_scale = (outputs[:, begin : begin + mixtures] for begin in start[:2])
        coefficients = [
            outputs[:, begin : begin + mixtures].tanh()
            for begin in (mixtures * (1 + other * numbers + 2) for other in range(x.shape[1]))
        ]
        if channel == 1:
            mean = mean + coefficients[0] * x[:, :1]
        if channel == 2:
            mean = mean + coefficients[1] * x[:, :1] + coefficients[2] * x[:, 1:2]
        here, scale = x[:, channel, None], log_scale.clamp(min=-7).exp()
        upper = torch.where(here > 0.999, 1.0, ((here + 1 / 255 - mean) / scale).sigmoid())
        lower = torch.where(here < -0.999, 0.0, ((here - 1 / 255 - mean) / scale).sigmoid())
        total = total + (upper - lower).log()
    return total.logsumexp(dim=1)


def named(network, style):
    """Its state dict as torch's weight norm writes it; any length goes with a direction, so these are random."""
    if style == "plain":
        return dict(network.state_dict())
    length_name, direction_name = {
        "legacy": ("weight_g", "weight_v"),
        "parametrizations": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    }[style]
    state = {}
    for key, value in network.state_dict().items():
        layer, _, last = key.rpartition(".")
        if last == "bias":
            state[key] = value
            continue
        length = torch.linalg.vector_norm(value, dim=tuple(range(1, value.dim())), keepdim=True)
        state[f"{layer}.{length_name}"] = length
        state[f"{layer}.{direction_name}"] = value * torch.rand_like(length).add(0.5)
    return state


STYLES = ["legacy", "parametrizations", "plain"]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same_outputs(network, published, tolerance, dtype=torch.float64, size=(8, 12)):
    x = torch.rand(2, network.channels, *size, dtype=dtype) * 2 - 1
    with torch.no_grad():
        wanted = published(x)
        assert 0.1 < wanted.std() < 10
        torch.testing.assert_close(network(x), wanted, rtol=tolerance, atol=tolerance)


# -- what is converted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("resnets", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("float64")
def test_the_network_computes_what_the_port_computes(channels, resnets, style):
    published = port(channels, resnets=resnets)
    network = from_published(named(published, style))
    assert (network.channels, network.outputs) == (channels, 6 if channels == 1 else 20)
    assert (network.filters, network.resnets) == (4, resnets)
    assert not network.training
    assert_same_outputs(network, published, 1e-10)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("float64")
def test_the_outputs_mean_what_they_mean_to_the_port(channels):
    published = port(channels, mixtures=3)
    levels = torch.randint(256, (4, channels, 8, 8)).double()
    levels[:, :, 0, 0], levels[:, :, 0, 1] = 0, 255
    conditional = DiscretizedLogisticMixture(channels, 3)
    x = levels.movedim(1, -1)
    with torch.no_grad():
        outputs = from_published(named(published, "legacy"))(conditional.encode(levels))
        log_prob = conditional.log_prob(outputs.movedim(1, -1), x)
        wanted = port_log_prob(published(levels / 127.5 - 1), levels, mixtures=3)
    torch.testing.assert_close(log_prob, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("channels", [1, 3])
def test_in_float32(channels):
    published = port(channels, filters=5, mixtures=3, dtype=torch.float32)
    network = from_published(named(published, "legacy"))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert_same_outputs(network, published, 1e-5, torch.float32, size=(28, 28) if channels == 1 else (32, 32))


@pytest.mark.parametrize("filters", [1, 2])
@pytest.mark.usefixtures("float64")
def test_the_smallest_networks(filters):
    published = port(filters=filters, mixtures=1)
    assert_same_outputs(from_published(named(published, "legacy")), published, 1e-10)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("normalise", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.usefixtures("float64")
def test_a_state_dict_that_torch_itself_normalised(normalise):
    published = port(resnets=2)
    layers = [layer for layer in published.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    for layer in layers:
        normalise(layer)
    with torch.no_grad():
        for parameter in published.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)  # as training would: lengths apart from directions
    assert_same_outputs(from_published(published.state_dict()), published, 1e-10)


@pytest.mark.usefixtures("float64")
def test_transposed_convolutions_may_be_normalised_per_output_channel():
    published = port()
    state = named(published, "plain")
    for key in [key for key in state if key.endswith("deconv.weight")]:
        weight = state.pop(key)
        state[f"{key}_g"] = torch.linalg.vector_norm(weight, dim=(0, 2, 3), keepdim=True)
        state[f"{key}_v"] = 2 * weight
    assert_same_outputs(from_published(state), published, 1e-10)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_prefix_of_all_names_is_left_out(prefix):
    published = port()
    state = {prefix + key: value for key, value in named(published, "legacy").items()}
    assert_same_outputs(from_published(state).double(), published, 1e-5)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_a_state_dict_inside_a_checkpoint(wrapper):
    published = port()
    assert_same_outputs(from_published({"epoch": 3, wrapper: named(published, "legacy")}).double(), published, 1e-5)


def test_half_precision_and_gradients_of_the_given_tensors_do_not_matter():
    published = port().half()
    state = {key: value.requires_grad_() for key, value in named(published, "plain").items()}
    assert_same_outputs(from_published(state).double(), published.double(), 1e-5)
    assert all(value.grad is None and value.dtype == torch.float16 for value in state.values())


@pytest.mark.parametrize("style", ["legacy", "plain"])
@pytest.mark.usefixtures("float64")
def test_a_channel_of_zero_weights_stays_zero(style):
    published = port()
    state = named(published, "legacy")
    for key in [key for key in state if key.endswith("weight_g")]:
        state[key][0] = 0
    with torch.no_grad():
        for key, value in published.named_parameters():
            if key.endswith("weight"):
                value[0] = 0
    if style == "plain":
        state = named(published, "plain")
    network = from_published(state)
    assert_same_outputs(network, published, 1e-10)
    network.train()(torch.zeros(1, 1, 8, 8)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.usefixtures("float64")
def test_the_given_state_dict_is_left_alone(style):
    state = named(port(), style)
    before = {key: value.clone() for key, value in state.items()}
    network = from_published(state)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_every_parameter_is_taken_from_the_given_ones():
    state = named(port(dtype=torch.float32), "legacy")
    first, second = from_published(state).state_dict(), from_published(state).state_dict()
    assert all(torch.equal(first[key], value) for key, value in second.items())


# -- what is refused --------------------------------------------------------------------------------------------------


def refusal(state):
    with pytest.raises(UserError) as caught:
        from_published(state)
    message = str(caught.value)
    assert message.startswith("Not the weights of a published PixelCNN++: ")
    assert "\n" not in message
    return message


RESNET = "up_layers.0.u_stream.0.conv_input.conv"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layer", ["u_init.conv", RESNET, "upsize_ul_stream.1.deconv", "nin_out.lin_a"])
def test_a_missing_parameter_is_named(layer, style):
    state = named(port(), style)
    assert f"'{layer}.bias' is missing." in refusal({k: v for k, v in state.items() if k != f"{layer}.bias"})
    without_weight = {k: v for k, v in state.items() if not k.startswith(layer) or k.endswith("bias")}
    assert f"'{layer}.weight' is missing (neither plain nor as weight_g and weight_v)" in refusal(without_weight)


def test_a_direction_without_its_length_is_named():
    state = named(port(), "legacy")
    del state[f"{RESNET}.weight_g"]
    assert f"'{RESNET}.weight_v' lacks its companion '{RESNET}.weight_g'" in refusal(state)


def test_two_weights_for_one_layer_are_refused():
    state = named(port(), "legacy") | {f"{RESNET}.weight": torch.zeros(4, 8, 2, 3)}
    assert f"'{RESNET}.weight_v' and '{RESNET}.weight' are both given" in refusal(state)


def test_an_unexpected_parameter_is_named():
    state = named(port(), "legacy")
    assert "'label.weight' has no place in an unconditional network with filters=4, resnets=1." in refusal(
        state | {"label.weight": torch.zeros(10, 4)}
    )
    message = refusal(state | {"u_init.bn.weight": torch.ones(4), "u_init.bn.num_batches_tracked": torch.tensor(3)})
    assert "'u_init.bn.weight' (one of 2 such names) has no place" in message


def test_a_gap_between_the_resnets_is_named():
    state = {
        key.replace("up_layers.0.u_stream.1", "up_layers.0.u_stream.99"): value
        for key, value in named(port(resnets=2), "legacy").items()
    }
    assert "'up_layers.0.u_stream.1.conv_input.conv.weight' is missing" in refusal(state)


def test_a_wrong_shape_is_named_with_the_right_one():
    state = named(port(), "plain")
    cases = {
        "u_init.conv.weight": (torch.zeros(4, 5, 2, 3), "[4, 5, 2, 3]; it should be [filters, 2, 2, 3] for grey"),
        RESNET + ".weight": (torch.zeros(4, 8, 3, 3), "[4, 8, 3, 3]; it should be [4, 8, 2, 3]"),
        RESNET + ".bias": (torch.zeros(8), "[8]; it should be [4]"),
        "ul_init.1.conv.weight": (torch.zeros(4, 2, 1, 2), "[4, 2, 1, 2]; it should be [4, 2, 2, 1]"),
        "nin_out.lin_a.weight": (torch.zeros(6, 4, 1, 1), "[6, 4, 1, 1]; it should be [outputs, filters]"),
        "nin_out.lin_a.bias": (torch.zeros(7), "[7]; it should be [6]"),
    }
    for key, (value, words) in cases.items():
        assert f"'{key}' has the shape {words}" in refusal(state | {key: value})


def test_a_length_that_does_not_fit_its_direction_is_named():
    state = named(port(), "legacy")
    wrong = torch.ones(3, 1, 1, 1)
    assert (
        f"'{RESNET}.weight_g' has the shape [3, 1, 1, 1]; beside '{RESNET}.weight_v' of shape [4, 8, 2, 3] it should "
        "be [4, 1, 1, 1]." in refusal(state | {f"{RESNET}.weight_g": wrong})
    )


@pytest.mark.parametrize("suffix", ["weight_g", "weight_v", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300], ids=str)
def test_values_that_are_not_finite_in_float32_are_refused(suffix, value):
    state = named(port(), "legacy")
    state[f"{RESNET}.{suffix}"].view(-1)[1] = value
    assert f"'{RESNET}.{suffix}' holds values that are not finite" in refusal(state)


def test_a_direction_of_zeros_is_refused():
    state = named(port(), "legacy")
    state[f"{RESNET}.weight_v"][2] = 0
    assert f"'{RESNET}.weight_v' is zero for a whole channel" in refusal(state)


@pytest.mark.parametrize("value", [3, "abc", None, torch.zeros(4, dtype=torch.int64), torch.zeros(4).to_sparse()])
def test_what_is_no_tensor_of_numbers_is_refused(value):
    assert f"'{RESNET}.bias' is not a tensor of floating-point numbers" in refusal(
        named(port(), "legacy") | {f"{RESNET}.bias": value}
    )


@pytest.mark.parametrize(
    "state", [None, [1], torch.zeros(3), {0: torch.zeros(3)}, port()], ids=lambda x: type(x).__name__
)
def test_what_is_no_state_dict_is_refused(state):
    assert f"a state dict maps names to tensors, and this is of type {type(state).__name__}" in refusal(state)


def test_other_models_are_told_by_their_names():
    assert refusal({}).endswith("'u_init.conv.weight' is missing (neither plain nor as weight_g and weight_v).")
    assert refusal({"conv1.weight": torch.zeros(3)}).endswith("; the names begin with 'conv1.weight'.")
