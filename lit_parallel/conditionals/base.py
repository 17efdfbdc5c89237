"""What a network's output at one position says: a distribution, and how noise becomes a sample of it (the coupling)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lit_parallel.errors import UserError, did_you_mean

_TABLE_ELEMENTS = {"cpu": 2**17, "cuda": 2**25}
"""Elements of one table of probabilities: to fit a CPU's cache; 128 MiB in float32 on a GPU, a few at once."""


class Conditional(ABC):
    """The distribution of the values at one position, given everything before it.

    With its noise fixed, a sample is a function of the parameters: ``x_t = g(parameters_t, noise_t)``. The function is
    the *coupling*. All couplings of a conditional sample the same distribution (but for ``paper``, which leaves out
    the rounding, and the clamping of logistic noise to 1e-5), and differ in how much a sample moves when the parameters
    do: that decides how fast parallel iteration converges.

    Attributes:
        channels: Values per position, generated in order.
        num_parameters: Numbers per position that the network puts out.
        couplings: Names of the couplings, the default first.
    """

    channels: int
    num_parameters: int
    couplings: ClassVar[tuple[str, ...]]

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """The network's input from the iterate ``[batch, length, channels]``."""

    @abstractmethod
    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Log-probability (or density) of values, in nats: ``[..., num_parameters], [..., channels] -> [...]``."""

    @abstractmethod
    def draw_noise(self, generator: np.random.Generator, length: int, coupling: str) -> np.ndarray:
        """The noise of one sample, ``[length, width]``, float32 or float64; the width depends on the coupling."""

    @abstractmethod
    def sample(self, parameters: Tensor, noise: Tensor, coupling: str, temperature: float) -> Tensor:
        """Values from parameters and noise.

        Built from elementwise operations on contiguous rows, so that a row gives the same bits whatever the number of
        rows. Parameters that are not finite give not-a-number.

        Args:
            parameters: ``[rows, num_parameters]`` float32 or float64.
            noise: ``[rows, width]``, of the same dtype.
            coupling: One of :attr:`couplings`.
            temperature: 1 samples the distribution itself, less makes it sharper.

        Returns:
            ``[rows, channels]``, of the same dtype.
        """

    def tolerance(self, coupling: str) -> float:
        """Below which change of a value to stop when the user names none; 0 asks for exact equality."""
        return 0.0

    @abstractmethod
    def to_pixels(self, x: Tensor) -> Tensor:
        """Values to 8-bit pixels, ``uint8``, same shape."""

    @abstractmethod
    def from_pixels(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """8-bit pixels to values, same shape; uniform noise dequantises them where values are continuous."""

    def check_coupling(self, coupling: str | None) -> str:
        """The coupling of that name, by default the best one.

        Raises:
            UserError: If this conditional has none of that name.
        """
        if coupling is None:
            return self.couplings[0]
        if coupling not in self.couplings:
            raise UserError(
                f"{type(self).__name__} has no coupling '{coupling}' (sampling.coupling)."
                f"{did_you_mean(coupling, self.couplings)}"
            )
        return coupling


class LevelConditional(Conditional):
    """Values on a finite set of levels 0 .. levels - 1, whose exact probabilities can be listed.

    The iterate holds levels as floating-point numbers. On a finite set "unchanged" is exact.

    ``gumbel``: Gumbel-max over the levels, ``argmax_k log p_k + G_k`` (Maddison, Tarlow, Minka, NeurIPS 2014,
    https://arxiv.org/abs/1411.0030), computed as ``argmax_k p_k / E_k`` with ``E_k = exp(-G_k)`` exponential.
    ``inverse_cdf``: the first level whose cumulated probability exceeds a uniform number.

    Attributes:
        levels: Number of levels.
    """

    levels: int
    couplings: ClassVar[tuple[str, ...]] = ("gumbel", "inverse_cdf")

    @abstractmethod
    def probabilities(self, parameters: Tensor) -> Iterator[Tensor]:
        """Unnormalised probabilities of each channel's levels, ``[rows, levels]``, in order of generation.

        A generator: the level that was chosen for a channel, ``[rows]``, is sent into it before the next channel.
        """

    def draw_noise(self, generator: np.random.Generator, length: int, coupling: str) -> np.ndarray:
        if coupling == "gumbel":
            race = generator.standard_exponential((length, self.channels * self.levels), dtype=np.float32)
            return np.maximum(race, 2.0**-25)  # an exact 0 would let a level of probability 0 win
        return np.minimum(generator.random((length, self.channels)), 1 - 2.0**-24)  # float32 would round it to 1

    def sample(self, parameters: Tensor, noise: Tensor, coupling: str, temperature: float) -> Tensor:
        rows = max(1, _TABLE_ELEMENTS.get(parameters.device.type, 2**22) // self.levels)
        chunks = [
            self._sample_rows(some.contiguous(), with_noise, coupling, temperature)
            for some, with_noise in zip(parameters.split(rows), noise.split(rows), strict=True)
        ]
        return where_finite(parameters, torch.cat(chunks) if len(chunks) > 1 else chunks[0])

    def _sample_rows(self, parameters: Tensor, noise: Tensor, coupling: str, temperature: float) -> Tensor:
        values: list[Tensor] = []
        listing = self.probabilities(parameters)
        table = next(listing)
        for of_channel in noise.unflatten(1, (self.channels, -1)).unbind(1):
            if temperature != 1:
                # Not a power: on a CPU its bits depend on an element's place in memory.
                table = ((table / table.amax(dim=1, keepdim=True)).log() / temperature).exp()
            if coupling == "gumbel":
                level = (table / of_channel).argmax(dim=1)
            else:
                # In whole numbers, whose sums are the same in any order: on a GPU that depends on the number of rows.
                cumulated = (table * (2.0**54 / table.amax(dim=1, keepdim=True))).long().cumsum(dim=1)
                threshold = (of_channel.double() * cumulated[:, -1:]).long()
                level = (cumulated <= threshold).sum(dim=1).clamp(max=self.levels - 1)
            values.append(level.to(parameters.dtype))
            if len(values) < self.channels:
                table = listing.send(values[-1])  # type: ignore[attr-defined]
        return torch.stack(values, dim=1)

    def to_pixels(self, x: Tensor) -> Tensor:
        """Levels spread evenly over 0 .. 255."""
        return (x * (255 / (self.levels - 1))).round().clamp(0, 255).to(torch.uint8)

    def from_pixels(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """The nearest level."""
        return (pixels.to(torch.float32 if noise is None else noise.dtype) * ((self.levels - 1) / 255)).round()


def where_finite(parameters: Tensor, values: Tensor) -> Tensor:
    """Not-a-number in every row whose parameters are not all finite, which an argmax or a clamp would hide."""
    finite = ((parameters - parameters) == 0).all(dim=1, keepdim=True)
    return torch.where(finite, values, float("nan"))
