"""Sampling a MADE: folded weights, plain and incremental systems against a loop over the module's own forward."""

import pytest
import scipy.stats
import torch

from lit_parallel.networks import MADE
from lit_parallel.sampling.made import FoldedMADE, IncrementalMadeSystem, MadeSystem
from lit_parallel.sampling.noise import logistic_noise
from lit_parallel.solvers import GSJacobi, Jacobi, JacobiGS, Sequential, SolverLoop, solve

LENGTH = 20
BOUND = 6.0
# Fewer and more units than positions, layers that widen and narrow.
HIDDEN = ([7], [24], [24, 24], [5, 31], [31, 5], [24, 9, 40])
every_shape = pytest.mark.parametrize("hidden", HIDDEN, ids=str)
every_order = pytest.mark.parametrize("order", ["natural", "random"])
both_degrees = pytest.mark.parametrize("degrees", ["spaced", "random"])


def strong_made(hidden, length=LENGTH, seed=0, **options) -> MADE:
    """A random MADE in float64 whose pixels depend on one another so strongly that iterating takes a while."""
    made = MADE(length, hidden, seed=seed, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (*made.hidden, made.output):
            fan_in = layer.mask.sum(dim=1, keepdim=True).clamp(min=1)
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / fan_in).sqrt())
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.3)
        made.output.weight[length:] *= 0.3  # moderate log-scales, or all values would be truncated
    return made


def noise_of(batch: int, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return logistic_noise(seed, range(batch), length)


def by_hand(made: MADE, noise: torch.Tensor, bound: float = BOUND) -> torch.Tensor:
    """Sequential sampling, one pixel after the other, ``[batch, pixel]``; noise in order of generation."""
    pixels = torch.zeros_like(noise)
    with torch.no_grad():
        for t, p in enumerate(made.rank[made.mask_index].argsort().tolist()):
            mean, log_scale = made(pixels)
            pixels[:, p] = (mean[:, p] + log_scale[:, p].exp() * noise[:, t]).clamp(-bound, bound)
    return pixels


def in_pixel_order(system, value: torch.Tensor) -> torch.Tensor:
    pixels = torch.empty_like(value)
    pixels[:, system.network.pixel] = value
    return pixels


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# -- folding -------------------------------------------------------------------------------------------------------


@every_shape
@every_order
@both_degrees
def test_folded_weights_compute_the_modules_outputs(hidden, order, degrees):
    made = strong_made(hidden, order=order, degrees=degrees, num_masks=2)
    pixels = torch.randn(3, LENGTH, dtype=torch.float64)
    for index in (0, 1):
        made.use_mask(index)
        folded = FoldedMADE.from_module(made)
        generated = made.rank[index].argsort()
        assert torch.equal(folded.pixel, generated)
        mean, log_scale = folded(pixels[:, generated]).unbind(-1)
        expected_mean, expected_log_scale = made(pixels)
        assert_close(mean, expected_mean[:, generated])
        assert_close(log_scale, expected_log_scale[:, generated])


def test_folded_weights_are_staircases():
    folded = FoldedMADE.from_module(strong_made([24, 9], order="random", degrees="random"))
    below = torch.arange(LENGTH)
    for weight, degree in zip(folded.weights, folded.degrees, strict=True):
        assert torch.equal(degree, degree.sort().values)
        assert (weight[degree[:, None] < below[None, :]] == 0).all()
        below = degree
    per_equation = folded.output_weight.unflatten(0, (LENGTH, 2))
    assert (per_equation.transpose(1, 2)[torch.arange(LENGTH)[:, None] <= below[None, :]] == 0).all()


def test_folding_takes_a_snapshot_in_the_dtype_asked_for():
    made = strong_made([24])
    folded = FoldedMADE.from_module(made, dtype=torch.float32)
    tensors = (*folded.weights, *folded.biases, folded.output_weight, folded.output_bias)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in tensors)
    before = folded(torch.zeros(1, LENGTH))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert torch.equal(folded(torch.zeros(1, LENGTH)), before)
    unchanged = FoldedMADE.from_module(made)
    made.output.bias.data.fill_(1.0)
    assert (unchanged.output_bias == 0).all()


