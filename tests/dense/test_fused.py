"""Evaluation by windows and iterations: the plain functions on a CPU, the kernels and the graph on a GPU."""

import contextlib
import copy

import pytest
import torch
from dense_helpers import NETWORKS, images, jacobi_iterates, lived_in, side_of
from torch import nn

pytest.importorskip("triton")

from lit_parallel.dense import fused
from lit_parallel.dense.fused import BlockPlan, FusedEvaluation, FusedWeights, Plan
from lit_parallel.dense.structure import structure_of
from lit_parallel.errors import UserError
from lit_parallel.kernels import dense_block
from lit_parallel.networks.densenet import DenseNet


def plan_of(structure, window, iterations=None):
    return Plan(tuple(BlockPlan(window, iterations) for _ in structure.blocks))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("window", "iterations"), [(9, None), (2, None), (1, None), (1, 1), (2, 2), (3, 4), (9, 9)])
def test_exact_plans_are_the_ordinary_forward(name, window, iterations):
    network = NETWORKS[name]()
    structure, x = structure_of(network), images(side=side_of(name) + 1)
    evaluation = FusedEvaluation(structure, plan_of(structure, window, iterations), torch.zeros_like(x))
    logits, residuals = evaluation.run(x)
    with torch.no_grad():
        torch.testing.assert_close(logits, network(x), rtol=1e-11, atol=1e-11)
    assert (residuals.relative == 0).all()
    with torch.no_grad():  # again, with other images; what the first run gave stays
        kept = logits.clone()
        torch.testing.assert_close(evaluation.run(2 * x)[0], network(2 * x), rtol=1e-11, atol=1e-11)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("guess", ["mean", "zero"])
@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_iterates_and_residuals_are_those_of_jacobi_iteration(guess, window, iterations):
    structure, x = structure_of(lived_in(DenseNet(4, (5,), 6, bn_size=2, num_classes=9))), images()
    evaluation = FusedEvaluation(structure, plan_of(structure, window, iterations), x, guess=guess)
    logits, residuals = evaluation.run(x)
    block, expected_residual = structure.blocks[0], x.new_zeros(len(x))
    with torch.no_grad():
        features = structure.stem(x)
        for first in range(0, 5, window):
            layers = block.layers[first : first + window]
            means = block.mean[first : first + window, :, None, None]
            start = (means if guess == "mean" else torch.zeros_like(means)).expand(len(x), -1, -1, *features.shape[2:])
            iterates = jacobi_iterates(layers, features, start)
            old, new = iterates[min(iterations, len(layers)) - 1 :][:2]
            features = torch.cat([features, new.flatten(1, 2)], 1)
            if iterations < len(layers):
                relative = (new - old).abs().amax(dim=(2, 3, 4)) / new.abs().amax(dim=(2, 3, 4))
                relative = relative if iterations > 1 else torch.full_like(relative, torch.inf)
                expected_residual = torch.maximum(expected_residual, relative.amax(dim=1))
        expected = structure.head(features)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(residuals.relative[0].double(), expected_residual, rtol=1e-5, atol=1e-6)


def test_plans_say_what_they_take():
    assert BlockPlan(4, 2).iterations_of(10) == 6
    assert BlockPlan(4, 2).evaluations_of(10) == (4 + 3) * 2 + 2 + 1
    assert (BlockPlan(10, 3).iterations_of(10), BlockPlan(10, 3).evaluations_of(10)) == (3, 10 + 9 + 8)
    assert (BlockPlan(4).iterations_of(10), BlockPlan(4).evaluations_of(10)) == (10, 10)
    structure = structure_of(NETWORKS["own"]())
    assert Plan.gs_jacobi(structure, 4, 2).blocks == (BlockPlan(3, 2), BlockPlan(4, 2), BlockPlan(2, 2))
    assert Plan.jacobi(structure, (1, 2, 3)).blocks == (BlockPlan(3, 1), BlockPlan(5, 2), BlockPlan(2, 3))
    assert [len(window) for window in BlockPlan(100).windows(48, 10**6)] == [1] * 48


