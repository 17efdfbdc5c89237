"""Walking the blocks of an RNN's, a GRU's or an LSTM's adjoint in one kernel launch.

A program owns some rows, each a sequence's block (or a column of one), and walks them through halo and block: at every
step it reads the diagonal factors, writes the gradients of the pre-activations, and multiplies them by ``W_hh``. Rows
never wait for one another. The plain reference is :meth:`lit_parallel.recurrent.chain.SteppedChain.walk`.

Two more kernels prepare the factors (:meth:`lit_parallel.recurrent.cells.Cell.linearise`): an LSTM's cell states are
rebuilt from its gates by a scan over time in pieces.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_parallel.kernels import interpreted
from lit_parallel.recurrent.cells import Cell, Layer, cell_of
from lit_parallel.recurrent.chain import Chain, Disagreement, Walk, blocks_of

_MAX_HIDDEN = 128
_PIECE = 64  # steps of a scan that one program takes
_WIDTH = 16  # hidden units of a scan that one program takes
_KINDS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3}
_PRODUCTS = {"full": "bf16x6", "bf16": "bf16", "coarse": "tf32"}


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
    if KIND == 0:
        p = s * (1.0 - y * y)
    else:
        p = tl.where(y > 0.0, s, s * 0.0)
    if KEEP:
        at = (t.to(tl.int64) * B + b)[:, None] * H + h[None, :]
        tl.store(gradients + at, p, mask=on[:, None] & (h < H)[None, :])
    return tl.where(on[:, None], _product(p, resident, PRODUCT), v), tl.where(on[:, None], p, 0.0)


@triton.jit
def _step_gated(
    j, v, of_c, squares, n, b, inside, h, factors, source, weight, gradients, T, B, C,
    H: tl.constexpr, HP: tl.constexpr, KIND: tl.constexpr, SOURCE: tl.constexpr, KEEP: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """Step n C + j of every row; rows that have no such step stay as they are."""
    t = n * C + j
    on = (inside & (t < T))[:, None]
    mask = on & (h < H)[None, :]
    at = (t.to(tl.int64) * B + b)[:, None]
    s = v
    if SOURCE:
        s += tl.load(source + at * H + h[None, :], mask=mask, other=0.0)
    out = gradients + at * (4 * H) + h[None, :]
    if KIND == 2:
        base = factors + at * (5 * H) + h[None, :]
        new = s * tl.load(base + 4 * H, mask=mask, other=0.0)
        p = s * tl.load(base, mask=mask, other=0.0)
        squares += p * p
        if KEEP:
            tl.store(out, p, mask=mask)
        out += H
        new_c = of_c
    else:
        base = factors + at * (6 * H) + h[None, :]
        u = of_c + s * tl.load(base, mask=mask, other=0.0)
        new = tl.zeros_like(v)
        new_c = tl.where(on, u * tl.load(base + 5 * H, mask=mask, other=0.0), of_c)
    for gate in range(KIND + 1):  # not unrolled: all gates share the memory that a matrix takes on the chip
        factor = tl.load(base + (gate + 1) * H, mask=mask, other=0.0)
        if KIND == 2:
            p = s * factor
        else:
            p = tl.where(gate < 3, u, s) * factor
        squares += p * p
        if KEEP:
            tl.store(out + gate * H, p, mask=mask)
        new += _product(p, _matrix(weight + gate * H * H, h, H, HP), PRODUCT)
    return tl.where(on, new, v), new_c, squares


@triton.jit
def _walk(
    factors, source, weight, last, start, gradients, arrived, left, energies, T, B, C, halo, columns, rows,
    H: tl.constexpr, HP: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, START: tl.constexpr, SOURCE: tl.constexpr,
    KEEP: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Walk R rows; see :meth:`lit_parallel.recurrent.chain.Chain.walk`."""
    S: tl.constexpr = 2 * H if KIND == 3 else H
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
    if KIND < 2:  # the only matrix stays on the chip; what the next step reads is fetched while this one multiplies
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
    else:  # a gated cell's matrices come from the cache at every step
        of_c = v
        if KIND == 3:
            if START:
                of_c = tl.load(start + state + H, mask=mask, other=0.0)
            else:
                of_c = tl.load(last + b[:, None] * S + H + h[None, :], mask=ends, other=0.0)
        for i in range(halo):
            v, of_c, _ = _step_gated(
                C + halo - 1 - i, v, of_c, squares, n, b, inside, h, factors, source, weight, gradients, T, B, C,
                H, HP, KIND, SOURCE, False, PRODUCT,
            )  # fmt: skip
        tl.store(arrived + state, v, mask=mask)
        if KIND == 3:
            tl.store(arrived + state + H, of_c, mask=mask)
        for i in range(C):
            v, of_c, squares = _step_gated(
                C - 1 - i, v, of_c, squares, n, b, inside, h, factors, source, weight, gradients, T, B, C,
                H, HP, KIND, SOURCE, KEEP, PRODUCT,
            )  # fmt: skip
        if KIND == 3:
            tl.store(left + state + H, of_c, mask=mask)
    tl.store(left + state, v, mask=mask)
    tl.store(energies + row, tl.sum(squares, axis=1), mask=inside)


