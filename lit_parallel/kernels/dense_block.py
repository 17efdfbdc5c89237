"""A dense block's layers on one buffer of features: two grouped kernels, and three small ones around the blocks.

The features of a block lie in one buffer ``x``, ``[batch, height, width, channels]``: first the block's input, then the
channels of every layer, written in place and never copied. A layer ``l`` reads the ``c_l`` channels before its own::

    pre_l = bias_l + gain_l * sum over c < c_l of relu(scale_l[c] x[c] + shift_l[c]) bottleneck_l[:, c]   (`collect`)
    x_l   = convolution 3 x 3 of relu(pre_l)                                                              (`grow`)

`collect` sums over a range of channels for many layers at once, on top of what was summed before, so that what
is final is summed once. `grow` may add what it has just made to the sums of later layers: then a layer is one launch.

Channels, growth and bottleneck are padded to multiples of 16 by zero weights: every load is aligned, and every padded
channel is zero. Sums are float32, or float64 for float64 features. Every program sums in ascending order, without
atomics: the same input gives the same bits.

Every function runs the kernel where there is one (:func:`~lit_parallel.kernels.triton_runs_on`), and otherwise the
plain function beside it, which says what it computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lit_parallel.kernels import overlap, triton_runs_on
from lit_parallel.tf32 import convolutions_may_use_tf32

if TYPE_CHECKING:
    from lit_parallel.dense.structure import FoldedLayer

_ALIGNED = 16  # channels: 32 bytes, and the least inner dimension of a tensor core's product


def padded(channels: int) -> int:
    """The channels that a number of channels takes in a buffer."""
    return -(-channels // _ALIGNED) * _ALIGNED


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which features of a type are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_of(dtype: torch.dtype, device: torch.device) -> str:
    """How features are multiplied: float32 as cuDNN may (``tf32``), or with all digits (``tf32x3``, ``ieee``)."""
    if dtype != torch.float32 or device.type != "cuda":
        return "ieee"
    return "tf32" if convolutions_may_use_tf32() else "tf32x3"


def rounded(weight: Tensor, product: str) -> Tensor:
    """Weights as the product takes them: tensor cores would cut digits off, always towards zero."""
    if product != "tf32":
        return weight
    return ((weight.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def _is_for_kernels(x: Tensor) -> bool:
    return triton_runs_on(x.device) and x.dtype != torch.float64


class _Weights:
    def replace_by(self, other: Self) -> None:
        """Copy the numbers of other weights of the same shape to where these lie."""
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                tensor.copy_(getattr(other, name))


@dataclass(frozen=True)
class BlockWeights(_Weights):
    """The folded layers of a block, laid out for the kernels.

    Attributes:
        scale, shift: ``[layers, channels]``, in the type of sums; zero beyond the channels that a layer reads.
        bottleneck: ``[layers, bottleneck, channels]``, in the type of features: the network's own weights. With the
            second norm's scale folded in they would be rounded once more.
        gain, bias: ``[layers, bottleneck]``, in the type of sums: the second norm.
        growth: ``[layers, 9, bottleneck, growth]``, in the type of features; rows of the 3 x 3 window first.
        entry: Channels of the block's input, padded.
        product: How float32 numbers are multiplied, see :func:`product_of`.
    """

    scale: Tensor
    shift: Tensor
    bottleneck: Tensor
    gain: Tensor
    bias: Tensor
    growth: Tensor
    entry: int
    product: str

    @classmethod
    def of(
        cls, layers: Sequence[FoldedLayer], gains: Sequence[Tensor], dtype: torch.dtype, product: str | None = None
    ) -> BlockWeights:
        """Lay out layers for features of a type.

        Args:
            layers: Folded, but for the second norm's scale, which their ``bottleneck`` is without.
            gains: That scale, ``[bottleneck]`` of every layer.
            dtype: Of features.
            product: How they are multiplied; by default as :func:`product_of` says now.
        """
        first = layers[0]
        start, growth, width = len(first.scale), first.growth.shape[0], first.growth.shape[1]
        entry, step = padded(start), padded(growth)
        channels = entry + len(layers) * step
        sums = sum_type(dtype)
        make = first.bottleneck.new_zeros
        scale, shift = make(2, len(layers), channels, dtype=sums).unbind()
        bottleneck = make(len(layers), padded(width), channels, dtype=dtype)
        gain, bias = make(2, len(layers), padded(width), dtype=sums).unbind()
        weight = make(len(layers), 9, padded(width), step, dtype=dtype)
        for index, layer in enumerate(layers):
            at = places(start, growth, index, make(0).device)
            scale[index, at] = layer.scale.to(sums)
            shift[index, at] = layer.shift.to(sums)
            bottleneck[index, :width, at] = layer.bottleneck.to(dtype)
            gain[index, :width] = gains[index].to(sums)
            bias[index, :width] = layer.bias.to(sums)
            weight[index, :, :width, :growth] = layer.growth.flatten(2).permute(2, 1, 0).to(dtype)
        product = product or product_of(dtype, bottleneck.device)
        return cls(scale, shift, rounded(bottleneck, product), gain, bias, rounded(weight, product), entry, product)

    @property
    def layers(self) -> int:
        return len(self.scale)

    @property
    def channels(self) -> int:
        """Channels of the buffer."""
        return self.scale.shape[1]

    @property
    def step(self) -> int:
        """Channels of one layer, padded."""
        return self.growth.shape[3]

    @property
    def width(self) -> int:
        """Channels of the bottleneck, padded."""
        return self.bottleneck.shape[1]

    def first_channel(self, layer: int) -> int:
        """Where a layer's channels begin, and what it reads ends."""
        return self.entry + layer * self.step