@pytest.mark.parametrize("iterations", [None, 2])
def test_refresh_takes_changed_weights(iterations):
    network = NETWORKS["torchvision_like"]()
    structure, x = structure_of(network), images()
    evaluation = FusedEvaluation(structure, plan_of(structure, 3, iterations), x)
    before, _ = evaluation.run(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(0.1)
    assert torch.equal(evaluation.run(x)[0], before)
    evaluation.refresh()
    expected, _ = FusedEvaluation(structure, evaluation.plan, x).run(x)
    assert torch.equal(evaluation.run(x)[0], expected)
    assert not torch.equal(before, expected)


@torch.no_grad()
def test_refresh_knows_nothing_of_autocast():
    network = NETWORKS["own"]().float()
    structure, x = structure_of(network), images().float()
    plan = plan_of(structure, 3, 2)
    evaluation = FusedEvaluation(structure, plan, x)
    network.features.denseblock2.denselayer2.norm1.running_mean.add_(0.3)
    with torch.autocast("cpu", torch.bfloat16):
        evaluation.refresh()
    assert torch.equal(evaluation.run(x)[0], FusedEvaluation(structure, plan, x).run(x)[0])


def test_refresh_keeps_the_product():
    weights = FusedWeights(structure_of(NETWORKS["own"]().float()), torch.float32, "tf32")
    weights.refresh()
    for tensor in (weights.head.weight, weights.transitions[0].weight, *(b.bottleneck for b in weights.blocks)):
        assert (tensor.view(torch.int32) & 0x1FFF == 0).all()
    assert {weights.head.product, weights.transitions[0].product, weights.blocks[0].product} == {"tf32"}


def test_residuals_are_those_of_the_last_batch():
    structure, x = structure_of(NETWORKS["own"]()), images()
    evaluation = FusedEvaluation(structure, plan_of(structure, 3, 2), x)
    expected = evaluation.run(x)[1].relative.clone()
    assert not torch.equal(evaluation.run(5 * x)[1].relative, expected)
    assert torch.equal(evaluation.run(x)[1].relative, expected)


def test_kernels_are_launched_on_the_device_of_the_images(monkeypatch):
    current, found = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    evaluate = FusedEvaluation._evaluate
    offsets = FusedWeights.offsets
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(FusedEvaluation, "_evaluate", lambda self: found.append([*current]) or evaluate(self))
    monkeypatch.setattr(FusedWeights, "offsets", lambda *given: found.append([*current]) or offsets(*given))
    structure, x = structure_of(NETWORKS["own"]()), images()
    evaluation = FusedEvaluation(structure, Plan.jacobi(structure, 2), x)
    evaluation.run(x)
    evaluation.refresh()
    assert len(found) == 3 + 1 + 1 + 3
    assert all(devices == [x.device] for devices in found)


def test_an_image_that_is_not_finite_spoils_only_itself():
    structure, x = structure_of(NETWORKS["own"]()), images()
    evaluation = FusedEvaluation(structure, plan_of(structure, 3, 2), x)
    expected, residuals = evaluation.run(x)
    relative = residuals.relative.clone()
    x[1, :, 3, 3] = float("nan")
    logits, residuals = evaluation.run(x)
    assert logits[1].isnan().all()
    assert residuals.relative[:2, 1].isinf().all()  # the third block is exact
    assert torch.equal(logits[[0, 2]], expected[[0, 2]])
    assert torch.equal(residuals.relative[:, [0, 2]], relative[:, [0, 2]])


def test_weights_are_shared_and_typed_as_autocast_says():
    network = NETWORKS["small_images"]().float()
    structure, x = structure_of(network), images(side=8).float()
    weights = FusedWeights(structure, torch.float32)
    one = FusedEvaluation(structure, Plan.sequential(structure), x, weights=weights)
    assert one.weights is weights
    with torch.no_grad():
        expected = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = FusedEvaluation(structure, Plan.sequential(structure), x)
        logits, _ = mixed.run(x)
        assert logits.dtype == torch.bfloat16
    assert one.run(x)[0].dtype == torch.float32
    torch.testing.assert_close(one.run(x)[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.05)


def test_what_does_not_fit_is_told():
    structure, x = structure_of(NETWORKS["own"]()), images()
    with pytest.raises(UserError, match="at least 1"):
        BlockPlan(0, 2)
    with pytest.raises(UserError, match="at least 1"):
        BlockPlan(2, 0)
    with pytest.raises(UserError, match="2 blocks, the network 3"):
        FusedEvaluation(structure, Plan((BlockPlan(1), BlockPlan(1))), x)
    with pytest.raises(UserError, match=r"shape \[3, 3, 32, 32\], not \[2, 3, 32, 32\]"):
        FusedEvaluation(structure, Plan.sequential(structure), x).run(x[:2])
    structure.network.features.transition1.pool = nn.AvgPool2d(3)
    with pytest.raises(UserError, match="set fused=false"):
        FusedEvaluation(structure, Plan.sequential(structure), x)
    structure = structure_of(NETWORKS["own"]())
    structure.network.classifier = nn.Sequential(structure.network.classifier)
    with pytest.raises(UserError, match="linear classifier: set fused=false"):
        FusedEvaluation(structure, Plan.sequential(structure), x)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("pool0", nn.MaxPool2d(2)),
        ("pool0", nn.AvgPool2d(3, 2, 1)),
        ("norm0", nn.GroupNorm(2, 6).double()),
        ("norm0", nn.BatchNorm2d(6, track_running_stats=False).double()),
        ("relu0", nn.LeakyReLU(0.3)),
        ("conv0", nn.Conv2d(3, 6, 7, 2, 3, bias=False, padding_mode="reflect").double()),
    ],
)
def test_a_stem_of_another_kind_is_called_as_it_is(name, part):
    network = NETWORKS["torchvision_like"]()
    setattr(network.features, name, part.eval())
    structure, x = structure_of(network), images()
    with torch.no_grad():
        expected = network(x)
    torch.testing.assert_close(FusedEvaluation(structure, Plan.sequential(structure), x).run(x)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["norm0", "denseblock1.denselayer2.norm1", "transition1.norm", "norm5"])
