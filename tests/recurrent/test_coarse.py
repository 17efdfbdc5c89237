"""The coarse correction: its linear algebra, and what it does to a chain of low rank."""

import pytest
import torch
from recurrent_helpers import random_chain

from lit_parallel.recurrent.chain import blocks_of
from lit_parallel.recurrent.coarse import coarse_space, doubling, next_basis, orthonormal, suffix_sums
from lit_parallel.recurrent.solve import Plan, solve_chain


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("solve", [doubling, suffix_sums])
def test_suffix_sums_solve_their_block_triangular_system(number, solve):
    batch, rank = 2, 3
    maps = torch.randn(number, batch, rank, rank, dtype=torch.float64)
    maps[-1] = torch.nan  # there is nothing behind the last
    terms = torch.randn(number, batch, rank, dtype=torch.float64)
    found = solve(maps.nan_to_num(7.0), terms)
    for b in range(batch):
        matrix = torch.eye(number * rank, dtype=torch.float64)
        for n in range(number - 1):
            matrix[n * rank : (n + 1) * rank, (n + 1) * rank : (n + 2) * rank] = -maps[n, b]
        expected = torch.linalg.solve(matrix, terms[:, b].flatten()).unflatten(0, (number, rank))
        torch.testing.assert_close(found[:, b], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormal_rows_span_the_same(dtype):
    vectors = torch.randn(2, 5, 9, dtype=dtype) * torch.tensor([1e-12, 1.0, 1e25, 3.0, 1e-3], dtype=dtype)[:, None]
    basis = orthonormal(vectors)
    assert basis.dtype == dtype
    torch.testing.assert_close(basis @ basis.mT, torch.eye(5, dtype=dtype).expand(2, 5, 5), rtol=0, atol=1e-6)
    units = torch.nn.functional.normalize(vectors.double(), dim=-1)
    spanned = units @ basis.double().mT @ basis.double()
    torch.testing.assert_close(spanned, units, rtol=0, atol=1e-6)


def test_dependent_and_vanished_rows_stay_finite_and_small():
    vectors = torch.zeros(4, 6)
    vectors[0], vectors[1], vectors[2] = torch.arange(6.0), torch.arange(6.0), torch.ones(6)
    basis = orthonormal(vectors)
    assert basis.isfinite().all()
    assert torch.linalg.matrix_norm(basis, 2) <= 1 + 1e-3
    assert basis[3].abs().max() == 0


def test_of_full_rank_the_correction_is_exact():
    chain = random_chain(24, 2, 4, radius=1.0)
    space = coarse_space(chain, 4, 4)
    assert space.basis.shape == space.image.shape == (6, 2, 4, 4)
    residual = torch.randn(5, 2, 4, dtype=torch.float64)
    errors = space.errors(residual)
    # e_n = rho_n + e_{n+1} M_{n+1}, nothing behind the last border.
    expected = residual.clone()
    for n in range(3, -1, -1):
        carried = chain.walk(4, 0, torch.cat([expected, residual[:1]])[:, :, None], source=False).left[n + 1, :, 0]
        expected[n] = residual[n] + carried
    torch.testing.assert_close(errors, expected, rtol=1e-4, atol=1e-4)


def low_rank_chain(length, size, rank):
    """Of a chain that remembers ``rank`` directions for ever and forgets all others at once."""
    chain = random_chain(length, 2, size, radius=1.0)
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    kept = torch.ones(size, dtype=torch.float64)
    kept[rank:] = 0.1
    chain.maps = (q * kept @ q.T).expand(length, 2, size, size).contiguous()
    return chain


def test_two_levels_need_few_sweeps_where_one_needs_as_many_as_there_are_blocks():
    chain = low_rank_chain(120, 8, rank=3)
    p, initial = chain.exact()
    into = torch.empty_like(p)
    outcome = solve_chain(chain, Plan(5, 0, rank=3, tolerance=1e-9), None, into)
    assert outcome.sweeps <= 3
    assert not outcome.sequential
    assert outcome.space is not None
    torch.testing.assert_close(into, p, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(outcome.initial, initial, rtol=1e-7, atol=1e-7)
    assert all(reduction < 1e-2 for reduction in outcome.reductions)

    without = solve_chain(chain, Plan(5, 0, tolerance=1e-9), None, into)
    assert without.sweeps >= blocks_of(120, 5)
    torch.testing.assert_close(into, p)


def test_a_basis_serves_the_next_chain():
    chain = low_rank_chain(60, 8, rank=3)
    into = torch.empty_like(chain.source)
    first = solve_chain(chain, Plan(5, 0, rank=4, tolerance=1e-9), None, into)
    chain.source.normal_()
    again = solve_chain(chain, Plan(5, 0, rank=4, tolerance=1e-9), None, into, next_basis(first.space.image))
    assert again.sweeps <= first.sweeps
    assert again.iterations == 5 * (again.sweeps + 1)  # one walk for the space
    assert first.iterations == 5 * (first.sweeps + 2)  # from random columns, two
    torch.testing.assert_close(into, chain.exact()[0], rtol=1e-7, atol=1e-7)


def test_a_subspace_that_misses_what_matters_costs_sweeps_and_no_accuracy():
    chain = low_rank_chain(60, 8, rank=8)  # nothing is forgotten, and one column sees little of it
    into = torch.empty_like(chain.source)
    outcome = solve_chain(chain, Plan(5, 0, rank=1, tolerance=1e-9), None, into)
    torch.testing.assert_close(into, chain.exact()[0])
    assert outcome.sweeps <= 2 * blocks_of(60, 5) + 2