@triton.jit
def _disagreement(arrived, left, energies, sums, blocks, B, S: tl.constexpr, SP: tl.constexpr, R: tl.constexpr):
    """Sums over a sequence's borders: squares of residuals and of the solution; the largest relative residual."""
    b = tl.program_id(1)
    n = tl.program_id(0) * R + tl.arange(0, R)
    s = tl.arange(0, SP)[None, :]
    border = (n + 1 < blocks)[:, None] & (s < S)
    here = (n.to(tl.int64) * B + b)[:, None] * S + s
    found = tl.load(left + here + B * S, mask=border, other=0.0)
    distance = found - tl.load(arrived + here, mask=border, other=0.0)
    squared, size = tl.sum(distance * distance, axis=1), tl.sum(found * found, axis=1)
    energy = tl.load(energies + n * B + b, mask=n < blocks, other=0.0)
    tl.atomic_add(sums + b * 3, tl.sum(squared, axis=0))
    tl.atomic_add(sums + b * 3 + 1, tl.sum(energy, axis=0))
    tl.atomic_max(sums + b * 3 + 2, tl.max(tl.where(squared > 0.0, squared / tl.maximum(size, 1e-30), 0.0), axis=0))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # Without cancellation near 0, where 1 - 2 / (exp(2 x) + 1) would lose its digits: a few terms of the series.
    small = x * (1.0 + x * x * (-0.33333333 + x * x * (0.13333333 - 0.053968254 * x * x)))
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.1, small, tl.where(x < 0, -large, large))


@triton.jit
def _linearise_gru(
    from_input, from_hidden, output, h_0, factors, steps, B, H: tl.constexpr, HP: tl.constexpr, R: tl.constexpr
):
    at = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]  # time * batch
    h = tl.arange(0, HP)[None, :]
    mask = (at < steps) & (h < H)
    x, y = from_input + at * (3 * H) + h, from_hidden + at * (3 * H) + h
    r = _sigmoid(tl.load(x, mask=mask, other=0.0) + tl.load(y, mask=mask, other=0.0))
    z = _sigmoid(tl.load(x + H, mask=mask, other=0.0) + tl.load(y + H, mask=mask, other=0.0))
    q = tl.load(y + 2 * H, mask=mask, other=0.0)
    new = _tanh(tl.load(x + 2 * H, mask=mask, other=0.0) + r * q)
    before = tl.load(output + (at - B) * H + h, mask=mask & (at >= B), other=0.0)
    before += tl.load(h_0 + at * H + h, mask=mask & (at < B), other=0.0)
    to_n = (1.0 - z) * (1.0 - new * new)
    out = factors + at * (5 * H) + h
    tl.store(out, to_n, mask=mask)
    tl.store(out + H, to_n * q * r * (1.0 - r), mask=mask)
    tl.store(out + 2 * H, (before - new) * z * (1.0 - z), mask=mask)
    tl.store(out + 3 * H, to_n * r, mask=mask)
    tl.store(out + 4 * H, z, mask=mask)


@triton.jit
def _compose(a, x, b, y):
    """First ``c -> a c + x``, then ``c -> b c + y``."""
    return a * b, b * x + y


@triton.jit
def _gates_lstm(gates, at, h, mask, H: tl.constexpr):
    base = gates + at * (4 * H) + h[None, :]
    i = _sigmoid(tl.load(base, mask=mask, other=0.0))
    f = _sigmoid(tl.load(base + H, mask=mask, other=0.0))
    g = _tanh(tl.load(base + 2 * H, mask=mask, other=0.0))
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
    o = _sigmoid(tl.load(gates + at * (4 * H) + 3 * H + h[None, :], mask=mask, other=0.0))
    tanh_c = _tanh(f * earlier + i * g)
    out = factors + at * (6 * H) + h[None, :]
    tl.store(out, o * (1.0 - tanh_c * tanh_c), mask=mask)
    tl.store(out + H, g * i * (1.0 - i), mask=mask)
    tl.store(out + 2 * H, earlier * f * (1.0 - f), mask=mask)
    tl.store(out + 3 * H, i * (1.0 - g * g), mask=mask)
    tl.store(out + 4 * H, tanh_c * o * (1.0 - o), mask=mask)
    tl.store(out + 5 * H, f, mask=mask)


def supports(kind: str, layer: Layer) -> bool:
    """Whether the kernels compute such a layer: float32, and at most 128 hidden units."""
    return kind in _KINDS and layer.output.dtype == torch.float32 and layer.h_0.shape[-1] <= _MAX_HIDDEN


