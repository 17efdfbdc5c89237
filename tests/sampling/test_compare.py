"""Solvers side by side, and their iterates one by one."""

import itertools
import math

import pytest
import torch
from small_models import categorical
from torch import nn

from lit_parallel.errors import UserError
from lit_parallel.sampling import compare as module
from lit_parallel.sampling.autoregressive import Given
from lit_parallel.sampling.compare import compare, trace
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.sampling.sampler import Sampler, What
from lit_parallel.solution import Status
from lit_parallel.solvers import SolverOptions

SHAPE = (3, 2, 4)
LENGTH = 24


@pytest.fixture
def model():
    return categorical(SHAPE, 6)


@pytest.fixture
def runs(monkeypatch):
    """The solvers in the order in which they ran."""
    names = []
    run = Sampler.batch

    def counted(self, indices, observer=None):
        names.append(self.name)
        return run(self, indices, observer)

    monkeypatch.setattr(Sampler, "batch", counted)
    return names


def measure(model, solvers, baselines=("sequential",), repeats=3, what=What(seed=2)):  # noqa: B008
    return compare(model, solvers, baselines, batch_size=3, what=what, indices=[0, 1, 2], repeats=repeats)


def test_every_solver_is_measured_in_turn_and_equals_sequential(model, runs):
    jacobi, windowed, sequential = measure(model, ["jacobi", SolverOptions(window=5)])
    assert runs == ["jacobi", "gs_jacobi", "sequential"] * 4
    assert [m.solver for m in (jacobi, windowed, sequential)] == ["jacobi", "gs_jacobi", "sequential"]
    for measurement in (jacobi, windowed, sequential):
        assert measurement.equal
        assert measurement.repeatable
        assert measurement.largest_difference == 0
        assert len(measurement.seconds) == 3
        assert measurement.median_seconds == sorted(measurement.seconds)[1]
        expected = sequential.median_seconds / measurement.median_seconds
        assert measurement.speedup == {"sequential": pytest.approx(expected)}
    assert sequential.pixel_map is None
    assert jacobi.pixel_map.shape == (3, 2, 4)
    by_channel = jacobi.solution.final_iteration.reshape(3, 2, 4, 3)
    assert torch.equal(jacobi.pixel_map, by_channel.amax(dim=-1))
    assert jacobi.row()["solved"] == 3
    assert jacobi.row()["bitwise_equal_to_sequential"] is True


def test_the_map_of_pixels_is_0_where_they_are_given_and_where_the_guess_was_right():
    given = Given(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8), torch.eye(4, dtype=torch.bool))
    jacobi, _ = measure(categorical((1, 4, 4), 2), ["jacobi"], what=What(2, given=given))
    mask = given.mask.expand(3, -1, -1)
    assert (jacobi.solution.final_iteration.reshape(3, 4, 4)[~mask] == 0).any()
    assert (jacobi.pixel_map[mask] == 0).all()
    assert torch.equal(jacobi.pixel_map, jacobi.solution.final_iteration.reshape(3, 4, 4))
    assert jacobi.solution.given
    assert all(speedup != speedup for speedup in jacobi.speedup.values())  # given equations cost nothing
    assert jacobi.row()["iteration_speedup"] != jacobi.row()["iteration_speedup"]


@pytest.mark.parametrize(("constant", "times"), [("_SLOW_SECONDS", 1), ("_ENOUGH_SECONDS", 2)])
def test_slow_solvers_are_not_repeated(model, runs, monkeypatch, constant, times):
    monkeypatch.setattr(module, constant, -1.0 if constant == "_SLOW_SECONDS" else 0.0)
    measurements = measure(model, ["jacobi"])
    # Slow: the first run counts and is the only one. Enough: after the first, untimed, one that counts.
    assert runs == ["jacobi", "sequential"] * times
    assert all(len(measurement.seconds) == 1 for measurement in measurements)
    assert all(measurement.repeatable for measurement in measurements)


def test_one_slow_solver_does_not_cost_the_others_their_repeats(model, runs, monkeypatch):
    run = Sampler.batch

    def slow(self, indices, observer=None):
        images, solution = run(self, indices, observer)
        solution.seconds = 11.0 if self.name == "sequential" else 0.5
        return images, solution

    monkeypatch.setattr(Sampler, "batch", slow)
    jacobi, sequential = measure(model, ["jacobi"])
    assert (jacobi.seconds, sequential.seconds) == ([0.5] * 3, [11.0])
    assert jacobi.speedup == {"sequential": 22.0}
    assert runs.count("sequential") == 1


