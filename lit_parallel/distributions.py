"""The logistic distribution and the logit transform of pixels.

An 8-bit pixel x becomes the real number ``z = logit(lambda + (1 - 2 lambda) (x + u) / 256)`` with uniform u in [0, 1).
Its density under the model, with the change of variables, bounds the probability of the pixel from below (uniform
dequantisation: Theis, van den Oord, Bethge, ICLR 2016, section 3.1, https://arxiv.org/abs/1511.01844; the transform:
Papamakarios, Pavlakou, Murray, NeurIPS 2017, section 4.3, https://arxiv.org/abs/1705.07057).
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

LEVELS = 256

CLAMP = 1e-5
"""Uniform noise is clamped to [CLAMP, 1 - CLAMP], as in the authors' code."""


def logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


class LogitTransform:
    """Between 8-bit pixels and real numbers.

    Args:
        squeeze: lambda, which keeps the logit finite at black and white.
    """

    def __init__(self, squeeze: float) -> None:
        self.squeeze = squeeze
        self.bound = logit(1 - squeeze)  # the image of [0, 256) is (-bound, bound)

    def forward(self, pixels: Tensor) -> Tensor:
        """Dequantised pixels in [0, 256) to real numbers, same shape."""
        p = self.squeeze + (1 - 2 * self.squeeze) * (pixels / LEVELS)
        return p.log() - (-p).log1p()

    def log_derivative(self, z: Tensor) -> Tensor:
        """``log |dz / dpixel|`` at z, same shape."""
        return math.log((1 - 2 * self.squeeze) / LEVELS) + F.softplus(z) + F.softplus(-z)

    def inverse(self, z: Tensor) -> Tensor:
        """Real numbers to 8-bit pixels, ``uint8``, same shape."""
        pixels = (z.sigmoid() - self.squeeze) / (1 - 2 * self.squeeze) * LEVELS
        return pixels.floor().clamp(0, LEVELS - 1).to(torch.uint8)


def logistic_log_density(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-density of the logistic distribution, elementwise."""
    standard = (z - mean) * torch.exp(-log_scale)
    return -standard - log_scale - 2 * F.softplus(-standard)


def logistic_quantile(u: np.ndarray) -> np.ndarray:
    """Uniform to standard logistic noise: ``logit(u)``, u clamped, elementwise."""
    u = np.clip(u, CLAMP, 1 - CLAMP)
    return np.log(u) - np.log1p(-u)