def linearise(kind: str, layer: Layer) -> Tensor:
    """What :class:`KernelChain` reads: the hidden states of an RNN, the factors of a gated cell.

    Args:
        kind: ``rnn_tanh``, ``rnn_relu``, ``gru`` or ``lstm``.
        layer: Of float32.

    Returns:
        ``[time, batch, hidden]`` of an RNN, ``[time, batch, factors, hidden]`` of others.
    """
    output = layer.output.contiguous()
    if kind not in ("gru", "lstm"):
        return output
    T, B, H = output.shape
    factors = output.new_empty(T, B, cell_of(kind).factors, H)
    gates = layer.from_input()
    if kind == "gru":
        from_hidden = layer.add_from_hidden(torch.zeros_like(gates))
        rows, padded = 8, max(16, triton.next_power_of_2(H))
        _linearise_gru[(triton.cdiv(T * B, rows),)](
            gates, from_hidden, output, layer.h_0.contiguous(), factors, T * B, B, H, padded, rows
        )
        return factors
    assert layer.c_0 is not None
    gates = layer.add_from_hidden(gates)
    pieces, strips = triton.cdiv(T, _PIECE), triton.cdiv(H, _WIDTH)
    products, ends = output.new_empty(2, pieces, B, H).unbind()
    first = output.new_empty(pieces + 1, B, H)
    _map_lstm[(pieces, B, strips)](gates, products, ends, T, B, H, _PIECE, _WIDTH)
    _carry_lstm[(B, strips)](products, ends, layer.c_0.contiguous(), first, pieces, B, H, _PIECE, _WIDTH)
    _linearise_lstm[(pieces, B, strips)](gates, first, factors, T, B, H, _PIECE, _WIDTH)
    return factors


class KernelChain(Chain):
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
            precision: ``full`` (float32 as six products of bfloat16, errors of 1e-7) or ``bf16``.
        """
        cell: Cell = cell_of(kind)
        self.kind, self.precision, self.gates = kind, precision, cell.gates
        self.factors, self.weight = factors, weight.contiguous()
        self.source, self.last = source.contiguous(), last.contiguous()
        self.length, self.batch, self.hidden = source.shape
        self.state_size = cell.states * self.hidden
        self.gradient_size = cell.pre_activations * self.hidden
        self.step_costs = (2.5e-6, 2.5e-10 * cell.gates)

    def walk(
        self, block: int, halo: int = 0, start: Tensor | None = None, *, source: bool = True, into: Tensor | None = None
    ) -> Walk:
        blocks = blocks_of(self.length, block)
        columns = 1 if start is None else start.shape[2]
        shape = (blocks, self.batch, columns)
        arrived, left = self.last.new_empty(2, *shape, self.state_size).unbind()
        energy = self.last.new_empty(shape)
        rows = blocks * self.batch * columns
        per_program, warps = _launch(self.kind, rows)
        _walk[(triton.cdiv(rows, per_program),)](
            self.factors,
            self.source,
            self.weight,
            self.last,
            self.last if start is None else start.contiguous(),
            self.last if into is None else into,
            arrived,
            left,
            energy,
            self.length,
            self.batch,
            block,
            halo,
            columns,
            rows,
            self.hidden,
            max(16, triton.next_power_of_2(self.hidden)),
            per_program,
            _KINDS[self.kind],
            start is not None,
            source,
            into is not None,
            "ieee" if interpreted() else _PRODUCTS[self.precision if columns == 1 else "coarse"],
            num_warps=warps,
            num_stages=1,
        )
        return Walk(arrived, left, energy)

    def disagreement(self, walk: Walk) -> Callable[[], Disagreement]:
        blocks = len(walk.left)
        sums = walk.left.new_zeros(self.batch, 3)
        padded = max(16, triton.next_power_of_2(self.state_size))
        rows = max(1, 4096 // padded)
        _disagreement[(triton.cdiv(blocks, rows), self.batch)](
            walk.arrived, walk.left, walk.energy, sums, blocks, self.batch, self.state_size, padded, rows
        )
        arrived = torch.empty(sums.shape, pin_memory=sums.is_cuda)
        arrived.copy_(sums, non_blocking=True)
        done = torch.cuda.Event() if sums.is_cuda else None
        if done is not None:
            done.record()

        def result() -> Disagreement:
            if done is not None:
                done.synchronize()
            residual, energy, ratio = arrived.double().unbind(1)
            relative = torch.where(energy > 0, residual / energy, residual).amax()
            return Disagreement(float(relative.sqrt()), float(ratio.amax().sqrt()))

        return result


def _launch(kind: str, rows: int) -> tuple[int, int]:
    """Rows per program and warps: as few rows as the tensor cores take, while there are processors for all."""
    return (16, 4) if rows <= 16 * 132 else (32, 8)


def build_chain(kind: str, layer: Layer, source: Tensor, last: Tensor, precision: str) -> KernelChain:
    """The chain of a layer; see :func:`lit_parallel.recurrent.layers.build_chain`."""
    return KernelChain(kind, linearise(kind, layer), layer.weight_hh, source, last, precision)
