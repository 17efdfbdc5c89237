"""A continuous value per position."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lit_parallel.conditionals.base import Conditional, where_finite
from lit_parallel.distributions import LEVELS, LogitTransform, logistic_log_density, logistic_quantile


class Logistic(Conditional):
    """A logistic distribution over logit-transformed pixels: the network puts out mean and log-scale.

    The network reads and generates real numbers, ``[batch, length]``; the coupling is the inverse of the distribution
    function. Likelihoods are those of the dequantised pixels, the change of variables included.

    Args:
        squeeze: lambda of the logit transform, see :mod:`lit_parallel.distributions`.
    """

    channels = 1
    num_parameters = 2
    couplings = ("inverse_cdf",)

    def __init__(self, squeeze: float = 1e-6) -> None:
        self.transform = LogitTransform(squeeze)

    def encode(self, x: Tensor) -> Tensor:
        return x[..., 0]

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        mean, log_scale = parameters.unbind(-1)
        return logistic_log_density(x[..., 0], mean, log_scale) + self.transform.log_derivative(x[..., 0])

    def draw_noise(self, generator: np.random.Generator, length: int, coupling: str) -> np.ndarray:
        return logistic_quantile(generator.random((length, 1)))

    def sample(self, parameters: Tensor, noise: Tensor, coupling: str, temperature: float) -> Tensor:
        mean, log_scale = parameters.unbind(-1)
        value = mean + (log_scale.contiguous().exp() * temperature) * noise[:, 0]
        return where_finite(parameters, value.clamp(-self.transform.bound, self.transform.bound)[:, None])

    def to_pixels(self, x: Tensor) -> Tensor:
        return self.transform.inverse(x)

    def from_pixels(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        dequantised = pixels + (0.5 if noise is None else noise)
        # In float32, 255 + u may round up to 256; the density is that of the half-open interval.
        return self.transform.forward(dequantised.clamp(max=LEVELS * (1 - 1e-7)))
