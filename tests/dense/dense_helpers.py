"""What the tests of parallel evaluation share: small DenseNets, one of them written as torchvision's are."""

import itertools
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.networks.densenet import DenseNet


class _DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int, bottleneck: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, bottleneck, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck, growth, kernel_size=3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        features = [input] if isinstance(input, Tensor) else input
        bottleneck = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        new = self.conv2(self.relu2(self.norm2(bottleneck)))
        return F.dropout(new, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else new


class _DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, channels: int, growth: int, bottleneck: int, drop_rate: float) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", _DenseLayer(channels + i * growth, growth, bottleneck, drop_rate))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class TorchvisionLike(nn.Module):
    """A DenseNet as torchvision writes it: layers that take lists, transitions made by hand, its own forward."""

    def __init__(self, growth=4, blocks=(4, 5), channels=6, classes=7, drop_rate=0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False),
                norm0=nn.BatchNorm2d(channels),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            )
        )
        for i, layers in enumerate(blocks, start=1):
            self.features.add_module(f"denseblock{i}", _DenseBlock(layers, channels, growth, 2 * growth, drop_rate))
            channels += layers * growth
            if i < len(blocks):
                transition = OrderedDict(
                    norm=nn.BatchNorm2d(channels),
                    relu=nn.ReLU(inplace=True),
                    conv=nn.Conv2d(channels, channels // 2, kernel_size=1, bias=False),
                    pool=nn.AvgPool2d(kernel_size=2, stride=2),
                )
                self.features.add_module(f"transition{i}", nn.Sequential(transition))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


def lived_in(network: nn.Module, batches: int = 3, side: int = 32, seed: int = 1) -> nn.Module:
    """The network with weights and statistics that are not those of a fresh one, in evaluation mode and float64."""
    generator = torch.Generator().manual_seed(seed)
    network = network.double().train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    with torch.no_grad():
        for _ in range(batches):
            network(torch.randn(4, 3, side, side, dtype=torch.float64, generator=generator))
    return network.eval()


def images(batch: int = 3, side: int = 32, seed: int = 2) -> Tensor:
    """Random float64 images ``[batch, 3, side, side]``."""
    return torch.randn(batch, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


NETWORKS = {
    "own": lambda: lived_in(DenseNet(4, (3, 5, 2), 6, bn_size=2, num_classes=9)),
    "small_images": lambda: lived_in(DenseNet(3, (4, 3), 4, bn_size=3, num_classes=6, small_images=True), side=8),
    "torchvision_like": lambda: lived_in(TorchvisionLike(drop_rate=0.2)),
}
"""Makers of networks; the images of the second are of 8x8 pixels."""


def side_of(name: str) -> int:
    return 8 if name == "small_images" else 32


def jacobi_iterates(layers, input: Tensor, guess: Tensor) -> list[Tensor]:
    """Jacobi iterates of a dense block, by definition, without any solver: as many as there are layers, and the guess.

    Args:
        layers: The dense layers.
        input: ``[batch, c_0, height, width]``.
        guess: ``[batch, layers, growth, height, width]``.
    """
    iterates = [guess]
    with torch.no_grad():
        for _ in layers:
            x = iterates[-1]
            before = itertools.accumulate(x.unbind(1), lambda a, b: torch.cat([a, b], 1), initial=input)
            iterates.append(torch.stack([layer(features) for layer, features in zip(layers, before, strict=False)], 1))
    return iterates
