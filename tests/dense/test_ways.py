"""Ways to evaluate, by themselves; what is made of them by measurement is tested with the choice."""

import copy

import pytest
import torch
from dense_helpers import NETWORKS, images

from lit_parallel.dense import ways
from lit_parallel.dense.evaluation import PlainEvaluation
from lit_parallel.dense.fused import BlockPlan, FusedWeights, Plan
from lit_parallel.dense.options import DenseOptions
from lit_parallel.dense.structure import structure_of
from lit_parallel.dense.ways import Fused, Ordinary, Padded, Plain, first_plan, kernels_run_on, runs_fused
from lit_parallel.errors import UserError


@pytest.fixture
def structure():
    """Blocks of four and three layers."""
    return structure_of(NETWORKS["small_images"]())


@pytest.fixture
def fused(structure):
    """Makes the kernels' way of a plan."""

    def make(plan, solver="gs_jacobi", **chosen):
        weights = FusedWeights(structure, torch.float64)
        return Fused(structure, solver, plan, images(2, side=8), DenseOptions(**chosen), weights)

    return make


def sizes(plan):
    return [(block.window, block.iterations) for block in plan.blocks]


def test_what_kernels_are_for():
    assert not kernels_run_on(torch.device("cpu"))
    assert all(runs_fused(DenseOptions(solver=solver)) for solver in ("sequential", "jacobi", "gs_jacobi"))
    assert not runs_fused(DenseOptions(solver="jacobi_gs"))
    assert not runs_fused(DenseOptions(solver="jacobi", scope="network"))
    assert not runs_fused(DenseOptions(solver="jacobi", stop="exact"))


def test_the_plan_to_begin_with(structure):
    assert first_plan(structure, DenseOptions(solver="sequential")) == Plan.sequential(structure)
    assert first_plan(structure, DenseOptions(solver="jacobi")) == Plan.jacobi(structure, 2)
    assert first_plan(structure, DenseOptions(solver="gs_jacobi")) == Plan.gs_jacobi(structure, 8, 2)
    options = DenseOptions(solver="gs_jacobi", window=3, iterations=1)
    assert first_plan(structure, options) == Plan.gs_jacobi(structure, 3, 1)


def test_the_plan_to_begin_with_keeps_the_limit(structure):
    assert first_plan(structure, DenseOptions(solver="jacobi", max_iterations=1)) == Plan.jacobi(structure, 1)
    options = DenseOptions(solver="gs_jacobi", window=2, max_iterations=3)
    assert sizes(first_plan(structure, options)) == [(2, 1), (2, 2)]  # four layers, and three
    options.max_iterations = 1
    with pytest.raises(UserError, match="max_iterations=1 are fewer than there are windows of 2 layers"):
        first_plan(structure, options)


def test_what_they_are_called(structure, fused):
    assert str(Ordinary(lambda x: x)) == "the ordinary forward"
    assert str(Plain(structure, DenseOptions(solver="jacobi"))) == "plain jacobi"
    assert str(fused(Plan.sequential(structure), "sequential")) == "fused sequential"
    assert str(fused(Plan.jacobi(structure, 2), "jacobi")) == "fused jacobi, 2 + 2 iterations"
    windows = "fused gs_jacobi, windows of"
    assert str(fused(Plan.gs_jacobi(structure, 2, 1))) == f"{windows} 2 layers, 1 + 1 iterations"
    plan = Plan((BlockPlan(3, 2), Plan.sequential(structure).blocks[1]))
    assert str(fused(plan)) == f"{windows} 3 + 1 layers, 2 + 3 iterations"


def test_a_plan_grows_where_it_is_wanted_as_far_as_it_may(structure, fused):
    way = fused(Plan((BlockPlan(4, 2), BlockPlan(2, 2))))
    grown = way.with_more([True, True])
    assert sizes(grown) == [(4, 3), (2, 2)]  # two iterations of a window of two are exact
    assert way.with_more([False, True]) is None
    assert fused(way.plan, max_iterations=2).with_more([True, True]) is None
    relative = torch.tensor([[1e-4, 2e-3], [0.0, 0.0]])
    assert way.grown(relative, images(2, side=8)) == grown
    assert way.grown(relative / 3, images(2, side=8)) is None
    assert way.grown(None, images(2, side=8)) is None


@pytest.mark.parametrize("is_chosen", [True, False])
def test_another_way_is_taken_where_a_larger_plan_has_no_memory(structure, fused, is_chosen, monkeypatch, caplog):
    way, x = fused(Plan.jacobi(structure, 2), tolerance=1e-9), images(2, side=8)
    if is_chosen:
        way.instead = Ordinary(structure.network), 1.0

    def adopt(self, plan, images):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nMuch more is said.")

    monkeypatch.setattr(Fused, "adopt", adopt)
    for _ in range(2):
        logits, record = way(x)
        assert record.way == ("ordinary" if is_chosen else "plain")
        assert torch.allclose(logits, structure.ordinary(x), rtol=1e-6)
    taken = "the ordinary forward" if is_chosen else "plain auto"
    assert caplog.messages == [f"The kernels lack memory (CUDA out of memory): {taken} is taken instead."]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_padding_leaves_no_trace(structure, batch):
    x = images(batch, side=8)
    options = DenseOptions(solver="jacobi", tolerance=1e-4)
    logits, record = Padded(Plain(structure, options), 3)(x)
    expected, alone = PlainEvaluation(structure, options)(x)
    assert torch.allclose(logits, expected, rtol=1e-12)
    for found, other in zip(record.blocks, alone.blocks, strict=True):
        assert torch.equal(found.iterations, other.iterations)
        assert torch.equal(found.evaluations, other.evaluations)
        assert torch.equal(found.solved, other.solved)
        assert found.residual.shape[1] == batch


def test_new_weights_are_taken_over(structure, fused):
    way, x = fused(Plan.sequential(structure), "sequential"), images(2, side=8)
    with torch.no_grad():
        before = way(x)[0]
        structure.network.classifier.weight *= 2
        assert torch.equal(way(x)[0], before)
        way._weights.refresh()
        way.refresh()
        assert torch.allclose(way(x)[0], copy.deepcopy(structure.network)(x), rtol=1e-10)


@pytest.mark.parametrize(("first", "rest", "calls", "median"), [(0.1, [3, 1, 4, 1, 5], 6, 3), (0.3, [3], 1, 0.3)])
def test_the_first_time_does_not_count_unless_it_is_long(monkeypatch, first, rest, calls, median):
    times, called = iter([first, *rest]), []
    monkeypatch.setattr(ways, "seconds_of", lambda work, device: work() or next(times))
    assert ways.median_seconds(called.append, images(1, side=8)) == median
    assert len(called) == calls
