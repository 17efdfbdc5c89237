"""The layers of a PixelCNN++ on windows of its images: one launch for a layer of both streams.

All features lie in one buffer, the *arena*. A feature map of level l takes ``[slots, 1 + height, 1 + width + 1,
features]`` of it, a frame of zeros above and on either side, features padded to a multiple of 32 by zeros: whatever a
causal convolution reads beside a window lies where it was put before, or is zero, and nothing is copied together.

A :class:`Job` is one layer on one window of each slot: a product of the features under the kernel, their concatenated
ELU taken on the way, with the layer's weights, further products of short-cut inputs added to it, then bias, gating and
residual. Jobs are rows of a table on the device; a launch (:func:`run`) takes one or two of them, of the down and of
the down-right stream. Which pixels a slot's window holds is read on the device, so a launch serves every position.

A pixel's sums run in one order wherever its window stands and whatever its neighbours: the same inputs give the same
bits. Windows of another size, or another number of slots, may be summed in another order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lit_parallel.kernels import interpreted, overlap, triton_runs_on

CHUNK = 32
"""Features are padded to multiples of this; the sums of a product advance by it."""

PRODUCT = "tf32x3"
"""How tensor cores multiply: in three products of parts, so that all digits of float32 count."""

IMAGE_FEATURES = CHUNK
"""Features of the image's map: channels, a channel of ones, zeros."""

_TILE = 64  # outputs are padded to multiples of this: no tile of weights ends within a row


class Kind(IntEnum):
    """What a job reads and how its result is used."""

    RAW = 0  # features as they are: changes of resolution
    ELU = 1  # concatenated ELU of features: the first convolution of a gated resnet
    GATED = 2  # the same; two products, of which one gates the other, added to a residual: the second convolution
    OUTPUT = 3  # ELU of features, to the parameters of the window's pixels
    IMAGE = 4  # the image: the first features

    @property
    def activates(self) -> bool:
        """Whether it reads a concatenated ELU."""
        return self in (Kind.ELU, Kind.GATED)


@dataclass(frozen=True)
class Map:
    """A feature map in the arena.

    Attributes:
        offset: Elements of the maps before it, for one slot.
        level: Of resolution.
        height, width: Of the image at this level.
        features: Padded.
        above: Rows of zeros above.
    """

    offset: int
    level: int
    height: int
    width: int
    features: int
    above: int = 1

    @property
    def row(self) -> int:
        """Elements of a row with its frame."""
        return (self.width + 2) * self.features

    @property
    def slot(self) -> int:
        """Elements of one slot."""
        return (self.height + self.above) * self.row

    def at(self, row: int, column: int, slots: int) -> int:
        """Where the pixel that lies so far from a pixel lies, for pixel (0, 0) of the first of so many slots."""
        return slots * self.offset + (self.above + row) * self.row + (1 + column) * self.features


@dataclass(frozen=True, eq=False)
class Job:
    """One layer on a window.

    Attributes:
        kind: What is computed.
        source: What the kernel lies over; ``None``: the image's map.
        target: Where the result goes; ``None``: to the parameters.
        kernel: Rows and columns of the convolution's kernel.
        corner: Row and column of the kernel's first place, relative to the pixel (at the source's level).
        stride: Pixels of the source to one of the job.
        spread: Pixels of the target to one of the job, in either direction.
        level: At which the job's window is counted.
        down: Whether it belongs to the down stream.
        skips: Short-cut inputs, read at the pixel itself.
        residual: What is added to a gated result.
        weight: ``[chunks, 32 or 64, 1 or 2, outputs]``, see :func:`pack`.
        bias: ``[labels, 1 or 2, outputs]``.
        outputs: Outputs that are computed, those of all places of a spread side by side.
    """

    kind: Kind
    source: Map
    target: Map | None
    kernel: tuple[int, int]
    corner: tuple[int, int]
    stride: int
    spread: int
    level: int
    down: bool
    skips: tuple[Map, ...]
    residual: Map | None
    weight: Tensor
    bias: Tensor
    outputs: int


