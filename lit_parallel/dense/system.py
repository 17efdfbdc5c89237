"""A DenseNet as a triangular system: one equation per dense layer, whose value is the features that the layer adds.

The layers are the network's own modules, called with the same tensors as in its ordinary forward, so that the solution
has the same bits. Which layers an iteration evaluates is looked at on the host: the solver loop is to run without a
CUDA graph (``cuda_graph=False``).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_parallel.dense.structure import Structure
from lit_parallel.systems import Equations, Evaluation, TensorSystem, TriangularSystem, select, write


class LayerSystem(TriangularSystem):
    """A system whose equations are dense layers.

    A layer is always evaluated for the whole batch, as in the ordinary forward, but its features enter the iterate only
    where a sample asked for it.

    Attributes:
        residual: Per iteration since the last reset, ``[batch]``: the largest change of a layer's features, relative to
            the largest of them; infinite where one is not finite.
        overflowed: ``[batch]`` samples with a value that was not finite in any of these iterations.
    """

    residual: list[Tensor]
    overflowed: Tensor

    def _begin(self) -> None:
        self.residual = []
        self.overflowed = torch.zeros(self.batch_size, dtype=torch.bool, device=self.device)

    @abstractmethod
    def layer_values(self, state: Any, layers: Sequence[int]) -> list[Tensor]:
        """The features ``[batch, growth, height, width]`` of the named layers (ascending) from the iterate."""

    @abstractmethod
    def place(self, state: Any, layer: int) -> tuple[Tensor, Tensor, int]:
        """Where a layer's features are: a tensor ``[batch, layers, ...]``, the guess of that shape, and the index."""

    def evaluate(self, state: Any, equations: Equations, frontier: Tensor, running: Tensor | None) -> Evaluation:
        if isinstance(equations, int):
            (value,) = self.layer_values(state, [equations])
            tensor, guess, index = self.place(state, equations)
            return Evaluation(equations, write(tensor, index, _fitting(value, tensor), guess, running).change)
        layers = list(range(self.length)) if equations is None else equations.unique().tolist()
        values = self.layer_values(state, layers)  # all of them before the first is written
        done = []
        for layer, value in zip(layers, values, strict=True):
            tensor, guess, index = self.place(state, layer)
            where = torch.arange(index, index + 1, device=self.device)
            asked = running
            if equations is not None and equations.dim() == 2:
                wanted = (equations == layer).any(1)
                asked = wanted if running is None else running & wanted
            done.append(write(tensor, where, _fitting(value, tensor), guess[:, index : index + 1], asked))
        change = torch.cat([evaluation.change for evaluation in done], 1)
        size = torch.cat([evaluation.size() for evaluation in done], 1)
        if equations is not None:
            entries = torch.searchsorted(torch.tensor(layers, device=self.device), equations)
            change, size = select(change, entries), select(size, entries)
        self._note(change, size, running)
        return Evaluation(equations, change, size)

    def _note(self, change: Tensor, size: Tensor, running: Tensor | None) -> None:
        relative = torch.where(change == 0, change, change / size)
        largest = torch.where(relative.isnan(), torch.inf, relative).amax(1)
        self.residual.append(largest if running is None else torch.where(running, largest, 0))
        self.overflowed = self.overflowed | change.isnan().any(1)


class DenseBlockSystem(LayerSystem, TensorSystem):
    """One dense block; the iterate is a tensor ``[batch, layers, growth, height, width]``.

    Args:
        layers: The block's dense layers, of a network in evaluation mode.
        input: What the block reads, ``[batch, c_0, height, width]``.
        mean: ``[layers, growth]`` features before the first iteration, the same at every pixel; by default zero.
    """

    def __init__(self, layers: Sequence[nn.Module], input: Tensor, mean: Tensor | None = None) -> None:
        super().__init__(_guess(layers, input, mean))
        self.layers, self.input = tuple(layers), input
        self._begin()

    def function(self, x: Tensor) -> Tensor:
        return torch.stack(self.layer_values(x, range(self.length)), 1)

    def layer_values(self, state: Tensor, layers: Sequence[int]) -> list[Tensor]:
        return [self.layers[layer](self.features(state, layer)) for layer in layers]

    def place(self, state: Tensor, layer: int) -> tuple[Tensor, Tensor, int]:
        return state, self.guess, layer

    def reset(self, state: Tensor, value: Tensor | None = None) -> None:
        self._begin()
        super().reset(state, value)

    def features(self, state: Tensor, layers: int | None = None) -> Tensor:
        """The block's input and the features of its first layers (by default all), ``[batch, channels, h, w]``."""
        return _concatenated(self.input, state[:, :layers])


@dataclass
class NetworkIterate:
    """The iterate of a :class:`DenseNetSystem`.

    Attributes:
        blocks: For each dense block ``[batch, layers, growth, height, width]``; the sizes differ from block to block.
        evaluated: ``[batch, length]`` layers that have been evaluated at least once.
        top: ``[batch, top_k]`` classes with the highest logits, in order; ``None`` before the first iteration.
        unchanged: ``[batch]`` for how many iterations they have been the same since all layers were evaluated.
    """

    blocks: list[Tensor]
    evaluated: Tensor
    unchanged: Tensor
    top: Tensor | None = None


