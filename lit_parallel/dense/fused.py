"""Evaluates a DenseNet by kernels, in one CUDA graph: block after block, window after window, as a plan says.

A window of layers first collects what everything before it contributes, once. Then its layers are evaluated one after
another, each adding its channels to the sums of those that follow (one launch per layer), or by Jacobi iterations of
all its layers at once (two launches per iteration). The first iteration starts from a guess that is the same at every
pixel, so that what the window's own channels contribute is a constant, known beforehand. After k iterations the first k
layers of a window are exact, and are left alone.

Without a GPU the same steps are taken by the plain functions beside the kernels, without a graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.cuda_graphs import capturing
from lit_parallel.dense.structure import NORMS, DenseBlock, Structure, fold
from lit_parallel.errors import UserError
from lit_parallel.kernels.dense_block import (
    BlockWeights,
    ReadWeights,
    collect,
    grow,
    mean,
    places,
    pool,
    product_of,
    rounded,
    sum_type,
    transition,
)

_SMALLEST = 1e-30  # size of channels to which a change is set in relation


@dataclass(frozen=True)
class BlockPlan:
    """How a block is evaluated.

    Attributes:
        window: Layers per window, at most. All of the block: Jacobi iteration of the whole block. One after another,
            they are fewer where there are many pixels.
        iterations: Jacobi iterations per window; ``None``: its layers one after another, which is exact, as is every
            number of iterations that reaches the window's length.
    """

    window: int
    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.window < 1 or (self.iterations is not None and self.iterations < 1):
            raise UserError(f"A window and its iterations must be at least 1, not {self.window} and {self.iterations}.")

    def windows(self, layers: int, rows: int = 1) -> list[range]:
        """The windows of a block of so many layers, for so many pixels of all images together."""
        size = self.window if self.iterations is not None else min(self.window, sequential_window(rows))
        return [range(first, min(first + size, layers)) for first in range(0, layers, size)]

    def iterations_of(self, layers: int) -> int:
        """Parallel iterations of a block of so many layers; sequentially every layer is one."""
        return layers if self.iterations is None else sum(min(self.iterations, len(w)) for w in self.windows(layers))

    def evaluations_of(self, layers: int) -> int:
        """Evaluations of single layers in all iterations of a block of so many layers."""
        if self.iterations is None:
            return layers
        return sum(len(w) - k for w in self.windows(layers) for k in range(min(self.iterations, len(w))))


@dataclass(frozen=True)
class Plan:
    """How a network is evaluated, block by block."""

    blocks: tuple[BlockPlan, ...]

    @classmethod
    def sequential(cls, structure: Structure) -> Plan:
        """Layer after layer: what no plan can beat in work."""
        return cls(tuple(BlockPlan(len(block.layers)) for block in structure.blocks))

    @classmethod
    def gs_jacobi(cls, structure: Structure, window: int, iterations: int) -> Plan:
        """The same window and iterations in every block; a window never has more layers than its block."""
        return cls(tuple(BlockPlan(min(window, len(b.layers)), iterations) for b in structure.blocks))

    @classmethod
    def jacobi(cls, structure: Structure, iterations: int | tuple[int, ...]) -> Plan:
        """All layers of a block at once, with a number of iterations for all blocks or for each."""
        blocks = structure.blocks
        each = iterations if isinstance(iterations, tuple) else (iterations,) * len(blocks)
        return cls(tuple(BlockPlan(len(b.layers), n) for b, n in zip(blocks, each, strict=True)))


def sequential_window(rows: int) -> int:
    """Layers that pass on what they make to one another before the next ones collect it: fewer, the more there is."""
    return 8 if rows <= 1024 else 2 if rows <= 4096 else 1


@dataclass(frozen=True)
class Residuals:
    """What the last iterations still changed.

    Attributes:
        relative: ``[blocks, batch]`` on the device: the largest change of a layer's channels in the last iteration of
            its window, relative to the largest of these channels; the largest of all layers. 0 where the plan is exact,
            infinite where one iteration left nothing to compare. It belongs to the evaluation's buffers: the next run
            writes over it.
    """

    relative: Tensor


class FusedWeights:
    """A network's weights, batch norm folded, laid out for the kernels.

    Args:
        structure: The network.
        dtype: The type of features: the network's, or autocast's.
        product: How they are multiplied; by default as :func:`~lit_parallel.kernels.dense_block.product_of` says now.
    """

    def __init__(self, structure: Structure, dtype: torch.dtype, product: str | None = None) -> None:
        device = next(structure.network.parameters()).device
        self.structure, self.dtype, self.product = structure, dtype, product or product_of(dtype, device)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            self.blocks = [self._block(block) for block in structure.blocks]
            self.means = [self._mean(index) for index in range(len(self.blocks))]
            self.transitions = [self._transition(index) for index in range(len(self.blocks) - 1)]
            self.head, self.head_bias = self._head()
            self.stem = self._stem()

    def refresh(self) -> None:
        """Fold the network's present weights into the same buffers."""
        new = FusedWeights(self.structure, self.dtype, self.product)
        with torch.no_grad():
            for mine, other in zip(self.blocks, new.blocks, strict=True):
                mine.replace_by(other)
            for read, other_read in zip([*self.transitions, self.head], [*new.transitions, new.head], strict=True):
                read.replace_by(other_read)
            for tensor, other_tensor in zip(self._tensors(), new._tensors(), strict=True):
                tensor.copy_(other_tensor)

    def _tensors(self) -> list[Tensor]:
        """What is not in the blocks, the transitions and the head's product."""
        return [*self.means, *(self.stem or ()), *(() if self.head_bias is None else (self.head_bias,))]

    def offsets(self, index: int, plan: BlockPlan, guess: str) -> Tensor:
        """What a window's channels contribute to its layers' bottlenecks by the guess, ``[layers, bottleneck]``."""
        weights = self.blocks[index]
        guessed = self.means[index] if guess == "mean" else torch.zeros_like(self.means[index])
        active = (weights.scale * guessed + weights.shift).relu()
        for window in plan.windows(weights.layers):
            active[window[0] : window[-1] + 1, : weights.first_channel(window[0])] = 0
        return weights.gain * torch.einsum("lc,lwc->lw", active, weights.bottleneck.to(active.dtype))

    def _block(self, block: DenseBlock) -> BlockWeights:
        folded, gains = [], []
        for layer, module in zip(block.folded(), block.layers, strict=True):
            folded.append(replace(layer, bottleneck=_part(module, "conv1").weight.flatten(1)))
            gains.append(fold(_part(module, "norm2"))[0])
        return BlockWeights.of(folded, gains, self.dtype, self.product)

    def _mean(self, index: int) -> Tensor:
        """Mean of the layers' channels, ``[channels]``, by the batch norm behind the block."""
        block, weights = self.structure.blocks[index], self.blocks[index]
        result = torch.zeros_like(weights.scale[0])
        result[self._places(index)[block.channels :]] = block.mean.flatten().to(result.dtype)
        return result

    def _places(self, index: int) -> Tensor:
        block = self.structure.blocks[index]
        assert block.norm.running_mean is not None
        return places(block.channels, block.growth, len(block.layers), block.norm.running_mean.device)

    def _read(self, index: int, weight: Tensor) -> ReadWeights:
        """The norm behind a block, and a product ``[out, channels]`` behind it."""
        at, like = self._places(index), self.blocks[index]
        scale, shift = torch.zeros_like(like.scale[:1].expand(2, -1)).unbind()
        for padded, folded in zip((scale, shift), fold(self.structure.blocks[index].norm), strict=True):
            padded[at] = folded.to(padded.dtype)
        wide = weight.new_zeros(len(weight), like.channels, dtype=self.dtype)
        wide[:, at] = weight.to(self.dtype)
        return ReadWeights(scale, shift, rounded(wide, self.product), self.product)

    def _transition(self, index: int) -> ReadWeights:
        transition = _part(self.structure.network, f"features.transition{index + 1}")
        pooling = _part(transition, "pool")
        if not all(_is(n, size) for n, size in ((2, pooling.kernel_size), (2, pooling.stride), (0, pooling.padding))):
            raise UserError(f"The kernels halve an image by means of 2 x 2 pixels, not by {pooling}: set fused=false.")
        return self._read(index, _part(transition, "conv").weight.flatten(1))

    def _head(self) -> tuple[ReadWeights, Tensor | None]:
        classifier = _part(self.structure.network, "classifier")
        names = list(dict(_part(self.structure.network, "features").named_children()))
        if names[-1] != "norm5" or not isinstance(classifier, nn.Linear):
            raise UserError("The kernels need features that end with norm5, and a linear classifier: set fused=false.")
        bias = None if classifier.bias is None else classifier.bias.to(self.dtype, copy=True)
        return self._read(len(self.blocks) - 1, classifier.weight), bias

    def _stem(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Convolution, scale and shift, if the stem is ImageNet's."""
        features: dict[str, Any] = dict(_part(self.structure.network, "features").named_children())
        if list(features)[:5] != ["conv0", "norm0", "relu0", "pool0", "denseblock1"]:
            return None
        conv, norm, _, pooling = parts = [features[name] for name in ("conv0", "norm0", "relu0", "pool0")]
        kinds = ((nn.Conv2d,), NORMS, (nn.ReLU,), (nn.MaxPool2d,))
        if any(type(part) not in kind for part, kind in zip(parts, kinds, strict=True)):
            return None
        if conv.padding_mode != "zeros" or norm.running_mean is None or norm.running_var is None:
            return None
        sizes = ((3, pooling.kernel_size), (2, pooling.stride), (1, pooling.padding), (1, pooling.dilation))
        if conv.bias is not None or pooling.ceil_mode or not all(_is(n, size) for n, size in sizes):
            return None
        weight = conv.weight.to(self.dtype, memory_format=torch.channels_last, copy=True)
        scale, shift = (tensor.to(sum_type(self.dtype)) for tensor in fold(norm))
        return weight, scale, shift


class FusedEvaluation:
    """Evaluates batches of one shape by a plan.

    Weights are copied: after they have changed (training has gone on, a checkpoint was loaded), :meth:`refresh` must be
    called before the next run.

    Args:
        structure: The network, in evaluation mode.
        plan: One for every block.
        images_like: ``[batch, channels, height, width]``: the shape and the device.
        guess: What Jacobi iterations start from: ``mean``, what batch norm knows of every channel, or ``zero``.
        weights: Of another evaluation of the same network in the same type, which are then shared.
    """

    def __init__(
        self,
        structure: Structure,
        plan: Plan,
        images_like: Tensor,
        *,
        guess: str = "mean",
        weights: FusedWeights | None = None,
    ) -> None:
        if len(plan.blocks) != len(structure.blocks):
            raise UserError(f"The plan has {len(plan.blocks)} blocks, the network {len(structure.blocks)}")
        self.structure, self.plan, self.guess = structure, plan, guess
        dtype = compute_type(structure, images_like.device)
        with self._on_its_own(images_like):
            self.weights = weights or FusedWeights(structure, dtype)
            self._images = images_like.to(self.weights.dtype, memory_format=torch.channels_last, copy=True)
            self._allocate()
            self._graph: torch.cuda.CUDAGraph | None = None
            self._evaluate()
            if images_like.device.type == "cuda" and dtype != torch.float64:  # for which there are no kernels
                self._capture()

    def run(self, images: Tensor) -> tuple[Tensor, Residuals]:
        """Logits ``[batch, classes]`` and what the last iterations changed; nothing waits for the device."""
        if images.shape != self._images.shape:
            raise UserError(f"This evaluation is for images of shape {[*self._images.shape]}, not {[*images.shape]}")
        with self._on_its_own(self._images):
            self._images.copy_(images)
            if self._graph is None:
                self._evaluate()
            else:
                self._graph.replay()
            return self._logits.clone(), Residuals(self._relative)

    def refresh(self) -> None:
        """Fold the network's present weights anew; the captured graph reads them from the same place."""
        self.weights.refresh()
        self.follow_weights()

    def follow_weights(self) -> None:
        """The same, where the weights are shared, and have been refreshed."""
        with self._on_its_own(self._images):
            for index, offset in enumerate(self._offsets):
                offset.copy_(self.weights.offsets(index, self.plan.blocks[index], self.guess))

    @staticmethod
    @contextlib.contextmanager
    def _on_its_own(images: Tensor) -> Iterator[None]:
        """Whatever the caller's modes and device are: kernels run on the current device."""
        without_autocast = torch.autocast(images.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), without_autocast, torch.cuda.device_of(images):
            yield

    def _allocate(self) -> None:
        """Buffers: features of every block; sums and activations of a window, which all blocks share."""
        weights, images = self.weights, self._images
        batch, _, height, across = self._stem_image().shape
        if weights.stem is not None:
            height, across = (height + 1) // 2, (across + 1) // 2
        self._features, needed = [], [0, 0]
        for block, plan in zip(weights.blocks, self.plan.blocks, strict=True):
            self._features.append(images.new_zeros(batch, height, across, block.channels))
            rows = batch * height * across
            longest = len(plan.windows(block.layers, rows)[0])
            size = longest * rows * block.width
            needed = [max(needed[0], size * _needs_total(plan, longest)), max(needed[1], size)]
            height, across = height // 2, across // 2
        self._total = images.new_empty(needed[0], dtype=sum_type(images.dtype))
        self._active = images.new_empty(needed[1])
        self._offsets = [weights.offsets(i, plan, self.guess) for i, plan in enumerate(self.plan.blocks)]
        # Changes and sizes; blocks with fewer layers than others have some that never change.
        most = max(block.layers for block in weights.blocks)
        self._change = torch.zeros(2, len(weights.blocks), most, batch, device=images.device)
        self._change[1] = _SMALLEST
        self._unchanged = self._change.clone()
        self._relative = torch.zeros(len(weights.blocks), batch, device=images.device)

    def _capture(self) -> None:
        torch.cuda.synchronize(self._images.device)
        torch.cuda.empty_cache()  # the graph keeps memory of its own
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, torch.cuda.Stream(self._images.device)):
            self._evaluate()
        self._graph = graph

    def _evaluate(self) -> None:
        weights = self.weights
        is_measured = any(
            plan.iterations is not None and 1 < plan.iterations < len(plan.windows(block.layers)[0])
            for plan, block in zip(self.plan.blocks, weights.blocks, strict=True)
        )
        if is_measured:
            self._change.copy_(self._unchanged)
        self._enter(self._stem_image())
        for index, x in enumerate(self._features):
            self._block(index)
            if index + 1 < len(self._features):
                transition(x, weights.transitions[index], self._features[index + 1])
        pooled = mean(self._features[-1], weights.head.scale, weights.head.shift)
        self._logits = F.linear(pooled, weights.head.weight, weights.head_bias)
        if is_measured:
            torch.amax(self._change[0] / self._change[1], dim=1, out=self._relative)
        for plan, block, relative in zip(self.plan.blocks, weights.blocks, self._relative, strict=True):
            if plan.iterations == 1 < len(plan.windows(block.layers)[0]):
                relative.fill_(math.inf)

    def _block(self, index: int) -> None:
        weights, x, plan = self.weights.blocks[index], self._features[index], self.plan.blocks[index]
        rows = x.shape[:3].numel()
        for layers in plan.windows(weights.layers, rows):
            shape = (len(layers), rows, weights.width)
            total = self._total[: math.prod(shape)].view(shape) if _needs_total(plan, len(layers)) else None
            active = self._active[: math.prod(shape)].view(shape)
            if plan.iterations is None:
                self._one_after_another(index, layers, total, active)
            else:
                self._iterate(index, layers, total, active)

    def _one_after_another(self, index: int, layers: range, total: Tensor | None, active: Tensor) -> None:
        weights, x = self.weights.blocks[index], self._features[index]
        collect(x, weights, layers, 0, weights.first_channel(layers[0]), total=total, active=active[:1])
        for k, layer in enumerate(layers):
            later, following = None, None
            if total is not None and k + 1 < len(layers):
                later, following = total[k + 1 :], active[k + 1]
            grow(active[k : k + 1], weights, x, range(layer, layer + 1), later=later, following=following)

    def _iterate(self, index: int, layers: range, total: Tensor | None, active: Tensor) -> None:
        weights, x = self.weights.blocks[index], self._features[index]
        iterations = self.plan.blocks[index].iterations or 1
        begin = weights.first_channel(layers[0])
        collect(x, weights, layers, 0, begin, total=total, active=active, offset=self._offsets[index])
        grow(active, weights, x, layers)
        for k in range(1, min(iterations, len(layers))):
            assert total is not None
            collect(x, weights, layers[k:], begin, weights.channels, base=total[k:], active=active[k:])
            change = self._change[:, index] if k + 1 == iterations < len(layers) else None
            grow(active[k:], weights, x, layers[k:], change=change)

    def _stem_image(self) -> Tensor:
        stem, structure = self.weights.stem, self.structure
        if stem is not None:
            conv = _part(structure.network, "features.conv0")
            return F.conv2d(self._images, stem[0], None, conv.stride, conv.padding, conv.dilation, conv.groups)
        of_network = next(structure.network.parameters()).dtype
        mixed = of_network != self.weights.dtype
        with torch.autocast(self._images.device.type, self.weights.dtype, enabled=mixed, cache_enabled=False):
            return structure.stem(self._images)

    def _enter(self, image: Tensor) -> None:
        """From the stem to the first block's features."""
        if self.weights.stem is not None:
            pool(image, *self.weights.stem[1:], self._features[0])
        else:
            self._features[0][..., : image.shape[1]].copy_(image.permute(0, 2, 3, 1))


def compute_type(structure: Structure, device: torch.device) -> torch.dtype:
    """The type of a network's features: autocast's where that is on, otherwise its weights'."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(structure.network.parameters()).dtype


def _part(module: nn.Module, name: str) -> Any:
    return module.get_submodule(name)


def _is(expected: int, size: int | tuple[int, int]) -> bool:
    return size in (expected, (expected, expected))


def _needs_total(plan: BlockPlan, layers: int) -> bool:
    """Whether sums are kept, for windows of so many layers: for more than one pass over them."""
    return layers > 1 and plan.iterations != 1
