"""The solver loop's bookkeeping for full evaluations, in three launches instead of about forty.

The plain functions are :func:`lit_parallel.systems.write` and :meth:`lit_parallel.solvers.books.Books.enter`. When all
equations are evaluated at once, an equation is consistent exactly if nothing before it changed: the first equation
that changed is the last one that is known to be final, unless it is not finite.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _write(state, new, guess, running, change, length, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = t < length
    at = sample * length + t
    old = tl.load(state + at, mask=inside, other=0.0)
    value = tl.load(new + at, mask=inside, other=0.0)
    fallback = tl.load(guess + at, mask=inside, other=0.0)
    open_ = tl.load(running + sample).to(tl.int1)
    not_finite = (value - value) != 0.0  # inf - inf and nan - nan are not 0
    value = tl.where(not_finite, fallback, value)
    value = tl.where(open_, value, old)
    distance = tl.abs(value - old)
    # -0.0 equals 0.0 but is another value: what reads it may tell them apart.
    flipped = (value == 0.0) & (old == 0.0) & ((1.0 / value) != (1.0 / old))
    distance = tl.where(flipped, 1e-37, distance)
    tl.store(change + at, tl.where(not_finite, float("nan"), distance), mask=inside)
    tl.store(state + at, value, mask=inside)


@triton.jit
def _enter(
    change,
    step,
    status,
    frontier,
    iterations,
    evaluations,
    evaluated_in,
    changed_in,
    non_finite,
    residual,
    batch,
    length,
    limit,
    RECORD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    if tl.load(status + sample) == 0:
        now = tl.load(step) + 1
        first = tl.full([], 0, tl.int64) + length  # the first equation that changed
        first_bad = first  # the first that is not finite
        largest = tl.full([], 0.0, tl.float32)
        for start in range(0, length, BLOCK):
            t = start + tl.arange(0, BLOCK)
            inside = t < length
            at = sample * length + t
            moved = tl.load(change + at, mask=inside, other=0.0)
            bad = (moved != moved) & inside
            changed = (bad | (moved > 0.0)) & inside
            tl.store(evaluated_in + at, (t * 0 + now).to(tl.int32), mask=inside)
            tl.store(changed_in + at, (t * 0 + now).to(tl.int32), mask=changed)
            tl.store(non_finite + at, bad, mask=inside)
            first = tl.minimum(first, tl.min(tl.where(changed, t, length), axis=0))
            first_bad = tl.minimum(first_bad, tl.min(tl.where(bad, t, length), axis=0))
            if RECORD:
                moved = tl.where(bad, float("inf"), moved).to(tl.float32)
                largest = tl.maximum(largest, tl.max(tl.where(inside, moved, 0.0), axis=0))
        failed = (first_bad == first) & (first < length)
        final = tl.where(failed, first, tl.minimum(first + 1, length))
        tl.store(frontier + sample, final)
        tl.store(iterations + sample, tl.load(iterations + sample) + 1)
        tl.store(evaluations + sample, tl.load(evaluations + sample) + length)
        tl.store(status + sample, tl.where(failed, 2, tl.where(final == length, 1, 0)))
        if RECORD:
            tl.store(residual + tl.minimum(now - 1, limit - 1) * batch + sample, largest)


@triton.jit
def _close(step, progress, status, batch, BLOCK: tl.constexpr):
    running = tl.full([], 0, tl.int32)
    for start in range(0, batch, BLOCK):
        sample = start + tl.arange(0, BLOCK)
        state = tl.load(status + sample, mask=sample < batch, other=1)
        running += tl.sum((state == 0).to(tl.int32), axis=0)
    now = tl.load(step) + 1
    tl.store(step, now)
    tl.store(progress, now * 2 + tl.where(running == 0, 1, 0))


def covers(state: Tensor, new: Tensor, guess: Tensor, running: Tensor | None) -> bool:
    """Whether :func:`write_all` can take the place of :func:`lit_parallel.systems.write`."""
    same = state.dtype == new.dtype == guess.dtype and state.shape == new.shape == guess.shape
    plain = state.is_contiguous() and new.is_contiguous() and guess.is_contiguous()
    return running is not None and same and plain and state.dim() == 2 and state.dtype.is_floating_point


def write_all(state: Tensor, new: Tensor, guess: Tensor, running: Tensor) -> Tensor:
    """Write new values of all equations; returns the change of each (not-a-number where it was not finite).

    Args:
        state: ``[batch, length]`` the iterate, changed in place.
        new: ``[batch, length]`` new values.
        guess: ``[batch, length]`` what replaces a value that is not finite.
        running: ``[batch]`` bool: samples whose values may change.
    """
    batch, length = state.shape
    change = torch.empty_like(state)
    block = min(_BLOCK, triton.next_power_of_2(length))
    _write[(batch, triton.cdiv(length, block))](state, new, guess, running, change, length, BLOCK=block)
    return change


def enter_all(books: Any, change: Tensor) -> None:
    """Enter an evaluation of all equations into the books.

    Args:
        books: :class:`lit_parallel.solvers.books.Books`.
        change: ``[batch, length]``; equations count as unchanged at exact equality.
    """
    batch, length = change.shape
    residual = books.residual
    _enter[(batch,)](
        change.contiguous(),
        books.step,
        books.status,
        books.frontier,
        books.iterations,
        books.evaluations,
        books.evaluated_in,
        books.changed_in,
        books.non_finite,
        residual if residual is not None else books.status,
        batch,
        length,
        1 if residual is None else residual.shape[0],
        RECORD=residual is not None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(length)),
    )
    _close[(1,)](books.step, books.progress, books.status, batch, BLOCK=min(_BLOCK, triton.next_power_of_2(batch)))
