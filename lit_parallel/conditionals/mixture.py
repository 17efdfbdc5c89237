"""The mixture of discretised logistics of PixelCNN++.

Salimans, Karpathy, Chen, Kingma (2017), section 2.1 and 2.2, https://arxiv.org/abs/1701.05517. A pixel is scaled to
[-1, 1]; level k has the probability that a mixture of logistics gives to the interval of width 2 / 255 around it, the
first and last level also everything beyond. In colour images the mean of green depends linearly on red, that of blue
on red and green, within each component.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lit_parallel.conditionals.base import LevelConditional, where_finite
from lit_parallel.distributions import logistic_quantile

_SMALLEST_LOG_SCALE = -7.0  # as in the authors' code
_LARGEST_LOG_SCALE = 20.0  # flat over all levels; beyond, float32 would lose the inner ones
_HALF_WIDTH = 1 / 255


@dataclass(frozen=True)
class _Parameters:
    """Views of the network's output; all but the logits ``[..., channels, mixtures]``."""

    logits: Tensor
    means: Tensor
    log_scales: Tensor
    coefficients: Tensor | None

    def mean(self, channel: int, earlier: list[Tensor]) -> Tensor:
        """Means of a channel's components ``[..., mixtures]``, given the earlier channels in [-1, 1], ``[...]`` each.

        Coefficient 0 leads from red to green, 1 from red to blue, 2 from green to blue.
        """
        mean = self.means[..., channel, :]
        for index, value in enumerate(earlier):
            assert self.coefficients is not None
            mean = mean + self.coefficients[..., channel - 1 + index, :] * value[..., None]
        return mean