# -- solving -------------------------------------------------------------------------------------------------------


@every_shape
@every_order
@both_degrees
@pytest.mark.parametrize("kind", [MadeSystem, IncrementalMadeSystem])
def test_sequential_sampling_is_a_loop_over_the_modules_forward(hidden, order, degrees, kind):
    made = strong_made(hidden, order=order, degrees=degrees)
    noise = noise_of(3)
    system = kind(FoldedMADE.from_module(made), noise, BOUND)
    solution = solve(system, Sequential())
    assert_close(in_pixel_order(system, solution.value), by_hand(made, noise))
    assert solution.work.tolist() == [1.0] * 3
    assert solution.all_solved


@every_shape
@both_degrees
@pytest.mark.parametrize("window", [1, 2, 3, 7, LENGTH - 1, LENGTH, LENGTH + 13])
def test_windows_of_every_width_reach_the_sequential_result(hidden, degrees, window):
    made = strong_made(hidden, order="random", degrees=degrees)
    noise = noise_of(4)
    system = IncrementalMadeSystem(FoldedMADE.from_module(made), noise, BOUND)
    solution = solve(system, GSJacobi(window))
    assert_close(in_pixel_order(system, solution.value), by_hand(made, noise))
    assert solution.all_solved
    assert (solution.iterations <= LENGTH).all()
    certified = solve(system, GSJacobi(window), certify=True)
    assert certified.certified.all()
    assert torch.equal(certified.value, solve(system.reference(), Sequential()).value)


@pytest.mark.parametrize("solver", [Jacobi(), JacobiGS(), JacobiGS(6), GSJacobi(), GSJacobi(5)], ids=lambda s: s.name)
@pytest.mark.parametrize("kind", [MadeSystem, IncrementalMadeSystem])
def test_every_other_schedule_reaches_the_sequential_result(solver, kind):
    made = strong_made([24, 24])
    noise = noise_of(4)
    solution = solve(kind(FoldedMADE.from_module(made), noise, BOUND), solver)
    assert_close(solution.value, by_hand(made, noise))
    assert (solution.iterations <= LENGTH).all()


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_shortest_images(length, window):
    made = strong_made([8, 8], length)
    noise = noise_of(3, length)
    system = IncrementalMadeSystem(FoldedMADE.from_module(made), noise, BOUND)
    for solver in (GSJacobi(window), Sequential()):
        assert_close(solve(system, solver).value, by_hand(made, noise))


def test_these_problems_are_not_too_easy():
    system = MadeSystem(FoldedMADE.from_module(strong_made([24, 24])), noise_of(4), BOUND)
    solution = solve(system, Jacobi())
    assert solution.iterations.min() >= 8
    truncated = (solution.value.abs() == BOUND).double().mean()
    assert 0 < truncated < 0.5


def test_values_are_truncated_at_the_bound_and_the_truncated_value_is_what_later_pixels_see():
    made = strong_made([24, 24])
    noise = noise_of(4)
    system = IncrementalMadeSystem(FoldedMADE.from_module(made), noise, 0.8)
    value = solve(system, GSJacobi(6)).value
    assert value.abs().max() == 0.8
    assert_close(value, by_hand(made, noise, bound=0.8))


# -- caches --------------------------------------------------------------------------------------------------------


