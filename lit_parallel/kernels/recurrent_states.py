"""Walking the blocks of an RNN's, a GRU's or an LSTM's forward pass in one kernel launch.

A program owns some rows, each a block of a sequence, and walks them through halo and block: at every step it multiplies
the state by ``W_hh``, adds what the input contributes, and writes the output. Steps are numbered from the end of the
sequence, as in the plain reference, :class:`lit_parallel.recurrent.forward_pass.CellStateChain`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_parallel.kernels import interpreted
from lit_parallel.kernels.recurrent import (
    KINDS,
    MAX_RESIDENT,
    NOT_AT_ALL,
    LaunchedChain,
    add_piece,
    halves_of,
    multiply,
    multiprocessors,
    put_aside,
    scale_of,
)
from lit_parallel.kernels.recurrent_factors import sigmoid, tanh
from lit_parallel.recurrent.cells import Layer, cell_of
from lit_parallel.recurrent.chain import Walk, blocks_of
from lit_parallel.recurrent.forward_pass import StateChain

#: Rows per program, warps, rows of a streamed matrix per piece, pieces on their way at once; and how many such programs
#: a multiprocessor holds.
_LAUNCHES = {"resident": (16, 8, 16, 1, 1), "gru": (16, 8, 64, 2, 1), "lstm": (16, 8, 64, 2, 1)}
_MAX_GATES = 1024  # rows of a weight whose product with a program's states fits into its registers


@triton.jit
def _activated(x, KIND: tl.constexpr):
    return tanh(x) if KIND == 0 else tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _place(j, n, b, inside, T, B, C):
    """Where step n C + j, from the end, of every row stands in time, and whether there is such a step."""
    s = n * C + j
    on = inside & (s < T) & (s >= 0)
    return (tl.where(on, T - 1 - s, 0).to(tl.int64) * B + b)[:, None], on[:, None]


@triton.jit
def _read(j, n, b, inside, h, from_input, T, B, C, H: tl.constexpr):
    """What the input contributes to an RNN's step."""
    at, on = _place(j, n, b, inside, T, B, C)
    return tl.load(from_input + at * H + h[None, :], mask=on & (h < H)[None, :], other=0.0)


