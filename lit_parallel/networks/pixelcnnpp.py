"""PixelCNN++: a convolutional network whose output at a pixel depends on the pixels above and to the left only.

Salimans, Karpathy, Chen, Kingma, "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and
Other Modifications", ICLR 2017, https://arxiv.org/abs/1701.05517. Song et al. (2021), section 4.4, sample it with 160
filters and 5 resnets per resolution (CIFAR-10), and 40 filters and 5 resnets (MNIST).

Two streams run through the network. *down* sees the rows above a pixel, *down-right* also the pixels to its left in
the same row. An encoder of three resolutions is followed by a decoder that takes up the encoder's features in reverse
order through short-cut connections (figure 2 of the paper).
"""

from __future__ import annotations

from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import weight_norm

from lit_parallel.networks.causal import CausalConv2d, CausalConvTranspose2d, Surround

Streams = tuple[Tensor | None, Tensor | None]
"""Features of the down and of the down-right stream; ``None`` where there are none, or none are wanted."""

RESOLUTIONS = 3
STRIDE = 2 ** (RESOLUTIONS - 1)
"""Height and width of an image must be multiples of this."""


_Layer = TypeVar("_Layer", bound=nn.Module)


class PixelCNNpp(nn.Module):
    """PixelCNN++ without its likelihood: from an image to the parameters of every pixel's distribution.

    Args:
        channels: Channels of the image, 1 or 3.
        outputs: Parameters per pixel.
        filters: Features of each stream.
        resnets: Gated resnets per stream and resolution in the encoder; the decoder has one more where it has taken
            up the features of a change of resolution.
        dropout: Part of the features that training leaves out in each gated resnet.
        num_classes: Labels 0 .. num_classes - 1 condition the network; ``None``: it takes none.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        filters: int = 160,
        resnets: int = 5,
        dropout: float = 0.5,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.outputs, self.filters, self.resnets = channels, outputs, filters, resnets
        self.dropout, self.num_classes = dropout, num_classes
        seen = channels + 1  # and a channel of ones, which tells the image from the padding around it
        self.rows_above = _normalised(CausalConv2d(seen, filters, (2, 3), centred=True))
        self.row_above = _normalised(CausalConv2d(seen, filters, (1, 3), centred=True))
        self.left = _normalised(CausalConv2d(seen, filters, (2, 1)))

        def block(count: int, skips: int) -> ResnetBlock:
            return ResnetBlock(count, filters, skips, dropout, num_classes)

        levels, changes = range(RESOLUTIONS), range(RESOLUTIONS - 1)
        self.encoder = nn.ModuleList(block(resnets, 0) for _ in levels)
        self.downsample = nn.ModuleList(Resample(filters, CausalConv2d) for _ in changes)
        self.decoder = nn.ModuleList(block(resnets + (level > 0), 1) for level in levels)
        self.upsample = nn.ModuleList(Resample(filters, CausalConvTranspose2d) for _ in changes)
        self.output = _normalised(CausalConv2d(filters, outputs, (1, 1)))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Parameters of every pixel given the pixels before it in raster order.

        Args:
            images: ``[batch, channels, height, width]``, pixels scaled to [-1, 1]; height and width multiples of 4.
            labels: ``[batch]`` class labels, for a conditional network.

        Returns:
            ``[batch, outputs, height, width]``.
        """
        x = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
        down = _shift_down(self.rows_above(x))
        down_right = _shift_down(self.row_above(x)) + _shift_right(self.left(x))
        return self.head(self.walk((down, down_right), WholeImages(labels)))

    def walk(self, streams: Streams, visitor: Visitor) -> Tensor:
        """From the first features to the last ones of the down-right stream, through every layer in between.

        Args:
            streams: The first features, of the image or of a part of it.
            visitor: Evaluates a layer, or knows that it need not.
        """
        features = [streams]
        for level, block in enumerate(self.encoder):
            for pair in block:  # type: ignore[attr-defined]
                features.append(visitor.resnets(level, pair, features[-1], (None, None)))
            if level < RESOLUTIONS - 1:
                features.append(visitor.downsample(level, self.downsample[level], features[-1]))  # type: ignore[arg-type]
        streams = features.pop()
        for number, block in enumerate(self.decoder):
            level = RESOLUTIONS - 1 - number
            for pair in block:  # type: ignore[attr-defined]
                streams = visitor.resnets(level, pair, streams, features.pop())
            if level > 0:
                streams = visitor.upsample(level, self.upsample[number], streams)  # type: ignore[arg-type]
        _, down_right = streams
        assert down_right is not None
        return down_right

    def head(self, features: Tensor, surround: Surround | None = None) -> Tensor:
        """From the last features to the output, pixel by pixel.

        Args:
            features: ``[batch, filters, rows, columns]``, of the image or of a part of it.
            surround: See :class:`~lit_parallel.networks.causal.CausalConv2d`.
        """
        return self.output(F.elu(features), surround)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, filters={self.filters}, resnets={self.resnets}"


class Visitor(Protocol):
    """How :meth:`PixelCNNpp.walk` has a layer evaluated. Level l has an image's height and width over ``2 ** l``."""

    def resnets(self, level: int, pair: ResnetPair, streams: Streams, skips: Streams) -> Streams: ...

    def downsample(self, level: int, layer: Resample, streams: Streams) -> Streams:
        """From this level to the next."""

    def upsample(self, level: int, layer: Resample, streams: Streams) -> Streams:
        """From this level to the one before."""


