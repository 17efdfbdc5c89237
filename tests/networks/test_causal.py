"""Causal convolutions: as a matrix product the same function, with rounding that is causal as well."""

import copy

import pytest
import torch
from small_models import pixelcnnpp
from torch import nn

from lit_parallel.errors import UserError
from lit_parallel.modules.conditional import ConditionalModule
from lit_parallel.networks import PixelCNNpp
from lit_parallel.networks.causal import CausalConv2d, CausalConvTranspose2d, as_products
from lit_parallel.sampling.causality import check_causality

KERNELS = [((2, 3), True), ((2, 2), False), ((1, 3), True), ((2, 1), False), ((1, 1), False)]


@pytest.mark.parametrize(("kernel", "centred"), KERNELS)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_product_is_the_convolution(kernel, centred, stride):
    layer = CausalConv2d(3, 5, kernel, stride, centred=centred).double()
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    expected = layer(x)
    as_products(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "centred"), KERNELS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("part", [(0, 0, 8, 12), (4, 0, 4, 12), (2, 4, 2, 4), (6, 2, 1, 1), (0, 10, 1, 1)])
def test_a_part_of_an_image_with_what_lies_around_it(kernel, centred, stride, product, part):
    top, column, rows, columns = part
    layer = CausalConv2d(3, 5, kernel, stride, centred=centred).double()
    layer.as_product = product
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    expected = layer(x)[:, :, top // stride : -(-(top + rows) // stride), column // stride :]

    def surround(asked, given):
        assert asked is layer
        left, right, above, below = layer.margins
        assert below == 0
        framed = torch.nn.functional.pad(x, layer.margins)
        around = framed[:, :, top : top + rows + above, column : column + columns + left + right]
        inner = around[:, :, above:, left : left + columns]
        assert torch.equal(inner, given)
        return around

    found = layer(x[:, :, top : top + rows, column : column + columns], surround)
    expected = expected[:, :, :, : -(-columns // stride)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "centred"), KERNELS[:2])
def test_the_product_is_the_transposed_convolution(kernel, centred):
    layer = CausalConvTranspose2d(3, 5, kernel, centred=centred).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = layer(x)
    assert expected.shape == (2, 5, 8, 12)
    as_products(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_of_a_pixelcnnpp(channels):
    network = PixelCNNpp(channels, 7, filters=6, resnets=2).double().eval()
    products = as_products(copy.deepcopy(network))
    x = torch.rand(2, channels, 8, 12, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(products(x), network(x), rtol=1e-10, atol=1e-10)
    convolutions = [m for m in products.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(convolutions) > 50
    assert all(module.as_product for module in convolutions)  # none is left to a library's choice
    assert not any(getattr(module, "as_product", False) for module in network.modules())


def test_later_pixels_leave_every_bit_as_it_is():
    check_causality(pixelcnnpp((1, 8, 8)), bitwise=True, trials=1)
    check_causality(pixelcnnpp((3, 4, 8), num_classes=3), bitwise=True, trials=1, batch_size=5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("filters", [8, 40])
def test_later_pixels_leave_every_bit_as_it_is_on_a_gpu(shape, filters):
    check_causality(pixelcnnpp(shape, filters=filters).cuda(), bitwise=True, trials=1)


class ThroughATransform(nn.Module):
    """A causal convolution along a row, computed by a Fourier transform: causal but for its rounding."""

    def __init__(self, length: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(length, outputs))
        self.length = length

    def forward(self, x):
        shifted = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        n = 2 * self.length
        product = torch.fft.rfft(shifted, n, dim=1) * torch.fft.rfft(self.kernel, n, dim=0)
        return torch.fft.irfft(product, n, dim=1)[:, : self.length]


def test_rounding_that_sees_later_values_is_found():
    from lit_parallel.conditionals import DiscretizedLogisticMixture

    conditional = DiscretizedLogisticMixture(1, 2)
    model = ConditionalModule(ThroughATransform(16, conditional.num_parameters), conditional, (1, 4, 4))
    check_causality(model)  # mathematically there is nothing to object to
    with pytest.raises(UserError, match=r"ThroughATransform is not causal: its output .* in its last bits changes"):
        check_causality(model, bitwise=True)
