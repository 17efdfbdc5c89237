"""``sample()``: the same images from every solver, every number of samples, and (up to rounding) every batch size."""

import numpy as np
import pytest
import torch

from lit_parallel.distributions import logit
from lit_parallel.errors import UserError
from lit_parallel.modules.made import MadeModule
from lit_parallel.modules.options import MadeOptions
from lit_parallel.sampling.noise import logistic_noise
from lit_parallel.sampling.sampler import Sampler, batches, sample
from lit_parallel.solution import Status
from lit_parallel.solvers import SolverOptions, Stopping

SHAPE = (1, 4, 5)
LENGTH = 20
CERTIFIED = [
    "jacobi",
    "jacobi_gs",
    "gs_jacobi",
    SolverOptions(name="jacobi_gs", block_size=7),
    SolverOptions(name="gs_jacobi", window=1),
    SolverOptions(name="gs_jacobi", window=6),
    SolverOptions(name="jacobi", absolute_tolerance=0.5),
]
every_certified_solver = pytest.mark.parametrize(
    "solver", CERTIFIED, ids=lambda s: s if isinstance(s, str) else f"{s.name}-{s.block_size or s.window}"
)


def made_module(order: str = "random", shape: tuple[int, int, int] = SHAPE, squeeze: float = 1e-3) -> MadeModule:
    """An untrained MADE in float32, with weights large enough for pixels to depend on one another."""
    model = MadeModule(MadeOptions(hidden_sizes=[24, 24], order=order, mask_seed=1, logit_lambda=squeeze), shape)
    with torch.no_grad():
        for layer in (*model.network.hidden, model.network.output):
            layer.weight.mul_(3)
    return model.eval()


@pytest.fixture
def model() -> MadeModule:
    return made_module()


@every_certified_solver
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_solver_gives_the_bits_of_plain_sequential_sampling(model, solver, batch_size):
    expected, sequential = sample(model, 8, solver="sequential", seed=3, batch_size=batch_size)
    images, solution = sample(model, 8, solver=solver, seed=3, batch_size=batch_size)
    assert torch.equal(solution.value, sequential.value)
    assert torch.equal(images, expected)
    assert solution.status == [Status.CONVERGED] * 8
    assert solution.certified.all()
    assert (solution.certificate_iterations >= 1).all()


def test_these_problems_are_not_too_easy(model):
    _, solution = sample(model, 8, solver="jacobi")
    assert solution.iterations.min() > 4
    assert (solution.value.abs() < model.transform.bound).any()


def test_sequential_solvers_need_no_certificate_and_cached_sampling_agrees_to_rounding(model):
    expected, plain = sample(model, 8, solver="sequential")
    images, cached = sample(model, 8, solver="cached_sequential")
    assert (plain.solver, cached.solver) == ("sequential", "cached_sequential")
    for solution in (plain, cached):
        assert not solution.certified.any()
        assert solution.status == [Status.CONVERGED] * 8
        assert solution.iterations.tolist() == [LENGTH] * 8
        assert solution.certificate_iterations.tolist() == [0] * 8
    torch.testing.assert_close(cached.value, plain.value, rtol=1e-4, atol=1e-4)
    assert (images.int() - expected.int()).abs().max() <= 1


def test_the_certificate_can_be_left_out(model):
    _, solution = sample(model, 8, solver=SolverOptions(name="gs_jacobi", certify=False))
    assert not solution.certified.any()
    assert solution.all_solved
    assert solution.certificate_iterations.tolist() == [0] * 8


# -- which sample is which -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sequential", "jacobi", "gs_jacobi", "cached_sequential"])
def test_a_padded_last_batch_gives_the_bits_of_a_full_one(model, solver):
    full, full_solution = sample(model, 10, solver=solver, batch_size=5)
    for number in (1, 4, 6, 8, 9):
        images, solution = sample(model, number, solver=solver, batch_size=5)
        assert torch.equal(images, full[:number])
        assert torch.equal(solution.value, full_solution.value[:number])


