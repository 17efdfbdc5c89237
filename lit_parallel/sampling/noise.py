"""Noise that belongs to a sample: image i of seed s has the same noise whatever the batch, solver or device.

A counter-based generator (Philox, Salmon et al., SC 2011) is keyed by seed and sample index, so no state is shared
between samples.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CLAMP = 1e-5
"""Uniform noise is clamped to [CLAMP, 1 - CLAMP], as in the authors' code."""


def uniform_noise(seed: int, indices: Sequence[int], length: int) -> np.ndarray:
    """Uniform numbers in [0, 1), ``[batch, length]`` float64.

    Args:
        seed: Seed of the sampling run, 0 or larger.
        indices: Index of each sample in the batch.
        length: Numbers per sample.
    """
    keys = (np.array([seed, index], dtype=np.uint64) for index in indices)
    return np.stack([np.random.Generator(np.random.Philox(key=key)).random(length) for key in keys])


def logistic_noise(seed: int, indices: Sequence[int], length: int) -> Tensor:
    """Standard logistic noise ``logit(u)``, u clamped, ``[batch, length]`` float64 on the CPU."""
    u = np.clip(uniform_noise(seed, indices, length), CLAMP, 1 - CLAMP)
    return torch.from_numpy(np.log(u) - np.log1p(-u))
