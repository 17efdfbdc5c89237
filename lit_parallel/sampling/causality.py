"""Does a network's output at a position depend on earlier positions only? Everything here rests on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lit_parallel.conditionals import Conditional
from lit_parallel.errors import UserError
from lit_parallel.sampling.autoregressive import AutoregressiveSystem, check_shape, folded
from lit_parallel.sampling.positions import Positions
from lit_parallel.systems import TriangularSystem

_TOLERANCE = 1e-9  # of the outputs' size, in float64
_REDRAWS = 16


class ConditionalModel(Protocol):
    """What the check looks at: see :class:`lit_parallel.modules.conditional.ConditionalModule`."""

    network: nn.Module
    conditional: Conditional
    positions: Positions
    num_classes: int | None

    def sampling_system(self, batch_size: int, *, incremental: bool) -> TriangularSystem: ...


@torch.no_grad()
def check_causality(
    model: ConditionalModel, *, trials: int = 2, seed: int = 0, bitwise: bool = False, batch_size: int = 16
) -> None:
    """Check that the output at each position depends on values before it only, by changing what must not matter.

    For every position s, all values from s on are drawn anew; the outputs at 0 .. s must stay as they are. Takes as
    many forward passes of one sample as there are positions and some more, times ``trials``.

    By default a copy of the network is checked on the CPU in float64 and evaluation mode: does it compute a causal
    function? ``bitwise`` asks for more: on the model's device, in its precision and at the given batch size, do later
    values leave every bit as it is? They may not if an algorithm goes through a transform (see
    :mod:`lit_parallel.networks.causal`); then now and then a sample never settles.

    Args:
        model: A :class:`~lit_parallel.modules.conditional.ConditionalModule`.
        trials: Random inputs to try; one may by chance miss a dependence.
        seed: Seed of the inputs.
        bitwise: Look at every bit, in the arithmetic of sampling.
        batch_size: Samples per evaluation; ``bitwise``, libraries choose algorithms by it.

    Raises:
        UserError: If it is not so; names the network, the output and the value that it sees.
    """
    if not hasattr(model, "positions"):
        raise UserError(f"{type(model).__name__} cannot be checked: wrap the network in a ConditionalModule.")
    name = type(model.network).__name__
    evaluate = _sampling_arithmetic(model, batch_size) if bitwise else _double_arithmetic(model, batch_size)
    for trial in range(trials):
        generator = np.random.default_rng([seed, trial])
        x = _random_values(model, generator)
        # Compared with the same place in the batch: a library's last bits may depend on the place.
        expected = evaluate(x.repeat(batch_size, 1, 1))
        check_shape(model.network, expected, [batch_size, model.positions.length, model.conditional.num_parameters])
        if not bool(expected.isfinite().all()):
            raise UserError(
                f"{name} returned values that are not finite: nothing can be said about what they depend on."
            )
        if not torch.equal(evaluate(x.repeat(batch_size, 1, 1)), expected):
            raise UserError(f"{name} is not a function of its input: it returned other values for the same one.")
        bound = 0.0 if bitwise else float(_TOLERANCE * (1 + expected.abs().amax()))
        for first, variants in _with_other_values_behind(model, x, generator, batch_size):
            # [batch, length]: output t of the run in which everything from first + i on was changed
            changed = (~((evaluate(variants) - expected).abs() <= bound)).any(dim=2)
            seen = changed.tril(diagonal=first)
            if seen.any():
                # The last such s: if changing everything behind s alone does nothing, it is s itself that is seen.
                s = first + int(seen.any(dim=1).nonzero().max())
                t = int(seen[s - first].nonzero().min())
                how = "in its last bits changes" if bitwise else "changes"
                raise UserError(
                    f"{name} is not causal: its output at position {t} {how} with the value at position {s}, but "
                    f"may depend on values before position {t} only (positions count from 0)."
                )


def _double_arithmetic(model: ConditionalModel, batch_size: int) -> Callable[[Tensor], Tensor]:
    network = folded(model.network).double().cpu()
    labels = None if model.num_classes is None else torch.zeros(batch_size, dtype=torch.int64)
    return lambda x: model.positions.parameters(network, model.conditional.encode(x), labels)


def _sampling_arithmetic(model: ConditionalModel, batch_size: int) -> Callable[[Tensor], Tensor]:
    system = model.sampling_system(batch_size, incremental=False)
    assert isinstance(system, AutoregressiveSystem)
    return lambda x: system.parameters(x.to(system.guess)).cpu()


def _with_other_values_behind(
    model: ConditionalModel, x: Tensor, generator: np.random.Generator, batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """Inputs in which all values from s on are others: for s = T-1 down to 0, a batch at a time, with its first s."""
    length = model.positions.length
    position = torch.arange(length)
    other = _random_values(model, generator)
    for _ in range(_REDRAWS):  # where chance drew the same value again, nothing would change
        other = torch.where(other == x, _random_values(model, generator), other)
    for end in range(length, 0, -batch_size):
        first = max(end - batch_size, 0)
        # At the end some s come twice, or (fewer positions than samples) lie behind the end, where nothing changes.
        kept = position[None, :] < torch.arange(first, first + batch_size)[:, None]
        yield first, torch.where(kept[:, :, None], x, other)


def _random_values(model: ConditionalModel, generator: np.random.Generator) -> Tensor:
    """``[1, length, channels]`` float64, drawn from the conditional with all parameters zero."""
    conditional, length = model.conditional, model.positions.length
    coupling = conditional.couplings[0]
    noise = torch.from_numpy(conditional.draw_noise(generator, length, coupling)).double()
    parameters = torch.zeros(length, conditional.num_parameters, dtype=torch.float64)
    return conditional.sample(parameters, noise, coupling, 1.0)[None]
