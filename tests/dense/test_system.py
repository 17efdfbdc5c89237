"""A dense block and a whole DenseNet as triangular systems, against Jacobi iterates by definition."""

import pytest
import torch
from dense_helpers import NETWORKS, images, jacobi_iterates, side_of

from lit_parallel.dense.structure import structure_of
from lit_parallel.dense.system import DenseBlockSystem, DenseNetSystem
from lit_parallel.solution import Status
from lit_parallel.solvers import GSJacobi, Jacobi, JacobiGS, Sequential, SolverLoop, Stopping, solve

SOLVERS = [Sequential(), Jacobi(), JacobiGS(), JacobiGS(2), GSJacobi(), GSJacobi(2), GSJacobi(4)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{s.name}-{list(vars(s).values())}")
every_network = pytest.mark.parametrize("name", NETWORKS)


def first_block(name: str = "torchvision_like", batch: int = 3, guess: str = "mean"):
    """A system of a network's first block, and what the ordinary forward makes of it, features of all layers."""
    network = NETWORKS[name]()
    structure = structure_of(network)
    with torch.no_grad():
        x = structure.stem(images(batch, side_of(name)))
        block = structure.blocks[0]
        system = DenseBlockSystem(block.layers, x, block.mean if guess == "mean" else None)
        expected = network.features.denseblock1(x)
    return system, expected


@every_solver
@every_network
@pytest.mark.parametrize("batch", [1, 4])
def test_a_block_ends_at_the_bits_of_the_ordinary_forward(name, solver, batch):
    system, expected = first_block(name, batch)
    solution = solve(system, solver, certify=True, cuda_graph=False)
    assert torch.equal(system.features(solution.value), expected)
    assert solution.status == [Status.CONVERGED] * batch
    assert solution.certified.all()
    assert int(solution.iterations.max()) <= len(system.layers)


@every_solver
@every_network
@pytest.mark.parametrize("guess", ["mean", "zero"])
def test_a_network_ends_at_the_bits_of_the_ordinary_forward(name, solver, guess):
    network, x = NETWORKS[name](), images(2, side_of(name))
    system = DenseNetSystem(structure_of(network), x, guess=guess)
    loop = SolverLoop(system, solver, cuda_graph=False)
    solution = loop.run()
    state = system.new_state()
    system.reset(state, solution.value)
    with torch.no_grad():
        assert torch.equal(system.logits(state), network(x))
    assert solution.status == [Status.CONVERGED] * 2
    assert int(solution.iterations.max()) <= system.length == sum(len(b.layers) for b in system.structure.blocks)


def test_jacobi_iterates_are_those_of_the_definition_and_their_prefix_is_exact():
    system, expected = first_block()
    wanted = jacobi_iterates(system.layers, system.input, system.guess)
    seen = []
    solution = SolverLoop(system, Jacobi(), cuda_graph=False).run(observer=lambda _, x: seen.append(x))
    assert [torch.equal(a, b) for a, b in zip(seen, wanted, strict=False)] == [True] * len(seen)
    growth = system.guess.shape[2]
    for k, x in enumerate(seen):
        until = system.input.shape[1] + k * growth
        assert torch.equal(system.features(x)[:, :until], expected[:, :until])
        assert torch.equal(system.features(x, k), expected[:, :until])
        assert k == 0 or k == len(seen) - 1 or not torch.equal(system.features(x), expected)
    assert len(seen) == int(solution.iterations.max()) + 1


def test_the_residual_is_the_largest_relative_change_of_a_layer():
    system, _ = first_block()
    wanted = jacobi_iterates(system.layers, system.input, system.guess)
    loop = SolverLoop(system, Jacobi(), cuda_graph=False)
    for _ in range(2):  # a second run begins anew
        loop.run()
        assert len(system.residual) == 4
        for k, residual in enumerate(system.residual):
            change = (wanted[k + 1] - wanted[k]).abs().amax((2, 3, 4)) / wanted[k + 1].abs().amax((2, 3, 4))
            assert torch.allclose(residual, change.amax(1), rtol=1e-12)


@every_network
def test_the_guess_is_the_mean_of_each_feature(name):
    structure, x = structure_of(NETWORKS[name]()), images(2, side_of(name))
    network = DenseNetSystem(structure, x)
    for block, guess in zip(structure.blocks, network.guess, strict=True):
        assert torch.equal(guess[1, :, :, 1, 0], block.mean)
    block = structure.blocks[0]
    assert torch.equal(DenseBlockSystem(block.layers, network.input, block.mean).guess, network.guess[0])
    assert not DenseBlockSystem(block.layers, network.input).guess.any()
    assert not any(guess.any() for guess in DenseNetSystem(structure, x, guess="zero").guess)


def test_a_mean_that_is_not_finite_is_not_guessed():
    system, _ = first_block()
    mean = torch.full(system.guess.shape[1:3], torch.nan)
    assert not DenseBlockSystem(system.layers, system.input, mean).guess.any()


def test_only_the_layers_that_are_asked_for_run():
    system, _ = first_block()
    calls = []
    for number, layer in enumerate(system.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    frontier = torch.zeros(3, dtype=torch.int64)

    def run(equations):
        calls.clear()
        system.evaluate(system.new_state(), equations, frontier, None)
        return list(calls)

    with torch.no_grad():
        assert run(2) == [2]
        assert run(None) == [0, 1, 2, 3]
        assert run(torch.tensor([1, 3, 3])) == [1, 3]
        assert run(torch.tensor([[0, 1], [2, 2], [1, 2]])) == [0, 1, 2]


@torch.no_grad()
def test_equations_chosen_per_sample_change_these_samples_alone():
    """Also across the border between two blocks, in the ragged iterate."""
    network = NETWORKS["torchvision_like"]()
    system = DenseNetSystem(structure_of(network), images())
    state = system.new_state()
    equations = torch.tensor([[2, 3], [4, 5], [4, 4]])
    running = torch.tensor([True, True, False])
    evaluation = system.evaluate(state, equations, torch.zeros(3, dtype=torch.int64), running)
    changed = (system.value(state) != system.value(system.new_state())).any(2)
    assert changed.nonzero().tolist() == [[0, 2], [0, 3], [1, 4], [1, 5]]
    all_values = system.new_state()
    system.evaluate(all_values, None, torch.zeros(3, dtype=torch.int64), None)
    for sample, layer in changed.nonzero().tolist():
        block, index = divmod(layer, 4)
        assert torch.equal(state.blocks[block][sample, index], all_values.blocks[block][sample, index])
        width = equations[sample].tolist().index(layer)
        difference = state.blocks[block][sample, index] - system.guess[block][sample, index]
        assert evaluation.change[sample, width] == difference.abs().max()
        assert evaluation.size()[sample, width] == state.blocks[block][sample, index].abs().max()


def test_a_ragged_iterate_survives_being_one_tensor():
    system = DenseNetSystem(structure_of(NETWORKS["own"]()), images())
    state = system.new_state()
    assert [list(block.shape) for block in state.blocks] == [[3, 3, 4, 8, 8], [3, 5, 4, 4, 4], [3, 2, 4, 2, 2]]
    for block in state.blocks:
        block.normal_()
    other = system.new_state()
    system.reset(other, system.value(state))
    assert system.value(state).shape == (3, 10, 256)
    assert all(torch.equal(a, b) for a, b in zip(state.blocks, other.blocks, strict=True))
    spoilt = system.value(state)
    spoilt[1, 4] = torch.nan
    system.reset(other, spoilt)
    assert torch.equal(other.blocks[1][1, 1], system.guess[1][1, 1])
    assert torch.equal(other.blocks[1][1, 2], state.blocks[1][1, 2])
    system.reset(other)
    assert all(torch.equal(a, b) for a, b in zip(other.blocks, system.guess, strict=True))


class Heads:
    """A structure of one block whose logits are given, one row per iteration."""

    def __init__(self, structure, logits):
        self.blocks, self.stem = structure.blocks[:1], structure.stem
        self.logits = iter(logits)

    def head(self, _):
        return next(self.logits)


@torch.no_grad()
def settled(rows, patience=2, top_k=2, equations=None):
    """In which of the iterations, from 0, each of two samples is settled, for given logits ``[batch][classes]``."""
    network = NETWORKS["torchvision_like"]()
    structure = Heads(structure_of(network), [torch.tensor(row) for row in rows])
    system = DenseNetSystem(structure, images(2), top_k=top_k, patience=patience)
    state, frontier = system.new_state(), torch.zeros(2, dtype=torch.int64)
    equations = equations or [None] * len(rows)
    found = [system.evaluate(state, e, frontier, None).settled for e in equations]
    return torch.stack(found).T.tolist()


NAN = float("nan")
ROWS = [
    [[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]],
    [[9.0, 8.0, 0.0, 1.0], [0.0, 1.0, 3.0, 2.0]],  # 0: the same two, the rest does not matter; 1: another order
    [[4.0, 3.9, 1.0, 0.0], [0.0, 1.0, 3.0, 2.0]],
    [[3.9, 4.0, 1.0, 0.0], [0.0, 1.0, 3.0, 2.5]],  # 0: changes once more
    [[3.9, 4.0, 1.0, 0.0], [0.0, NAN, 3.0, 2.5]],
]


def test_the_highest_logits_are_stable_when_their_order_is_for_so_many_iterations():
    assert settled(ROWS) == [[False, False, True, False, False], [False, False, False, True, False]]
    assert settled(ROWS, patience=1) == [[False, True, True, False, True], [False, False, True, True, False]]
    assert settled(ROWS, top_k=1)[0] == [False, False, True, False, False]
    assert settled([ROWS[0]] * 4, top_k=9)[0] == [False, False, True, True]  # more than there are classes
    assert settled([[ROWS[0][0], [NAN] * 4]] * 4) == [[False, False, True, True], [False] * 4]


def test_nothing_is_stable_before_all_layers_have_been_evaluated():
    some, others = torch.tensor([0, 2]), torch.tensor([1, 3])
    found = settled([ROWS[0]] * 7, equations=[some, some, some, others, some, others, None])
    assert found == [[False] * 5 + [True] * 2] * 2  # patience is counted from the fourth on
    per_sample = [torch.tensor([[0, 1], [2, 3]])] * 3 + [torch.tensor([[2, 3], [2, 3]])] * 3
    assert settled([ROWS[0]] * 6, equations=per_sample) == [[False] * 5 + [True], [False] * 6]


def test_an_iterate_too_narrow_for_its_values_is_refused():
    system, _ = first_block()
    narrow = DenseBlockSystem(system.layers, system.input.float())
    narrow.input = system.input
    with pytest.raises(TypeError, match=r"returned torch.float64 for an input of torch.float32"):
        solve(narrow, Jacobi(), cuda_graph=False)


def test_stopping_by_relative_change_stops_earlier_and_says_so():
    system, expected = first_block()
    exact = solve(system, Jacobi(), cuda_graph=False)
    near = solve(system, Jacobi(), Stopping(relative_tolerance=0.5), cuda_graph=False)
    assert near.status == [Status.SETTLED] * 3
    assert (near.iterations < exact.iterations).all()
    assert float(system.residual[-1].max()) <= 0.5 < float(system.residual[0].max())
    assert not torch.equal(system.features(near.value), expected)


@torch.no_grad()
def test_a_certificate_is_one_of_all_features_where_stable_logits_were_enough():
    network, x = NETWORKS["own"](), images()
    system = DenseNetSystem(structure_of(network), x, top_k=1, patience=1)
    solution = solve(system, Jacobi(), cuda_graph=False)
    assert Status.SETTLED in solution.status
    assert not solution.certified.any()
    certified = solve(system, Jacobi(), certify=True, cuda_graph=False)
    assert certified.certified.all()
    state = system.new_state()
    system.reset(state, certified.value)
    assert torch.equal(system.logits(state), network(x))
