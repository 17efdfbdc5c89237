"""The plain way to evaluate a DenseNet: every solver, scope and stopping rule, against the ordinary forward."""

import copy

import pytest
import torch
from dense_helpers import NETWORKS, TorchvisionLike, images, jacobi_iterates, lived_in, side_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_parallel.dense.evaluation import PlainEvaluation
from lit_parallel.dense.options import DenseOptions
from lit_parallel.dense.structure import structure_of
from lit_parallel.errors import UserError

SOLVERS = ("sequential", "jacobi", "jacobi_gs", "gs_jacobi")


def evaluate(network, x, **options):
    return PlainEvaluation(structure_of(network), DenseOptions(**options))(x)


def ordinary(network, x):
    with torch.no_grad():
        return network(x)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scope", ["block", "network"])
@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=3, deadline=None)
@given(batch=st.integers(1, 6), guess=st.sampled_from(["mean", "zero"]))
def test_exact_stopping_gives_the_bits_of_the_ordinary_forward(name, scope, solver, batch, guess):
    network, x = NETWORKS[name](), images(batch, side_of(name))
    logits, record = evaluate(network, x, solver=solver, scope=scope, stop="exact", guess=guess)
    assert torch.equal(logits, ordinary(network, x))
    assert (record.solver, record.way) == (solver, "plain")
    assert 0 < sum(block.seconds for block in record.blocks) <= record.seconds
    layers = [len(block.layers) for block in structure_of(network).blocks]
    names = [f"features.denseblock{i + 1}" for i in range(len(layers))]
    assert [block.layers for block in record.blocks] == (layers if scope == "block" else [sum(layers)])
    assert [block.name for block in record.blocks] == (names if scope == "block" else ["features"])
    for block in record.blocks:
        assert block.solved.all()
        assert (block.iterations <= block.layers).all()
        assert block.iterations.shape == block.evaluations.shape == (batch,)
        if solver == "sequential":
            assert block.evaluations.tolist() == [block.layers] * batch
            assert block.residual is None
        else:
            assert block.residual.shape == (int(block.iterations.max()), batch)
        if solver == "jacobi":
            assert torch.equal(block.evaluations, block.iterations * block.layers)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_a_fixed_number_of_jacobi_iterations_is_that_of_the_definition(iterations):
    network, x = NETWORKS["own"](), images()
    logits, record = evaluate(network, x, solver="jacobi", iterations=iterations)
    structure = structure_of(network)
    with torch.no_grad():
        features = structure.stem(x)
        for index, block in enumerate(structure.blocks):
            features = structure.transition(index - 1, features) if index else features
            guess = block.mean[None, :, :, None, None].expand(3, -1, -1, *features.shape[2:])
            values = jacobi_iterates(block.layers, features, guess)[min(iterations, len(block.layers))]
            features = torch.cat([features, values.flatten(1, 2)], 1)
        assert torch.equal(logits, structure.head(features))
    assert [block.iterations.tolist() for block in record.blocks] == [
        [min(iterations, len(block.layers))] * 3 for block in structure.blocks
    ]
    assert all(block.solved is None for block in record.blocks)  # nothing was checked


@torch.no_grad()
def windows_by_hand(layers, x, guess, window, iterations):
    """GS-Jacobi with the same number of iterations for every window, by definition; all features of the block."""
    values = list(guess.unbind(1))
    for first in range(0, len(layers), window):
        for _ in range(iterations):
            old = list(values)
            for layer in range(first, min(first + window, len(layers))):
                values[layer] = layers[layer](torch.cat([x, *old[:layer]], 1))
    return torch.cat([x, *values], 1)


@pytest.mark.parametrize(("window", "iterations"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 1), (9, 2)])
def test_a_fixed_number_of_iterations_per_window_is_that_of_the_definition(window, iterations):
    network, x = NETWORKS["torchvision_like"](), images()
    logits, record = evaluate(network, x, solver="gs_jacobi", window=window, iterations=iterations)
    structure = structure_of(network)
    with torch.no_grad():
        features = structure.stem(x)
        for index, block in enumerate(structure.blocks):
            features = structure.transition(index - 1, features) if index else features
            guess = block.mean[None, :, :, None, None].expand(3, -1, -1, *features.shape[2:])
            features = windows_by_hand(block.layers, features, guess, window, iterations)
        assert torch.equal(logits, structure.head(features))
    for block in record.blocks:
        whole, rest = divmod(block.layers, min(window, block.layers))
        assert block.iterations.tolist() == [whole * iterations + min(rest, iterations)] * 3
    if window == 1:
        assert torch.equal(logits, ordinary(network, x))