def padded(features: int) -> int:
    """The features that so many take in the arena."""
    return -(-features // CHUNK) * CHUNK


def pack(parts: Sequence[Tensor], signs: int, gates: int = 1) -> Tensor:
    """A layer's weights as the kernel reads them.

    Args:
        parts: For every place that is read, in order: ``[signs * features, gates * outputs]``; with two signs the
            weights of ``elu(x)``, then those of ``elu(-x)``.
        signs: 2 for a concatenated ELU, otherwise 1.
        gates: 2 for a gated layer.

    Returns:
        ``[chunks, signs * 32, gates, outputs]``, outputs padded.
    """
    places = []
    for part in parts:
        signed = part.unflatten(0, (signs, -1)).unflatten(2, (gates, -1))  # [signs, features, gates, outputs]
        features, outputs = signed.shape[1], signed.shape[3]
        signed = F.pad(signed, (0, -outputs % _TILE, 0, 0, 0, padded(features) - features))
        places.append(signed.flatten(0, 1).unflatten(0, (-1, signs * CHUNK)))
    return torch.cat(places).contiguous()


def pack_bias(bias: Tensor, gates: int = 1) -> Tensor:
    """``[labels, gates * outputs]`` as the kernel reads it, ``[labels, gates, outputs]`` padded."""
    bias = bias.unflatten(1, (gates, -1))
    return F.pad(bias, (0, -bias.shape[2] % _TILE)).contiguous()


_FIELDS = (
    "src", "src_slot", "src_row", "src_pixel", "stride", "pixel_chunks", "row_pixels", "main_pixels", "chunks",
    "skip1", "skip2", "residual", "dst", "dst_slot", "dst_row", "dst_pixel", "spread",
    "outputs", "weight", "bias", "width", "level", "rows", "columns", "use_left", "exponent",
)  # fmt: skip


class Layers:
    """Jobs with their weights laid out on one device.

    Args:
        jobs: Launches name them by their index. On a GPU their own copies of the weights are given up.

    Attributes:
        weights: In float32, of the jobs that read no concatenated ELU.
        halves: Of the others: for every chunk the weights in 16 bits, then what these lack, times a power of two.
        exponents: Of that power.
        labels: How many there are.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self.exponents: list[int] = []
        self.weight_offsets: list[int] = []
        weights: list[Tensor] = []
        halves: list[Tensor] = []
        for job in jobs:
            into = halves if job.kind.activates else weights
            self.weight_offsets.append(sum(part.numel() for part in into))
            if not job.kind.activates:
                self.exponents.append(0)
                into.append(job.weight.flatten())
                continue
            # The smallest of a layer's weights keep most of their digits if the largest is just below the largest.
            largest = max(float(job.weight.abs().max()), 1e-30)
            self.exponents.append(min(13 - math.frexp(largest)[1], 40))
            scaled = job.weight * 2.0 ** self.exponents[-1]
            high = scaled.half()
            into.append(torch.stack([high, (scaled - high).half()], dim=1).flatten())
        self.weights, self.halves = torch.cat(weights), torch.cat(halves)
        self.biases = torch.cat([job.bias.flatten() for job in jobs])
        self.labels = max(len(job.bias) for job in jobs)
        if self.weights.device.type == "cuda":
            self.jobs = [replace(job, weight=job.weight.to("meta")) for job in jobs]


class Table:
    """Layers on windows of one size, as the kernel reads about them.

    Args:
        layers: Their jobs.
        rows: Rows of the window at level 0, or 1: one pixel, at every level.
        columns: All columns of the image, or 1; jobs of the down stream always take all of them.
        slots: Images in work at a time.
    """

    def __init__(self, layers: Layers, rows: int, columns: int, slots: int) -> None:
        self.layers, self.slots = layers, slots
        self.positions: list[int] = []
        lines, bias = [], 0
        for index, job in enumerate(layers.jobs):
            src, dst = job.source, job.target
            high = max(1, rows >> job.level)
            across = src.width // job.stride if job.down else max(1, columns >> job.level)
            assert all((skip.slot, skip.row) == (src.slot, src.row) for skip in job.skips)
            skips = [skip.at(0, 0, slots) for skip in job.skips] + [0, 0]
            line = {
                "src": src.at(*job.corner, slots), "src_slot": src.slot, "src_row": src.row, "src_pixel": src.features,
                "stride": job.stride, "pixel_chunks": src.features // CHUNK, "row_pixels": job.kernel[1],
                "main_pixels": job.kernel[0] * job.kernel[1], "chunks": len(job.weight),
                "skip1": skips[0], "skip2": skips[1],
                "residual": 0 if job.residual is None else job.residual.at(0, 0, slots),
                "dst": 0 if dst is None else dst.at(0, 0, slots), "dst_slot": 0 if dst is None else dst.slot,
                "dst_row": 0 if dst is None else dst.row, "dst_pixel": 0 if dst is None else dst.features,
                "spread": job.spread, "outputs": job.outputs,
                "weight": layers.weight_offsets[index], "bias": bias, "width": job.weight.shape[-1],
                "level": job.level, "rows": high, "columns": across, "use_left": int(not job.down),
                "exponent": layers.exponents[index],
            }  # fmt: skip
            assert tuple(line) == _FIELDS
            lines.append(list(line.values()))
            bias += job.bias.numel()
            self.positions.append(high * across)
        self.lines = torch.tensor(lines, dtype=torch.int64, device=layers.weights.device)


@dataclass(frozen=True)
class Workspace:
    """What the layers read and write.

    Attributes:
        arena: All feature maps; zeros at first.
        active: Their concatenated ELU in 16 bits, ``elu(x)`` and ``elu(-x)``, then what that lacks of either; in the
            same order, so four times as long.
        image: ``[samples, 2 + height, 1 + width + 1, 32]``: see :data:`Kind.IMAGE`.
        parameters: ``[slots * pixels of a window, pitch]``: what the last layer puts out.
        sample: ``[slots]`` whose image a slot's is; -1: idle.
        top, left: ``[slots]`` first row and column of its window, at level 0.
        label: ``[samples]`` labels.
    """

    arena: Tensor
    active: Tensor
    image: Tensor
    parameters: Tensor
    sample: Tensor
    top: Tensor
    left: Tensor
    label: Tensor


@triton.jit
def _split(x):
    """A float32 number as the sum of two in 16 bits, 22 of its 24 digits; what is too large is not passed over."""
    x = tl.where(tl.abs(x) <= 65000.0, x, float("nan"))
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _rows(x, SLICES: tl.constexpr):
    if SLICES == 1:
        return x[:, None]
    else:
        return x[None, :, None]


@triton.jit
def _columns(x, SLICES: tl.constexpr):
    if SLICES == 1:
        return x[None, :]
    else:
        return x[None, None, :]


@triton.jit
def _weights(w_at, mask, SLICES: tl.constexpr):
    if SLICES == 1:
        return tl.load(w_at)
    else:
        return tl.load(w_at, mask=mask, other=0.0)


@triton.jit
def _to(pixel, n, spread, dst_row, dst_pixel, SPREADS: tl.constexpr):
    """A place of the target and a feature of it: where an output goes is their sum.

    Outputs behind the features of a pixel go to the pixels beside, below, and below beside it.
    """
    if SPREADS:
        quarter = n // dst_pixel
        beside = (quarter >> 1) * dst_row + (quarter & 1) * dst_pixel
        return pixel[:, None] + beside[None, :], (n % dst_pixel)[None, :]
    else:
        return pixel[:, None], n[None, :]


@triton.jit
def _job(
    arena, active, image, parameters, weights, halves, biases, sample, top, left, label, line, tile, slots,
    pitch, KIND: tl.constexpr, LABELS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SLICES: tl.constexpr,
    STAGES: tl.constexpr, PRODUCT: tl.constexpr, OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    src = tl.multiple_of(tl.load(line + 0), 32)
    src_slot = tl.multiple_of(tl.load(line + 1), 32)
    src_row = tl.multiple_of(tl.load(line + 2).to(tl.int32), 32)
    src_pixel = tl.multiple_of(tl.load(line + 3).to(tl.int32), 32)
    stride = tl.load(line + 4).to(tl.int32)
    pixel_chunks = tl.load(line + 5).to(tl.int32)
    row_pixels = tl.load(line + 6).to(tl.int32)
    main_pixels = tl.load(line + 7).to(tl.int32)
    chunks = tl.load(line + 8).to(tl.int32)
    skip1 = tl.multiple_of(tl.load(line + 9), 32)
    skip2 = tl.multiple_of(tl.load(line + 10), 32)
    residual = tl.multiple_of(tl.load(line + 11), 32)
    dst = tl.multiple_of(tl.load(line + 12), 32)
    dst_slot = tl.multiple_of(tl.load(line + 13), 32)
    dst_row = tl.multiple_of(tl.load(line + 14).to(tl.int32), 32)
    dst_pixel = tl.multiple_of(tl.load(line + 15).to(tl.int32), 32)
    spread = tl.load(line + 16).to(tl.int32)
    outputs = tl.load(line + 17).to(tl.int32)
    weight = tl.multiple_of(tl.load(line + 18), 64)
    bias = tl.multiple_of(tl.load(line + 19), 64)
    width = tl.multiple_of(tl.load(line + 20).to(tl.int32), 64)
    level = tl.load(line + 21).to(tl.int32)
    rows = tl.load(line + 22).to(tl.int32)
    columns = tl.load(line + 23).to(tl.int32)
    use_left = tl.load(line + 24).to(tl.int32)
    exponent = tl.load(line + 25).to(tl.float32)

    SPLIT: tl.constexpr = KIND == 1 or KIND == 2
    K: tl.constexpr = 64 if SPLIT else 32
    GATES: tl.constexpr = 2 if KIND == 2 else 1
    signed = GATES * width  # from one row of weights to the next
    positions = rows * columns
    tiles = (outputs + N - 1) // N
    m = (tile // tiles) * M + tl.arange(0, M)
    n = (tile % tiles) * N + tl.arange(0, N)
    slot = tl.minimum(m // positions, slots - 1)
    position = m % positions
    inside = m < slots * positions
    k = tl.arange(0, K)
    # Windows move between iterations only. The launch before this one began when those before it had ended: unless
    # that one is what moves windows, they may be read while it still runs.
    if OVERLAP and not EARLY:
        gdc_wait()
    owner = tl.load(sample + slot, mask=inside, other=-1, cache_modifier=".cg")
    row = (tl.load(top + slot, cache_modifier=".cg") >> level) + position // columns
    column = (tl.load(left + slot, cache_modifier=".cg") >> level) * use_left + position % columns
    inside = inside & (owner >= 0)
    pixel = row * stride * src_row + column * stride * src_pixel
    if KIND == 4:
        x_at = image + (owner.to(tl.int64) * src_slot + pixel)
    elif SPLIT:
        x_at = active + 4 * (slot.to(tl.int64) * src_slot + pixel)
    else:
        x_at = arena + (slot.to(tl.int64) * src_slot + pixel)
    x_at = _rows(x_at, SLICES) + _columns(k, SLICES)
    if SPLIT:
        w_at = halves + weight + _rows(k * signed, SLICES) + _columns(n, SLICES)
    else:
        w_at = weights + weight + _rows(k * signed, SLICES) + _columns(n, SLICES)
    # Every slice has so many chunks; where its first one lies is divided out once, the others are counted.
    count = (chunks + SLICES - 1) // SLICES
    begin = tl.full([], 0, tl.int32) if SLICES == 1 else (tl.arange(0, SLICES) * count)[:, None, None]
    which = begin // pixel_chunks  # of the places that are read, then of the short cuts
    within = begin - which * pixel_chunks
    over = which // row_pixels
    along = which - over * row_pixels
    # In units of 32 elements, so that the compiler sees how loads are aligned.
    UNITS: tl.constexpr = 8 if SPLIT else 32
    skip1 = skip1 // UNITS
    skip2 = skip2 // UNITS
    next_pixel = src_pixel // UNITS - pixel_chunks * (K // 32)
    next_row = (src_row - row_pixels * src_pixel) // UNITS
    at = (src + over * src_row + along * src_pixel) // UNITS
    if SPLIT:
        at = tl.where(which < main_pixels, at, tl.where(which == main_pixels, skip1, skip2))
    at += within * (K // 32)
    w_at += begin * (K * signed * (2 if SPLIT else 1))
    x_mask = _rows(inside, SLICES)
    unit = tl.exp2(-exponent)
    # Features of padding are zero and stay so: to store them too keeps whole vectors together.
    stored = outputs if KIND == 3 else spread * spread * dst_pixel
    used = inside[:, None] & (n < stored)[None, :]
    if LABELS and KIND == 2:  # labels condition gated layers only
        own = tl.load(label + owner, mask=inside, other=0).to(tl.int32)
        b_at = biases + bias + (own * signed)[:, None] + n[None, :]
        offset = tl.load(b_at, mask=used, other=0.0)
        gate_offset = tl.load(b_at + width, mask=used, other=0.0)
    else:
        offset = tl.load(biases + bias + n)[None, :]
        gate_offset = tl.load(biases + bias + width + n)[None, :] if KIND == 2 else offset
    if KIND != 3:
        to = slot.to(tl.int64) * dst_slot + row * spread * dst_row + column * spread * dst_pixel
        place, feature = _to(to, n, spread, dst_row, dst_pixel, KIND == 0)
    busy = tl.max(owner, axis=0) >= 0
    if OVERLAP:
        if EARLY:
            gdc_wait()
        gdc_launch_dependents()
    if busy:
        if SLICES > 1 and KIND == 2:  # in small launches nobody else would work while it is waited for
            before = tl.load(arena + residual + place + feature, mask=used, other=0.0)
        acc = tl.zeros([M, N], tl.float32) if SLICES == 1 else tl.zeros([SLICES, M, N], tl.float32)
        gate = acc
        for index in tl.range(0, count, num_stages=STAGES):
            w_mask = begin + index < chunks
            mask = x_mask if SLICES == 1 else x_mask & w_mask
            x = tl.load(x_at + at * 32, mask=mask, other=0.0)
            high = _weights(w_at, w_mask, SLICES)
            # Sums that go on in a tensor core lose digits: they are short, and added up in float32.
            if SPLIT:
                x_low = tl.load(x_at + (at * 32 + 2 * src_pixel), mask=mask, other=0.0)
                rest = _weights(w_at + K * signed, w_mask, SLICES)
                acc += tl.dot(x, high) * unit
                acc += tl.dot(x, rest) * unit
                acc += tl.dot(x_low, high) * unit
                if KIND == 2:
                    high = _weights(w_at + width, w_mask, SLICES)
                    rest = _weights(w_at + (width + K * signed), w_mask, SLICES)
                    gate += tl.dot(x, high) * unit
                    gate += tl.dot(x, rest) * unit
                    gate += tl.dot(x_low, high) * unit
                w_at += 2 * K * signed
            else:
                if KIND == 3:
                    x = tl.where(x > 0, x, tl.exp(x) - 1.0)
                acc += tl.dot(x, high, input_precision=PRODUCT) * unit
                w_at += K * signed
            within += 1
            ends = within == pixel_chunks
            within = tl.where(ends, 0, within)
            which += ends.to(tl.int32)
            along += ends.to(tl.int32)
            wraps = along == row_pixels
            along = tl.where(wraps, 0, along)
            at += K // 32 + tl.where(ends, next_pixel, 0) + tl.where(wraps, next_row, 0)
            if SPLIT:
                at = tl.where(ends & (which >= main_pixels), tl.where(which == main_pixels, skip1, skip2), at)
        if SLICES > 1:
            acc = tl.sum(acc, axis=0)
            gate = tl.sum(gate, axis=0)
        acc += offset
        if KIND == 3:
            tl.store(parameters + m.to(tl.int64)[:, None] * pitch + n[None, :], acc, mask=used)
        else:
            if KIND == 2:
                if SLICES == 1:
                    before = tl.load(arena + residual + place + feature, mask=used, other=0.0)
                acc = before + acc / (1.0 + tl.exp(-(gate + gate_offset)))
            if KIND != 1:
                tl.store(arena + dst + place + feature, acc, mask=used)
            e = tl.exp(-tl.abs(acc)) - 1.0
            high, rest = _split(tl.where(acc > 0, acc, e))
            y_at = active + 4 * (dst + place) + feature  # a pixel takes four times as much there
            tl.store(y_at, high, mask=used)
            tl.store(y_at + 2 * dst_pixel, rest, mask=used)
            high, rest = _split(tl.where(acc > 0, e, -acc))
            tl.store(y_at + dst_pixel, high, mask=used)
            tl.store(y_at + 3 * dst_pixel, rest, mask=used)


@triton.jit(do_not_specialize=["first", "second", "split", "slots"])
def _launch(
    arena, active, image, parameters, weights, halves, biases, sample, top, left, label, lines,
    first, second, split, slots, pitch,
    FIRST: tl.constexpr, SECOND: tl.constexpr, LABELS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SLICES: tl.constexpr, FIELDS: tl.constexpr, STAGES: tl.constexpr, PRODUCT: tl.constexpr, OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if FIRST == SECOND:
        line = lines + tl.where(tile < split, first, second) * FIELDS
        tile = tl.where(tile < split, tile, tile - split)
        _job(arena, active, image, parameters, weights, halves, biases, sample, top, left, label, line, tile, slots,
             pitch, FIRST, LABELS, M, N, SLICES, STAGES, PRODUCT, OVERLAP, EARLY)  # fmt: skip
    elif tile < split:
        line = lines + first * FIELDS
        _job(arena, active, image, parameters, weights, halves, biases, sample, top, left, label, line, tile, slots,
             pitch, FIRST, LABELS, M, N, SLICES, STAGES, PRODUCT, OVERLAP, EARLY)  # fmt: skip
    else:
        line = lines + second * FIELDS
        _job(arena, active, image, parameters, weights, halves, biases, sample, top, left, label, line, tile - split,
             slots, pitch, SECOND, LABELS, M, N, SLICES, STAGES, PRODUCT, OVERLAP, EARLY)  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """How a launch is cut.

    Attributes:
        rows: Pixels of a program.
        outputs: Its outputs; of gated jobs twice as many.
        slices: Parts of its sums that run side by side.
        warps: That work on it.
        stages: Chunks that are loaded ahead.
    """

    rows: int
    outputs: int
    slices: int = 1
    warps: int = 4
    stages: int = 3

    def fitting(self, gated: bool, room: int) -> Tile:
        """The tile with as many stages as so many bytes of shared memory take."""
        chunk = self.slices * 2 * CHUNK * (self.rows + (1 + gated) * self.outputs) * 4
        return replace(self, stages=max(1, min(self.stages, room // chunk)))

    def programs(self, pixels: int, outputs: int) -> int:
        """How many there are for so many pixels and outputs."""
        return triton.cdiv(pixels, self.rows) * triton.cdiv(outputs, self.outputs)


_TILES = (Tile(64, 64, 1, 4, 4), Tile(64, 32, 1, 4, 3), Tile(64, 16, 1, 4, 3), Tile(16, 32, 1, 2, 4))
_ENOUGH = (112, 112, 84, 100)  # programs, for an H100 of 132 multiprocessors: as measured there
_SMALLEST = Tile(16, 16, 2, 2, 4)


def tile_for(sizes: Sequence[tuple[int, int]]) -> Tile:
    """The largest tile that gives the device enough programs.

    Args:
        sizes: Pixels and outputs of the jobs of a launch.
    """
    for tile, enough in zip(_TILES, _ENOUGH, strict=True):
        if sum(tile.programs(*size) for size in sizes) >= enough:
            return tile
    return _SMALLEST


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take, less a little that the compiler needs."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block) - 2048


def run_on(device: torch.device) -> bool:
    """Whether the kernels can be launched for tensors on this device: its programs must hold at least a chunk."""
    if not triton_runs_on(device) or interpreted():
        return triton_runs_on(device)
    least = _SMALLEST.slices * 2 * CHUNK * (_SMALLEST.rows + 2 * _SMALLEST.outputs) * 4
    return torch.cuda.get_device_capability(device) >= (8, 0) and shared_memory(device) >= least


def run(table: Table, workspace: Workspace, jobs: Sequence[int], tile: Tile | None = None) -> None:
    """Run one job, or two that do not depend on each other, on every slot's window.

    Args:
        table: The jobs and the size of the windows.
        workspace: What they read and write.
        jobs: Indices of one or two jobs.
        tile: How the launch is cut; by default :func:`tile_for` decides.
    """
    device, slots = workspace.arena.device, table.slots
    if not triton_runs_on(device):
        for job in jobs:
            _run_plainly(table, workspace, job)
        return
    chosen = [table.layers.jobs[index] for index in jobs]
    sizes = [(slots * table.positions[index], job.outputs) for index, job in zip(jobs, chosen, strict=True)]
    tile = tile or tile_for(sizes)
    counts = [tile.programs(*size) for size in sizes]
    if not interpreted():
        tile = tile.fitting(any(job.kind == Kind.GATED for job in chosen), shared_memory(device))
    _launch[(sum(counts),)](
        workspace.arena,
        workspace.active,
        workspace.image,
        workspace.parameters,
        table.layers.weights,
        table.layers.halves,
        table.layers.biases,
        workspace.sample,
        workspace.top,
        workspace.left,
        workspace.label,
        table.lines,
        jobs[0],
        jobs[-1],
        counts[0],
        slots,
        workspace.parameters.shape[1],
        int(chosen[0].kind),
        int(chosen[-1].kind),
        table.layers.labels > 1,
        tile.rows,
        tile.outputs,
        tile.slices,
        len(_FIELDS),
        tile.stages,
        "ieee" if interpreted() else PRODUCT,
        EARLY=all(job.kind != Kind.IMAGE for job in chosen),
        num_warps=tile.warps,
        **overlap(device, 0),  # wide launches, too
    )


def _run_plainly(table: Table, workspace: Workspace, index: int) -> None:
    """What a launch does for one job."""
    job, slots, device = table.layers.jobs[index], table.slots, workspace.arena.device
    line = dict(zip(_FIELDS, table.lines[index].tolist(), strict=True))
    position = torch.arange(table.positions[index], device=device)
    row = (workspace.top >> job.level)[:, None] + position // line["columns"]
    column = (workspace.left * line["use_left"] >> job.level)[:, None] + position % line["columns"]
    busy = workspace.sample >= 0
    source = workspace.image.flatten() if job.kind == Kind.IMAGE else workspace.arena
    owner = workspace.sample.clamp(min=0).long()
    who = owner if job.kind == Kind.IMAGE else torch.arange(slots, device=device)
    pixel = who[:, None] * line["src_slot"] + (row * line["src_row"] + column * line["src_pixel"]) * job.stride
    starts = []
    for place in range(line["main_pixels"]):
        over, along = divmod(place, line["row_pixels"])
        starts.append(line["src"] + over * line["src_row"] + along * line["src_pixel"])
    starts += [skip.at(0, 0, slots) for skip in job.skips]
    at = pixel[..., None, None] + torch.tensor(starts, device=device)[:, None]
    x = source[at + torch.arange(line["src_pixel"], device=device)]  # [slots, positions, places, features]
    if job.kind.activates:
        x = F.elu(torch.cat([x, -x], dim=-1))
    elif job.kind == Kind.OUTPUT:
        x = F.elu(x)
    result = x.flatten(2) @ job.weight.flatten(2).flatten(0, 1)
    label = workspace.label[owner] if len(job.bias) > 1 else torch.zeros_like(owner)
    result = result.unflatten(2, job.bias.shape[1:]) + job.bias[label][:, None]
    result = result[..., : job.outputs]  # [slots, positions, gates, outputs]
    if job.kind == Kind.OUTPUT:
        workspace.parameters[:, : job.outputs].unflatten(0, (slots, -1))[busy] = result[busy, :, 0]
        return
    quarter, feature = torch.arange(job.outputs, device=device), torch.arange(job.outputs, device=device)
    quarter, feature = quarter // line["dst_pixel"], feature % line["dst_pixel"]
    across = (row * job.spread)[..., None] + quarter // 2
    along = (column * job.spread)[..., None] + quarter % 2
    to = torch.arange(slots, device=device)[:, None, None] * line["dst_slot"]
    to = to + across * line["dst_row"] + along * line["dst_pixel"] + feature
    value = result[:, :, 0]
    if job.kind == Kind.GATED:
        value = workspace.arena[line["residual"] + to] + value * result[:, :, 1].sigmoid()
    workspace.arena[line["dst"] + to[busy]] = value[busy]
