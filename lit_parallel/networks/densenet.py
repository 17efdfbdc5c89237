"""DenseNet: a convolutional network whose every layer reads the features of all layers before it in its block.

Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR 2017,
https://arxiv.org/abs/1608.06993; always with bottlenecks and compression (DenseNet-BC). Song et al. (2021) evaluate
DenseNet-201 by Jacobi iteration.

Modules and parameters are named, ordered and initialised as in torchvision, so that state dicts go both ways:
``features`` holds ``conv0``, ``norm0``, ``relu0``, ``pool0``, ``denseblock1``, ``transition1``, ..., ``norm5``. The
numbers of ``norm0`` and ``norm5`` are torchvision's for any number of blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.errors import UserError

_CIFAR_BLOCKS = 3


class DenseNet(nn.Module):
    """DenseNet-BC, from images to logits.

    Args:
        growth_rate: Features that a layer adds (k in the paper).
        block_config: Layers of each block.
        num_init_features: Features that the first block reads.
        bn_size: Features of a bottleneck, in multiples of ``growth_rate``.
        drop_rate: Part of its new features that training leaves out in each layer.
        num_classes: Logits.
        compression: Part of the features that a transition keeps (theta in the paper).
        in_channels: Channels of an image.
        small_images: Begin with a 3x3 convolution alone, as for CIFAR; otherwise a 7x7 convolution and pooling first
            divide height and width by 4.

    Raises:
        UserError: If one of these is out of range.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: tuple[int, ...] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        *,
        compression: float = 0.5,
        in_channels: int = 3,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        if not block_config:
            raise UserError("block_config is empty: name the layers of each block, such as (6, 12, 24, 16).")
        for name, value in (
            ("growth_rate", growth_rate),
            ("block_config", min(block_config)),
            ("num_init_features", num_init_features),
            ("bn_size", bn_size),
            ("num_classes", num_classes),
            ("in_channels", in_channels),
        ):
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}.")
        if not 0 < compression <= 1:
            raise UserError(f"compression must be above 0 and at most 1, not {compression}.")
        if not 0 <= drop_rate < 1:
            raise UserError(f"drop_rate must be at least 0 and below 1, not {drop_rate}.")

        features = _stem(in_channels, num_init_features, small_images)
        channels = num_init_features
        for number, layers in enumerate(block_config, start=1):
            features[f"denseblock{number}"] = DenseBlock(layers, channels, growth_rate, bn_size, drop_rate)
            channels += layers * growth_rate
            if number < len(block_config):
                kept = int(channels * compression)
                if kept < 1:
                    raise UserError(f"compression={compression} leaves nothing of {channels} features: raise it.")
                features[f"transition{number}"] = Transition(channels, kept)
                channels = kept
        features["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(features)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images.

        Args:
            images: ``[batch, in_channels, height, width]``; every transition halves height and width.

        Returns:
            ``[batch, num_classes]``.
        """
        features = F.relu(self.features(images), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(features, 1).flatten(1))


class DenseBlock(nn.ModuleDict):
    """Dense layers ``denselayer1``, ``denselayer2``, ...: each reads the block's input and what all before it added.

    Args:
        layers: How many.
        channels: Features of the input.
        growth_rate: Features that a layer adds.
        bn_size: Features of a bottleneck, in multiples of ``growth_rate``.
        drop_rate: Part of its new features that training leaves out in each layer.
    """

    def __init__(self, layers: int, channels: int, growth_rate: int, bn_size: int, drop_rate: float) -> None:
        super().__init__(
            {
                f"denselayer{index + 1}": DenseLayer(channels + index * growth_rate, growth_rate, bn_size, drop_rate)
                for index in range(layers)
            }
        )

    def forward(self, features: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` to ``[batch, channels + layers * growth_rate, height, width]``."""
        for layer in self.values():
            features = torch.cat([features, layer(features)], dim=1)
        return features


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a 1x1 convolution to the bottleneck; batch norm, ReLU and a 3x3 convolution from it.

    Args:
        channels: Features read.
        growth_rate: Features added.
        bn_size: Features of the bottleneck, in multiples of ``growth_rate``.
        drop_rate: Part of the new features that training leaves out.
    """

    def __init__(self, channels: int, growth_rate: int, bn_size: int, drop_rate: float) -> None:
        super().__init__()
        bottleneck = bn_size * growth_rate
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, bottleneck, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)

    def forward(self, features: Tensor) -> Tensor:
        """The new features alone: ``[batch, channels, height, width]`` to ``[batch, growth_rate, height, width]``."""
        bottleneck = self.conv1(self.relu1(self.norm1(features)))
        new = self.conv2(self.relu2(self.norm2(bottleneck)))
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new


class Transition(nn.Sequential):
    """Between two blocks: fewer features, and half the height and width.

    Args:
        channels: Features read.
        kept: Features left.
    """

    def __init__(self, channels: int, kept: int) -> None:
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(channels),
                relu=nn.ReLU(inplace=True),
                conv=nn.Conv2d(channels, kept, kernel_size=1, bias=False),
                pool=nn.AvgPool2d(kernel_size=2, stride=2),
            )
        )


def densenet121(**options: Any) -> DenseNet:
    """DenseNet-121, 8.0 million parameters (table 1 of the paper); ``options`` are those of :class:`DenseNet`."""
    return DenseNet(32, (6, 12, 24, 16), 64, **options)


def densenet161(**options: Any) -> DenseNet:
    """DenseNet-161, 28.7 million parameters, of growth rate 48; ``options`` are those of :class:`DenseNet`."""
    return DenseNet(48, (6, 12, 36, 24), 96, **options)


def densenet169(**options: Any) -> DenseNet:
    """DenseNet-169, 14.1 million parameters (table 1 of the paper); ``options`` are those of :class:`DenseNet`."""
    return DenseNet(32, (6, 12, 32, 32), 64, **options)


def densenet201(**options: Any) -> DenseNet:
    """DenseNet-201, 20.0 million parameters (table 1 of the paper); ``options`` are those of :class:`DenseNet`."""
    return DenseNet(32, (6, 12, 48, 32), 64, **options)


def densenet_cifar(
    depth: int = 100, growth_rate: int = 12, *, num_classes: int = 10, small_images: bool = True, **options: Any
) -> DenseNet:
    """DenseNet-BC for images of 32x32 pixels (section 3 of the paper): three blocks of ``(depth - 4) / 6`` layers.

    Args:
        depth: Convolutions and the classifier along the longest way: 100, 190 and 250 in the paper.
        growth_rate: Features that a layer adds: 12, 40 and 24 in the paper.
        num_classes: Logits.
        small_images: Begin with a 3x3 convolution alone.
        options: Others of :class:`DenseNet`.

    Raises:
        UserError: If no three blocks of equal length have this depth.
    """
    convolutions = 2 * _CIFAR_BLOCKS  # a layer has two, and every block as many layers
    layers, rest = divmod(depth - 4, convolutions)  # 4: the stem, two transitions, the classifier
    if layers < 1 or rest:
        below, above = 4 + convolutions * layers, 4 + convolutions * (layers + 1)
        near = f"{below} or {above}" if layers > 0 else f"at least {4 + convolutions}"
        raise UserError(f"depth must be 6 n + 4, for three blocks of n layers: {near}, not {depth}.")
    return DenseNet(
        growth_rate,
        (layers,) * _CIFAR_BLOCKS,
        2 * growth_rate,
        num_classes=num_classes,
        small_images=small_images,
        **options,
    )


def _stem(in_channels: int, features: int, small_images: bool) -> OrderedDict[str, nn.Module]:
    """What stands before the first block."""
    if small_images:
        return OrderedDict(conv0=nn.Conv2d(in_channels, features, kernel_size=3, padding=1, bias=False))
    return OrderedDict(
        conv0=nn.Conv2d(in_channels, features, kernel_size=7, stride=2, padding=3, bias=False),
        norm0=nn.BatchNorm2d(features),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