class WholeImages:
    """Evaluates every layer on whole images.

    Args:
        labels: ``[batch]`` class labels, for a conditional network.
    """

    def __init__(self, labels: Tensor | None) -> None:
        self.labels = labels

    def resnets(self, level: int, pair: ResnetPair, streams: Streams, skips: Streams) -> Streams:
        return pair(*streams, *skips, self.labels)

    def downsample(self, level: int, layer: Resample, streams: Streams) -> Streams:
        return layer(*streams)

    upsample = downsample


class ResnetBlock(nn.ModuleList):
    """The gated resnets of one resolution, a pair for each step: one in either stream."""

    def __init__(self, count: int, filters: int, skips: int, dropout: float, num_classes: int | None) -> None:
        super().__init__(ResnetPair(filters, skips, dropout, num_classes) for _ in range(count))


class ResnetPair(nn.Module):
    """A gated resnet of the down stream, and one of the down-right stream, which also reads the first one's result.

    Args:
        filters: Features of each stream.
        skips: 1 in the decoder, where each stream also reads the encoder's features; 0 in the encoder.
        dropout: Part of the features that training leaves out.
        num_classes: Number of labels, or ``None``.
    """

    def __init__(self, filters: int, skips: int, dropout: float, num_classes: int | None) -> None:
        super().__init__()
        self.down = GatedResnet(filters, (2, 3), True, skips * filters, dropout, num_classes)
        self.down_right = GatedResnet(filters, (2, 2), False, (skips + 1) * filters, dropout, num_classes)

    def forward(
        self,
        down: Tensor,
        down_right: Tensor,
        skip_down: Tensor | None,
        skip_down_right: Tensor | None,
        labels: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        down = self.down(down, skip_down, labels)
        return down, self.down_right(down_right, joined(down, skip_down_right), labels)


class GatedResnet(nn.Module):
    """``x + a * sigmoid(b)``, where a and b are two convolutions deep.

    Args:
        filters: Features in and out.
        kernel_size: Rows and columns of the convolutions.
        centred: Whether the kernel reaches as far right as left; otherwise it ends at the pixel itself.
        skip_filters: Features of the short-cut input, 0 if there is none.
        dropout: Part of the features that training leaves out between the convolutions.
        num_classes: Number of labels, or ``None``.
    """

    def __init__(
        self,
        filters: int,
        kernel_size: tuple[int, int],
        centred: bool,
        skip_filters: int,
        dropout: float,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        self.first = _normalised(CausalConv2d(2 * filters, filters, kernel_size, centred=centred))
        self.skip = _normalised(CausalConv2d(2 * skip_filters, filters, (1, 1))) if skip_filters else None
        self.dropout = nn.Dropout(dropout)
        self.second = _normalised(CausalConv2d(2 * filters, 2 * filters, kernel_size, centred=centred))
        # A layer whose result is added to what is there starts small (init_scale in the authors' code).
        self.second.initial_scale = 0.1  # type: ignore[assignment]
        self.label = nn.Embedding(num_classes, 2 * filters) if num_classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.05)

    def forward(
        self, x: Tensor, skip: Tensor | None, labels: Tensor | None, surround: Surround | None = None
    ) -> Tensor:
        hidden = self.first(concatenated_elu(x), surround)
        if self.skip is not None and skip is not None:
            hidden = hidden + self.skip(concatenated_elu(skip), surround)
        hidden = self.second(self.dropout(concatenated_elu(hidden)), surround)
        if self.label is not None:
            hidden = hidden + self.label(labels)[:, :, None, None]
        a, b = hidden.chunk(2, dim=1)
        return x + a * torch.sigmoid(b)


class Resample(nn.Module):
    """A change of resolution by a factor of two in both streams."""

    def __init__(self, filters: int, convolution: type[CausalConv2d] | type[CausalConvTranspose2d]) -> None:
        super().__init__()
        self.down = _normalised(convolution(filters, filters, (2, 3), stride=2, centred=True))
        self.down_right = _normalised(convolution(filters, filters, (2, 2), stride=2))

    def forward(self, down: Tensor, down_right: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(down), self.down_right(down_right)


def concatenated_elu(x: Tensor) -> Tensor:
    """``elu([x, -x])``: ``[batch, filters, ...] -> [batch, 2 filters, ...]``, as in the authors' code."""
    return F.elu(torch.cat([x, -x], dim=1))


def joined(down: Tensor, skip: Tensor | None) -> Tensor:
    """What a gated resnet of the down-right stream reads beside its own stream."""
    return down if skip is None else torch.cat([down, skip], dim=1)


def _shift_down(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def _shift_right(x: Tensor) -> Tensor:
    return F.pad(x, (1, 0, 0, 0))[:, :, :, :-1]


def _normalised(layer: _Layer) -> _Layer:
    """Weight normalisation per output channel (Salimans and Kingma, 2016, https://arxiv.org/abs/1602.07868)."""
    assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    assert layer.bias is not None
    nn.init.normal_(layer.weight, std=0.05)
    nn.init.zeros_(layer.bias)
    return cast(_Layer, weight_norm(layer, dim=1 if isinstance(layer, nn.ConvTranspose2d) else 0))
