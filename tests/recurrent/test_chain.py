"""Walking blocks: against dense matrices, against truncated backpropagation, and against the general solvers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_helpers import CELLS, build, cell_chain, exactly, gradients, random_chain

from lit_parallel.recurrent import parallelize
from lit_parallel.recurrent.chain import blocks_of
from lit_parallel.recurrent.solve import Plan, solve_chain
from lit_parallel.solvers import Jacobi, JacobiGS, Sequential, Stopping, solve
from lit_parallel.systems import TensorSystem


def walked(chain, *arguments, **options):
    """A walk, and what it left behind."""
    into = torch.full((chain.length, chain.batch, chain.gradient_size), torch.nan).to(chain.last)
    return chain.walk(*arguments, **options, into=into), into


@given(length=st.integers(1, 20), block=st.integers(1, 22), batch=st.integers(1, 3), size=st.integers(1, 4))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_walks_that_start_from_the_truth_find_the_truth(length, block, batch, size):
    chain = random_chain(length, batch, size, radius=0.9)
    p, initial = chain.exact()
    # A halo that reaches the end of the chain for all blocks.
    walk, into = walked(chain, block, length)
    torch.testing.assert_close(into, p)
    torch.testing.assert_close(walk.left[0, :, 0], initial)
    torch.testing.assert_close(walk.left[1:], walk.arrived[:-1])
    energy = torch.stack([part.square().sum((0, 2)) for part in p.split(block)])
    torch.testing.assert_close(walk.energy[:, :, 0], energy)
    # The right start at every border.
    again, into = walked(chain, block, 0, walk.arrived)
    torch.testing.assert_close(into, p)
    assert torch.equal(again.arrived, walk.arrived)


def test_a_walk_of_a_chain_known_by_hand():
    """With J = 1 and g = 1, what a step leaves behind counts the steps seen."""
    chain = random_chain(7, 1, 1, 0.0)
    chain.maps, chain.source, chain.last = torch.ones(7, 1, 1, 1), torch.ones(7, 1, 1), torch.full((1, 1), 10.0)
    walk, into = walked(chain, 3, 1)
    # Blocks 0..2, 3..5, 6: the first two see one step more, and only the last begins at the end.
    assert into.flatten().tolist() == [4, 3, 2, 14, 13, 12, 11]
    assert walk.arrived.flatten().tolist() == [1, 11, 10]
    assert walk.left.flatten().tolist() == [4, 14, 11]
    assert walk.energy.flatten().tolist() == [16 + 9 + 4, 14**2 + 13**2 + 12**2, 121]
    found = chain.disagreement(walk)()
    energy = float(walk.energy.sum())
    assert found.of_solution == pytest.approx(((14 - 1) ** 2 / energy) ** 0.5)
    assert found.of_border == pytest.approx((14 - 1) / 14)


def test_columns_walk_alone_and_without_source():
    chain = random_chain(11, 2, 3, 1.0)
    start = torch.randn(blocks_of(11, 4), 2, 5, 3, dtype=torch.float64)
    walk = chain.walk(4, 0, start, source=False)
    for n in range(3):
        map_of_block = chain.maps[min(4 * n + 3, 10)]
        for t in range(min(4 * n + 2, 9), 4 * n - 1, -1):
            map_of_block = map_of_block @ chain.maps[t]
        torch.testing.assert_close(walk.left[n], start[n] @ (map_of_block if n < 2 else _product(chain.maps[8:])))
    assert torch.equal(walk.arrived, start)


def _product(maps):
    result = maps[-1]
    for one in maps[:-1].flip(0):
        result = result @ one
    return result


def test_after_k_jacobi_iterations_the_last_k_are_exact():
    chain = random_chain(15, 2, 3, radius=1.5)
    p, _ = chain.exact()
    for iterations in range(1, 16):
        _, into = walked(chain, 1, iterations - 1)
        right = [torch.allclose(a, b, rtol=1e-12) for a, b in zip(into, p, strict=True)]
        # Such a chain forgets nothing: exactly those are.
        assert right == [False] * (15 - iterations) + [True] * iterations


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("iterations", "block"), [(1, 1), (3, 1), (12, 1), (40, 1), (3, 3), (7, 3), (9, 4)])
def test_a_fixed_number_of_iterations_is_truncated_backpropagation(cell, iterations, block):
    """Every step's gradient is that of the losses in a window: K steps, or its block and a halo of K - C."""
    length, hidden = 11, 4
    module = build(cell, 2, hidden).double()
    x = torch.randn(length, 2, 2, dtype=torch.float64)
    states = [torch.zeros(1, 2, hidden, dtype=torch.float64)] * (2 if cell == "lstm" else 1)
    weights = torch.randn(length, 2, hidden, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for t in range(length):
        end = t + iterations if block == 1 else t // block * block + iterations
        x_t = x[t].clone().requires_grad_()
        output, _ = module(torch.cat([x[:t], x_t[None], x[t + 1 :]]), states[0] if len(states) == 1 else tuple(states))
        (expected[t],) = torch.autograd.grad((weights * output)[t:end].sum(), x_t)

    solver = "jacobi" if block == 1 else "jacobi_gs"
    block_size = None if block == 1 else block
    parallelize(module, solver=solver, iterations=iterations, block_size=block_size, probe_every=0)
    x.requires_grad_()
    (ours,) = torch.autograd.grad((weights * module(x)[0]).sum(), x)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("cell", CELLS)
def test_enough_fixed_iterations_are_exact(cell):
    module = build(cell, 2, 4).double()
    x = torch.randn(9, 2, 2, dtype=torch.float64)
    expected = gradients(module, x)
    parallelize(module, solver="jacobi", iterations=9, probe_every=0)
    ours = gradients(module, x)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-12, atol=1e-14)


