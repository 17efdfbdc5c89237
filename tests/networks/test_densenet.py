"""DenseNet against its definition, written again with torch's functions, and against torchvision where that is."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.errors import UserError
from lit_parallel.networks import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet_cifar,
)

SMALL = {"growth_rate": 8, "block_config": (2, 3, 2, 2), "num_init_features": 16, "num_classes": 7}


def network(**options) -> DenseNet:
    """A small network whose batch norms are as if it had been trained."""
    made = DenseNet(**{**SMALL, **options}).double().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    nn.init.normal_(made.classifier.bias)
    return made


def images(channels: int = 3, side: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, dtype=torch.float64)


# -- its definition ---------------------------------------------------------------------------------------------------


def definition(state, x, block_config, *, small_images=False, training=False, drop_rate=0.0):
    """The logits of images by torch's functions alone; in training the running statistics in `state` move on."""

    def norm_relu(x, name):
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, state[f"{name}.weight"], state[f"{name}.bias"], training).relu()

    if small_images:
        x = F.conv2d(x, state["features.conv0.weight"], padding=1)
    else:
        x = F.conv2d(x, state["features.conv0.weight"], stride=2, padding=3)
        x = F.max_pool2d(norm_relu(x, "features.norm0"), 3, stride=2, padding=1)
    for block, layers in enumerate(block_config, start=1):
        features = [x]
        for layer in range(1, layers + 1):
            name = f"features.denseblock{block}.denselayer{layer}"
            x = F.conv2d(norm_relu(torch.cat(features, dim=1), f"{name}.norm1"), state[f"{name}.conv1.weight"])
            x = F.conv2d(norm_relu(x, f"{name}.norm2"), state[f"{name}.conv2.weight"], padding=1)
            features.append(F.dropout(x, drop_rate) if training and drop_rate else x)
        x = torch.cat(features, dim=1)
        if block < len(block_config):
            name = f"features.transition{block}"
            x = F.avg_pool2d(F.conv2d(norm_relu(x, f"{name}.norm"), state[f"{name}.conv.weight"]), 2)
    x = norm_relu(x, "features.norm5").mean(dim=(2, 3))
    return F.linear(x, state["classifier.weight"], state["classifier.bias"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_config": (3,)},
        {"block_config": (2, 1), "growth_rate": 5, "num_init_features": 7, "bn_size": 2, "in_channels": 1},
        {"block_config": (2, 2, 1), "compression": 0.3},
        {"block_config": (2, 2, 1), "small_images": True},
    ],
    ids=str,
)
def test_logits_are_bitwise_those_of_the_definition(options):
    model = network(**options)
    x = images(options.get("in_channels", 3))
    config = options.get("block_config", SMALL["block_config"])
    expected = definition(model.state_dict(), x, config, small_images=options.get("small_images", False))
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert expected.std() > 0.1


@pytest.mark.parametrize("drop_rate", [0.0, 0.4])
def test_training_is_bitwise_that_of_the_definition(drop_rate):
    model, x = network(block_config=(2, 2), drop_rate=drop_rate), images(side=32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = definition(state, x, (2, 2), training=True, drop_rate=drop_rate)
    torch.manual_seed(3)
    assert torch.equal(model.train()(x), expected)
    for name, value in model.state_dict().items():
        if "running" in name:
            assert torch.equal(value, state[name])


def test_gradients_are_those_of_the_definition():
    model, x = network(block_config=(3, 2)), images(side=32)
    targets = torch.randn(2, 7, dtype=torch.float64)
    (model(x) * targets).sum().backward()
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    (definition(state, x, (3, 2)) * targets).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-10, atol=1e-12)


def test_dropout_leaves_out_new_features_in_training_alone():
    model, x = network(block_config=(2,), drop_rate=0.5), images(side=32)
    assert torch.equal(model(x), model(x))
    layer, features = model.features.denseblock1.denselayer1.train(), torch.randn(4, 16, 8, 8, dtype=torch.float64)
    assert 0.4 < (layer(features) == 0).double().mean() < 0.6


