"""The mixture of discretised logistics in NumPy and SciPy, written from the paper alone: what the code is held to."""

import numpy as np
from scipy.special import expit

EDGES = (2 * np.arange(255) + 1) / 255 - 1  # between level k and level k + 1


def level_probabilities(mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Differences of the logistic distribution function, ``[...] -> [..., 256]``, from whichever side is exact."""
    mean, scale = np.asarray(mean)[..., None], np.asarray(scale)[..., None]
    standard = (EDGES - mean) / scale
    zeros, ones = np.zeros_like(mean), np.ones_like(mean)
    rising = np.diff(np.concatenate([zeros, expit(standard), ones], axis=-1))
    falling = np.diff(np.concatenate([ones, expit(-standard), zeros], axis=-1))
    centres = np.arange(256) / 127.5 - 1
    return np.where(centres < mean, rising, -falling)


class ExactMixture:
    """The distribution of one pixel.

    Args:
        parameters: The network's output for it, in the order of the authors' code.
        channels: 1 or 3.
        mixtures: Components.
        temperature: Divides the logits and multiplies the scales.
    """

    def __init__(self, parameters: np.ndarray, channels: int, mixtures: int, temperature: float = 1.0) -> None:
        parameters = np.asarray(parameters, dtype=np.float64)
        weights = np.exp((parameters[:mixtures] - parameters[:mixtures].max()) / temperature)
        self.channels, self.weights = channels, weights / weights.sum()
        rest = parameters[mixtures:].reshape(channels, -1)
        self.means = rest[:, :mixtures]
        self.scales = np.exp(np.maximum(rest[:, mixtures : 2 * mixtures], -7)) * temperature
        self.coefficients = np.tanh(rest[:, 2 * mixtures :])

    def components(self, earlier: tuple[int, ...]) -> np.ndarray:
        """Probabilities of the next channel's levels in each component, ``[mixtures, 256]``."""
        scaled = [level / 127.5 - 1 for level in earlier]
        mean = self.means[len(earlier)].copy()
        if len(earlier) == 1:
            mean += self.coefficients[0] * scaled[0]
        if len(earlier) == 2:
            mean += self.coefficients[1] * scaled[0] + self.coefficients[2] * scaled[1]
        return level_probabilities(mean, self.scales[len(earlier)])

    def marginal(self, earlier: tuple[int, ...]) -> np.ndarray:
        """``p(earlier, next)`` for every level of the next channel, ``[256]``."""
        weights = self.weights
        for channel, level in enumerate(earlier):
            weights = weights * self.components(earlier[:channel])[:, level]
        return weights @ self.components(earlier)

    def conditional(self, earlier: tuple[int, ...], temperature: float = 1.0) -> np.ndarray:
        """``p(next | earlier)``, ``[256]``, sharpened as ``p^(1 / temperature)``."""
        joint = self.marginal(earlier)
        powers = (joint / joint.max()) ** (1 / temperature)
        return powers / powers.sum()

    def likely(self, temperature: float = 1.0, above: float = 1e-5) -> dict[tuple[int, ...], float]:
        """Every colour of at least this probability with it; the temperature is that of the conditionals."""
        found: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(self.channels):
            found = {
                (*earlier, level): before * p
                for earlier, before in found.items()
                for level, p in enumerate(self.conditional(earlier, temperature))
                if before * p >= above
            }
        return found
