"""GS-Jacobi sampling of a MADE with cached pre-activations, a whole sweep in one kernel launch.

One program owns one sample. It walks over aligned windows of equations: it iterates inside a window until nothing
changes, adds what is now final to the cached pre-activations of everything behind the window, and moves on. Samples
never wait for one another, and no launch or synchronisation stands between two iterations.

Every pre-activation is one chain of fused multiply-adds in ascending order of its inputs, from zero, then the bias.
A cached prefix continues that same chain, so caching changes no bit. cuBLAS sums in the same order with every kernel
that does not split the inner dimension (``CUBLAS_WORKSPACE_CONFIG=:0:0`` keeps it from splitting at the sizes at hand);
then the result has the bits of the plain forward pass, and the certificate says so at once. Where cuBLAS sums in
another order, the certificate's iterations repair the last bits.

The plain reference is :class:`lit_parallel.sampling.made.MadeSystem` under GS-Jacobi.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lit_parallel.kernels import interpreted
from lit_parallel.systems import FusedBooks

if interpreted():

    @triton.jit
    def _exp(x):
        return tl.exp(x)
else:
    from triton.language.extra import libdevice

    @triton.jit
    def _exp(x):
        # The accurate exponential, as in torch; tl.exp is an approximation.
        return libdevice.exp(x)


@triton.jit
def _chain(acc, weight, stride, columns, mask, vector, start, end, CHUNK: tl.constexpr):
    """Continue a chain: acc[j] = fma(weight[k, columns[j]], vector[k], acc[j]) for k in [start, end), chunk by chunk.

    The range is rounded up to whole chunks; what lies beyond ``end`` is masked out, which adds nothing.
    """
    for chunk in range(start, end, CHUNK):
        for i in tl.static_range(CHUNK):
            k = chunk + i
            w = tl.load(weight + k * stride + columns, mask=mask & (columns * 0 + k < end), other=0.0)
            v = tl.load(vector + tl.minimum(k, end - 1))
            acc = tl.fma(w, v, acc)
    return acc


@triton.jit
def _two_chains(acc, other, weight, offset, stride, columns, mask, vector, start, end, CHUNK: tl.constexpr):
    """Two chains over the same vector; the second's weights stand ``offset`` further."""
    for chunk in range(start, end, CHUNK):
        for i in tl.static_range(CHUNK):
            k = chunk + i
            inside = mask & (columns * 0 + k < end)
            w = tl.load(weight + k * stride + columns, mask=inside, other=0.0)
            w2 = tl.load(weight + k * stride + offset + columns, mask=inside, other=0.0)
            v = tl.load(vector + tl.minimum(k, end - 1))
            acc = tl.fma(w, v, acc)
            other = tl.fma(w2, v, other)
    return acc, other


