"""The estimated error: never far below the true one, for chains that forget, that remember, and that explode."""

import math

import pytest
import torch
from recurrent_helpers import CELLS, cell_chain, exactly, random_chain

from lit_parallel.recurrent.chain import blocks_of
from lit_parallel.recurrent.solve import Gain, Plan, measure_gain, solve_chain


def true_error(into, p) -> float:
    """The largest relative error of a sequence."""
    return float(((into - p).norm(dim=(0, 2)) / p.norm(dim=(0, 2))).amax())


def chains():
    for radius in (0.3, 0.7, 0.9, 1.0, 1.1):
        for seed in range(6):
            yield random_chain(60, 2, 5, radius, seed), f"random, radius {radius}"
    for cell in CELLS:
        for scale in (0.5, 1.0, 2.0, 4.0):
            torch.manual_seed(int(10 * scale))
            yield cell_chain(cell, 60, 2, 6, scale), f"{cell}, scale {scale}"


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-8])
def test_the_estimate_bounds_the_true_error(rank, tolerance):
    for chain, name in chains():
        p, initial = exactly(chain)
        for block, halo in ((1, 8), (4, 0), (4, 9), (7, 20)):
            if rank and halo:
                continue
            plan = Plan(block, halo, rank, tolerance)
            into = torch.empty_like(p)
            outcome = solve_chain(chain, plan, None if rank else measure_gain(chain, plan), into)
            error = true_error(into, p)
            where = (name, block, halo, outcome.sweeps, outcome.error, error)
            assert error <= tolerance, where
            # What ended at rounding has an estimate above the tolerance, and its error is that of rounding.
            assert error <= max(outcome.error, 1e-12), where
            assert outcome.sweeps <= blocks_of(60, block) + 2 or rank, where
            torch.testing.assert_close(outcome.initial, initial, rtol=10 * tolerance, atol=10 * tolerance * p.norm())


def test_a_gain_that_is_out_of_date_misleads_nobody():
    """It is of a network that forgot; this one does not."""
    for radius in (0.9, 0.97, 1.0):
        before, now = random_chain(120, 2, 5, 0.2), random_chain(120, 2, 5, 1.0, seed=3)
        q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
        now.maps = (radius * q).expand(120, 2, 5, 5).contiguous()
        p, _ = now.exact()
        into = torch.empty_like(p)
        for block, halo in ((4, 8), (1, 10), (10, 0)):
            plan = Plan(block, halo, tolerance=1e-3)
            outcome = solve_chain(now, plan, measure_gain(before, plan), into)
            assert true_error(into, p) <= 1e-3, (radius, block, outcome.error)


def test_the_gain_of_a_chain_known_by_hand():
    chain = random_chain(40, 1, 4, 0.0)
    chain.maps = 0.5 * torch.eye(4, dtype=torch.float64).expand(40, 1, 4, 4)
    gain = measure_gain(chain, Plan(5, 10))
    assert gain.per_step == pytest.approx(0.5)
    inside = math.sqrt(sum(0.25**k for k in range(16)))  # 1, 1/2, 1/4, ..: over 16 steps at least
    assert gain.amplification == pytest.approx(2 * inside)  # with its margin


def test_what_a_halo_forgets_altogether_still_has_a_gain():
    """Units of a relu network die: errors that reach the borders through a shorter halo count nevertheless."""
    chain = random_chain(40, 1, 4, 1.0)
    chain.maps = chain.maps.clone()
    chain.maps[::7] = 0
    gain = measure_gain(chain, Plan(3, 32))
    assert gain.amplification >= 1
    assert gain.per_step > 0
    into = torch.empty_like(chain.source)
    for halo in (0, 1, 5, 32):
        solve_chain(chain, Plan(3, halo, tolerance=1e-9), gain, into)
        torch.testing.assert_close(into, chain.exact()[0])


def test_blocks_that_let_nothing_through_hand_on_their_own_gradients():
    """Their maps are zero, and so is every subspace of what they let through; what they begin with is not."""
    chain = random_chain(40, 1, 4, 1.0)
    chain.maps = chain.maps.clone()
    chain.maps[2::5] = 0
    into = torch.empty_like(chain.source)
    outcome = solve_chain(chain, Plan(5, 0, rank=2, tolerance=1e-9), None, into)
    torch.testing.assert_close(into, chain.exact()[0])
    assert outcome.sweeps == 2


@pytest.mark.parametrize(
    ("per_step", "block", "blocks", "carried"),
    [(1.0, 5, 7, 7), (0.5, 1, 50, 2.0), (0.5, 2, 2, 1.25), (2.0, 1, 3, 7), (0.0, 3, 9, 1.0), (2.0, 10, 1000, math.inf)],
)
def test_border_errors_add_up_over_the_blocks(per_step, block, blocks, carried):
    assert Gain(3.0, per_step).of_border_errors(block, blocks) == pytest.approx(3.0 * carried)


def test_one_block_is_exact_and_says_so():
    chain = random_chain(9, 2, 3, 1.2)
    into = torch.empty_like(chain.source)
    called = []
    outcome = solve_chain(chain, Plan(9, 0, tolerance=1e-9), None, into, meanwhile=lambda: called.append(1))
    assert torch.equal(into, chain.exact()[0])
    assert (outcome.sweeps, outcome.iterations, outcome.residual, outcome.error) == (1, 9, 0.0, 0.0)
    assert called


@pytest.mark.parametrize("rank", [0, 2])
def test_a_zero_gradient_is_solved_at_once(rank):
    chain = random_chain(30, 2, 3, 1.0)
    chain.source.zero_()
    chain.last.zero_()
    into, called = torch.empty_like(chain.source), []
    outcome = solve_chain(
        chain, Plan(4, 0, rank, 1e-9), Gain(1.0, 1.0), into, meanwhile=lambda: called.append(into.clone())
    )
    assert outcome.sweeps == 1
    assert outcome.error == outcome.residual == 0
    assert (into == 0).all()
    assert len(called) == 1
    assert (called[0] == 0).all()


def test_each_sequence_is_held_to_the_tolerance():
    """A sequence of small gradients is not drowned by one of large ones."""
    chain = random_chain(60, 3, 4, 0.9)
    chain.source[:, 1] *= 1e-7
    chain.last[1] *= 1e-7
    chain.source[:, 2] = chain.last[2] = 0
    p, _ = chain.exact()
    into = torch.empty_like(p)
    plan = Plan(4, 3, tolerance=1e-6)
    solve_chain(chain, plan, measure_gain(chain, plan), into)
    assert true_error(into[:, :2], p[:, :2]) <= 1e-6
    assert (into[:, 2] == 0).all()


def test_iterations_count_the_steps_walked_one_after_another():
    chain = random_chain(40, 1, 3, 0.9)
    into = torch.empty_like(chain.source)
    assert solve_chain(chain, Plan(4, 6), None, into).iterations == 10
    plan = Plan(4, 6, tolerance=1e-9)
    outcome = solve_chain(chain, plan, measure_gain(chain, plan), into)
    assert outcome.iterations == 10 + 4 * (outcome.sweeps - 1)
    assert outcome.sweeps > 1
