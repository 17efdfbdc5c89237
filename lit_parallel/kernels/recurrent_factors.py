"""The diagonal factors of a recurrent layer's adjoint, from its hidden states.

One kernel multiplies hidden states and inputs by the gates' weights and, of a GRU, makes the factors of the products
at once. An LSTM's cell states are rebuilt from its gates by a scan over time: every piece of it by itself, then what
each piece starts from, then the factors. The plain functions are :meth:`lit_parallel.recurrent.cells.Cell.linearise`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lit_parallel.kernels import interpreted
from lit_parallel.recurrent.cells import Layer, cell_of

_PIECE = 64  # steps of a scan that one program takes
_WIDTH = 16  # hidden units of a scan that one program takes
_ROWS, _UNITS, _DEPTH = 64, 32, 32  # of the tiles of a product


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # Without cancellation near 0, where 1 - 2 / (exp(2 x) + 1) would lose its digits: a few terms of the series.
    small = x * (1.0 + x * x * (-0.33333333 + x * x * (0.13333333 - 0.053968254 * x * x)))
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.1, small, tl.where(x < 0, -large, large))


@triton.jit
def _add_products(
    acc_0, acc_1, acc_2, acc_3, rows, mask, weight, unit, K, H,
    GATES: tl.constexpr, LAST: tl.constexpr, DEPTH: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Add rows @ weight.T for every gate; the third of three is added to accumulator LAST."""
    k = tl.arange(0, DEPTH)
    for begin in range(0, K, DEPTH):
        inside = (begin + k) < K
        a = tl.load(rows + (begin + k)[None, :], mask=mask[:, None] & inside[None, :], other=0.0)
        both = inside[:, None] & (unit < H)[None, :]
        at = weight + unit[None, :] * K + (begin + k)[:, None]
        acc_0 = tl.dot(a, tl.load(at, mask=both, other=0.0), acc_0, input_precision=PRODUCT)
        acc_1 = tl.dot(a, tl.load(at + H * K, mask=both, other=0.0), acc_1, input_precision=PRODUCT)
        third = tl.load(at + 2 * H * K, mask=both, other=0.0)
        if LAST == 2:
            acc_2 = tl.dot(a, third, acc_2, input_precision=PRODUCT)
        else:
            acc_3 = tl.dot(a, third, acc_3, input_precision=PRODUCT)
        if GATES == 4:
            acc_3 = tl.dot(a, tl.load(at + 3 * H * K, mask=both, other=0.0), acc_3, input_precision=PRODUCT)
    return acc_0, acc_1, acc_2, acc_3


@triton.jit
def _add_bias(acc_0, acc_1, acc_2, acc_3, bias, unit, H, GATES: tl.constexpr, LAST: tl.constexpr):
    inside = unit < H
    acc_0 += tl.load(bias + unit, mask=inside, other=0.0)[None, :]
    acc_1 += tl.load(bias + H + unit, mask=inside, other=0.0)[None, :]
    third = tl.load(bias + 2 * H + unit, mask=inside, other=0.0)[None, :]
    if LAST == 2:
        acc_2 += third
    else:
        acc_3 += third
    if GATES == 4:
        acc_3 += tl.load(bias + 3 * H + unit, mask=inside, other=0.0)[None, :]
    return acc_0, acc_1, acc_2, acc_3