@triton.jit
def _push(cache, weight, stride, first, end_column, vector, start, end, LANES: tl.constexpr, CHUNK: tl.constexpr):
    """Add inputs [start, end) of a layer to the cached pre-activations of all its units from ``first`` on.

    Starts at a whole multiple of 128: the few units before ``first`` are final and their cache is not read again.
    """
    for block in range(first // 128 * 128, end_column, LANES):
        columns = block + tl.arange(0, LANES)
        mask = columns < end_column
        acc = tl.load(cache + columns, mask=mask, other=0.0)
        acc = _chain(acc, weight, stride, columns, mask, vector, start, end, CHUNK)
        tl.store(cache + columns, acc, mask=mask)


@triton.jit
def _clear(cache, size, LANES: tl.constexpr):
    for block in range(0, size, LANES):
        columns = block + tl.arange(0, LANES)
        tl.store(cache + columns, tl.zeros([LANES], tl.float32), mask=columns < size)


@triton.jit
def _sweep(
    x,
    hidden1,
    hidden2,
    cache,
    noise,
    weight1,
    bias1,
    weight2,
    bias2,
    weight_out,
    bias_out,
    first1,
    end1,
    first2,
    end2,
    iterations,
    evaluations,
    frontier,
    failed,
    changed_in,
    residual,
    batch,
    length,
    units1,
    units2,
    bound,
    limit,
    RECORD: tl.constexpr,
    WINDOW: tl.constexpr,
    LANES1: tl.constexpr,
    LANES2: tl.constexpr,
    CHUNK: tl.constexpr,
    PUSH_LANES: tl.constexpr,
    PUSH_CHUNK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    x += sample * length
    noise += sample * length
    changed_in += sample * length
    hidden1 += sample * units1
    hidden2 += sample * units2
    # Sums over everything final, without the biases: first layer, second layer, means, log-scales.
    cache += sample * (units1 + units2 + 2 * length)
    cache2 = cache + units1
    cache_mean = cache2 + units2
    cache_scale = cache_mean + length
    _clear(cache, units1 + units2 + 2 * length, PUSH_LANES)
    tl.debug_barrier()

    count = 0  # parallel iterations of this sample
    work = 0
    final = 0
    bad = 0
    lo = 0
    while (lo < length) & (bad == 0) & (count < limit):
        window = lo // WINDOW
        hi = tl.minimum(lo + WINDOW, length)
        t = lo + tl.arange(0, WINDOW)
        inside = t < length
        u1_first = tl.load(first1 + window)
        u1_end = tl.load(end1 + window)
        u2_first = tl.load(first2 + window)
        u2_end = tl.load(end2 + window)
        u1 = u1_first + tl.arange(0, LANES1)
        u2 = u2_first + tl.arange(0, LANES2)
        in1 = u1 < u1_end
        in2 = u2 < u2_end
        b1 = tl.load(bias1 + u1, mask=in1, other=0.0)
        b2 = tl.load(bias2 + u2, mask=in2, other=0.0)
        b_mean = tl.load(bias_out + t, mask=inside, other=0.0)
        b_scale = tl.load(bias_out + length + t, mask=inside, other=0.0)
        e = tl.load(noise + t, mask=inside, other=0.0)

        prefix1 = tl.load(cache + u1, mask=in1, other=0.0)
        prefix2 = tl.load(cache2 + u2, mask=in2, other=0.0)
        prefix_mean = tl.load(cache_mean + t, mask=inside, other=0.0)
        prefix_scale = tl.load(cache_scale + t, mask=inside, other=0.0)

        old = tl.load(x + t, mask=inside, other=0.0)
        last_change = tl.zeros([WINDOW], tl.int32)
        not_finite = tl.zeros([WINDOW], tl.int32)
        going = 1
        before = count
        while (going == 1) & (count < limit):
            a1 = _chain(prefix1, weight1, units1, u1, in1, x, lo, hi, CHUNK)
            tl.store(hidden1 + u1, tl.maximum(a1 + b1, 0.0), mask=in1)
            tl.debug_barrier()
            a2 = _chain(prefix2, weight2, units2, u2, in2, hidden1, u1_first, u1_end, CHUNK)
            tl.store(hidden2 + u2, tl.maximum(a2 + b2, 0.0), mask=in2)
            tl.debug_barrier()
            mean, scale = _two_chains(
                prefix_mean,
                prefix_scale,
                weight_out,
                length,
                2 * length,
                t,
                inside,
                hidden2,
                u2_first,
                u2_end,
                CHUNK,
            )
            mean += b_mean
            scale += b_scale
            new = mean + _exp(scale) * e
            nan = new != new
            new = tl.minimum(tl.maximum(new, -bound), bound)
            new = tl.where(nan, 0.0, new)
            not_finite = tl.where(nan & inside, 1, 0)
            moved = inside & (new != old)
            tl.store(x + t, new, mask=inside)
            if RECORD:
                distance = tl.where(nan, float("inf"), tl.abs(new - old))
                largest = tl.max(tl.where(inside, distance, 0.0), axis=0)
                tl.store(residual + count * batch + sample, largest)
            count += 1
            work += hi - lo
            last_change = tl.where(moved, count, last_change)
            # No equation of the window reads the last one: it is final once nothing before it moves.
            going = tl.max((moved & (t + 1 < hi)).to(tl.int32), axis=0)
            old = new
            tl.debug_barrier()
        tl.store(changed_in + t, last_change, mask=inside)
        # Within a settled window the first value that is not finite was computed from final inputs.
        bad = tl.max(not_finite, axis=0)
        first_bad = tl.min(tl.where(not_finite == 1, t, length), axis=0)
        # At the iteration limit, every iteration has made at least one more equation final.
        final = tl.minimum(tl.where(going == 1, lo + count - before, hi), first_bad)
        bad = tl.where(going == 1, 0, bad)
        if (going == 0) & (hi < length):
            _push(cache, weight1, units1, u1_end, units1, x, lo, hi, PUSH_LANES, PUSH_CHUNK)
            _push(cache2, weight2, units2, u2_end, units2, hidden1, u1_first, u1_end, PUSH_LANES, PUSH_CHUNK)
            w_mean, w_scale = weight_out, weight_out + length
            _push(cache_mean, w_mean, 2 * length, hi, length, hidden2, u2_first, u2_end, PUSH_LANES, PUSH_CHUNK)
            _push(cache_scale, w_scale, 2 * length, hi, length, hidden2, u2_first, u2_end, PUSH_LANES, PUSH_CHUNK)
            tl.debug_barrier()
        lo = tl.where(going == 1, lo, hi)
    tl.store(iterations + sample, count)
    tl.store(evaluations + sample, work)
    tl.store(frontier + sample, final)
    tl.store(failed + sample, bad)


# The fastest of those tried on an H100: links of a chain that are loaded together, inside a window and when a window
# is pushed to the cache; units that are pushed together; warps of a program.
CHUNK = 16
PUSH_CHUNK = 16
PUSH_LANES = 512
WARPS = 4


@dataclass
class SweepWeights:
    """The weights of a folded MADE with two hidden layers, laid out for the kernel.

    Attributes:
        weight1, weight2: ``[inputs, units]``, units in order of their degree.
        weight_out: ``[units, 2, length]``: all means, then all log-scales.
        bias1, bias2: ``[units]``.
        bias_out: ``[2, length]``.
        first1, end1, first2, end2: ``[windows]`` int32: the units that each window must compute, per layer.
        window: Equations per window, a power of two.
        lanes1, lanes2: Powers of two, at least the most units of any window.
    """

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    weight_out: Tensor
    bias_out: Tensor
    first1: Tensor
    end1: Tensor
    first2: Tensor
    end2: Tensor
    window: int
    lanes1: int
    lanes2: int


def sweep(
    x: Tensor,
    hidden: list[Tensor],
    cache: Tensor,
    noise: Tensor,
    weights: SweepWeights,
    books: FusedBooks,
    bound: float,
    limit: int,
) -> None:
    """Solve all samples by GS-Jacobi, from the iterate ``x`` on, in place.

    Args:
        x: ``[batch, length]`` iterate.
        hidden: Two buffers ``[batch, units]``; what they hold does not matter.
        cache: ``[batch, units of both layers + 2 length]`` buffer; what it holds does not matter.
        noise: ``[batch, length]``.
        weights: Of a MADE with two hidden layers.
        books: Filled in; int32, but for the residual.
        bound: Values are truncated to [-bound, bound].
        limit: Most iterations of a sample.
    """
    batch, length = x.shape
    _sweep[(batch,)](
        x,
        hidden[0],
        hidden[1],
        cache,
        noise,
        weights.weight1,
        weights.bias1,
        weights.weight2,
        weights.bias2,
        weights.weight_out,
        weights.bias_out,
        weights.first1,
        weights.end1,
        weights.first2,
        weights.end2,
        books.iterations,
        books.evaluations,
        books.frontier,
        books.failed,
        books.changed_in,
        books.residual if books.residual is not None else books.changed_in,
        batch,
        length,
        len(weights.bias1),
        len(weights.bias2),
        bound,
        limit,
        RECORD=books.residual is not None,
        WINDOW=weights.window,
        LANES1=weights.lanes1,
        LANES2=weights.lanes2,
        CHUNK=CHUNK,
        PUSH_LANES=PUSH_LANES,
        PUSH_CHUNK=PUSH_CHUNK,
        num_warps=WARPS,
        enable_fp_fusion=False,  # only the chains are fused, as written
    )