def activations(made: MADE, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Hidden activations of the module, units in order of their degree."""
    result, x = [], pixels
    with torch.no_grad():
        for layer, degree in zip(made.hidden, made.split_degrees(), strict=True):
            x = layer(x).relu()
            result.append(x[:, degree.argsort(stable=True)])
    return result


@both_degrees
@pytest.mark.parametrize("solver", [Sequential(), GSJacobi(1), GSJacobi(6), GSJacobi(7)], ids=lambda s: str(vars(s)))
def test_in_the_end_the_caches_hold_the_networks_activations(solver, degrees):
    made = strong_made([24, 31], order="random", degrees=degrees)
    noise = noise_of(3)
    system = IncrementalMadeSystem(FoldedMADE.from_module(made), noise, BOUND)
    loop = SolverLoop(system, solver)
    loop.run()
    for cached, expected in zip(loop._state.hidden, activations(made, by_hand(made, noise)), strict=True):
        assert_close(cached, expected)


def test_reset_to_a_value_fills_the_caches_with_its_activations():
    made = strong_made([24, 24], order="random")
    noise = noise_of(3)
    network = FoldedMADE.from_module(made)
    system = IncrementalMadeSystem(network, noise, BOUND)
    value = torch.randn(3, LENGTH, dtype=torch.float64)
    state = system.new_state()
    system.reset(state, value)
    for cached, expected in zip(state.hidden, activations(made, in_pixel_order(system, value)), strict=True):
        assert_close(cached, expected)
    # The window [12, 18) computes only the units it needs anew; all others must belong to the value.
    frontier = torch.full((3,), 13)
    evaluation = system.evaluate(state, torch.arange(6).expand(3, 6), frontier, None)
    assert evaluation.equations.tolist() == [12, 13, 14, 15, 16, 17]
    assert_close(system.value(state)[:, 12:18], system.reference().function(value)[:, 12:18])
    others = [t for t in range(LENGTH) if not 12 <= t < 18]
    assert torch.equal(system.value(state)[:, others], value[:, others])


def test_reset_to_the_initial_guess_forgets_everything():
    system = IncrementalMadeSystem(FoldedMADE.from_module(strong_made([24, 24])), noise_of(3), BOUND)
    state = system.new_state()
    system.reset(state, torch.full((3, LENGTH), torch.inf, dtype=torch.float64))
    system.reset(state)
    for tensor, fresh in zip([state.x, *state.hidden], [system.new_state().x, *system.new_state().hidden], strict=True):
        assert torch.equal(tensor, fresh)


@pytest.mark.parametrize(("frontier", "due"), [(0, range(4)), (7, range(4, 9)), (19, range(14, 19))])
def test_a_window_computes_no_unit_but_those_that_are_due(frontier, due):
    made = strong_made([LENGTH - 1, LENGTH - 1])  # one unit of every degree
    system = IncrementalMadeSystem(FoldedMADE.from_module(made), noise_of(3), BOUND)
    state = system.new_state()
    for activation in state.hidden:
        activation.fill_(-1)  # which no activation is
    system.evaluate(state, torch.arange(5).expand(3, 5), torch.full((3,), frontier), None)
    for activation in state.hidden:
        assert (activation[0] != -1).nonzero().flatten().tolist() == list(due)


@pytest.mark.parametrize("window", [3, 7, LENGTH])
def test_any_start_leads_to_the_same_result(window):
    made = strong_made([24, 24])
    noise = noise_of(3)
    system = IncrementalMadeSystem(FoldedMADE.from_module(made), noise, BOUND)
    exact = by_hand(made, noise)
    start = 3 * torch.randn(3, LENGTH, dtype=torch.float64)
    assert_close(solve(system, GSJacobi(window), start=start).value, exact)
    # From its own result every window is confirmed at once.
    result = solve(system, GSJacobi(window)).value
    again = solve(system, GSJacobi(window), start=result)
    assert_close(again.value, exact)
    assert (again.iterations <= -(-LENGTH // window) + 1).all()


@pytest.mark.parametrize("kind", [MadeSystem, IncrementalMadeSystem])
@pytest.mark.parametrize("solver", [GSJacobi(6), Jacobi(), Sequential()], ids=lambda s: s.name)
def test_one_loop_solves_again_with_noise_refilled_in_place(kind, solver):
    made = strong_made([24, 24])
    noise = noise_of(3)
    loop = SolverLoop(kind(FoldedMADE.from_module(made), noise, BOUND), solver, certify=not solver.predetermined)
    first = loop.run().value
    for seed in (1, 2, 0):
        noise.copy_(noise_of(3, seed=seed))
        solution = loop.run()
        assert_close(solution.value, by_hand(made, noise_of(3, seed=seed)))
        assert solution.certified.all() or solver.predetermined
    assert torch.equal(solution.value, first)


def test_the_observer_sees_snapshots_and_the_prefix_property_holds_in_windows():
    made = strong_made([24, 24])
    noise = noise_of(3)
    exact = by_hand(made, noise)
    iterates = []
    system = IncrementalMadeSystem(FoldedMADE.from_module(made), noise, BOUND)
    solve(system, GSJacobi(6), observer=lambda k, x: iterates.append(x))
    assert (iterates[0] == 0).all()
    for k, x in enumerate(iterates):
        assert_close(x[:, :k], exact[:, :k])


# -- samples and their neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 6, LENGTH])
def test_a_sample_does_not_depend_on_its_neighbours(window):
    made = strong_made([24, 24])
    noise = noise_of(5)
    noise[1] *= 1e-3  # neighbours that converge at once, and one that is truncated nearly everywhere
    noise[2] *= 50
    network = FoldedMADE.from_module(made)
    together = solve(IncrementalMadeSystem(network, noise, BOUND), GSJacobi(window))
    for i in range(5):
        alone = solve(IncrementalMadeSystem(network, noise[i : i + 1].clone(), BOUND), GSJacobi(window))
        assert_close(alone.value[0], together.value[i])
        assert alone.iterations[0] <= together.iterations[i]  # the window waits for the slowest


@pytest.mark.parametrize("kind", [MadeSystem, IncrementalMadeSystem])
@pytest.mark.parametrize("solver", [GSJacobi(6), Jacobi()], ids=lambda s: s.name)
def test_a_sample_whose_noise_is_not_a_number_ends_alone(kind, solver):
    made = strong_made([24, 24])
    noise = noise_of(4)
    noise[2, 9] = torch.nan
    solution = solve(kind(FoldedMADE.from_module(made), noise, BOUND), solver, certify=True)
    assert [status.name for status in solution.status] == ["CONVERGED", "CONVERGED", "NON_FINITE", "CONVERGED"]
    assert solution.frontier.tolist() == [LENGTH, LENGTH, 9, LENGTH]
    healthy = [0, 1, 3]
    assert_close(solution.value[healthy], by_hand(made, noise[healthy]))


def test_work_of_a_window_is_its_width():
    system = IncrementalMadeSystem(FoldedMADE.from_module(strong_made([24, 24])), noise_of(1), BOUND)
    one = solve(system, GSJacobi(1))
    assert (one.iterations == LENGTH).all()
    assert (one.evaluations == LENGTH).all()
    five = solve(system, GSJacobi(5))
    assert torch.equal(five.evaluations, 5 * five.iterations)
    assert five.evaluations < solve(system, Jacobi()).evaluations


# -- what is sampled -----------------------------------------------------------------------------------------------


def test_samples_have_the_models_distribution():
    """Probability integral transform: F_t(x_t | x_<t) is uniform, and independent from pixel to pixel."""
    length, batch, bound = 4, 4000, 30.0
    made = strong_made([16, 16], length, order="random", seed=2)
    system = IncrementalMadeSystem(FoldedMADE.from_module(made), noise_of(batch, length, seed=5), bound)
    pixels = in_pixel_order(system, solve(system, GSJacobi(3)).value)
    with torch.no_grad():
        mean, log_scale = made(pixels)
    first, second = made.rank[0].argsort().tolist()[:2]
    # Nothing comes before the first pixel: its logistic is one and the same for all samples.
    assert mean[:, first].std() < 1e-9
    fixed = scipy.stats.logistic(float(mean[0, first]), float(log_scale[0, first].exp()))
    assert scipy.stats.kstest(pixels[:, first].numpy(), fixed.cdf).pvalue > 1e-3
    # The second follows its conditional, which no single logistic is.
    assert mean[:, second].std() > 0.1
    u = torch.special.expit((pixels - mean) / log_scale.exp())
    for p in range(length):
        assert scipy.stats.kstest(u[:, p].numpy(), "uniform").pvalue > 1e-3
    correlation = torch.corrcoef(u.T) - torch.eye(length, dtype=torch.float64)
    assert correlation.abs().max() < 4 / batch**0.5
