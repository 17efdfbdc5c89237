"""Noise that belongs to a sample: image i of seed s has the same noise whatever the batch, solver or device.

A counter-based generator (Philox, Salmon et al., SC 2011) is keyed by seed and sample index, so no state is shared
between samples.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_parallel.distributions import logistic_quantile


def generator(seed: int, index: int) -> np.random.Generator:
    """The generator of all noise of one sample.

    Args:
        seed: Seed of the sampling run, 0 or larger.
        index: Index of the sample.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def uniform_noise(seed: int, indices: Sequence[int], length: int) -> np.ndarray:
    """Uniform numbers in [0, 1), ``[batch, length]`` float64.

    Args:
        seed: Seed of the sampling run, 0 or larger.
        indices: Index of each sample in the batch.
        length: Numbers per sample.
    """
    return np.stack([generator(seed, index).random(length) for index in indices])


def logistic_noise(seed: int, indices: Sequence[int], length: int) -> Tensor:
    """Standard logistic noise ``logit(u)``, u clamped, ``[batch, length]`` float64 on the CPU."""
    return torch.from_numpy(logistic_quantile(uniform_noise(seed, indices, length)))