@triton.jit
def _step_resident(
    j, v, x, n, b, inside, h, resident, output, T, B, C,
    H: tl.constexpr, KIND: tl.constexpr, KEEP: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """One step of every row; rows that have no such step stay as they are."""
    at, on = _place(j, n, b, inside, T, B, C)
    if PRODUCT == "bf16":
        product = tl.dot(v.to(tl.bfloat16), resident.to(tl.bfloat16))
    else:
        product = tl.dot(v, resident, input_precision=PRODUCT)
    new = tl.where(on & (h < H)[None, :], _activated(x + product, KIND), v)
    if KEEP:
        tl.store(output + at * H + h[None, :], new, mask=on & (h < H)[None, :])
    return new, tl.where(on, new, 0.0)


@triton.jit
def _multiply_gates(
    aside, size, weight, row, inside, h,
    H: tl.constexpr, HP: tl.constexpr, G: tl.constexpr, R: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """What was put aside, ``[R, H]``, times the matrix of each of three or four gates, streamed in pieces."""
    k = tl.arange(0, DEPTH)
    aside += row.to(tl.int64)[:, None] * H + k[None, :]
    weight += k[:, None] * (G * H) + h[None, :]
    low: tl.constexpr = H * G * H
    acc_0 = tl.zeros([R, HP], dtype=tl.float32)
    acc_1 = tl.zeros([R, HP], dtype=tl.float32)
    acc_2 = tl.zeros([R, HP], dtype=tl.float32)
    acc_3 = tl.zeros([R, HP], dtype=tl.float32)
    for begin in tl.range(0, H, DEPTH, num_stages=STAGES):
        more = (begin + k) < H
        of_p = inside[:, None] & more[None, :]
        of_w = more[:, None] & (h < H)[None, :]
        p = tl.load(aside + begin, mask=of_p, other=0.0)
        p_low = p
        if FULL:
            p_low = tl.load(aside + size + begin, mask=of_p, other=0.0)
        at = weight + begin * (G * H)
        acc_0 = add_piece(acc_0, p, p_low, at, low, of_w, FULL)
        acc_1 = add_piece(acc_1, p, p_low, at + H, low, of_w, FULL)
        acc_2 = add_piece(acc_2, p, p_low, at + 2 * H, low, of_w, FULL)
        if G == 4:
            acc_3 = add_piece(acc_3, p, p_low, at + 3 * H, low, of_w, FULL)
    return acc_0, acc_1, acc_2, acc_3


@triton.jit
def _step_streamed(
    j, v, c, row, n, b, inside, h, from_input, bias, weight, weight_scale, output, factors, aside, size, T, B, C,
    H: tl.constexpr, HP: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, KEEP: tl.constexpr, FACTORS: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One step of every row; rows that have no such step stay as they are."""
    G: tl.constexpr = 1 if KIND < 2 else KIND + 1
    at, on = _place(j, n, b, inside, T, B, C)
    mask = on & (h < H)[None, :]
    x = from_input + at * (G * H) + h[None, :]
    x_0 = tl.load(x, mask=mask, other=0.0)
    scale, back = scale_of(tl.max(tl.abs(v), axis=1))
    back = (back * weight_scale)[:, None]
    put = aside + row.to(tl.int64)[:, None] * H + h[None, :]
    put_aside(v, scale, put, size, inside[:, None] & (h < H)[None, :], FULL)
    new_c = c
    if KIND < 2:
        tl.debug_barrier()  # what one thread has put aside, all read
        product = multiply(aside, size, weight, row, inside, h, H, HP, H, R, DEPTH, STAGES, 1, FULL)
        new = _activated(x_0 + product * back, KIND)
    else:
        x_1 = tl.load(x + H, mask=mask, other=0.0)
        x_2 = tl.load(x + 2 * H, mask=mask, other=0.0)
        x_3 = x_0
        if KIND == 3:
            x_3 = tl.load(x + 3 * H, mask=mask, other=0.0)
        tl.debug_barrier()
        a_0, a_1, a_2, a_3 = _multiply_gates(aside, size, weight, row, inside, h, H, HP, G, R, DEPTH, STAGES, FULL)
        if KIND == 2:
            of_n = tl.load(bias + h, mask=h < H, other=0.0)[None, :]
            r, z, q = sigmoid(x_0 + a_0 * back), sigmoid(x_1 + a_1 * back), a_2 * back + of_n
            fresh = tanh(x_2 + r * q)
            new = fresh + z * (v - fresh)
            if KEEP and FACTORS:  # as in recurrent_factors
                to = factors + at * (5 * H) + h[None, :]
                to_n = (1.0 - z) * (1.0 - fresh * fresh)
                tl.store(to, to_n, mask=mask)
                tl.store(to + H, to_n * q * r * (1.0 - r), mask=mask)
                tl.store(to + 2 * H, (v - fresh) * z * (1.0 - z), mask=mask)
                tl.store(to + 3 * H, to_n * r, mask=mask)
                tl.store(to + 4 * H, z, mask=mask)
        else:
            i, f, g = sigmoid(x_0 + a_0 * back), sigmoid(x_1 + a_1 * back), tanh(x_2 + a_2 * back)
            o = sigmoid(x_3 + a_3 * back)
            new_c = tl.where(mask, f * c + i * g, c)
            tanh_c = tanh(new_c)
            new = o * tanh_c
            if KEEP and FACTORS:
                to = factors + at * (6 * H) + h[None, :]
                tl.store(to, o * (1.0 - tanh_c * tanh_c), mask=mask)
                tl.store(to + H, g * i * (1.0 - i), mask=mask)
                tl.store(to + 2 * H, c * f * (1.0 - f), mask=mask)
                tl.store(to + 3 * H, i * (1.0 - g * g), mask=mask)
                tl.store(to + 4 * H, tanh_c * o * (1.0 - o), mask=mask)
                tl.store(to + 5 * H, f, mask=mask)
    tl.debug_barrier()
    new = tl.where(mask, new, v)
    if KEEP:
        tl.store(output + at * H + h[None, :], new, mask=mask)
    return new, new_c, tl.where(on, new, 0.0)


@triton.jit(do_not_specialize=["T", "B", "C", "rows"])
def _walk(
    from_input, bias, weight, halves, scale, last, start, output, factors, aside, arrived, left, energies,
    T, B, C, halo_at, rows,
    H: tl.constexpr, HP: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, START: tl.constexpr, KEEP: tl.constexpr,
    FACTORS: tl.constexpr, RESIDENT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, FULL: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """Walk R rows; see :meth:`lit_parallel.recurrent.chain.Chain.walk`."""
    S: tl.constexpr = 2 * H if KIND == 3 else H
    halo = tl.load(halo_at)
    if halo == NOT_AT_ALL:
        return
    row = tl.program_id(0) * R + tl.arange(0, R)
    h = tl.arange(0, HP)
    inside = row < rows
    n = row // B
    b = row % B
    mask = inside[:, None] & (h < H)[None, :]
    state = row.to(tl.int64)[:, None] * S + h[None, :]
    if START:
        from_state = start + state
        given = mask
    else:  # zero, or what stands before the first step in time
        from_state = last + b[:, None] * S + h[None, :]
        given = mask & ((n + 1) * C + halo >= T)[:, None]
    v = tl.load(from_state, mask=given, other=0.0)
    squares = tl.zeros([R, HP], dtype=tl.float32)
    if RESIDENT:  # an RNN's matrix stays on the chip; what the next step reads is fetched while this one multiplies
        both = (h < H)[:, None] & (h < H)[None, :]
        resident = tl.load(weight + h[:, None] * H + h[None, :], mask=both, other=0.0)
        x = _read(C + halo - 1, n, b, inside, h, from_input, T, B, C, H)
        for i in range(halo):
            j = C + halo - 1 - i
            x2 = _read(j - 1, n, b, inside, h, from_input, T, B, C, H)
            v, _ = _step_resident(j, v, x, n, b, inside, h, resident, output, T, B, C, H, KIND, False, PRODUCT)
            x = x2
        tl.store(arrived + state, v, mask=mask)
        for i in range(C):
            j = C - 1 - i
            x2 = _read(j - 1, n, b, inside, h, from_input, T, B, C, H)
            v, kept = _step_resident(j, v, x, n, b, inside, h, resident, output, T, B, C, H, KIND, KEEP, PRODUCT)
            squares += kept * kept
            x = x2
    else:  # larger ones come from the cache at every step
        c = v
        weight_scale = tl.load(scale)
        size = rows.to(tl.int64) * H
        if KIND == 3:
            c = tl.load(from_state + H, mask=given, other=0.0)
        for i in range(halo):
            v, c, _ = _step_streamed(
                C + halo - 1 - i, v, c, row, n, b, inside, h, from_input, bias, halves, weight_scale, output, factors,
                aside, size, T, B, C, H, HP, R, KIND, False, False, DEPTH, STAGES, FULL,
            )  # fmt: skip
        tl.store(arrived + state, v, mask=mask)
        if KIND == 3:
            tl.store(arrived + state + H, c, mask=mask)
        for i in range(C):
            v, c, kept = _step_streamed(
                C - 1 - i, v, c, row, n, b, inside, h, from_input, bias, halves, weight_scale, output, factors,
                aside, size, T, B, C, H, HP, R, KIND, KEEP, FACTORS, DEPTH, STAGES, FULL,
            )  # fmt: skip
            squares += kept * kept
        if KIND == 3:
            tl.store(left + state + H, c, mask=mask)
    tl.store(left + state, v, mask=mask)
    tl.store(energies + row, tl.sum(squares, axis=1), mask=inside)


class KernelStateChain(LaunchedChain, StateChain):
    """The states of a layer, walked by the kernel.

    Attributes:
        factors: To be filled as well, for the backward pass, as :func:`lit_parallel.kernels.recurrent.linearise` would
            from the output.
    """

    factors: Tensor | None = None

    def __init__(self, kind: str, layer: Layer, precision: str = "full") -> None:
        """Take what is there before the forward pass.

        Args:
            kind: ``rnn_tanh``, ``rnn_relu``, ``gru`` or ``lstm``.
            layer: Of float32.
            precision: ``full`` (float32, as products of halves of 16 bits) or ``half`` (the upper half alone).
        """
        cell = cell_of(kind)
        self.kind, self.precision, self.gates = kind, precision, cell.gates
        self.length, self.batch, _ = layer.input.shape
        self.hidden = self.gradient_size = layer.h_0.shape[-1]
        self.state_size = cell.states * self.hidden
        first = layer.h_0 if layer.c_0 is None else torch.cat([layer.h_0, layer.c_0], dim=-1)
        self.last = first.contiguous()
        of_both, of_hidden = layer.bias_ih, layer.bias_hh
        self.bias = self.last.new_zeros(self.hidden) if kind == "gru" else self.last
        if of_both is not None and of_hidden is not None:
            added = len(of_hidden)
            if kind == "gru":  # the last gate's own is multiplied by the reset gate
                added = 2 * self.hidden
                self.bias = of_hidden[added:].contiguous()
            of_both = torch.cat([of_both[:added] + of_hidden[:added], of_both[added:]])
        x, to_gates = layer.input.flatten(0, 1), layer.weight_ih.t()
        self.from_input = x @ to_gates if of_both is None else torch.addmm(of_both, x, to_gates)
        self.weight = layer.weight_hh.t().contiguous()
        self.resident = cell.gates == 1 and self.hidden <= MAX_RESIDENT
        self.halves = self.scale = self.weight
        if not self.resident:
            self.halves, self.scale = halves_of(self.weight)

    def preferred_block(self, halo: int) -> int:
        per_program, _, _, _, programs = self._launch()
        return self.fewest_steps(halo, per_program * programs * multiprocessors(self.last.device))[1]

    def walk(
        self, block: int, halo: int = 0, start: Tensor | None = None, *, source: bool = True, into: Tensor | None = None
    ) -> Walk:
        blocks = blocks_of(self.length, block)
        found = self.new_walk(blocks)
        rows = blocks * self.batch
        per_program, warps, depth, stages, _ = self._launch()
        full = self.precision == "full"
        aside = self.last if self.resident else self.halves.new_empty(1 + full, rows, self.hidden)
        _walk[(triton.cdiv(rows, per_program),)](
            self.from_input,
            self.bias,
            self.weight,
            self.halves,
            self.scale,
            self.last,
            self.last if start is None else start.contiguous(),
            self.last if into is None else into,
            self.last if self.factors is None else self.factors,
            aside,
            found.arrived,
            found.left,
            found.energy,
            self.length,
            self.batch,
            block,
            self.halo_at(halo),
            rows,
            self.hidden,
            max(16, triton.next_power_of_2(self.hidden)),
            per_program,
            KINDS[self.kind],
            start is not None,
            into is not None,
            self.factors is not None,
            self.resident,
            depth,
            stages,
            full,
            "ieee" if interpreted() else self._product(),
            num_warps=warps,
        )
        return found

    def in_time(self, into: Tensor) -> Tensor:
        return into

    def _product(self) -> str:
        """How the product with a matrix that stays on the chip is computed."""
        if self.precision == "half":
            return "bf16"
        return "ieee" if self.careful else "bf16x6"

    def _launch(self) -> tuple[int, int, int, int, int]:
        """What an H100 was fastest with: see :data:`_LAUNCHES`."""
        if self.gates > 1:
            return _LAUNCHES[self.kind] if self.hidden <= 128 else (16, 8, 16, 2, 1)
        if self.resident:
            return _LAUNCHES["resident"]
        return 16, 4, max(16, 32 * 128 // max(128, triton.next_power_of_2(self.hidden))), 4, 2


def supports(layer: Layer) -> bool:
    """Whether a layer's gates are few enough."""
    return len(layer.weight_hh) <= _MAX_GATES