def test_norms_without_weights(name):
    network = NETWORKS["torchvision_like"]()
    norm = nn.BatchNorm2d(network.features.get_submodule(name).num_features, affine=False).double().eval()
    norm.running_mean.normal_()
    network.features.set_submodule(name, norm)
    structure, x = structure_of(network), images()
    logits, _ = FusedEvaluation(structure, Plan.sequential(structure), x).run(x)
    torch.testing.assert_close(logits, network(x), rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def _all_digits(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)

    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize(("window", "iterations"), [(9, None), (1, None), (3, 9)])
    def test_the_graph_is_the_ordinary_forward(self, name, window, iterations):
        network = NETWORKS[name]().float().cuda()
        structure, x = structure_of(network), images(side=side_of(name) + 1).float().cuda()
        evaluation = FusedEvaluation(structure, plan_of(structure, window, iterations), torch.zeros_like(x))
        logits = [evaluation.run(factor * x)[0] for factor in (1, 2, 1)]
        with torch.no_grad():
            torch.testing.assert_close(logits[0], network(x), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(logits[1], network(2 * x), rtol=1e-3, atol=1e-4)
        assert torch.equal(logits[0], logits[2])

    def test_iterates_are_those_of_the_plain_functions(self, monkeypatch):
        network = lived_in(DenseNet(32, (6, 12), 64, num_classes=9), side=64).float().cuda()
        structure, x = structure_of(network), images(side=64).float().cuda()
        for plan in (Plan.jacobi(structure, 2), Plan.gs_jacobi(structure, 4, 2), Plan.gs_jacobi(structure, 8, 3)):
            with monkeypatch.context() as plainly:
                plainly.setattr(FusedEvaluation, "_capture", lambda self: None)
                for name in ("collect", "grow", "transition", "mean", "pool"):
                    plainly.setattr(fused, name, getattr(dense_block, f"{name}_plainly"))
                expected, expected_residuals = FusedEvaluation(structure, plan, x).run(x)
            logits, residuals = FusedEvaluation(structure, plan, x).run(x)
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(residuals.relative, expected_residuals.relative, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize(("kind", "times"), [("bfloat16", 2), ("tf32", 2), ("float32", 8)])  # measured: 5.3
    def test_hardly_farther_from_float64_than_the_ordinary_forward(self, kind, times, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", kind == "tf32")
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        network = lived_in(DenseNet(32, (6, 12, 12), 64, num_classes=100), side=64).cuda().to(dtype)
        x = images(8, side=64).cuda().to(dtype)
        with torch.no_grad():
            ordinary = network(x)
            exact = copy.deepcopy(network).double()(x.double())
        structure = structure_of(network)
        logits, _ = FusedEvaluation(structure, Plan.sequential(structure), x).run(x)
        assert logits.dtype == dtype
        assert (logits - exact).norm() <= times * (ordinary - exact).norm()

    def test_refresh_reaches_the_graph(self):
        network = NETWORKS["own"]().float().cuda()
        structure, x = structure_of(network), images().float().cuda()
        evaluation = FusedEvaluation(structure, Plan.sequential(structure), x)
        network.features.denseblock2.denselayer2.norm1.running_mean.add_(0.3)
        network.features.conv0.weight.data.mul_(1.2)
        evaluation.refresh()
        with torch.no_grad():
            torch.testing.assert_close(evaluation.run(x)[0], network(x), rtol=1e-3, atol=1e-4)

    def test_autocast_and_inference_mode(self):
        network = NETWORKS["small_images"]().float().cuda()
        structure, x = structure_of(network), images(side=8).float().cuda()
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            expected = network(x)
            logits, _ = FusedEvaluation(structure, Plan.sequential(structure), x).run(x)
        assert logits.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), expected.float(), rtol=0.1, atol=0.05)