class Restless(nn.Module):
    """Another function after every so many calls."""

    def __init__(self, network, calls: int) -> None:
        super().__init__()
        self.network, self.calls, self.done = network, calls, 0

    def forward(self, x):
        shift = self.done // self.calls
        self.done += 1
        return self.network(x).roll(shift, dims=-1)


def test_runs_that_differ_are_not_called_repeatable(model):
    model.network = Restless(model.network, calls=LENGTH)
    (measurement,) = measure(model, [], ["sequential"])
    assert not measurement.repeatable
    assert measurement.row()["repeatable"] is False


def test_what_was_not_solved_has_no_speedup_and_is_not_compared(model):
    limited, sequential = measure(model, [SolverOptions(name="jacobi", max_iterations=2)], repeats=1)
    assert limited.solution.status == [Status.ITERATION_LIMIT] * 3
    assert limited.equal is None  # nothing was found that could be equal
    assert limited.largest_difference >= 1
    assert math.isnan(limited.speedup["sequential"])
    assert sequential.speedup == {"sequential": 1.0}
    assert limited.row()["solved"] == 0


def test_without_the_sequential_baseline_nothing_is_compared(model):
    (measurement,) = measure(model, ["jacobi"], baselines=())
    assert measurement.equal is None
    assert measurement.largest_difference is None
    assert measurement.speedup == {}


def test_a_model_without_caches_has_no_cached_sequential_sampling(model):
    with pytest.raises(UserError) as error:
        measure(model, ["jacobi"], ["cached_sequential"])
    assert str(error.value) == (
        "ConditionalModule has no evaluation from caches: name another solver than cached_sequential, and leave it out "
        "of compare.baselines."
    )


# -- traces --------------------------------------------------------------------------------------------------------

GIVEN = Given(
    torch.randint(0, 6, (2, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) * 51,
    torch.arange(8).reshape(2, 4) % 3 == 1,
)


def observed(model, solver, what, indices, exact):
    """The same quantities from the loop's own iterates."""
    sampler = Sampler(model, solver, 3, what)
    iterates = []
    sampler.batch(indices, observer=lambda k, x: iterates.append(x[: len(indices)]))
    error = torch.tensor([(x - exact).abs().mean() for x in iterates])
    change = torch.tensor([(b - a).abs().mean() for a, b in itertools.pairwise(iterates)])
    return error, change, [model.images(sampler.system, x[:2]) for x in iterates]


@pytest.mark.parametrize("given", [None, GIVEN])
@pytest.mark.parametrize("indices", [[0, 1, 2], [5, 3]])
@pytest.mark.parametrize("solver", ["sequential", "jacobi", SolverOptions(name="jacobi_gs", block_size=5)])
def test_a_trace_is_what_an_observer_of_a_real_run_sees(model, runs, solver, indices, given):
    what = What(1, SamplingOptions("inverse_cdf"), given)
    exact = Sampler(model, "gs_jacobi", 3, what).batch(indices)[1].value
    runs.clear()
    found = trace(model, solver, batch_size=3, what=what, indices=indices, exact=exact, shown=2)
    assert len(runs) == (solver != "sequential")  # whose iterates are known without running it
    error, change, frames = observed(model, solver, what, indices, exact)
    torch.testing.assert_close(found.error, error)
    torch.testing.assert_close(found.change, change)
    assert torch.equal(found.frames, torch.stack(frames))
    assert found.frames.dtype == torch.uint8
    assert found.error[-1] == 0
    assert found.error[0] > 0
    assert len(found.error) == len(found.frames) == len(found.change) + 1
    if solver == "sequential":
        assert len(found.change) == LENGTH


def test_the_trace_of_a_solver_that_was_stopped_stops(model):
    what = What(1)
    exact = Sampler(model, "jacobi", 3, what).batch([0, 1, 2])[1].value
    for name in ("sequential", "jacobi"):
        options = SolverOptions(name=name, max_iterations=3)
        found = trace(model, options, batch_size=3, what=what, indices=[0, 1, 2], exact=exact)
        assert found.solver == name
        assert len(found.frames) == 4
        assert found.frames.shape[1:] == (3, *SHAPE)
