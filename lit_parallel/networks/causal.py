"""Causal convolutions, also in a form whose rounding is causal too.

That an output depends on earlier pixels only holds for the mathematics of a convolution, not for every algorithm:
those that go through a transform (Winograd, FFT) compute a whole tile of outputs from a whole tile of inputs, and what
cancels exactly in real numbers leaves a rounding error of later pixels in an earlier output. On a finite alphabet such
an error mostly changes nothing, and now and then decides between two nearly equal levels; the system is then not
triangular, and its iteration need not end. cuDNN may choose such algorithms. As a matrix product, every output is one
dot product over what it may see. It costs memory: the inputs of a layer, once for each place of its kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Surround = Callable[["CausalConv2d", Tensor], Tensor]
"""Puts around a part of a layer's input what the layer reads beside it: ``x`` widened by ``layer.margins``.

Whoever evaluates a part of an image only knows what lies beside it; around a whole image there are zeros.
"""


class CausalConv2d(nn.Conv2d):
    """A convolution that reads a pixel and what is above and to the left of it; centred: and above to the right.

    A centred kernel reads its own row to the right as well: the down stream's input is shifted down by a row first.

    Attributes:
        as_product: Compute it as a matrix product.
        margins: Columns to the left and to the right, rows above and below that the kernel reads beside a pixel.
    """

    as_product: bool = False
    kernel_size: tuple[int, int]
    bias: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: int = 1,
        *,
        centred: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        rows, columns = kernel_size
        right = columns // 2 if centred else 0
        self.margins = (columns - 1 - right, right, rows - 1, 0)

    def forward(self, x: Tensor, surround: Surround | None = None) -> Tensor:
        """``[batch, in, height, width]`` to ``[batch, out, height / stride, width / stride]``.

        Args:
            x: The input, a whole image or a part of one.
            surround: What lies around it (``None``: zeros).
        """
        x = F.pad(x, self.margins) if surround is None else surround(self, x)
        if surround is not None and x.shape[2:] == self.kernel_size:  # one pixel of each image: one product for all
            return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]
        if self.as_product:
            return _product(x, self.weight, self.bias, self.stride[0])
        return super().forward(x)


class CausalConvTranspose2d(nn.ConvTranspose2d):
    """The transposed convolution that doubles the resolution and reads what :class:`CausalConv2d` would.

    Attributes:
        as_product: Compute it as a matrix product.
    """

    as_product: bool = False
    kernel_size: tuple[int, int]
    bias: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: int = 2,
        *,
        centred: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, output_padding=1)
        self.crop_left = kernel_size[1] // 2 if centred else 0

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        rows, columns = 2 * x.shape[2], 2 * x.shape[3]
        if not self.as_product:
            return super().forward(x)[:, :, :rows, self.crop_left : self.crop_left + columns]
        # The convolution, with its kernel turned round, of the image with zeros put between its pixels.
        spread = x.new_zeros(*x.shape[:2], rows, columns)
        spread[:, :, ::2, ::2] = x
        height, width = self.kernel_size
        margins = (width - 1 - self.crop_left, self.crop_left, height - 1, 0)
        return _product(F.pad(spread, margins), self.weight.flip(2, 3).transpose(0, 1), self.bias, 1)


def as_products(network: nn.Module) -> nn.Module:
    """Let every causal convolution of a network be computed as a matrix product from now on."""
    for module in network.modules():
        if isinstance(module, (CausalConv2d, CausalConvTranspose2d)):
            module.as_product = True
    return network


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """The convolution of a padded image, as one matrix product per image.

    Args:
        x: ``[batch, in, height, width]``, padded.
        weight: ``[out, in, kernel rows, kernel columns]``.
        bias: ``[out]``.
        stride: In both directions.
    """
    height = (x.shape[2] - weight.shape[2]) // stride + 1
    width = (x.shape[3] - weight.shape[3]) // stride + 1
    seen = [
        x[:, :, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
        for i in range(weight.shape[2])
        for j in range(weight.shape[3])
    ]
    columns = (seen[0] if len(seen) == 1 else torch.stack(seen, dim=2)).reshape(len(x), -1, height * width)
    product = torch.matmul(weight.flatten(1), columns).unflatten(2, (height, width))
    return product if bias is None else product + bias[:, None, None]