def test_between_batch_sizes_only_rounding_differs(model):
    expected, one = sample(model, 9, batch_size=9)
    for batch_size in (1, 2, 4, 64):
        images, solution = sample(model, 9, batch_size=batch_size)
        torch.testing.assert_close(solution.value, one.value, rtol=1e-4, atol=1e-4)
        assert (images.int() - expected.int()).abs().max() <= 1


def test_a_batch_may_hold_any_indices_in_any_order(model):
    full, _ = sample(model, 10, seed=4, batch_size=5)
    sampler = Sampler(model, "gs_jacobi", 5, 4)
    for indices in ([7, 0, 3, 9, 1], [8], [2, 9]):
        images, solution = sampler.batch(indices)
        assert torch.equal(images, full[indices])
        assert len(solution.status) == len(solution.value) == len(indices)


def test_seeds_and_samples_differ(model):
    images, _ = sample(model, 6, seed=0)
    assert len({image.numpy().tobytes() for image in images}) == 6
    assert not torch.equal(images, sample(model, 6, seed=1)[0])
    assert torch.equal(images, sample(model, 6, seed=0)[0])


def test_batches_cover_all_samples_once_and_in_order():
    assert list(batches(7, 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batches(6, 3)) == [[0, 1, 2], [3, 4, 5]]
    assert list(batches(2, 3)) == [[0, 1]]


# -- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["natural", "random"])
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 2, 4)])
def test_images_are_what_a_loop_over_the_network_draws(order, shape):
    """Every pixel by hand, in NumPy where it can be: order, noise, truncation, inverse transform."""
    model = made_module(order, shape)
    model.double()  # the images, not the rounding, are in question here
    images, _ = sample(model, 3, seed=9, solver="cached_sequential")
    assert images.dtype == torch.uint8
    assert images.shape == (3, *shape)
    noise, bound = logistic_noise(9, range(3), model.length), logit(1 - 1e-3)
    z = torch.zeros(3, model.length, dtype=torch.float64)
    rank = model.network.rank[0].tolist()
    with torch.no_grad():
        for t in range(model.length):
            p = rank.index(t)
            mean, log_scale = (output[:, p] for output in model.network(z))
            z[:, p] = (mean + log_scale.exp() * noise[:, t]).clamp(-bound, bound)
    grey = (1 / (1 + np.exp(-z.numpy())) - 1e-3) / (1 - 2e-3)
    expected = np.clip(np.floor(grey * 256), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(images.flatten(1).numpy(), expected)
    assert len(images.unique()) > 10


def test_images_follow_the_likelihood():
    """Frequencies of coarse two-pixel images against the integral of the likelihood over their cells."""
    model = made_module("random", (1, 1, 2), squeeze=1e-6).double()
    with torch.no_grad():
        model.network.output.weight[2:] *= 0.1  # no log-scale so large that values leave the bounds
    number, cells, nodes = 4000, 4, 64
    images, _ = sample(model, number, seed=1, batch_size=number)
    coarse = images.flatten(1).long() // (256 // cells)
    counts = torch.bincount(coarse[:, 0] * cells + coarse[:, 1], minlength=cells**2).double()

    x, w = np.polynomial.legendre.leggauss(nodes)
    # Each pixel within a cell by Gauss-Legendre; at black and white the density of a pixel rises steeply,
    # so the substitution v = smooth(u) crowds the points at both ends.
    u, w = torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)
    smooth, slope = u * u * u * (10 - 15 * u + 6 * u * u), 30 * u * u * (1 - u) ** 2
    width = 256 / cells
    points = (torch.arange(cells)[:, None] * width + smooth * width).flatten()
    weights = (w * slope * width).repeat(cells)
    grid = torch.cartesian_prod(points, points)
    floor = grid.floor().to(torch.uint8)
    density = model.log_likelihood(floor[:, None, None, :], (grid - floor)[:, None, None, :]).exp().detach()
    mass = (density.reshape(len(points), -1) * weights * weights[:, None]).reshape(cells, nodes, cells, nodes)
    probability = mass.sum(dim=(1, 3)).flatten()
    assert float(probability.sum()) > 0.99  # what lies beyond the bound is drawn as black or white
    deviation = (counts - number * probability) / (number * probability).sqrt()
    assert deviation.abs().max() < 4
    assert probability.max() / probability.min() > 3


