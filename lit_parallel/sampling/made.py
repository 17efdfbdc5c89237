"""Sampling a MADE as a triangular system, the plain way and the incremental way.

With fixed logistic noise e, sampling is deterministic: ``x_t = clamp(mean_t(x_<t) + exp(log_scale_t(x_<t)) e_t)``
(Song et al., 2021, sections 4.3 and the authors' code for the clamp). Both systems below evaluate these equations with
the same folded weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lit_parallel.networks import MADE
from lit_parallel.systems import Equations, Evaluation, TensorSystem, TriangularSystem, select, write


@dataclass(frozen=True)
class FoldedMADE:
    """The weights of a MADE for sampling: masks multiplied in, everything sorted in order of generation.

    Sorting turns the masked matrices into staircases: what the equations of a window need is a contiguous slice.

    Attributes:
        weights: Hidden layers, each ``[units, inputs]``, units in order of their degree.
        biases: Each ``[units]``.
        output_weight: ``[2 length, units]``; rows 2t and 2t + 1 are mean and log-scale of equation t.
        output_bias: ``[2 length]``.
        degrees: Each ``[units]``, ascending, on the CPU: a unit of degree m reads x_0 .. x_m and nothing later.
        pixel: ``[length]`` the pixel that each equation generates.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    output_weight: Tensor
    output_bias: Tensor
    degrees: tuple[Tensor, ...]
    pixel: Tensor

    @classmethod
    @torch.no_grad()
    def from_module(cls, network: MADE, dtype: torch.dtype | None = None) -> FoldedMADE:
        """Fold and sort the weights of a network, under the mask it uses now."""
        pixel = network.rank[network.mask_index].argsort()
        weights, biases, degrees = [], [], []
        below = pixel
        for layer, degree in zip(network.hidden_layers(), network.split_degrees(), strict=True):
            degree, order = degree.sort(stable=True)
            weights.append(layer.masked_weight()[order][:, below].to(dtype).contiguous())
            biases.append(layer.bias[order].to(dtype).contiguous())
            degrees.append(degree.cpu())
            below = order
        length = network.length
        rows = torch.stack([pixel, pixel + length], dim=1).flatten()
        return cls(
            weights=tuple(weights),
            biases=tuple(biases),
            output_weight=network.output.masked_weight()[rows][:, below].to(dtype).contiguous(),
            output_bias=network.output.bias[rows].to(dtype).contiguous(),
            degrees=tuple(degrees),
            pixel=pixel,
        )

    @property
    def length(self) -> int:
        return len(self.pixel)

    def __call__(self, x: Tensor) -> Tensor:
        """Mean and log-scale of every equation, ``[batch, length] -> [batch, length, 2]``."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = F.relu(F.linear(x, weight, bias))
        return F.linear(x, self.output_weight, self.output_bias).unflatten(1, (self.length, 2))


def due_units(degree: Tensor, starts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The units of a layer that windows of equations must compute: the first, and the one after the last.

    Window [lo, hi) reads units of degree up to hi - 2; those of degree below lo - 1 were final before it came.

    Args:
        degree: ``[units]``, ascending.
        starts: ``[windows]`` first equation of each window.
        width: Equations per window.
    """
    return torch.searchsorted(degree, starts - 1), torch.searchsorted(degree, starts + width - 1)


def _sample(parameters: Tensor, noise: Tensor, bound: float) -> Tensor:
    """``[batch, width, 2]`` parameters and ``[batch, width]`` noise to values ``[batch, width]``."""
    mean, log_scale = parameters.unbind(-1)
    # Product and sum apart: one rounding each, on every device.
    return (mean + log_scale.exp() * noise).clamp(-bound, bound)


class MadeSystem(TensorSystem):
    """The reference: every evaluation is one forward pass of the whole network.

    Args:
        network: Folded weights.
        noise: ``[batch, length]`` logistic noise in order of generation; may be refilled in place between runs.
        bound: Values are truncated to [-bound, bound].
    """

    temperature: float = 1.0  # of the noise that is loaded

    def __init__(self, network: FoldedMADE, noise: Tensor, bound: float) -> None:
        super().__init__(torch.zeros_like(noise))
        self.network, self.noise, self.bound = network, noise, bound

    def function(self, x: Tensor) -> Tensor:
        return _sample(self.network(x), self.noise, self.bound)