class AdjointSystem(TensorSystem):
    """A chain as the general solvers see it: equation i is what step ``T - 1 - i`` hands on."""

    def __init__(self, chain):
        super().__init__(torch.zeros(chain.batch, chain.length, chain.state_size).to(chain.last))
        self.chain = chain

    def function(self, x):
        arrives = torch.cat([self.chain.last[:, None], x[:, :-1]], dim=1).flip(1).transpose(0, 1)
        _, earlier = self.chain.step(0, 1, arrives[:, :, None].contiguous(), True)
        return earlier[:, :, 0].transpose(0, 1).flip(1)


@pytest.mark.parametrize("cell", CELLS)
def test_the_general_solvers_find_the_same(cell):
    """One vocabulary: iteration K of the paper's methods is a walk with the halo that belongs to K."""
    length, block = 12, 3
    chain = cell_chain(cell, length, batch=2, hidden=3)
    system = AdjointSystem(chain)

    def handed_on(block, halo):  # by every step: what a shorter last block of steps t.. finds first
        into = [chain.walk(block, halo).left[:, :, 0]]
        return torch.stack(into).flatten(0, 1).flip(0).transpose(0, 1)

    for iterations in (1, 2, 5, length):
        theirs = solve(system, Jacobi(), Stopping(max_iterations=iterations)).value
        torch.testing.assert_close(theirs, handed_on(1, iterations - 1), rtol=1e-12, atol=1e-14)
    for sweeps in (1, 2, 4):  # the last equation of a block is what the block hands on
        theirs = solve(system, JacobiGS(block), Stopping(max_iterations=sweeps * block)).value
        ours = handed_on(block, (sweeps - 1) * block)
        torch.testing.assert_close(theirs[:, block - 1 :: block], ours, rtol=1e-12, atol=1e-14)
    theirs = solve(system, Sequential()).value
    p, initial = exactly(chain)
    torch.testing.assert_close(theirs[:, -1], initial)
    into = torch.empty_like(p)
    outcome = solve_chain(chain, Plan(block, 2, rank=2, tolerance=1e-12), None, into)
    torch.testing.assert_close(into, p, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outcome.initial, theirs[:, -1])