# -- solutions, mistakes -------------------------------------------------------------------------------------------


def test_the_solutions_of_all_batches_are_joined(model):
    _, solution = sample(model, 8, batch_size=3)
    assert solution.solver == "gs_jacobi"
    assert solution.length == LENGTH
    assert len(solution.status) == 8
    tensors = ("iterations", "evaluations", "frontier", "certified", "certificate_iterations", "total_iterations")
    assert all(getattr(solution, name).shape == (8,) for name in tensors)
    assert solution.value.shape == solution.final_iteration.shape == (8, LENGTH)
    parts = [Sampler(model, "gs_jacobi", 3, 0).batch(indices)[1] for indices in batches(8, 3)]
    assert torch.equal(solution.iterations, torch.cat([part.iterations for part in parts]))
    assert torch.equal(solution.value, torch.cat([part.value for part in parts]))
    summary = solution.summary()
    assert summary["samples"] == 8
    assert summary["certified"] is True
    assert summary["status"] == {"converged": 8}
    assert summary["seconds"] > 0


@pytest.mark.parametrize("count", [1, 3])
def test_residuals_and_observer_of_a_padded_batch(model, count):
    seen = []
    sampler = Sampler(model, "jacobi", 3, 0, record_residual=True)
    _, solution = sampler.batch(list(range(count)), observer=lambda k, x: seen.append(x))
    assert solution.residual.shape[1] == count
    assert solution.residual.shape[0] == len(seen) - 1
    for i, needed in enumerate(solution.iterations.tolist()):
        assert (solution.residual[needed:, i] == 0).all()  # once solved, nothing is entered any more
        assert (solution.residual[: needed - 1, i] > 0).all()


def test_options_reach_the_loop(model):
    options = SolverOptions(name="jacobi", max_iterations=2, absolute_tolerance=1e-3, relative_tolerance=1e-4)
    sampler = Sampler(model, options, 4, 0)
    assert sampler.loop.stopping == Stopping(2, 1e-3, 1e-4)
    images, solution = sampler.batch(range(4))
    assert images.shape == (4, *SHAPE)
    assert solution.status == [Status.ITERATION_LIMIT] * 4
    assert not solution.certified.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_samples": -3}, "num_samples must be at least 1, got -3"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": 2**64}, "seed must be from 0 to"),
        ({"solver": "gs_jakobi"}, "unknown solver 'gs_jakobi'. Did you mean 'gs_jacobi'?"),
        ({"solver": "cached_sequental"}, "Did you mean 'cached_sequential'?"),
        ({"solver": SolverOptions(name="jacobi", window=3)}, "solver.window belongs to gs_jacobi"),
        ({"solver": SolverOptions(max_iterations=0)}, "max_iterations must be at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(model, arguments, message):
    with pytest.raises(UserError) as error:
        sample(model, **{"num_samples": 2, **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_batch_must_fit(model):
    sampler = Sampler(model, "jacobi", 3, 0)
    for indices in ([], [0, 1, 2, 3]):
        with pytest.raises(UserError, match=f"a batch holds 1 to 3 samples, got {len(indices)}"):
            sampler.batch(indices)


def test_sampling_neither_trains_nor_moves_the_model(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, solution = sample(model, 2)
    assert not solution.value.requires_grad
    assert images.device.type == solution.value.device.type == "cpu"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_several_masks_are_sampled_with_the_first():
    torch.manual_seed(0)
    model = MadeModule(MadeOptions(hidden_sizes=[24], order="random", num_masks=3), SHAPE)
    expected = sample(model, 3)[0]
    model.network.use_mask(2)
    assert torch.equal(sample(model, 3)[0], expected)