# -- sizes and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (densenet121, 7_978_856),
        (densenet161, 28_681_000),
        (densenet169, 14_149_480),
        (densenet201, 20_013_928),
        (densenet_cifar, 769_162),
        (lambda: densenet_cifar(190, 40), 25_624_430),
    ],
)
def test_numbers_of_parameters(build, parameters):
    with torch.device("meta"):
        model = build()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def batch_norm(name: str) -> list[str]:
    return [f"{name}.{end}" for end in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def dense_layer(name: str) -> list[str]:
    return [*batch_norm(f"{name}.norm1"), f"{name}.conv1.weight", *batch_norm(f"{name}.norm2"), f"{name}.conv2.weight"]


def test_the_state_dict_is_named_and_ordered_as_torchvisions():
    model = DenseNet(8, (2, 1, 1, 1), 16)
    assert list(model.state_dict()) == [
        "features.conv0.weight",
        *batch_norm("features.norm0"),
        *dense_layer("features.denseblock1.denselayer1"),
        *dense_layer("features.denseblock1.denselayer2"),
        *batch_norm("features.transition1.norm"),
        "features.transition1.conv.weight",
        *dense_layer("features.denseblock2.denselayer1"),
        *batch_norm("features.transition2.norm"),
        "features.transition2.conv.weight",
        *dense_layer("features.denseblock3.denselayer1"),
        *batch_norm("features.transition3.norm"),
        "features.transition3.conv.weight",
        *dense_layer("features.denseblock4.denselayer1"),
        *batch_norm("features.norm5"),
        "classifier.weight",
        "classifier.bias",
    ]


def test_the_state_dict_of_densenet121():
    with torch.device("meta"):
        state = densenet121().state_dict()
    assert len(state) == 727
    layers = [name for name in state if name.startswith("features.denseblock1.")]
    assert layers == [name for layer in range(1, 7) for name in dense_layer(f"features.denseblock1.denselayer{layer}")]
    shapes = {
        "features.conv0.weight": [64, 3, 7, 7],
        "features.denseblock1.denselayer6.norm1.weight": [224],
        "features.denseblock1.denselayer6.conv1.weight": [128, 224, 1, 1],
        "features.denseblock1.denselayer6.conv2.weight": [32, 128, 3, 3],
        "features.transition3.conv.weight": [512, 1024, 1, 1],
        "features.norm5.running_var": [1024],
        "classifier.weight": [1000, 1024],
    }
    assert {name: list(state[name].shape) for name in shapes} == shapes


def test_the_modules_are_named_as_torchvisions():
    features = DenseNet(**SMALL).features
    assert [name for name, _ in features.named_children()] == [
        *("conv0", "norm0", "relu0", "pool0", "denseblock1", "transition1", "denseblock2", "transition2"),
        *("denseblock3", "transition3", "denseblock4", "norm5"),
    ]
    assert [name for name, _ in features.denseblock2.named_children()] == ["denselayer1", "denselayer2", "denselayer3"]
    layer = features.denseblock2.denselayer1
    assert [name for name, _ in layer.named_children()] == ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"]
    assert layer.drop_rate == 0
    assert [name for name, _ in features.transition1.named_children()] == ["norm", "relu", "conv", "pool"]


def test_the_network_for_small_images():
    model = densenet_cifar(22, 4)
    assert [name for name, _ in model.features.named_children()] == [
        *("conv0", "denseblock1", "transition1", "denseblock2", "transition2", "denseblock3", "norm5"),
    ]
    assert model.features.conv0.weight.shape == (8, 3, 3, 3)
    assert [len(block) for block in (model.features.denseblock1, model.features.denseblock3)] == [3, 3]
    assert model.features(torch.zeros(2, 3, 32, 32)).shape[2:] == (8, 8)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("compression", "kept"), [(0.5, 16), (0.3, 9), (1.0, 32)])
def test_a_transition_keeps_a_part_of_the_features(compression, kept):
    features = DenseNet(8, (2, 1), 16, compression=compression).features
    assert features.transition1.conv.weight.shape == (kept, 32, 1, 1)
    assert features.norm5.num_features == kept + 8


def test_options_reach_every_network():
    options = {"num_classes": 5, "in_channels": 1, "drop_rate": 0.2}
    for build in (densenet121, densenet_cifar):
        with torch.device("meta"):
            model = build(small_images=build is densenet121, **options)
        assert (model.classifier.out_features, model.features.conv0.in_channels) == (5, 1)
        assert model.features.conv0.kernel_size == ((3, 3) if build is densenet121 else (7, 7))
        assert model.features.denseblock1.denselayer1.drop_rate == 0.2


@pytest.mark.parametrize(
    ("depth", "near"), [(101, "100 or 106"), (11, "10 or 16"), (9, "at least 10"), (4, "at least 10"), (-2, "at least")]
)
def test_a_depth_that_does_not_fit_is_refused(depth, near):
    with pytest.raises(UserError, match=rf"depth must be 6 n \+ 4, .*: {near}.*, not {depth}\."):
        densenet_cifar(depth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"growth_rate": 0}, "growth_rate must be at least 1, not 0"),
        ({"block_config": ()}, "block_config is empty"),
        ({"block_config": (2, 0)}, "block_config must be at least 1, not 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, not 0"),
        ({"compression": 1.5}, "compression must be above 0 and at most 1, not 1.5"),
        ({"compression": 0.01}, "compression=0.01 leaves nothing of 32 features"),
        ({"drop_rate": 1.0}, "drop_rate must be at least 0 and below 1, not 1.0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DenseNet(**{**SMALL, **options})


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_fresh_weights():
    model = DenseNet(16, (4, 4), 32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.detach().mean().abs() < 0.2 * (2 / fan_in) ** 0.5, name
            assert module.weight.detach().std() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert (model.classifier.bias == 0).all()


@pytest.mark.parametrize("small_images", [False, True])
def test_the_memory_format_does_not_change_the_logits(small_images):
    model, x = network(block_config=(2, 2), small_images=small_images), images(side=32)
    with torch.no_grad():
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        assert model.features(x).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_lower_precision(dtype, tolerance):
    model, x = network(block_config=(2, 2)), images(side=32)
    with torch.no_grad():
        expected = model(x)
        logits = model.to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    assert (logits - expected).norm() < tolerance * expected.norm()


# -- torchvision ------------------------------------------------------------------------------------------------------


def test_torchvisions_network_gives_the_same():
    models = pytest.importorskip("torchvision.models.densenet")
    theirs = models.DenseNet(8, (2, 3, 2, 2), num_init_features=16, num_classes=7).double().eval()
    ours = network()
    theirs.load_state_dict(ours.state_dict())
    x = images()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    ours.load_state_dict(theirs.state_dict())


def test_torchvisions_fresh_weights_are_the_same():
    models = pytest.importorskip("torchvision.models.densenet")
    torch.manual_seed(1)
    theirs = models.DenseNet(8, (2, 3, 2, 2), num_init_features=16).state_dict()
    torch.manual_seed(1)
    ours = DenseNet(8, (2, 3, 2, 2), num_init_features=16).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_torchvisions_densenet121_has_the_same_names():
    models = pytest.importorskip("torchvision.models.densenet")
    with torch.device("meta"):
        ours, theirs = densenet121().state_dict(), models.densenet121().state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
