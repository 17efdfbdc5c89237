"""Does a network's output at a position depend on earlier positions only? Everything here rests on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lit_parallel.conditionals import Conditional
from lit_parallel.errors import UserError
from lit_parallel.sampling.autoregressive import folded
from lit_parallel.sampling.positions import Positions

_BATCH = 32
_TOLERANCE = 1e-9  # of the outputs' size, in float64


class ConditionalModel(Protocol):
    """What the check looks at: see :class:`lit_parallel.modules.conditional.ConditionalModule`."""

    network: nn.Module
    conditional: Conditional
    positions: Positions
    num_classes: int | None


@torch.no_grad()
def check_causality(model: ConditionalModel, *, trials: int = 2, seed: int = 0) -> None:
    """Check that the output at each position depends on values before it only, by changing what must not matter.

    For every position s, all values from s on are drawn anew; the outputs at 0 .. s must stay as they are. A copy of
    the network is checked on the CPU in float64 and evaluation mode, so that what rounds differently is not taken for
    a dependence. Takes as many forward passes of one sample as there are positions, times ``trials``.

    Args:
        model: A :class:`~lit_parallel.modules.conditional.ConditionalModule`.
        trials: Random inputs to try; one may by chance miss a dependence.
        seed: Seed of the inputs.

    Raises:
        UserError: If it is not so; names the network, the output and the value that it sees.
    """
    network = folded(model.network).double().cpu()
    name = type(model.network).__name__
    for trial in range(trials):
        generator = np.random.default_rng([seed, trial])
        labels = None if model.num_classes is None else torch.zeros(1, dtype=torch.int64)
        x = _random_values(model, generator)
        expected = model.positions.parameters(network, model.conditional.encode(x), labels)
        wanted = (1, model.positions.length, model.conditional.num_parameters)
        if tuple(expected.shape) != wanted:
            raise UserError(f"{name} returned shape {list(expected.shape)} for one sample: it must be {list(wanted)}.")
        bound = _TOLERANCE * (1 + expected.abs().amax())
        for first, outputs in _with_other_values_behind(model, network, x, labels, generator):
            # [some, length]: output t of the run in which everything from first + i on was changed
            changed = ((outputs - expected).abs() > bound).any(dim=2)
            seen = changed.tril(diagonal=first)
            if seen.any():
                # The last such s: if changing everything behind s alone does nothing, it is s itself that is seen.
                s = first + int(seen.any(dim=1).nonzero().max())
                t = int(seen[s - first].nonzero().min())
                raise UserError(
                    f"{name} is not causal: its output at position {t} changes with the value at position {s}, but "
                    f"may depend on values before position {t} only (positions count from 0)."
                )


def _with_other_values_behind(
    model: ConditionalModel, network: nn.Module, x: Tensor, labels: Tensor | None, generator: np.random.Generator
) -> Iterator[tuple[int, Tensor]]:
    """Outputs where all values from s on are others: for s = T-1 down to 0, some at a time, with the first s."""
    length = model.positions.length
    position = torch.arange(length)
    other = _random_values(model, generator)
    # Where chance drew the same value again, nothing would change.
    other = torch.where(other == x, x.roll(1, dims=1), other)
    for end in range(length, 0, -_BATCH):
        first = max(end - _BATCH, 0)
        kept = position[None, :] < torch.arange(first, end)[:, None]
        variants = torch.where(kept[:, :, None], x, other)
        repeated = None if labels is None else labels.expand(len(variants))
        yield first, model.positions.parameters(network, model.conditional.encode(variants), repeated)


def _random_values(model: ConditionalModel, generator: np.random.Generator) -> Tensor:
    """``[1, length, channels]`` float64, drawn from the conditional with all parameters zero."""
    conditional, length = model.conditional, model.positions.length
    coupling = conditional.couplings[0]
    noise = torch.from_numpy(conditional.draw_noise(generator, length, coupling)).double()
    parameters = torch.zeros(length, conditional.num_parameters, dtype=torch.float64)
    return conditional.sample(parameters, noise, coupling, 1.0)[None]