@pytest.mark.parametrize("solver", SOLVERS[1:])
@pytest.mark.parametrize("scope", ["block", "network"])
def test_a_sample_does_not_depend_on_its_neighbours(solver, scope):
    network, x = lived_in(TorchvisionLike(growth=2, blocks=(12, 6))), images(4)
    x[1] *= 1e-3
    x[2] = 0
    x[3] *= 30
    differed = False
    for tolerance in (0.2, 0.05, 0.01):
        options = {"solver": solver, "scope": scope, "tolerance": tolerance}
        logits, record = evaluate(network, x, **options)
        differed |= any(len(block.iterations.unique()) > 1 for block in record.blocks)
        for i in range(4):
            alone, record_alone = evaluate(network, x[i : i + 1], **options)
            # The classifier's product rounds otherwise for another number of rows, as it does in the ordinary forward.
            assert torch.allclose(logits[i : i + 1], alone, rtol=1e-12, atol=1e-12)
            for together, single in zip(record.blocks, record_alone.blocks, strict=True):
                assert together.iterations[i] == single.iterations[0]
                assert together.evaluations[i] == single.evaluations[0]
                n = int(single.iterations)
                assert torch.equal(together.residual[:n, i], single.residual[:, 0])
                assert not together.residual[n:, i].any()
    assert differed  # or nothing was tested


def test_relative_change_stops_earlier_nearby_and_is_reported():
    network, x = NETWORKS["torchvision_like"](), images()
    exact, complete = evaluate(network, x, solver="jacobi", stop="exact")
    errors, iterations = [], []
    for tolerance in (1e-6, 0.3):
        logits, record = evaluate(network, x, solver="jacobi", tolerance=tolerance)
        errors.append(float((logits - exact).norm() / exact.norm()))
        iterations.append(sum(int(block.iterations.sum()) for block in record.blocks))
        for block in record.blocks:
            last = block.residual[block.iterations - 1, torch.arange(3)]
            assert (block.solved & ((last <= tolerance) | (block.iterations == block.layers))).all()
    assert iterations[1] < iterations[0] <= sum(int(block.iterations.sum()) for block in complete.blocks)
    assert errors[0] < 1e-5 < errors[1] < 0.3


def test_an_iteration_limit_is_reported():
    network, x = NETWORKS["own"](), images()
    _, record = evaluate(network, x, solver="jacobi", stop="exact", max_iterations=3)
    assert [block.solved.tolist() for block in record.blocks] == [[True] * 3, [False] * 3, [True] * 3]
    assert int(record.blocks[1].iterations.max()) == 3


@torch.no_grad()
def test_stable_top_k_stops_when_the_classes_of_the_iterates_are_stable():
    """Against the Jacobi iterates of the whole network, made by hand."""
    network, x = NETWORKS["own"](), images(8)
    structure = structure_of(network)
    stem = structure.stem(x)
    logits, record = evaluate(network, x, solver="jacobi", scope="network", stop="top_k", top_k=3, patience=1)

    def inputs(values):
        features = [stem]
        for index, value in enumerate(values[:-1]):
            features.append(structure.transition(index, torch.cat([features[-1], value.flatten(1, 2)], 1)))
        return features

    values = []
    for size, block in zip((8, 4, 2), structure.blocks, strict=True):
        values.append(block.mean[None, :, :, None, None].expand(8, -1, -1, size, size))
    history = []
    for _ in range(10):
        values = [
            jacobi_iterates(block.layers, features, value)[1]
            for block, features, value in zip(structure.blocks, inputs(values), values, strict=True)
        ]
        history.append(structure.head(torch.cat([inputs(values)[-1], values[-1].flatten(1, 2)], 1)))
    top = torch.stack(history).topk(3, dim=2).indices
    expected = []
    for i in range(8):
        stable = [k for k in range(1, 10) if torch.equal(top[k, i], top[k - 1, i])]
        expected.append(stable[0] + 1)
        assert torch.equal(logits[i], history[stable[0]][i])
    (block,) = record.blocks
    assert block.iterations.tolist() == expected
    assert min(expected) < 5  # so that something was tested
    assert block.solved.all()