class DenseNetSystem(LayerSystem):
    """A whole DenseNet: the layers of all its dense blocks. A block reads the transition of the iterate before it.

    Args:
        structure: Of the network, in evaluation mode.
        images: ``[batch, channels, height, width]``.
        guess: Features before the first iteration: ``"mean"``, as batch norm knows them, or ``"zero"``.
        top_k: Look at the logits in every iteration: a sample is settled when its classes with the ``top_k`` highest
            logits have kept their order.
        patience: For so many iterations in a row, counted once all layers have been evaluated.
    """

    def __init__(
        self,
        structure: Structure,
        images: Tensor,
        *,
        guess: str = "mean",
        top_k: int | None = None,
        patience: int = 2,
    ) -> None:
        self.structure, self.top_k, self.patience = structure, top_k, patience
        self.input = structure.stem(images)
        self.guess: list[Tensor] = []
        self._places: list[tuple[int, int]] = []
        x = self.input
        for index, block in enumerate(structure.blocks):
            if index > 0:
                x = structure.transition(index - 1, _concatenated(x, self.guess[-1]))  # for its shape
            self.guess.append(_guess(block.layers, x, block.mean if guess == "mean" else None))
            self._places += [(index, layer) for layer in range(len(block.layers))]
        self.length, self.batch_size, self.device = len(self._places), len(images), images.device
        self._begin()

    def new_state(self) -> NetworkIterate:
        return NetworkIterate(
            [guess.clone() for guess in self.guess],
            torch.zeros(self.batch_size, self.length, dtype=torch.bool, device=self.device),
            torch.zeros(self.batch_size, dtype=torch.int64, device=self.device),
        )

    def reset(self, state: NetworkIterate, value: Tensor | None = None) -> None:
        self._begin()
        state.evaluated.zero_()
        state.unchanged.zero_()
        state.top = None
        first = 0
        for block, guess in zip(state.blocks, self.guess, strict=True):
            block.copy_(guess)
            if value is not None:
                given = value[:, first : first + block.shape[1], : guess[0, 0].numel()].view_as(block)
                block.copy_(torch.where(given.isfinite(), given, guess))
            first += block.shape[1]

    def value(self, state: NetworkIterate) -> Tensor:
        """The iterate as one tensor ``[batch, length, numbers]``, where smaller features are followed by zeros."""
        numbers = max(block[0, 0].numel() for block in state.blocks)
        flat = [block.flatten(2) for block in state.blocks]
        return torch.cat([nn.functional.pad(block, (0, numbers - block.shape[2])) for block in flat], 1)

    def layer_values(self, state: NetworkIterate, layers: Sequence[int]) -> list[Tensor]:
        last, _ = self._places[layers[-1]]
        inputs = self._inputs(state, last)
        values = []
        for block, layer in (self._places[equation] for equation in layers):
            features = _concatenated(inputs[block], state.blocks[block][:, :layer])
            values.append(self.structure.blocks[block].layers[layer](features))
        return values

    def place(self, state: NetworkIterate, layer: int) -> tuple[Tensor, Tensor, int]:
        block, index = self._places[layer]
        return state.blocks[block], self.guess[block], index

    def evaluate(
        self, state: NetworkIterate, equations: Equations, frontier: Tensor, running: Tensor | None
    ) -> Evaluation:
        evaluation = super().evaluate(state, equations, frontier, running)
        if self.top_k is not None and not isinstance(equations, int):
            evaluation.settled = self._settled(state, equations)
        return evaluation

    def reference(self) -> DenseNetSystem:
        """The same without a look at the logits, so that a certificate is one of all features."""
        reference = copy.copy(self)
        reference.top_k = None
        return reference

    def logits(self, state: NetworkIterate) -> Tensor:
        """``[batch, classes]`` what the head makes of the iterate."""
        last = len(state.blocks) - 1
        return self.structure.head(_concatenated(self._inputs(state, last)[last], state.blocks[last]))

    def _inputs(self, state: NetworkIterate, last: int) -> list[Tensor]:
        """What each block up to a last one reads."""
        inputs = [self.input]
        for block in range(last):
            inputs.append(self.structure.transition(block, _concatenated(inputs[-1], state.blocks[block])))
        return inputs

    def _settled(self, state: NetworkIterate, equations: Tensor | None) -> Tensor:
        # Classes keep their order, too, while a solver has not yet come to the layers that would change it.
        known = state.evaluated.all(1)
        if equations is None:
            state.evaluated.fill_(True)
        else:
            state.evaluated.scatter_(1, equations.expand(self.batch_size, equations.shape[-1]), True)
        logits = self.logits(state)
        top = logits.argsort(dim=1, descending=True, stable=True)[:, : self.top_k]
        same = torch.zeros_like(state.evaluated[:, 0]) if state.top is None else (top == state.top).all(1)
        state.top = top
        state.unchanged = torch.where(known & same, state.unchanged + 1, 0)
        return logits.isfinite().all(1) & (state.unchanged >= self.patience)


def _guess(layers: Sequence[nn.Module], input: Tensor, mean: Tensor | None) -> Tensor:
    """What a block's layers add before the first iteration, ``[batch, layers, growth, height, width]``."""
    growth: Any = layers[0].get_submodule("conv2")
    guess = input.new_zeros(len(input), len(layers), growth.out_channels, *input.shape[2:])
    return guess if mean is None else guess + torch.where(mean.isfinite(), mean, 0).to(guess.dtype)[:, :, None, None]


def _concatenated(input: Tensor, features: Tensor) -> Tensor:
    """``[batch, c_0 + layers * growth, h, w]`` in the memory format of the ordinary forward, on which bits may depend.

    Args:
        input: ``[batch, c_0, h, w]``.
        features: ``[batch, layers, growth, h, w]``.
    """
    channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    together = torch.cat([input, features.flatten(1, 2)], 1)
    return together.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _fitting(value: Tensor, state: Tensor) -> Tensor:
    """``[batch, 1, growth, h, w]`` in the type of the iterate, which holds it."""
    if torch.promote_types(value.dtype, state.dtype) != state.dtype:
        raise TypeError(f"a dense layer returned {value.dtype} for an input of {state.dtype}, which cannot hold it")
    return value[:, None].to(state.dtype)
