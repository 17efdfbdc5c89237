"""MADE: a multilayer perceptron whose masks make output t depend on inputs before t only.

Germain, Gregor, Murray, Larochelle, "MADE: Masked Autoencoder for Distribution Estimation", ICML 2015,
https://arxiv.org/abs/1502.03509. The sampling experiments of Song et al. (2021), section 4.3, use it with two hidden
layers of 512 units and a logistic distribution per pixel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class MaskedLinear(nn.Linear):
    """A linear layer some of whose weights are held at zero."""

    mask: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        # Not in the state dict: masks follow from the degrees, which are.
        self.register_buffer("mask", torch.ones(out_features, in_features), persistent=False)

    def masked_weight(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked_weight(), self.bias)


class MADE(nn.Module):
    """Masked multilayer perceptron with a mean and a log-scale per input.

    Input p is generated as the ``rank[p]``-th. A hidden unit of degree m sees inputs of rank at most m, and hidden
    units of degree at most its own; the output of rank r sees units of degree below r (reference above, section 4).

    Args:
        length: Number of inputs, T.
        hidden_sizes: Units of each hidden layer.
        order: ``natural``, or ``random`` (a permutation per mask).
        degrees: ``spaced`` spreads the units' degrees evenly over the positions; ``random`` draws them, as the
            original publication does.
        num_masks: Masks to choose from with :meth:`use_mask` (order-agnostic and connectivity-agnostic training).
        seed: Seed of random orders and degrees.
    """

    rank: Tensor
    degrees: Tensor
    output: MaskedLinear

    def __init__(
        self,
        length: int,
        hidden_sizes: Sequence[int] = (512, 512),
        *,
        order: str = "natural",
        degrees: str = "spaced",
        num_masks: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.length = length
        self.hidden_sizes = tuple(hidden_sizes)
        self.num_masks = num_masks
        generator = torch.Generator().manual_seed(seed)
        ranks, all_degrees = [], []
        for index in range(num_masks):
            ranks.append(torch.randperm(length, generator=generator) if order == "random" else torch.arange(length))
            # With several masks "spaced" degrees would all be the same: vary the connectivity.
            drawn = degrees == "random" or (index > 0 and order == "natural")
            all_degrees.append(torch.cat(_draw_degrees(length, self.hidden_sizes, generator if drawn else None)))
        self.register_buffer("rank", torch.stack(ranks))  # [num_masks, length]
        self.register_buffer("degrees", torch.stack(all_degrees))  # [num_masks, all hidden units]
        sizes = [length, *self.hidden_sizes]
        self.hidden = nn.ModuleList(MaskedLinear(a, b) for a, b in itertools.pairwise(sizes))
        self.output = MaskedLinear(sizes[-1], 2 * length)
        self.mask_index = 0
        self.use_mask(0)
        self.register_load_state_dict_post_hook(_restore_mask)

    def use_mask(self, index: int) -> None:
        """Switch to one of the ``num_masks`` masks."""
        self.mask_index = index % self.num_masks
        rank = self.rank[self.mask_index]
        below = rank
        for layer, degree in zip(self.hidden_layers(), self.split_degrees(), strict=True):
            layer.mask.copy_(degree[:, None] >= below[None, :])
            below = degree
        self.output.mask.copy_((rank[:, None] > below[None, :]).repeat(2, 1))

    def hidden_layers(self) -> list[MaskedLinear]:
        return [layer for layer in self.hidden if isinstance(layer, MaskedLinear)]

    def split_degrees(self) -> tuple[Tensor, ...]:
        """The degrees of each hidden layer's units under the mask in use, each ``[hidden]``."""
        return self.degrees[self.mask_index].split(self.hidden_sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of each input given the earlier ones: ``[batch, length] -> 2 x [batch, length]``."""
        for layer in self.hidden:
            x = F.relu(layer(x))
        mean, log_scale = self.output(x).chunk(2, dim=-1)
        return mean, log_scale

    def extra_repr(self) -> str:
        return f"length={self.length}, num_masks={self.num_masks}"


def _restore_mask(module: MADE, _: Any) -> None:
    module.use_mask(module.mask_index)


def _draw_degrees(length: int, hidden_sizes: Sequence[int], generator: Any) -> list[Tensor]:
    """Degrees 0 .. T-2 for every layer: evenly spaced, or drawn at random if a generator is given."""
    highest = max(length - 2, 0)
    lowest, layers = 0, []
    for size in hidden_sizes:
        if generator is None:
            degree = torch.arange(size) * (highest + 1) // size
        else:
            degree = torch.randint(lowest, highest + 1, (size,), generator=generator)
            lowest = int(degree.min())
        layers.append(degree)
    return layers
