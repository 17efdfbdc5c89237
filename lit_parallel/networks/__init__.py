"""Plain networks; none knows Lightning or a solver."""

from lit_parallel.networks.densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet_cifar,
)
from lit_parallel.networks.made import MADE
from lit_parallel.networks.pixelcnnpp import PixelCNNpp

__all__ = [
    "MADE",
    "DenseNet",
    "PixelCNNpp",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet_cifar",
]