def places(start: int, growth: int, layers: int, device: torch.device | None = None) -> Tensor:
    """Where the channels of a block's input and of its first layers lie in the padded buffer, ``[channels]``."""
    own = torch.arange(layers, device=device)[:, None] * padded(growth) + torch.arange(growth, device=device)
    return torch.cat([torch.arange(start, device=device), padded(start) + own.flatten()])


@triton.jit
def _begin(OVERLAP: tl.constexpr):
    """Let the launch behind start, and wait for what the launch before has written."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _operand(x, dtype: tl.constexpr, PRODUCT: tl.constexpr):
    """A float32 number as a product takes it."""
    if PRODUCT == "tf32":  # tensor cores cut digits off, always towards zero: rounded before
        bits = x.to(tl.int32, bitcast=True)
        x = tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _add_product(acc, a, w, PRODUCT: tl.constexpr):
    if PRODUCT == "tf32x3":  # tensor cores cut their sums off, too: few terms are left to them
        acc += tl.dot(a, w, input_precision=PRODUCT)
    else:
        acc = tl.dot(a, w, acc, input_precision=PRODUCT)
    return acc


# --------------------------------------------------------------------------------------------------------- collect


@triton.jit(do_not_specialize=["rows", "first", "count", "active_count"])
def _collect(
    x, scale, shift, weight, gain, bias, offset, base, total, active,
    rows, channels, width, entry, step, first, count, active_count, begin, end,
    BASE: tl.constexpr, TOTAL: tl.constexpr, ACTIVE: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PRODUCT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    member = count - 1 - tl.program_id(2)  # the longest sums first
    layer = (first + member).to(tl.int64)
    stop = tl.multiple_of(tl.minimum(end, entry + (first + member) * step), 16)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    k = tl.arange(0, DEPTH)
    features = x + row.to(tl.int64)[:, None] * channels + k[None, :]
    scale += layer * channels + k
    shift += layer * channels + k
    weights = weight + layer * width * channels + out[None, :] * channels + k[:, None]
    dtype = weight.dtype.element_ty
    acc = tl.zeros([ROWS, OUT], tl.float32)
    _begin(OVERLAP)
    for at in tl.range(begin, stop, DEPTH, num_stages=STAGES):
        more = at + k < stop
        a = tl.load(features + at, mask=(row < rows)[:, None] & more[None, :], other=0.0)
        s = tl.load(scale + at, mask=more, other=0.0)
        t = tl.load(shift + at, mask=more, other=0.0)
        w = tl.load(weights + at, mask=more[:, None] & (out < width)[None, :], other=0.0)
        a = _operand(_relu(a.to(tl.float32) * s[None, :] + t[None, :]), dtype, PRODUCT)
        acc = _add_product(acc, a, w, PRODUCT)
    acc *= tl.load(gain + layer * width + out, mask=out < width, other=0.0)[None, :]
    mask = (row < rows)[:, None] & (out < width)[None, :]
    at = (member.to(tl.int64) * rows + row)[:, None] * width + out[None, :]
    if BASE:
        acc += tl.load(base + at, mask=mask, other=0.0)
    else:
        acc += tl.load(bias + layer * width + out, mask=out < width, other=0.0)[None, :]
    if TOTAL:
        tl.store(total + at, acc, mask=mask)
    if ACTIVE:
        if OFFSET:
            acc += tl.load(offset + layer * width + out, mask=out < width, other=0.0)[None, :]
        if member < active_count:
            tl.store(active + at, _operand(_relu(acc), dtype, PRODUCT), mask=mask)


def collect_plainly(
    x: Tensor,
    weights: BlockWeights,
    layers: range,
    begin: int,
    end: int,
    *,
    base: Tensor | None = None,
    total: Tensor | None = None,
    active: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """What :func:`collect` does."""
    features = x.flatten(0, 2)
    for member, layer in enumerate(layers):
        reads = slice(begin, max(begin, min(end, weights.first_channel(layer))))
        scaled = features[:, reads].to(weights.scale.dtype) * weights.scale[layer, reads] + weights.shift[layer, reads]
        part = scaled.relu().to(x.dtype).to(scaled.dtype) @ weights.bottleneck[layer, :, reads].to(scaled.dtype).T
        pre = (weights.bias[layer] if base is None else base[member]) + weights.gain[layer] * part
        if total is not None:
            total[member] = pre
        if active is not None and member < len(active):
            active[member] = (pre if offset is None else pre + offset[layer]).relu()


def collect(
    x: Tensor,
    weights: BlockWeights,
    layers: range,
    begin: int,
    end: int,
    *,
    base: Tensor | None = None,
    total: Tensor | None = None,
    active: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """Sum the channels ``begin`` to ``end`` (or to where a layer's own begin) into the bottlenecks of some layers.

    Args:
        x: ``[batch, height, width, channels]`` features.
        weights: Of the block.
        layers: Without gaps.
        begin: A multiple of 16.
        end: Another.
        base: ``[layers, rows, bottleneck]`` what is summed on top of, with rows = batch * height * width; ``None``:
            the layers' bias.
        total: The same shape, which takes the sums; may be ``base``.
        active: The same shape, in the type of ``x``: takes ``relu(sum + offset)``, what the next convolution reads; or
            with fewer layers, of which it takes that.
        offset: ``[all layers, bottleneck]``, or nothing.
    """
    if not _is_for_kernels(x):
        return collect_plainly(x, weights, layers, begin, end, base=base, total=total, active=active, offset=offset)
    rows = x.shape[:3].numel()
    tile = tile_of_collect(rows, len(layers), weights.width).for_type(x.dtype)
    unused = weights.bias
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(weights.width, tile.out), len(layers))
    _collect[grid](
        x,
        weights.scale,
        weights.shift,
        weights.bottleneck,
        weights.gain,
        weights.bias,
        unused if offset is None else offset,
        unused if base is None else base,
        unused if total is None else total,
        unused if active is None else active,
        rows,
        weights.channels,
        weights.width,
        weights.entry,
        weights.step,
        layers[0],
        len(layers),
        0 if active is None else len(active),
        begin,
        end,
        base is not None,
        total is not None,
        active is not None,
        offset is not None,
        tile.rows,
        tile.out,
        tile.depth,
        tile.stages,
        weights.product,
        num_warps=tile.warps,
        **overlap(x.device, math.prod(grid)),
    )


# ------------------------------------------------------------------------------------------------------------ grow


@triton.jit(do_not_specialize=["height", "across", "batch", "tiles", "layer_0", "apart", "later"])
def _grow(
    active, growth, x, change, scale, shift, weight, gain, sums, following,
    height, across, batch, tiles, channels, width, entry, step, layer_0, apart, later,
    MEASURE: tl.constexpr, PUSH: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr, PRODUCT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0) // tiles
    pixels = height * across
    pixel = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside = pixel < pixels
    line, column = pixel // across, pixel % across
    row = sample.to(tl.int64) * pixels + pixel
    rows = batch.to(tl.int64) * pixels
    layer = layer_0.to(tl.int64)
    if not PUSH:
        layer += tl.program_id(1)
        active += tl.program_id(1) * rows * width
    first = entry + layer * step
    g = tl.arange(0, STEP)
    k = tl.arange(0, DEPTH)
    active += row[:, None] * width + k[None, :]
    growth += layer * 9 * width * step + k[:, None] * step + g[None, :]
    dtype = x.dtype.element_ty
    if PUSH:  # weights need not wait for the kernel before
        reader = layer + 1 + tl.program_id(1)
        b = tl.arange(0, WIDTH)
        s = tl.load(scale + reader * channels + first + g, mask=g < step, other=0.0)
        t = tl.load(shift + reader * channels + first + g, mask=g < step, other=0.0)
        of_gain = gain + reader * width + b
        gain_reader = tl.load(of_gain, mask=b < width, other=0.0)
        of_reader = weight + (reader * width + b[None, :]) * channels + first + g[:, None]
        w_reader = tl.load(of_reader, mask=(g < step)[:, None] & (b < width)[None, :], other=0.0)
    _begin(OVERLAP)
    if PUSH:
        of_sums = sums + (tl.program_id(1) * rows + row)[:, None] * width + b[None, :]
        mask_sums = inside[:, None] & (b < width)[None, :]
        pushed = tl.load(of_sums, mask=mask_sums, other=0.0)
    acc = tl.zeros([ROWS, STEP], tl.float32)
    for i in tl.range(0, 9 * CHUNKS, num_stages=STAGES):
        tap, chunk = i // CHUNKS, i % CHUNKS * DEPTH
        down, right = tap // 3 - 1, tap % 3 - 1
        seen = inside & (line + down >= 0) & (line + down < height)
        seen = seen & (column + right >= 0) & (column + right < across)
        more = chunk + k < width
        of_a = active + (down * across + right) * width + chunk
        a = tl.load(of_a, mask=seen[:, None] & more[None, :], other=0.0)
        w = tl.load(growth + (tap * width + chunk) * step, mask=more[:, None] & (g < step)[None, :], other=0.0)
        acc = _add_product(acc, a, w, PRODUCT)
    new = acc.to(dtype)
    mask = inside[:, None] & (g < step)[None, :]
    to = x + row[:, None] * channels + first + g[None, :]
    if MEASURE:
        value = new.to(tl.float32)
        distance = tl.abs(value - tl.load(to, mask=mask, other=0.0).to(tl.float32))
        distance = tl.where(mask, tl.where(distance == distance, distance, float("inf")), 0.0)
        largest = tl.where(mask, tl.where(value == value, tl.abs(value), 0.0), 0.0)
        at = change + layer * batch + sample
        tl.atomic_max(at, tl.max(tl.max(distance, axis=1), axis=0))
        tl.atomic_max(at + apart, tl.max(tl.max(largest, axis=1), axis=0))
    if PUSH:
        read = _operand(_relu(new.to(tl.float32) * s[None, :] + t[None, :]), dtype, PRODUCT)
        pushed += gain_reader[None, :] * tl.dot(read, w_reader, input_precision=PRODUCT)
        if tl.program_id(1) == 0:  # the next layer, whose sum is whole
            tl.store(to, new, mask=mask)
            of_following = following + row[:, None] * width + b[None, :]
            tl.store(of_following, _operand(_relu(pushed), dtype, PRODUCT), mask=mask_sums)
        else:
            tl.store(of_sums, pushed, mask=mask_sums)
    else:
        tl.store(to, new, mask=mask)


def grow_plainly(
    active: Tensor,
    weights: BlockWeights,
    x: Tensor,
    layers: range,
    *,
    later: Tensor | None = None,
    following: Tensor | None = None,
    change: Tensor | None = None,
) -> None:
    """What :func:`grow` does."""
    batch, height, across, _ = x.shape
    for member, layer in enumerate(layers):
        image = active[member].view(batch, height, across, -1).permute(0, 3, 1, 2)
        kernel = weights.growth[layer].permute(2, 1, 0).unflatten(2, (3, 3))
        sums = sum_type(x.dtype)
        new = F.conv2d(image.to(sums), kernel.to(sums), padding=1).permute(0, 2, 3, 1).to(x.dtype)
        first = weights.first_channel(layer)
        own = x[..., first : first + weights.step]
        if change is not None:
            distance, size = (new - own).abs(), new.abs()
            seen = torch.stack([distance.nan_to_num(torch.inf), size.nan_to_num(0.0)]).amax(dim=(2, 3, 4))
            change[:, layer] = torch.maximum(change[:, layer], seen.to(change.dtype))
        own.copy_(new)
    if later is not None and following is not None:
        readers = range(layers[-1] + 1, layers[-1] + 1 + len(later))
        ends = first + weights.step
        collect_plainly(x, weights, readers, first, ends, base=later, total=later, active=following[None])


def grow(
    active: Tensor,
    weights: BlockWeights,
    x: Tensor,
    layers: range,
    *,
    later: Tensor | None = None,
    following: Tensor | None = None,
    change: Tensor | None = None,
) -> None:
    """Write the channels of some layers from what is active in their bottlenecks.

    Args:
        active: ``[layers, rows, bottleneck]`` sums after the rectifier, in the type of ``x``.
        weights: Of the block.
        x: ``[batch, height, width, channels]`` features, in place.
        layers: Without gaps.
        later: ``[later layers, rows, bottleneck]``, only for one layer: sums of those that follow it, to which what it
            contributes is added. The first one's is whole then, and left as it is:
        following: ``[rows, bottleneck]`` takes it, after the rectifier, in the type of ``x``.
        change: ``[2, all layers, batch]`` float32: takes the largest change and the largest size of every layer's
            channels, where they are larger than what it holds. What is not a number counts as an infinite change.
    """
    if not _is_for_kernels(x):
        return grow_plainly(active, weights, x, layers, later=later, following=following, change=change)
    batch, height, across, _ = x.shape
    count = 0 if later is None else len(later)
    tile = tile_of_grow(batch, height * across, count or len(layers), weights.width).for_type(x.dtype)
    tiles = triton.cdiv(height * across, tile.rows)
    grid = (batch * tiles, count or len(layers))
    _grow[grid](
        active,
        weights.growth,
        x,
        weights.bias if change is None else change,
        weights.scale,
        weights.shift,
        weights.bottleneck,
        weights.gain,
        weights.bias if later is None else later,
        active if following is None else following,
        height,
        across,
        batch,
        tiles,
        weights.channels,
        weights.width,
        weights.entry,
        weights.step,
        layers[0],
        0 if change is None else change.stride(0),
        count,
        change is not None,
        count > 0,
        tile.rows,
        triton.next_power_of_2(weights.step),
        triton.next_power_of_2(weights.width),
        tile.depth,
        triton.cdiv(weights.width, tile.depth),
        tile.stages,
        weights.product,
        num_warps=tile.warps,
        **overlap(x.device, math.prod(grid)),
    )


# ----------------------------------------------------------------------------------------- between the blocks


@dataclass(frozen=True)
class ReadWeights(_Weights):
    """What reads all features of a block: batch norm, rectifier and a product.

    Attributes:
        scale, shift: ``[channels]`` of the block's padded buffer, in the type of sums.
        weight: ``[out, channels]``, in the type of features.
    """

    scale: Tensor
    shift: Tensor
    weight: Tensor
    product: str = "ieee"


@triton.jit(do_not_specialize=["rows", "height", "across", "out_channels"])
def _transition(
    x, scale, shift, weight, y, rows, height, across, channels, out_stride, out_channels,
    ROWS: tl.constexpr, OUT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PRODUCT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    half_height, half_across = height // 2, across // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    k = tl.arange(0, DEPTH)
    sample, pixel = row // (half_height * half_across), row % (half_height * half_across)
    corner = (sample * height + pixel // half_across * 2) * across + pixel % half_across * 2
    features = x + corner.to(tl.int64)[:, None] * channels + k[None, :]
    weights = weight + out[None, :] * channels + k[:, None]
    dtype = weight.dtype.element_ty
    acc = tl.zeros([ROWS, OUT], tl.float32)
    _begin(OVERLAP)
    for at in tl.range(0, channels, DEPTH, num_stages=STAGES):
        more = at + k < channels
        s = tl.load(scale + at + k, mask=more, other=0.0)[None, :]
        t = tl.load(shift + at + k, mask=more, other=0.0)[None, :]
        w = tl.load(weights + at, mask=more[:, None] & (out < out_channels)[None, :], other=0.0)
        mask = (row < rows)[:, None] & more[None, :]
        above = features + at
        below = above + across * channels
        a = _relu(tl.load(above, mask=mask, other=0.0).to(tl.float32) * s + t)
        a += _relu(tl.load(above + channels, mask=mask, other=0.0).to(tl.float32) * s + t)
        a += _relu(tl.load(below, mask=mask, other=0.0).to(tl.float32) * s + t)
        a += _relu(tl.load(below + channels, mask=mask, other=0.0).to(tl.float32) * s + t)
        acc = _add_product(acc, _operand(0.25 * a, dtype, PRODUCT), w, PRODUCT)
    mask = (row < rows)[:, None] & (out < out_channels)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * out_stride + out[None, :], acc.to(y.dtype.element_ty), mask=mask)


def transition_plainly(x: Tensor, weights: ReadWeights, y: Tensor) -> None:
    """What :func:`transition` does."""
    active = (x.to(weights.scale.dtype) * weights.scale + weights.shift).relu()
    pooled = F.avg_pool2d(active.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    product = pooled.to(x.dtype).to(pooled.dtype) @ weights.weight.to(pooled.dtype).T
    y[..., : len(weights.weight)] = product.to(y.dtype)


def transition(x: Tensor, weights: ReadWeights, y: Tensor) -> None:
    """From all features of a block to the input of the next: batch norm, rectifier, 1 x 1, mean of 2 x 2 pixels.

    The mean comes before the product, which is linear: the same result at a quarter of the arithmetic.

    Args:
        x: ``[batch, height, width, channels]`` features.
        weights: Of the transition.
        y: ``[batch, height // 2, width // 2, channels]`` features of the next block, whose first channels are written.
    """
    if not _is_for_kernels(x):
        return transition_plainly(x, weights, y)
    rows, out = y.shape[:3].numel(), len(weights.weight)
    tile = TRANSITION.for_type(x.dtype)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(out, tile.out))
    _transition[grid](
        x,
        weights.scale,
        weights.shift,
        weights.weight,
        y,
        rows,
        x.shape[1],
        x.shape[2],
        x.shape[3],
        y.shape[3],
        out,
        tile.rows,
        tile.out,
        tile.depth,
        tile.stages,
        weights.product,
        num_warps=tile.warps,
        **overlap(x.device, math.prod(grid)),
    )


@triton.jit(do_not_specialize=["pixels"])
def _mean(
    x, scale, shift, y, pixels, channels, ROWS: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    s = tl.load(scale + c, mask=c < channels, other=0.0)[None, :]
    t = tl.load(shift + c, mask=c < channels, other=0.0)[None, :]
    sums = tl.zeros([ROWS, WIDE], tl.float32)
    _begin(OVERLAP)
    for at in range(0, pixels, ROWS):
        pixel = at + tl.arange(0, ROWS)
        mask = (pixel < pixels)[:, None] & (c < channels)[None, :]
        a = tl.load(x + (sample * pixels + pixel)[:, None] * channels + c[None, :], mask=mask, other=0.0)
        sums += tl.where(mask, _relu(a.to(tl.float32) * s + t), 0.0)
    mean = tl.sum(sums, axis=0) / pixels
    tl.store(y + sample * channels + c, mean.to(y.dtype.element_ty), mask=c < channels)


def mean_plainly(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What :func:`mean` does."""
    return (x.to(scale.dtype) * scale + shift).relu().mean(dim=(1, 2)).to(x.dtype)


def mean(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The mean over all pixels after batch norm and rectifier, ``[batch, channels]``."""
    if not _is_for_kernels(x):
        return mean_plainly(x, scale, shift)
    batch, height, across, channels = x.shape
    y = x.new_empty(batch, channels)
    grid = (batch, triton.cdiv(channels, 32))
    _mean[grid](
        x, scale, shift, y, height * across, channels, 64, 32, num_warps=4, **overlap(x.device, math.prod(grid))
    )
    return y


@triton.jit(do_not_specialize=["height", "across", "out_height", "out_across", "rows"])
def _pool(image, scale, bias, y, rows, height, across, out_height, out_across, channels, out_stride,
          ROWS: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    _begin(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDE)
    sample, pixel = row // (out_height * out_across), row % (out_height * out_across)
    top, left = pixel // out_across * 2 - 1, pixel % out_across * 2 - 1
    s = tl.load(scale + c, mask=c < channels, other=0.0)[None, :]
    largest = tl.full([ROWS, WIDE], float("-inf"), tl.float32)
    for i in tl.static_range(9):
        v, h = top + i // 3, left + i % 3
        seen = (row < rows) & (v >= 0) & (v < height) & (h >= 0) & (h < across)
        at = ((sample * height + v) * across + h).to(tl.int64)[:, None] * channels + c[None, :]
        value = s * tl.load(image + at, mask=seen[:, None] & (c < channels)[None, :], other=0.0).to(tl.float32)
        value = tl.where(seen[:, None], value, float("-inf"))
        largest = tl.where((value > largest) | (value != value), value, largest)
    result = largest + tl.load(bias + c, mask=c < channels, other=0.0)[None, :]
    result = tl.where(result < 0.0, 0.0, result)
    mask = (row < rows)[:, None] & (c < channels)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * out_stride + c[None, :], result.to(y.dtype.element_ty), mask=mask)


def pool_plainly(image: Tensor, scale: Tensor, bias: Tensor, y: Tensor) -> None:
    """What :func:`pool` does."""
    pooled = F.max_pool2d(
        image.to(bias.dtype) * scale[:, None, None] + bias[:, None, None], 3, stride=2, padding=1
    ).relu()
    y[..., : len(bias)] = pooled.permute(0, 2, 3, 1).to(y.dtype)


def pool(image: Tensor, scale: Tensor, bias: Tensor, y: Tensor) -> None:
    """Batch norm, rectifier and the largest of 3 x 3 pixels, at every other pixel.

    Args:
        image: ``[batch, channels, height, width]``, channels last in memory.
        scale: ``[channels]``, in the type of sums.
        bias: The same.
        y: ``[batch, (height + 1) // 2, (width + 1) // 2, channels]`` features, whose first channels are written.
    """
    if not _is_for_kernels(y):
        return pool_plainly(image, scale, bias, y)
    channels, height, across = image.shape[1:]
    rows = y.shape[:3].numel()
    grid = (triton.cdiv(rows, 16),)
    _pool[grid](
        image, scale, bias, y, rows, height, across, y.shape[1], y.shape[2], channels, y.shape[3],
        16, triton.next_power_of_2(channels), num_warps=4, **overlap(y.device, grid[0]),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class Tile:
    """How a product is cut.

    Attributes:
        rows, out: Pixels and outputs of a program.
        depth: Links of the sums that are loaded at a time.
        warps: Of a program.
        stages: Loads on their way at a time.
    """

    rows: int
    out: int
    depth: int
    warps: int
    stages: int

    def for_type(self, dtype: torch.dtype) -> Tile:
        """The same in bytes: chosen for features of two bytes."""
        return replace(self, depth=max(_ALIGNED, 2 * self.depth // dtype.itemsize))


# The fastest of those tried on an H100. Large tiles load less; small ones leave no multiprocessor without work.


def tile_of_collect(rows: int, layers: int, width: int) -> Tile:
    """The tile of :func:`collect`."""

    def programs(tile: Tile) -> int:
        return layers * triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.out)

    for tile in (Tile(64, 128, 64, 4, 3), Tile(64, 64, 128, 4, 3)):
        if programs(tile) >= 264:
            return tile
    return Tile(16, 64, 128, 4, 4) if programs(Tile(16, 64, 128, 4, 4)) >= 132 else Tile(16, 32, 128, 4, 4)


def tile_of_grow(batch: int, pixels: int, programs: int, width: int) -> Tile:
    """The tile of :func:`grow`, for so many programs per tile of pixels."""
    depth = 128 if width == 128 else 64
    return Tile(64 if programs * batch * triton.cdiv(pixels, 64) >= 32 else 16, 0, depth, 4, 4)


TRANSITION = Tile(16, 32, 128, 4, 3)
