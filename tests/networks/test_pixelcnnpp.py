"""PixelCNN++ against its definition: which pixels an output reads, how large the network is, what conditions it."""

import pytest
import torch

from lit_parallel.conditionals import DiscretizedLogisticMixture
from lit_parallel.networks import PixelCNNpp
from lit_parallel.networks.pixelcnnpp import concatenated_elu


def network(channels: int = 1, outputs: int = 5, **options) -> PixelCNNpp:
    options = {"filters": 4, "resnets": 1, "dropout": 0.0, **options}
    return PixelCNNpp(channels, outputs, **options).double().eval()


def reads(model: PixelCNNpp, height: int, width: int) -> torch.Tensor:
    """Whether the output at a pixel depends on the input at a pixel, by gradients, ``[pixels, pixels]``."""
    pixels = height * width
    images = torch.rand(1, model.channels, height, width, dtype=torch.float64).repeat(pixels, 1, 1, 1).requires_grad_()
    labels = torch.zeros(pixels, dtype=torch.int64) if model.num_classes else None
    outputs = model(images, labels).flatten(2)
    own = outputs[torch.arange(pixels), :, torch.arange(pixels)]  # copy t of the image: the output at pixel t
    (own @ torch.rand(model.outputs, dtype=torch.float64)).sum().backward()
    return (images.grad != 0).any(dim=1).flatten(1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resnets", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (4, 12)], ids=str)
def test_no_output_reads_its_own_or_a_later_pixel(channels, resnets, size):
    height, width = size
    read = reads(network(channels, resnets=resnets), height, width)
    earlier = torch.ones_like(read).tril(-1)
    assert not (read & ~earlier).any()
    for pixel in range(height * width):
        row, column = divmod(pixel, width)
        if column:
            assert read[pixel, pixel - 1]  # left
        if row:
            assert read[pixel, pixel - width]  # above
        if row and column + 1 < width:
            assert read[pixel, pixel - width + 1]  # above to the right
    if resnets == 2 and size == (8, 8):
        assert torch.equal(read, earlier)  # and no blind spot
    else:
        assert read.sum() > 0.94 * earlier.sum()


def test_a_later_pixel_changes_no_bit_of_an_earlier_output():
    model = network(3)
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    before = model(images)
    images[:, :, 5, 3] = -1.0
    after = model(images)
    same = (before == after).all(dim=1)[0].flatten()
    assert same[: 5 * 8 + 4].all()
    assert not same[5 * 8 + 4]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (4, 16), (20, 8), (28, 28)], ids=str)
def test_the_output_has_the_size_of_the_image(channels, size):
    outputs = DiscretizedLogisticMixture(channels, 10).num_parameters
    result = network(channels, outputs)(torch.rand(2, channels, *size, dtype=torch.float64))
    assert result.shape == (2, outputs, *size)
    assert result.isfinite().all()


def test_images_do_not_see_each_other():
    model = network(3)
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-12, atol=1e-12)


def published_size(channels: int, f: int, n: int, mixtures: int) -> int:
    """Parameters, from figure 2 and section 2 of the paper; every layer has lengths and biases besides its weights."""

    def layer(inputs: int, outputs: int, taps: int) -> int:
        return inputs * outputs * taps + 2 * outputs

    # Gated resnets: two convolutions of taps 2x3 (down) or 2x2 (down-right), fed by both signs of the features; the
    # second one makes values and gates. Short-cuts are 1x1 convolutions, again of both signs.
    down = layer(2 * f, f, 6) + layer(2 * f, 2 * f, 6)
    down_right = layer(2 * f, f, 4) + layer(2 * f, 2 * f, 4)
    one, two = layer(2 * f, f, 1), layer(4 * f, f, 1)
    encoder = 3 * n * (down + down_right + one)  # down-right reads down
    decoder = (3 * n + 2) * (down + one + down_right + two)  # and both read the encoder
    changes = 2 * 2 * (layer(f, f, 6) + layer(f, f, 4))  # down twice, up twice
    first = layer(channels + 1, f, 6) + layer(channels + 1, f, 3) + layer(channels + 1, f, 2)
    last = layer(f, mixtures * (3 if channels == 1 else 10), 1)
    return first + encoder + decoder + changes + last


@pytest.mark.parametrize(
    ("channels", "filters", "expected"), [(3, 160, 54_000_000), (1, 40, 3_400_000)], ids=["cifar10", "mnist"]
)
def test_the_published_architectures_have_the_published_size(channels, filters, expected):
    outputs = DiscretizedLogisticMixture(channels, 10).num_parameters
    with torch.device("meta"):
        model = PixelCNNpp(channels, outputs, filters=filters, resnets=5)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == published_size(channels, filters, 5, 10)
    assert size == pytest.approx(expected, rel=0.02)


def test_every_parameter_matters():
    model = network(num_classes=3, resnets=2).train()
    model(torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.arange(2)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_dropout_acts_in_training_only():
    model, images = network(dropout=0.5), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))
    model = network(dropout=0.0).train()
    assert torch.equal(model(images), model(images))


def test_labels_condition_every_output_and_open_no_path_to_later_pixels():
    model = network(num_classes=3)
    images = torch.rand(1, 1, 8, 8, dtype=torch.float64).expand(3, -1, -1, -1)
    outputs = model(images, torch.tensor([0, 1, 0]))
    assert torch.equal(outputs[0], outputs[2])
    assert (outputs[0] != outputs[1]).any(dim=0).all()
    read = reads(model, 8, 8)
    assert not read.triu().any()


def test_concatenated_elu_is_elu_of_both_signs():
    x = torch.tensor([[[[2.0]], [[-1.0]]]])
    expected = [2.0, torch.tensor(-1.0).expm1(), torch.tensor(-2.0).expm1(), 1.0]
    assert concatenated_elu(x).flatten().tolist() == pytest.approx([float(value) for value in expected])
