"""A linear recurrence of small matrices, one program per sequence: the plain function is ``coarse.doubling``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _suffix_sums(maps, terms, sums, length, batch, RANK: tl.constexpr, PADDED: tl.constexpr):
    b = tl.program_id(0)
    row = tl.arange(0, PADDED)
    inside = row < RANK
    square = row[:, None] * RANK + row[None, :]
    both = inside[:, None] & inside[None, :]
    x = tl.zeros([PADDED], dtype=tl.float32)
    at = (length - 1).to(tl.int64) * batch + b
    matrix = tl.zeros([PADDED, PADDED], dtype=tl.float32)  # nothing comes from behind the last
    term = tl.load(terms + at * RANK + row, mask=inside, other=0.0)
    for _ in range(length):
        further = tl.maximum(at - batch, b)  # fetched while this one multiplies
        next_matrix = tl.load(maps + further * RANK * RANK + square, mask=both, other=0.0)
        next_term = tl.load(terms + further * RANK + row, mask=inside, other=0.0)
        x = term + tl.sum(matrix * x[None, :], axis=1)
        tl.store(sums + at * RANK + row, x, mask=inside)
        at, matrix, term = further, next_matrix, next_term


def suffix_sums(maps: Tensor, terms: Tensor) -> Tensor:
    """Solve ``x_n = terms_n + maps_n x_{n+1}``; see :func:`lit_parallel.recurrent.coarse.suffix_sums`."""
    length, batch, rank = terms.shape
    sums = torch.empty_like(terms, memory_format=torch.contiguous_format)
    padded = triton.next_power_of_2(rank)
    _suffix_sums[(batch,)](maps.contiguous(), terms.contiguous(), sums, length, batch, rank, padded, num_warps=8)
    return sums