@triton.jit
def _gates(
    input, output, h_0, weight_ih, weight_hh, bias_ih, bias_hh, out, steps, B, inputs, H,
    GATES: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """A GRU's factors, or an LSTM's gates, for a tile of steps (time and batch) and hidden units."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    at = row.to(tl.int64)[:, None]
    acc_0 = tl.zeros([ROWS, UNITS], dtype=tl.float32)
    acc_1 = tl.zeros([ROWS, UNITS], dtype=tl.float32)
    acc_2 = tl.zeros([ROWS, UNITS], dtype=tl.float32)
    acc_3 = tl.zeros([ROWS, UNITS], dtype=tl.float32)
    first, later = row < B, (row >= B) & (row < steps)
    LAST: tl.constexpr = 2 if GATES == 4 else 3  # a GRU's third gate keeps input and hidden states apart
    acc_0, acc_1, acc_2, acc_3 = _add_products(
        acc_0, acc_1, acc_2, acc_3, output + (at - B) * H, later, weight_hh, unit, H, H, GATES, 2, DEPTH, PRODUCT
    )
    if tl.program_id(0) * ROWS < B:
        acc_0, acc_1, acc_2, acc_3 = _add_products(
            acc_0, acc_1, acc_2, acc_3, h_0 + at * H, first, weight_hh, unit, H, H, GATES, 2, DEPTH, PRODUCT
        )
    acc_0, acc_1, acc_2, acc_3 = _add_products(
        acc_0, acc_1, acc_2, acc_3, input + at * inputs, row < steps, weight_ih, unit, inputs, H, GATES, LAST, DEPTH,
        PRODUCT,
    )  # fmt: skip
    if BIAS:
        acc_0, acc_1, acc_2, acc_3 = _add_bias(acc_0, acc_1, acc_2, acc_3, bias_hh, unit, H, GATES, 2)
        acc_0, acc_1, acc_2, acc_3 = _add_bias(acc_0, acc_1, acc_2, acc_3, bias_ih, unit, H, GATES, LAST)
    mask = (row < steps)[:, None] & (unit < H)[None, :]
    if GATES == 4:
        to = out + at * (4 * H) + unit[None, :]
        tl.store(to, sigmoid(acc_0), mask=mask)
        tl.store(to + H, sigmoid(acc_1), mask=mask)
        tl.store(to + 2 * H, tanh(acc_2), mask=mask)
        tl.store(to + 3 * H, sigmoid(acc_3), mask=mask)
    else:
        r, z = sigmoid(acc_0), sigmoid(acc_1)
        new = tanh(acc_3 + r * acc_2)
        before = tl.load(output + (at - B) * H + unit[None, :], mask=mask & later[:, None], other=0.0)
        before += tl.load(h_0 + at * H + unit[None, :], mask=mask & first[:, None], other=0.0)
        to_n = (1.0 - z) * (1.0 - new * new)
        to = out + at * (5 * H) + unit[None, :]
        tl.store(to, to_n, mask=mask)
        tl.store(to + H, to_n * acc_2 * r * (1.0 - r), mask=mask)
        tl.store(to + 2 * H, (before - new) * z * (1.0 - z), mask=mask)
        tl.store(to + 3 * H, to_n * r, mask=mask)
        tl.store(to + 4 * H, z, mask=mask)


@triton.jit
def _compose(a, x, b, y):
    """First ``c -> a c + x``, then ``c -> b c + y``."""
    return a * b, b * x + y


@triton.jit
def _gates_lstm(gates, at, h, mask, H: tl.constexpr):
    base = gates + at * (4 * H) + h[None, :]
    i = tl.load(base, mask=mask, other=0.0)
    f = tl.load(base + H, mask=mask, other=0.0)
    g = tl.load(base + 2 * H, mask=mask, other=0.0)
    return i, f, g


@triton.jit
def _map_lstm(gates, products, ends, T, B, H: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr):
    """What a piece of ``c_t = f_t c_{t-1} + i_t g_t`` does: c becomes ``products`` times c, plus ``ends``."""
    piece, b = tl.program_id(0), tl.program_id(1)
    t = piece * PIECE + tl.arange(0, PIECE)
    h = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    mask = (t < T)[:, None] & (h < H)[None, :]
    i, f, g = _gates_lstm(gates, (t.to(tl.int64) * B + b)[:, None], h, mask, H)
    # Beyond the end nothing changes.
    product, c = tl.associative_scan((tl.where(mask, f, 1.0), tl.where(mask, i * g, 0.0)), 0, _compose)
    is_last = (tl.arange(0, PIECE) == PIECE - 1)[:, None]
    place = (piece.to(tl.int64) * B + b) * H + h
    tl.store(products + place, tl.sum(tl.where(is_last, product, 0.0), axis=0), mask=h < H)
    tl.store(ends + place, tl.sum(tl.where(is_last, c, 0.0), axis=0), mask=h < H)


@triton.jit
def _carry_lstm(products, ends, c_0, first, pieces, B, H: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr):
    """What every piece starts from: ``first[n + 1] = products[n] first[n] + ends[n]``, ``first[0] = c_0``."""
    b = tl.program_id(0)
    h = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    carry = tl.load(c_0 + b * H + h, mask=h < H, other=0.0)
    tl.store(first + b * H + h, carry, mask=h < H)
    row = tl.arange(0, PIECE)
    for begin in range(0, pieces, PIECE):
        n = begin + row
        mask = (n < pieces)[:, None] & (h < H)[None, :]
        at = (n.to(tl.int64) * B + b)[:, None] * H + h[None, :]
        product = tl.load(products + at, mask=mask, other=1.0)
        end = tl.load(ends + at, mask=mask, other=0.0)
        product, end = tl.associative_scan((product, end), 0, _compose)
        c = product * carry[None, :] + end
        tl.store(first + at + B * H, c, mask=mask)
        carry = tl.sum(tl.where((row == PIECE - 1)[:, None], c, 0.0), axis=0)


@triton.jit
def _linearise_lstm(gates, first, factors, T, B, H: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr):
    """The factors of a piece, from what it starts from."""
    piece, b = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, PIECE)
    t = piece * PIECE + row
    h = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    mask = (t < T)[:, None] & (h < H)[None, :]
    at = (t.to(tl.int64) * B + b)[:, None]
    # The scan of all steps but this one gives c one step earlier: from c itself it would lose digits.
    behind = mask & (row > 0)[:, None]
    i, f, g = _gates_lstm(gates, at - B, h, behind, H)
    product, earlier = tl.associative_scan((tl.where(behind, f, 1.0), tl.where(behind, i * g, 0.0)), 0, _compose)
    start = tl.load(first + (piece.to(tl.int64) * B + b) * H + h, mask=h < H, other=0.0)
    earlier += product * start[None, :]
    i, f, g = _gates_lstm(gates, at, h, mask, H)
    o = tl.load(gates + at * (4 * H) + 3 * H + h[None, :], mask=mask, other=0.0)
    tanh_c = tanh(f * earlier + i * g)
    out = factors + at * (6 * H) + h[None, :]
    tl.store(out, o * (1.0 - tanh_c * tanh_c), mask=mask)
    tl.store(out + H, g * i * (1.0 - i), mask=mask)
    tl.store(out + 2 * H, earlier * f * (1.0 - f), mask=mask)
    tl.store(out + 3 * H, i * (1.0 - g * g), mask=mask)
    tl.store(out + 4 * H, tanh_c * o * (1.0 - o), mask=mask)
    tl.store(out + 5 * H, f, mask=mask)


def linearise(kind: str, layer: Layer) -> Tensor:
    """What :class:`lit_parallel.kernels.recurrent.KernelChain` reads.

    Args:
        kind: ``rnn_tanh``, ``rnn_relu``, ``gru`` or ``lstm``.
        layer: Of float32.

    Returns:
        The hidden states ``[time, batch, hidden]`` of an RNN, the factors ``[time, batch, factors, hidden]`` of others.
    """
    output = layer.output.contiguous()
    if kind not in ("gru", "lstm"):
        return output
    T, B, H = output.shape
    cell = cell_of(kind)
    factors = output.new_empty(T, B, cell.factors, H)
    gates = factors if kind == "gru" else output.new_empty(T, B, cell.gates, H)
    bias_ih, bias_hh = (output if bias is None else bias.contiguous() for bias in (layer.bias_ih, layer.bias_hh))
    _gates[(triton.cdiv(T * B, _ROWS), triton.cdiv(H, _UNITS))](
        layer.input.contiguous(),
        output,
        layer.h_0.contiguous(),
        layer.weight_ih.contiguous(),
        layer.weight_hh.contiguous(),
        bias_ih,
        bias_hh,
        gates,
        T * B,
        B,
        layer.input.shape[-1],
        H,
        cell.gates,
        layer.bias_ih is not None,
        _ROWS,
        _UNITS,
        _DEPTH,
        "ieee" if interpreted() else "tf32x3",
    )
    if kind == "gru" or layer.c_0 is None:
        return factors
    pieces, strips = triton.cdiv(T, _PIECE), triton.cdiv(H, _WIDTH)
    products, ends = output.new_empty(2, pieces, B, H).unbind()
    first = output.new_empty(pieces + 1, B, H)
    _map_lstm[(pieces, B, strips)](gates, products, ends, T, B, H, _PIECE, _WIDTH)
    _carry_lstm[(B, strips)](products, ends, layer.c_0.contiguous(), first, pieces, B, H, _PIECE, _WIDTH)
    _linearise_lstm[(pieces, B, strips)](gates, first, factors, T, B, H, _PIECE, _WIDTH)
    return factors
