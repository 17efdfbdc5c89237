"""One logit per level."""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lit_parallel.conditionals.base import LevelConditional


class Categorical(LevelConditional):
    """A categorical distribution over levels: the network puts out one logit for each.

    Images of several channels have one position per channel of a pixel.

    Args:
        levels: Number of levels from 2 to 256, which is that of 8-bit pixels.
    """

    channels = 1

    def __init__(self, levels: int = 256) -> None:
        if not 2 <= levels <= 256:
            raise ValueError(f"levels must be from 2 to 256, not {levels}")
        self.levels = self.num_parameters = levels

    def encode(self, x: Tensor) -> Tensor:
        """Levels as integers, ``[batch, length]``: what an embedding reads."""
        return x[..., 0].long()

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        return F.log_softmax(parameters, dim=-1).gather(-1, x.long())[..., 0]

    def probabilities(self, parameters: Tensor) -> Generator[Tensor, Tensor, None]:
        yield (parameters - parameters.amax(dim=1, keepdim=True)).exp()