class IncrementalMadeSystem(TriangularSystem):
    """The same equations from cached activations: only the units that a window of equations needs are computed.

    A hidden unit whose inputs are all final never changes again, so it is computed once. What a window costs is what
    it needs anew: with windows of one equation this is cached sequential sampling, with a sliding window GS-Jacobi.
    Each unit is one dot product over its whole row of weights, as in the reference; most linear algebra libraries
    then give the reference's bits (and the certificate tells).

    Windows are aligned to multiples of their width and common to the batch: the window moves on when all samples have
    passed it. An iteration evaluates the aligned window, whatever was asked for.

    Args:
        network: Folded weights.
        noise: ``[batch, length]`` logistic noise in order of generation; may be refilled in place between runs.
        bound: Values are truncated to [-bound, bound].
    """

    temperature: float = 1.0  # of the noise that is loaded

    @dataclass
    class State:
        """``x`` [batch, length], and the ``hidden`` activations, each [batch, units]."""

        x: Tensor
        hidden: list[Tensor]

    def __init__(self, network: FoldedMADE, noise: Tensor, bound: float) -> None:
        self.network, self.noise, self.bound = network, noise, bound
        self.batch_size, self.length = noise.shape
        self.device = noise.device
        self.zeros = torch.zeros_like(noise)
        self._needed: dict[int, list[Tensor]] = {}
        # How many units of each layer are final once t equations are.
        counts = torch.arange(self.length)
        self._final_units = [torch.searchsorted(degree, counts).tolist() for degree in network.degrees]

    @property
    def window(self) -> int:
        return min(self.length, 112)

    def reference(self) -> MadeSystem:
        return MadeSystem(self.network, self.noise, self.bound)

    def new_state(self) -> State:
        hidden = [torch.zeros_like(self.noise[:, :1]).repeat(1, len(bias)) for bias in self.network.biases]
        return self.State(torch.zeros_like(self.noise), hidden)

    def reset(self, state: State, value: Tensor | None = None) -> None:
        state.x.copy_(self.zeros if value is None else value)
        if value is None:
            for activation in state.hidden:
                activation.zero_()
        else:  # the caches must belong to the given iterate
            x = state.x
            for activation, weight, bias in zip(state.hidden, self.network.weights, self.network.biases, strict=True):
                x = activation.copy_(F.relu(F.linear(x, weight, bias)))

    def value(self, state: State) -> Tensor:
        return state.x.clone()

    def evaluate(self, state: State, equations: Equations, frontier: Tensor, running: Tensor | None) -> Evaluation:
        if isinstance(equations, int):
            return self._span(state, equations, equations + 1, equations, running)
        if equations is None:
            return self._span(state, 0, self.length, None, running)
        if equations.dim() == 1:  # scattered equations: nothing to save, so evaluate the whole network
            new = _sample(self.network(state.x), self.noise, self.bound)
            return write(state.x, equations, select(new, equations), select(self.zeros, equations), running)
        width = equations.shape[-1]
        unfinished = frontier if running is None else torch.where(running, frontier, self.length - 1)
        window = unfinished.min().reshape(1) // width
        if self.device.type != "cpu":
            return self._window(state, width, window, running)
        first = int(window) * width  # on a CPU, looking at it costs nothing
        end = min(first + width, self.length)
        return self._span(state, first, end, torch.arange(first, end), running)

    def _span(self, state: State, first: int, end: int, equations: Equations, running: Tensor | None) -> Evaluation:
        """Evaluate equations ``first .. end - 1``, known on the host, all before them being final."""
        # A single equation leaves out the inputs whose weights are zero: the least work, as cached sequential sampling
        # is to be measured. A window keeps whole rows, which libraries sum up in the order of the full product.
        single = end - first == 1
        x, inputs = state.x, end - 1 if single else self.length
        for activation, weight, bias, final in zip(
            state.hidden, self.network.weights, self.network.biases, self._final_units, strict=True
        ):
            due = slice(final[max(first - 1, 0)], final[end - 1])
            if due.stop > due.start:
                rows = F.linear(x[:, :inputs], weight[due, :inputs], bias[due])
                torch.clamp(rows, min=0, out=activation[:, due])
            x, inputs = activation, due.stop if single else len(bias)
        outputs = slice(2 * first, 2 * end)
        parameters = F.linear(
            x[:, :inputs], self.network.output_weight[outputs, :inputs], self.network.output_bias[outputs]
        )
        new = _sample(parameters.unflatten(1, (end - first, 2)), self.noise[:, first:end], self.bound)
        return write(state.x, equations, new, self.zeros[:, first:end], running)

    def _window(self, state: State, width: int, window: Tensor, running: Tensor | None) -> Evaluation:
        """Evaluate all equations of the given aligned window (``[1]``, on the device): the same, but capturable."""
        x = state.x
        for activation, weight, bias, needed in zip(
            state.hidden, self.network.weights, self.network.biases, self._needed_units(width), strict=True
        ):
            units = needed.index_select(0, window).flatten()
            rows = F.linear(x, weight.index_select(0, units), bias.index_select(0, units))
            activation.index_copy_(1, units, F.relu(rows))
            x = activation
        offsets = torch.arange(width, device=self.device)
        equations = (window * width + offsets).clamp(max=self.length - 1)
        rows = (2 * equations[:, None] + torch.arange(2, device=self.device)).flatten()
        parameters = F.linear(
            x, self.network.output_weight.index_select(0, rows), self.network.output_bias.index_select(0, rows)
        )
        noise = self.noise.index_select(1, equations)
        new = _sample(parameters.unflatten(1, (width, 2)), noise, self.bound)
        return write(state.x, equations, new, torch.zeros_like(new), running)

    def _needed_units(self, width: int) -> list[Tensor]:
        """For every aligned window the hidden units it must compute, per layer ``[windows, most units of any]``.

        A window that needs fewer units than another repeats its last one, which is harmless.
        """
        if width not in self._needed:
            starts = torch.arange(0, self.length, width)
            tables = []
            for degree in self.network.degrees:
                first, end = due_units(degree, starts, width)
                most = max(int((end - first).max()), 1)
                table = first[:, None] + torch.arange(most)
                table = torch.minimum(table, (end - 1).clamp(min=0)[:, None]).clamp(max=len(degree) - 1)
                tables.append(table.to(self.device))
            self._needed[width] = tables
        return self._needed[width]