class DiscretizedLogisticMixture(LevelConditional):
    """A mixture of discretised logistics over 256 levels, for grey and colour pixels.

    The network's output holds, in the order of the authors' code, the logits of the components, then for each channel
    means, log-scales and (in colour) coefficients.

    Two couplings besides those of the levels sample the component by Gumbel-max and then transform logistic noise, as
    the authors of PixelCNN++ do. ``mixture_8bit`` rounds to the 8-bit grid, channel by channel, which is the
    distribution that was trained; ``paper`` keeps the continuous values, as Song et al. (2021) do. Here a temperature
    divides the components' logits and multiplies their scales.

    Args:
        channels: 1 or 3.
        mixtures: Components.
    """

    levels = 256
    couplings: ClassVar[tuple[str, ...]] = ("gumbel", "inverse_cdf", "mixture_8bit", "paper")

    def __init__(self, channels: int = 3, mixtures: int = 10) -> None:
        if channels not in (1, 3):
            raise ValueError(f"a pixel has 1 or 3 channels, not {channels}")
        self.channels, self.mixtures = channels, mixtures
        self.num_parameters = mixtures * (10 if channels == 3 else 3)

    def encode(self, x: Tensor) -> Tensor:
        """Levels 0 .. 255 to [-1, 1]."""
        return x * (2 / 255) - 1

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        p = self._split(parameters)
        values = self.encode(x)
        log_prob = F.log_softmax(p.logits, dim=-1)
        earlier: list[Tensor] = []
        for channel in range(self.channels):
            mean = p.mean(channel, earlier)
            log_prob = log_prob + _log_bin(x[..., channel, None], mean, p.log_scales[..., channel, :])
            earlier.append(values[..., channel])
        return log_prob.logsumexp(dim=-1)

    def probabilities(self, parameters: Tensor) -> Generator[Tensor, Tensor, None]:
        """See the base class. The weights of the components are carried from channel to channel as a posterior."""
        p = self._split(parameters)
        edges = torch.arange(255, dtype=parameters.dtype, device=parameters.device) * (2 / 255) - (1 - _HALF_WIDTH)
        largest = 80.0 if parameters.dtype == torch.float32 else 700.0  # whose exponential is finite
        # Logarithms, so that they do not vanish one and all where the level is unlikely.
        log_weights = p.logits
        earlier: list[Tensor] = []
        for channel in range(self.channels):
            weights = (log_weights - log_weights.amax(dim=1, keepdim=True)).exp()
            mean, log_scale = p.mean(channel, earlier), p.log_scales[:, channel].contiguous()
            sharpness = (-log_scale).exp()
            # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): no cancellation, and a - b is constant.
            inside = weights * -torch.expm1(sharpness * (-2 * _HALF_WIDTH))
            table = parameters.new_zeros(len(parameters), self.levels)
            for m in range(self.mixtures):  # one component after another: a fixed order of summation, and less memory
                # Not Tensor.sigmoid: on a CPU its bits depend on an element's place in memory.
                odds = ((mean[:, m, None] - edges) * sharpness[:, m, None]).clamp_(-largest, largest).exp_()
                below = (1 + odds).reciprocal_()
                above = odds.mul_(below)
                table[:, 0] += weights[:, m] * below[:, 0]
                table[:, 1:-1] += inside[:, m, None] * (below[:, 1:] * above[:, :-1])
                table[:, -1] += weights[:, m] * above[:, -1]
            level = yield table
            earlier.append(self.encode(level))
            log_weights = log_weights + _log_bin(level[:, None], mean, log_scale)

    def draw_noise(self, generator: np.random.Generator, length: int, coupling: str) -> np.ndarray:
        if coupling not in ("mixture_8bit", "paper"):
            return super().draw_noise(generator, length, coupling)
        race = generator.standard_exponential((length, self.mixtures))
        logistic = logistic_quantile(generator.random((length, self.channels)))
        return np.concatenate([race, logistic], axis=1)

    def sample(self, parameters: Tensor, noise: Tensor, coupling: str, temperature: float) -> Tensor:
        if coupling not in ("mixture_8bit", "paper"):
            return super().sample(parameters, noise, coupling, temperature)
        parameters = parameters.contiguous()
        p = self._split(parameters)
        race, logistic = noise[:, : self.mixtures], noise[:, self.mixtures :]
        weights = ((p.logits - p.logits.amax(dim=1, keepdim=True)) / temperature).exp()
        component = (weights / race).argmax(dim=1, keepdim=True)
        levels: list[Tensor] = []
        earlier: list[Tensor] = []
        for channel in range(self.channels):
            mean = p.mean(channel, earlier).gather(1, component)[:, 0]
            scale = p.log_scales[:, channel].gather(1, component)[:, 0].exp() * temperature
            value = (mean + scale * logistic[:, channel]).clamp(-1, 1)
            level = (value + 1) * 127.5
            if coupling == "mixture_8bit":
                level = level.round()
            levels.append(level)
            earlier.append(self.encode(level))
        return where_finite(parameters, torch.stack(levels, dim=1))

    def tolerance(self, coupling: str) -> float:
        """Continuous values stop moving at a hundredth of a level; exact equality can be asked for."""
        return 0.01 if coupling == "paper" else 0.0

    def _split(self, parameters: Tensor) -> _Parameters:
        logits, rest = parameters[..., : self.mixtures], parameters[..., self.mixtures :]
        parts = rest.unflatten(-1, (self.channels, -1, self.mixtures)).unbind(-2)
        coefficients = parts[2].tanh() if self.channels == 3 else None
        return _Parameters(logits, parts[0], parts[1].clamp(_SMALLEST_LOG_SCALE, _LARGEST_LOG_SCALE), coefficients)


def _log_bin(level: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of a level under a discretised logistic, elementwise; stable everywhere, differentiable.

    ``sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))``.
    """
    sharpness = (-log_scale).exp()
    centre = level * (2 / 255) - 1 - mean
    upper = F.logsigmoid((centre + _HALF_WIDTH) * sharpness)
    lower = F.logsigmoid((_HALF_WIDTH - centre) * sharpness)
    inside = upper + lower + torch.log(-torch.expm1(sharpness * (-2 * _HALF_WIDTH)))
    return torch.where(level == 0, upper, torch.where(level == 255, lower, inside))