@pytest.mark.parametrize("scope", ["block", "network"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_that_is_not_finite_affects_itself_alone(solver, scope):
    network, x = NETWORKS["torchvision_like"](), images(4)
    clean = evaluate(network, x, solver=solver, scope=scope, stop="exact")[0]
    x[2, 1, 5, 7] = torch.nan
    logits, record = evaluate(network, x, solver=solver, scope=scope, stop="exact")
    healthy = [0, 1, 3]
    assert torch.equal(logits[healthy], clean[healthy])
    assert logits[2].isnan().all()
    assert torch.equal(logits.isnan(), ordinary(network, x).isnan())
    assert record.blocks[0].solved.tolist() == [True, True, False, True]
    if scope == "network" and solver != "sequential":
        assert (record.blocks[0].iterations[2] < record.blocks[0].iterations[0]) or solver == "jacobi_gs"
    if record.blocks[0].residual is not None:
        iterations = int(record.blocks[0].iterations[2])
        assert record.blocks[0].residual[:iterations, 2].isinf().all()
        assert not record.blocks[0].residual[iterations:, 2].any()


def test_the_neighbours_of_such_an_image_are_evaluated_as_asked():
    network, x = NETWORKS["torchvision_like"](), images(3)
    clean = evaluate(network, x, solver="jacobi", tolerance=0.3)[0]
    x[1] = torch.inf
    logits = evaluate(network, x, solver="jacobi", tolerance=0.3)[0]
    assert torch.equal(logits[[0, 2]], clean[[0, 2]])
    assert not torch.isclose(logits[[0, 2]], ordinary(network, x)[[0, 2]], rtol=1e-6).any()


@pytest.mark.parametrize("scope", ["block", "network"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_features_that_overflow_are_shown_as_by_the_ordinary_forward(solver, scope):
    """In the middle of the network, where the guess, which is finite, would go on in their place."""
    network, x = NETWORKS["own"](), images(3)
    network.features.denseblock2.denselayer1.conv2.weight.data.mul_(1e280)
    options = {"solver": solver, "scope": scope, "tolerance": 0.1}
    clean = evaluate(network, x, **options)[0]
    x[1] *= 1e40
    expected = ordinary(network, x)
    assert not expected[1].isfinite().any()
    logits, record = evaluate(network, x, **options)
    assert torch.equal(logits[1].isfinite(), expected[1].isfinite())
    assert torch.equal(logits[[0, 2]], clean[[0, 2]])
    assert torch.stack([block.solved for block in record.blocks]).all(0).tolist() == [True, False, True]


@pytest.mark.parametrize("options", [{"iterations": 1}, {"stop": "exact", "max_iterations": 1}])
@pytest.mark.parametrize("solver", SOLVERS[1:])
def test_features_that_overflow_are_shown_although_it_is_too_early_to_tell(solver, options):
    network, x = NETWORKS["own"](), images(3)
    network.features.denseblock2.denselayer5.conv2.weight.data.mul_(1e280)
    clean = evaluate(network, x, solver=solver, **options)[0]
    x[1] *= 1e40
    window = {"window": 5} if solver == "gs_jacobi" else {"block_size": 1} if solver == "jacobi_gs" else {}
    logits, record = evaluate(network, x, solver=solver, **options, **window)
    assert int(record.blocks[1].iterations[1]) == 1  # equation 4 is not known to be final
    assert not logits[1].isfinite().any()
    assert logits[[0, 2]].isfinite().all()
    assert torch.equal(logits[1].isfinite(), ordinary(network, x)[1].isfinite())
    assert clean.isfinite().all()


def test_features_that_overflow_on_the_way_do_not_spoil_the_result():
    """From a far-off guess a layer is infinite at first, although its solution is finite."""
    network, x = NETWORKS["own"](), images(2)
    network.features.norm5.running_mean.fill_(1e300)  # the guess of the last block
    network.features.denseblock3.denselayer2.norm1.weight.data.fill_(1e30)
    logits, record = evaluate(network, x, solver="jacobi", stop="exact")
    assert record.blocks[2].residual.isinf().any()
    assert torch.equal(logits, ordinary(network, x))


@pytest.mark.parametrize("solver", SOLVERS)
def test_other_precisions(solver):
    network, x = NETWORKS["torchvision_like"](), images()
    expected = ordinary(network, x)
    single = copy.deepcopy(network).float()
    logits, _ = evaluate(single, x.float(), solver=solver, stop="exact")
    assert torch.equal(logits, ordinary(single, x.float()))
    half = copy.deepcopy(network).bfloat16()
    logits, record = evaluate(half, x.bfloat16(), solver=solver, stop="exact")
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, ordinary(half, x.bfloat16()))
    assert float((logits.double() - expected).norm() / expected.norm()) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        logits, record = evaluate(single, x.float(), solver=solver, stop="exact")
        assert torch.equal(logits, ordinary(single, x.float()))
    assert all(block.solved.all() for block in record.blocks)


def test_channels_last_and_inference_mode():
    network = NETWORKS["own"]().to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    formats = []
    for block in structure_of(network).blocks:
        for layer in block.layers:
            layer.register_forward_hook(lambda _, inputs, new: formats.append((inputs[0].stride(1), new.stride(1))))
    with torch.inference_mode():
        logits, _ = evaluate(network, x, solver="gs_jacobi", stop="exact")
    assert set(formats) == {(1, 1)}  # as in the ordinary forward
    assert torch.equal(logits, ordinary(network, x))


def test_auto_is_sequential_here_and_a_network_may_have_a_drop_rate():
    network, x = lived_in(TorchvisionLike(drop_rate=0.5)), images()
    logits, record = evaluate(network, x)
    assert record.solver == "sequential"
    assert torch.equal(logits, ordinary(network, x))
    assert not logits.requires_grad


def test_a_network_in_training_mode_is_refused():
    network = NETWORKS["own"]().train()
    with pytest.raises(UserError, match=r"call eval\(\)"):
        evaluate(network, images())
    with pytest.raises(UserError, match="block_size belongs to"):
        evaluate(network, images(), block_size=3)
