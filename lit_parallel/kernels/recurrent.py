"""Walking the blocks of an RNN's, a GRU's or an LSTM's adjoint in one kernel launch.

A program owns some rows, each a sequence's block (or a column of one), and walks them through halo and block: at every
step it reads the diagonal factors, writes the gradients of the pre-activations, and multiplies them by ``W_hh``. Rows
never wait for one another. The plain reference is :meth:`lit_parallel.recurrent.chain.SteppedChain.walk`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_parallel.kernels import interpreted
from lit_parallel.kernels.recurrent_factors import linearise
from lit_parallel.recurrent.cells import Cell, Layer, cell_of
from lit_parallel.recurrent.chain import Chain, Disagreement, Walk, blocks_of

_MOST_ROUNDS, _SHORTEST_BLOCK = 8, 4
NOT_AT_ALL = tl.constexpr(-1)  # a halo that says: this walk is not needed
_SMALLEST = tl.constexpr(1e-20)  # sum of squares of a solution, of which a float32 still tells its errors
MAX_RESIDENT = 128  # hidden units whose matrix stays on the chip
KINDS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3}


@triton.jit
def _matrix(weight, h, H: tl.constexpr, HP: tl.constexpr):
    """One gate's matrix, ``[HP, HP]``, rows and columns beyond H zero."""
    k = tl.arange(0, HP)
    inside = (k < H)[:, None] & (h < H)[None, :]
    return tl.load(weight + k[:, None] * H + h[None, :], mask=inside, other=0.0)


@triton.jit
def _product(p, w, PRODUCT: tl.constexpr):
    if PRODUCT == "bf16":
        product = tl.dot(p.to(tl.bfloat16), w.to(tl.bfloat16))
    else:
        product = tl.dot(p, w, input_precision=PRODUCT)
    return product


@triton.jit
def _read(j, n, b, inside, h, factors, source, T, B, C, H: tl.constexpr, KIND: tl.constexpr, SOURCE: tl.constexpr):
    """An RNN's derivative and the output's gradient at step n C + j of every row; before the first step, anything."""
    t = tl.maximum(n * C + j, 0)
    mask = (inside & (t < T))[:, None] & (h < H)[None, :]
    at = (t.to(tl.int64) * B + b)[:, None] * H + h[None, :]
    y = tl.load(factors + at, mask=mask, other=0.0)
    g = y
    if SOURCE:
        g = tl.load(source + at, mask=mask, other=0.0)
    return y, g


@triton.jit
def _step_rnn(
    j, v, y, g, n, b, inside, h, resident, gradients, T, B, C,
    H: tl.constexpr, KIND: tl.constexpr, SOURCE: tl.constexpr, KEEP: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Step n C + j of every row; rows that have no such step stay as they are."""
    t = n * C + j
    on = inside & (t < T)
    s = v
    if SOURCE:
        s += g
    p = s * (1.0 - y * y) if KIND == 0 else tl.where(y > 0.0, s, 0.0)
    if KEEP:
        at = (t.to(tl.int64) * B + b)[:, None] * H + h[None, :]
        tl.store(gradients + at, p, mask=on[:, None] & (h < H)[None, :])
    return tl.where(on[:, None], _product(p, resident, PRODUCT), v), tl.where(on[:, None], p, 0.0)


@triton.jit
def put_aside(p, scale, put, size, mask, FULL: tl.constexpr):
    """Split ``p * scale`` into two halves of 16 bits and write them."""
    scaled = p * scale[:, None]
    high = scaled.to(tl.float16)
    tl.store(put, high, mask=mask)
    if FULL:
        tl.store(put + size, (scaled - high.to(tl.float32)).to(tl.float16), mask=mask)


@triton.jit
def add_piece(acc, p, p_low, weight, low, of_w, FULL: tl.constexpr):
    """Add a product of halves of 16 bits; those of the weight are ``low`` numbers apart."""
    w = tl.load(weight, mask=of_w, other=0.0)
    if FULL:
        # The product of both lower halves is below float32's last bit. Tensor cores round their sums towards zero, all
        # in one direction: few terms are left to them, the smallest first; the rest is added outside.
        w_low = tl.load(weight + low, mask=of_w, other=0.0)
        part = tl.dot(p_low, w)
        part = tl.dot(p, w_low, part)
        acc += tl.dot(p, w, part)
    else:
        acc = tl.dot(p, w, acc)
    return acc


@triton.jit
def _read_and_add_piece(acc, aside, size, weight, low, of_p, of_w, FULL: tl.constexpr):
    p = tl.load(aside, mask=of_p, other=0.0)
    p_low = p
    if FULL:
        p_low = tl.load(aside + size, mask=of_p, other=0.0)
    return add_piece(acc, p, p_low, weight, low, of_w, FULL)


@triton.jit
def multiply(
    aside, size, weight, row, inside, h,
    H: tl.constexpr, HP: tl.constexpr, K: tl.constexpr, R: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    AT_ONCE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """What was put aside, ``[R, K]``, times the weight ``[K, H]``, streamed from the cache in pieces, all in halves.

    AT_ONCE parts of K, one, three or four, are summed side by side: products that need not wait for one another.
    """
    PART: tl.constexpr = K // AT_ONCE
    k = tl.arange(0, DEPTH)
    aside += row.to(tl.int64)[:, None] * K + k[None, :]
    weight += k[:, None] * H + h[None, :]
    low: tl.constexpr = K * H
    acc_0 = tl.zeros([R, HP], dtype=tl.float32)
    acc_1 = tl.zeros([R, HP], dtype=tl.float32)
    acc_2 = tl.zeros([R, HP], dtype=tl.float32)
    acc_3 = tl.zeros([R, HP], dtype=tl.float32)
    for begin in tl.range(0, PART, DEPTH, num_stages=STAGES):
        more = (begin + k) < PART
        of_p = inside[:, None] & more[None, :]
        of_w = more[:, None] & (h < H)[None, :]
        p, w = aside + begin, weight + begin * H
        acc_0 = _read_and_add_piece(acc_0, p, size, w, low, of_p, of_w, FULL)
        if AT_ONCE > 1:
            acc_1 = _read_and_add_piece(acc_1, p + PART, size, w + PART * H, low, of_p, of_w, FULL)
            acc_2 = _read_and_add_piece(acc_2, p + 2 * PART, size, w + 2 * PART * H, low, of_p, of_w, FULL)
        if AT_ONCE > 3:
            acc_3 = _read_and_add_piece(acc_3, p + 3 * PART, size, w + 3 * PART * H, low, of_p, of_w, FULL)
    if AT_ONCE > 1:
        acc_0 = (acc_0 + acc_1) + (acc_2 + acc_3)
    return acc_0


@triton.jit
def scale_of(largest):
    """The power of two that brings a row's largest number near 2^10, where 16 bits hold most of it."""
    usable = (largest > 1e-30) & (largest < 1e30)
    exponent = tl.floor(tl.log2(tl.where(usable, largest, 1.0)))
    return tl.exp2(10.0 - exponent), tl.exp2(exponent - 10.0)


@triton.jit
def _step_streamed(
    j, v, of_c, squares, row, n, b, inside, h, factors, source, weight, weight_scale, gradients, aside, size, T, B, C,
    H: tl.constexpr, HP: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, SOURCE: tl.constexpr, KEEP: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr, AT_ONCE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Step n C + j of every row; rows that have no such step stay as they are."""
    K: tl.constexpr = H if KIND < 2 else (KIND + 1) * H
    t = n * C + j
    on = (inside & (t < T))[:, None]
    mask = on & (h < H)[None, :]
    at = (t.to(tl.int64) * B + b)[:, None]
    put = aside + row.to(tl.int64)[:, None] * K + h[None, :]
    s = v
    if SOURCE:
        s += tl.load(source + at * H + h[None, :], mask=mask, other=0.0)
    new_c = of_c
    if KIND < 2:
        y = tl.load(factors + at * H + h[None, :], mask=mask, other=0.0)
        p_0 = s * (1.0 - y * y) if KIND == 0 else tl.where(y > 0.0, s, 0.0)
        p_0 = tl.where(mask, p_0, 0.0)
        largest = tl.abs(p_0)
        squares += p_0 * p_0
        new = tl.zeros_like(v)
        if KEEP:
            tl.store(gradients + at * H + h[None, :], p_0, mask=mask)
    else:
        out = gradients + at * (4 * H) + h[None, :]
        if KIND == 2:
            base = factors + at * (5 * H) + h[None, :]
            p_in = s * tl.load(base, mask=mask, other=0.0)
            p_0 = s * tl.load(base + H, mask=mask, other=0.0)
            p_1 = s * tl.load(base + 2 * H, mask=mask, other=0.0)
            p_2 = s * tl.load(base + 3 * H, mask=mask, other=0.0)
            new = s * tl.load(base + 4 * H, mask=mask, other=0.0)
            p_3 = p_in  # of the input alone
        else:
            base = factors + at * (6 * H) + h[None, :]
            u = of_c + s * tl.load(base, mask=mask, other=0.0)
            p_0 = u * tl.load(base + H, mask=mask, other=0.0)
            p_1 = u * tl.load(base + 2 * H, mask=mask, other=0.0)
            p_2 = u * tl.load(base + 3 * H, mask=mask, other=0.0)
            p_3 = s * tl.load(base + 4 * H, mask=mask, other=0.0)
            new = tl.zeros_like(v)
            new_c = tl.where(on, u * tl.load(base + 5 * H, mask=mask, other=0.0), of_c)
        squares += p_0 * p_0 + p_1 * p_1 + p_2 * p_2 + p_3 * p_3
        largest = tl.maximum(tl.maximum(tl.abs(p_0), tl.abs(p_1)), tl.maximum(tl.abs(p_2), tl.abs(p_3)))
        if KEEP:
            if KIND == 2:
                tl.store(out, p_3, mask=mask)
                out += H
            else:
                tl.store(out + 3 * H, p_3, mask=mask)
            tl.store(out, p_0, mask=mask)
            tl.store(out + H, p_1, mask=mask)
            tl.store(out + 2 * H, p_2, mask=mask)
    scale, back = scale_of(tl.max(largest, axis=1))
    put_aside(p_0, scale, put, size, mask, FULL)
    if KIND >= 2:
        put_aside(p_1, scale, put + H, size, mask, FULL)
        put_aside(p_2, scale, put + 2 * H, size, mask, FULL)
    if KIND == 3:
        put_aside(p_3, scale, put + 3 * H, size, mask, FULL)
    tl.debug_barrier()  # what one thread has put aside, all read
    product = multiply(aside, size, weight, row, inside, h, H, HP, K, R, DEPTH, STAGES, AT_ONCE, FULL)
    tl.debug_barrier()
    return tl.where(on, new + product * (back * weight_scale)[:, None], v), new_c, squares


@triton.jit(do_not_specialize=["T", "B", "C", "columns", "rows"])
def _walk(
    factors, source, weight, halves, scale, last, start, gradients, aside, arrived, left, energies,
    T, B, C, halo_at, columns, rows,
    H: tl.constexpr, HP: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, START: tl.constexpr, SOURCE: tl.constexpr,
    KEEP: tl.constexpr, RESIDENT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, AT_ONCE: tl.constexpr,
    FULL: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Walk R rows; see :meth:`lit_parallel.recurrent.chain.Chain.walk`."""
    S: tl.constexpr = 2 * H if KIND == 3 else H
    halo = tl.load(halo_at)  # not an argument: a captured graph stays when it changes
    if halo == NOT_AT_ALL:
        return
    row = tl.program_id(0) * R + tl.arange(0, R)
    h = tl.arange(0, HP)
    inside = row < rows
    n = row // columns // B
    b = row // columns % B
    mask = inside[:, None] & (h < H)[None, :]
    state = row.to(tl.int64)[:, None] * S + h[None, :]
    if START:
        v = tl.load(start + state, mask=mask, other=0.0)
    else:  # zero, or what arrives at the end of the chain
        ends = mask & ((n + 1) * C + halo >= T)[:, None]
        v = tl.load(last + b[:, None] * S + h[None, :], mask=ends, other=0.0)
    squares = tl.zeros([R, HP], dtype=tl.float32)
    if RESIDENT:  # an RNN's matrix stays on the chip; what the next step reads is fetched while this one multiplies
        resident = _matrix(weight, h, H, HP)
        y, g = _read(C + halo - 1, n, b, inside, h, factors, source, T, B, C, H, KIND, SOURCE)
        for i in range(halo):
            j = C + halo - 1 - i
            y2, g2 = _read(j - 1, n, b, inside, h, factors, source, T, B, C, H, KIND, SOURCE)
            v, _ = _step_rnn(j, v, y, g, n, b, inside, h, resident, gradients, T, B, C, H, KIND, SOURCE, False, PRODUCT)
            y, g = y2, g2
        tl.store(arrived + state, v, mask=mask)
        for i in range(C):
            j = C - 1 - i
            y2, g2 = _read(j - 1, n, b, inside, h, factors, source, T, B, C, H, KIND, SOURCE)
            v, p = _step_rnn(j, v, y, g, n, b, inside, h, resident, gradients, T, B, C, H, KIND, SOURCE, KEEP, PRODUCT)
            squares += p * p
            y, g = y2, g2
    else:  # larger ones come from the cache at every step
        of_c = v
        weight_scale = tl.load(scale)
        size = rows.to(tl.int64) * (H if KIND < 2 else (KIND + 1) * H)
        if KIND == 3:
            if START:
                of_c = tl.load(start + state + H, mask=mask, other=0.0)
            else:
                of_c = tl.load(last + b[:, None] * S + H + h[None, :], mask=ends, other=0.0)
        for i in range(halo):
            v, of_c, _ = _step_streamed(
                C + halo - 1 - i, v, of_c, squares, row, n, b, inside, h, factors, source, halves, weight_scale,
                gradients, aside, size, T, B, C, H, HP, R, KIND, SOURCE, False, DEPTH, STAGES, AT_ONCE, FULL,
            )  # fmt: skip
        tl.store(arrived + state, v, mask=mask)
        if KIND == 3:
            tl.store(arrived + state + H, of_c, mask=mask)
        for i in range(C):
            v, of_c, squares = _step_streamed(
                C - 1 - i, v, of_c, squares, row, n, b, inside, h, factors, source, halves, weight_scale,
                gradients, aside, size, T, B, C, H, HP, R, KIND, SOURCE, KEEP, DEPTH, STAGES, AT_ONCE, FULL,
            )  # fmt: skip
        if KIND == 3:
            tl.store(left + state + H, of_c, mask=mask)
    tl.store(left + state, v, mask=mask)
    tl.store(energies + row, tl.sum(squares, axis=1), mask=inside)


@triton.jit(do_not_specialize=["blocks", "B"])
def _disagreement(
    arrived, left, energies, sums, halo_at, blocks, B, S: tl.constexpr, SP: tl.constexpr, R: tl.constexpr
):
    """Of a sequence's borders: sums of squares of residuals and solution, the largest relative residual and number."""
    if tl.load(halo_at) == NOT_AT_ALL:
        return
    b = tl.program_id(1)
    n = tl.program_id(0) * R + tl.arange(0, R)
    s = tl.arange(0, SP)[None, :]
    border = (n + 1 < blocks)[:, None] & (s < S)
    here = (n.to(tl.int64) * B + b)[:, None] * S + s
    found = tl.load(left + here + B * S, mask=border, other=0.0)
    expected = tl.load(arrived + here, mask=border, other=0.0)
    distance = found - expected
    squared, size = tl.sum(distance * distance, axis=1), tl.sum(found * found, axis=1)
    largest = tl.max(tl.maximum(tl.abs(found), tl.abs(expected)), axis=1)
    energy = tl.load(energies + n * B + b, mask=n < blocks, other=0.0)
    sums += b * 4
    tl.atomic_add(sums, tl.sum(squared, axis=0))
    tl.atomic_add(sums + 1, tl.sum(energy, axis=0))
    tl.atomic_max(sums + 2, tl.max(tl.where(squared > 0.0, squared / tl.maximum(size, 1e-30), 0.0), axis=0))
    tl.atomic_max(sums + 3, tl.max(largest, axis=0))


@triton.jit(do_not_specialize=["C", "T", "B"])
def _verdict(sums, limit, halo_at, next_halo, worst, C, T, B, LAST: tl.constexpr, BP: tl.constexpr):
    """Whether sums of :func:`_disagreement` are small enough, and with what halo to walk again if they are not.

    The worst of all sequences is the square of the residual relative to the solution; infinity if it is not known,
    such as for numbers that are not finite or vanish when they are squared. Where nothing at all arrives, it is zero.
    """
    b = tl.arange(0, BP)
    inside = b < B
    residual = tl.load(sums + 4 * b, mask=inside, other=0.0)
    energy = tl.load(sums + 4 * b + 1, mask=inside, other=1.0)
    largest = tl.load(sums + 4 * b + 3, mask=inside, other=0.0)
    finite = residual + energy < float("inf")
    told = finite & (energy >= _SMALLEST)
    nothing = finite & (largest == 0.0)
    relative = tl.where(told, residual / tl.where(told, energy, 1.0), tl.where(nothing, 0.0, float("inf")))
    found = tl.max(relative, axis=0)
    again = 0 if LAST else tl.minimum(2 * tl.load(halo_at) + C, T)
    tl.store(worst + LAST, found)
    tl.store(next_halo, tl.where(found <= tl.load(limit), NOT_AT_ALL, again))


def _judge(
    sums: Tensor, limit: Tensor, halo: Tensor, following: Tensor, worst: Tensor, block: int, length: int, last: bool
) -> None:
    padded = triton.next_power_of_2(len(sums))
    _verdict[(1,)](sums, limit, halo, following, worst, block, length, len(sums), last, padded, num_warps=1)


@functools.cache
def prepare(device: torch.device, batch: int) -> None:
    """Compile what :meth:`LaunchedChain.walk_until_right` needs beside what every chain does."""
    sums, halos = torch.zeros(batch + 2, 4, device=device), torch.zeros(2, 4, dtype=torch.int32, device=device)
    for last in (False, True):
        _judge(sums[:batch], sums[batch], halos[0], halos[1], sums[batch + 1], 1, 1, last)


@functools.cache
def _some_halo(device: torch.device) -> Tensor:
    """Of a walk that was needed."""
    return torch.zeros(1, dtype=torch.int32, device=device)


class Launch(NamedTuple):
    """Rows per program (as few as the tensor cores take), warps, and how a streamed matrix is read.

    That is rows of it per piece, pieces on their way at once, and parts that are summed side by side.
    """

    rows: int
    warps: int
    depth: int
    stages: int
    at_once: int = 1


#: Of up to 128 hidden units, measured on an H100: for programs that have a multiprocessor for themselves and for those
#: that share it with another, each with the microseconds that a step takes.
_LAUNCHES = {
    "gru": ((Launch(16, 8, 128, 2), 12.0), (Launch(16, 4, 64, 2, at_once=3), 16.4)),
    "lstm": ((Launch(16, 8, 128, 2), 13.9), (Launch(16, 4, 32, 4), 18.3)),
}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a device, on which programs run side by side."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class LaunchedChain(Chain):
    """A chain whose blocks are walked by a kernel, and compared by another.

    Attributes:
        halo: On the device, ``[1]``: if given, it counts instead of the argument of :meth:`walk`.
        found: If given, what a walk finds is written there.
    """

    halo: Tensor | None = None
    found: Walk | None = None

    def halo_at(self, halo: int) -> Tensor:
        """Where a kernel reads it: not as an argument, so that a captured graph stays when it changes."""
        if self.halo is not None:
            return self.halo
        return torch.full((1,), halo, dtype=torch.int32, device=self.last.device)

    def fewest_steps(self, halo: int, at_once: int) -> tuple[int, int]:
        """The fewest steps that are walked one after another, and the block for them.

        A step takes as long for one program as for all that the device holds at once, so that the last of several
        rounds should be full.

        Args:
            halo: That each block walks as well.
            at_once: Rows that the device walks at once.
        """
        best = -(-self.batch // at_once) * self.length, self.length  # of one block, without a halo
        for rounds in range(1, _MOST_ROUNDS + 1):
            if of_each := rounds * at_once // self.batch:  # blocks of every sequence
                block = min(max(_SHORTEST_BLOCK, -(-self.length // of_each)), self.length)
                best = min(best, (rounds * (block + halo), block))
        return best

    def new_walk(self, blocks: int, columns: int = 1) -> Walk:
        """Memory for what a walk finds."""
        if self.found is not None:
            return Walk(*(x[:blocks] for x in (self.found.arrived, self.found.left, self.found.energy)))
        shape = (blocks, self.batch, columns)
        arrived, left = self.last.new_empty(2, *shape, self.state_size).unbind()
        return Walk(arrived, left, self.last.new_empty(shape))

    def border_sums(self, walk: Walk, sums: Tensor | None = None) -> Tensor:
        """Per sequence, ``[batch, 4]``.

        Squares of residuals and of the solution, the largest relative residual, the largest number at a border. With
        ``sums`` they are added to these, unless the walk was not needed (:attr:`halo`).
        """
        blocks = len(walk.left)
        sums = walk.left.new_zeros(self.batch, 4) if sums is None else sums
        padded = max(16, triton.next_power_of_2(self.state_size))
        rows = max(1, 4096 // padded)
        grid = (triton.cdiv(blocks, rows), self.batch)
        walked = (walk.arrived, walk.left, walk.energy)
        halo = _some_halo(sums.device) if self.halo is None else self.halo
        _disagreement[grid](*walked, sums, halo, blocks, self.batch, self.state_size, padded, rows)
        return sums

    def walk_until_right(self, block: int, halo: Tensor, limit: Tensor, into: Tensor, worst: Tensor) -> Walk:
        """Walk all blocks; where neighbours disagree, with a longer halo, and then as one block: all on the device.

        The host need not wait to know whether a walk was enough: those that are not needed end at once.

        Args:
            block: Steps per block, of several.
            halo: Of the first walk, ``[1]``, int32; the second's is twice that and a block.
            limit: Largest square of the residual relative to the solution, ``[1]``.
            into: See :meth:`walk`.
            worst: Filled with the squares after the first and the second walk, ``[2]``; the latter means nothing if the
                first walk was enough.
        """
        sums = self.last.new_zeros(2, self.batch, 4)
        halos = torch.empty(2, 4, dtype=torch.int32, device=sums.device)  # 16 bytes apart, as kernels are compiled for
        self.halo = halo
        walk = self.found = self.walk(block, into=into)
        for i, (of_walk, following) in enumerate(zip(sums, halos, strict=True)):
            self.border_sums(walk, of_walk)
            _judge(of_walk, limit, self.halo, following, worst, block, self.length, i == 1)
            self.halo = following
            self.walk(block if i == 0 else self.length, into=into)
        return walk

    def disagreement(self, walk: Walk) -> Callable[[], Disagreement]:
        sums = self.border_sums(walk)
        if not sums.is_cuda:
            return lambda: read_sums(sums)
        arrived = torch.empty(sums.shape, pin_memory=True)
        arrived.copy_(sums, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def result() -> Disagreement:
            done.synchronize()
            return read_sums(arrived)

        return result


class KernelChain(LaunchedChain):
    """The adjoint of a layer, walked by the kernel."""

    def __init__(
        self, kind: str, factors: Tensor, weight: Tensor, source: Tensor, last: Tensor, precision: str = "full"
    ) -> None:
        """Take what the forward pass left.

        Args:
            kind: ``rnn_tanh``, ``rnn_relu``, ``gru`` or ``lstm``.
            factors: From :func:`linearise`.
            weight: ``weight_hh``, ``[gates * hidden, hidden]``.
            source: Gradient of the output, ``[time, batch, hidden]``.
            last: Gradient of the final state, ``[batch, states * hidden]``.
            precision: ``full`` (float32, as products of halves of 16 bits) or ``half`` (the upper half alone).
        """
        cell: Cell = cell_of(kind)
        self.kind, self.precision, self.gates = kind, precision, cell.gates
        self.factors, self.weight = factors, weight.contiguous()
        self.source, self.last = source.contiguous(), last.contiguous()
        self.length, self.batch, self.hidden = source.shape
        self.state_size = cell.states * self.hidden
        self.gradient_size = cell.pre_activations * self.hidden
        self.halves = self.scale = self.weight
        self.resident = cell.gates == 1 and self.hidden <= MAX_RESIDENT
        # Measured on an H100.
        self.step_costs = (3e-6, 1e-9) if self.resident else (1e-5, 2.6e-9 * (self.hidden / 128) ** 2)
        if not self.resident:
            self.halves, self.scale = halves_of(self.weight)

    def walk(
        self, block: int, halo: int = 0, start: Tensor | None = None, *, source: bool = True, into: Tensor | None = None
    ) -> Walk:
        blocks = blocks_of(self.length, block)
        columns = 1 if start is None else start.shape[2]
        found = self.new_walk(blocks, columns)
        rows = blocks * self.batch * columns
        per_program, warps, depth, stages, at_once = self._launch(rows, columns)
        full = self.precision == "full" and columns == 1
        aside = self.last if self.resident else self.halves.new_empty(1 + full, rows, len(self.weight))
        _walk[(triton.cdiv(rows, per_program),)](
            self.factors,
            self.source,
            self.weight,
            self.halves,
            self.scale,
            self.last,
            self.last if start is None else start.contiguous(),
            self.last if into is None else into,
            aside,
            found.arrived,
            found.left,
            found.energy,
            self.length,
            self.batch,
            block,
            self.halo_at(halo),
            columns,
            rows,
            self.hidden,
            max(16, triton.next_power_of_2(self.hidden)),
            per_program,
            KINDS[self.kind],
            start is not None,
            source,
            into is not None,
            self.resident,
            depth,
            stages,
            at_once,
            full,
            "ieee" if interpreted() else self._product(columns),
            num_warps=warps,
        )
        return found

    def preferred_block(self, halo: int) -> int:
        at_once = 16 * multiprocessors(self.last.device)
        if self.resident:
            return self.fewest_steps(halo, at_once)[1]  # there is no room for a second matrix
        if self._launches is None:
            return super().preferred_block(halo)
        times = []
        for programs, (_, of_step) in enumerate(self._launches, 1):
            steps, block = self.fewest_steps(halo, programs * at_once)
            times.append((steps * of_step, block))
        return min(times)[1]

    def preferred_coarse_block(self) -> int:
        # A step takes long, however few blocks walk it.
        return min(max(round(math.sqrt(self.length) / 2), 16), 64)

    def _product(self, columns: int) -> str:
        """How the product with a matrix that stays on the chip is computed."""
        if columns > 1:
            return "tf32"
        if self.precision == "half":
            return "bf16"
        return "ieee" if self.careful else "bf16x6"

    @property
    def _launches(self) -> tuple[tuple[Launch, float], tuple[Launch, float]] | None:
        return _LAUNCHES.get(self.kind) if self.hidden <= 128 else None

    def _launch(self, rows: int, columns: int) -> Launch:
        depth = max(16, 32 * 128 // max(128, triton.next_power_of_2(self.hidden)))
        if columns > 1:  # of a coarse space
            return Launch(64 if self.hidden <= 128 else 32, 8, depth, 4)
        if self.resident:
            return Launch(16, 8, depth, 4)
        if self._launches is None:
            return Launch(16, 4, depth, 4)
        (alone, _), (beside_another, _) = self._launches
        return alone if rows <= alone.rows * multiprocessors(self.last.device) else beside_another


def read_sums(sums: Tensor) -> Disagreement:
    """What :meth:`KernelChain.border_sums` says, on the host."""
    relative = ratio = 0.0
    for residual, energy, of_border, _ in sums.tolist():
        if not math.isfinite(residual + energy):
            return Disagreement(math.inf, math.inf)
        relative = max(relative, residual / energy if energy > 0 else residual)
        ratio = max(ratio, of_border)
    return Disagreement(math.sqrt(relative), math.sqrt(ratio))


def halves_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as the sum of two halves of 16 bits, ``[2, ...]``, times a scale, ``[1]``: 22 bits of every number."""
    exponent = torch.floor(torch.log2(weight.abs().amax().clamp(1e-30, 1e30))) - 10
    scaled = weight * torch.exp2(-exponent)
    high = scaled.half()
    return torch.stack([high, (scaled - high.float()).half()]), torch.exp2(exponent).reshape(1)


def build_chain(
    kind: str, layer: Layer, source: Tensor, last: Tensor, precision: str, factors: Tensor | None = None
) -> KernelChain:
    """The chain of a layer; see :func:`lit_parallel.recurrent.layers.build_chain`."""
    return KernelChain(
        kind, linearise(kind, layer) if factors is None else factors, layer.weight_hh, source, last, precision
    )
