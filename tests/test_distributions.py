"""Logit transform and logistic density against autograd, SciPy, and numerical integrals of the likelihood."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from lit_parallel.distributions import LEVELS, LogitTransform, logistic_log_density
from lit_parallel.modules.made import MadeModule
from lit_parallel.modules.options import MadeOptions

both_squeezes = pytest.mark.parametrize("squeeze", [1e-6, 0.05])


@both_squeezes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [1e-3, 0.5, 1 - 1e-3])
def test_every_pixel_value_survives_the_round_trip(squeeze, dtype, noise):
    transform = LogitTransform(squeeze)
    pixels = torch.arange(LEVELS, dtype=torch.uint8)
    z = transform.forward(pixels.to(dtype) + noise)
    assert z.dtype == dtype
    assert torch.equal(transform.inverse(z), pixels)


@both_squeezes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0, 1 - 2**-24])
def test_on_the_border_of_two_levels_rounding_may_give_the_neighbour_and_nothing_else(squeeze, dtype, noise):
    transform = LogitTransform(squeeze)
    pixels = torch.arange(LEVELS)
    difference = transform.inverse(transform.forward(pixels.to(dtype) + noise)).long() - pixels
    assert difference.abs().max() <= 1  # never from black to white
    assert transform.inverse(transform.forward(torch.tensor([0.0, LEVELS], dtype=dtype))).tolist() == [0, 255]


@both_squeezes
def test_forward_is_the_logit_of_the_squeezed_pixel(squeeze):
    dequantised = torch.linspace(0, LEVELS, 1001, dtype=torch.float64)
    expected = scipy.special.logit(squeeze + (1 - 2 * squeeze) * dequantised.numpy() / 256)
    torch.testing.assert_close(LogitTransform(squeeze).forward(dequantised).numpy(), expected, rtol=1e-9, atol=1e-12)


@both_squeezes
def test_the_bound_is_the_image_of_black_and_of_white(squeeze):
    transform = LogitTransform(squeeze)
    ends = transform.forward(torch.tensor([0.0, LEVELS], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([-transform.bound, transform.bound], dtype=torch.float64))
    beyond = torch.tensor([-1e4, -transform.bound, transform.bound, 1e4])
    assert transform.inverse(beyond).tolist() == [0, 0, 255, 255]
    assert transform.bound == pytest.approx(scipy.special.logit(1 - squeeze))


@both_squeezes
def test_log_derivative_is_that_of_the_forward_function(squeeze):
    transform = LogitTransform(squeeze)
    pixels = torch.linspace(0.01, 255.99, 301, dtype=torch.float64, requires_grad=True)
    z = transform.forward(pixels)
    (derivative,) = torch.autograd.grad(z.sum(), pixels)
    torch.testing.assert_close(transform.log_derivative(z), derivative.log(), rtol=1e-9, atol=1e-9)


def test_logistic_log_density_is_scipys():
    z = torch.linspace(-40, 40, 161, dtype=torch.float64)
    mean, log_scale = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    expected = scipy.stats.logistic.logpdf(z.numpy(), loc=0.7, scale=math.exp(-0.4))
    torch.testing.assert_close(logistic_log_density(z, mean, log_scale).numpy(), expected, rtol=0, atol=1e-8)


def test_logistic_log_density_stays_finite_far_out():
    z = torch.tensor([-200.0, 200.0])
    assert torch.equal(logistic_log_density(z, torch.zeros(2), torch.zeros(2)), torch.tensor([-200.0, -200.0]))


# -- the likelihood of the original pixels integrates to what the model puts between the bounds --------------------


def quadrature(pieces: int, nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Legendre points and weights on [0, 256], in pieces that shrink towards the ends, where logits are steep."""
    half = np.concatenate([[0], np.geomspace(1e-7, 0.5, pieces)])
    edges = LEVELS * np.concatenate([half, 1 - half[-2::-1]])
    x, w = np.polynomial.legendre.leggauss(nodes)
    width = np.diff(edges)[:, None]
    points = edges[:-1, None] + width * (x + 1) / 2
    return torch.from_numpy(points.ravel()), torch.from_numpy((width * w / 2).ravel())


def density(model: MadeModule, pixels: torch.Tensor) -> torch.Tensor:
    """``exp(log_likelihood)`` at dequantised pixels ``[points, pixels]``, as training sees them: integer plus noise."""
    images = pixels.floor().to(torch.uint8)
    return model.log_likelihood(images[:, None, None, :], (pixels - images)[:, None, None, :]).exp().detach()


def model_of(pixels: int, squeeze: float, order: str = "natural") -> MadeModule:
    options = MadeOptions(hidden_sizes=[8, 8], logit_lambda=squeeze, order=order, mask_seed=1)
    model = MadeModule(options, (1, 1, pixels)).double()
    with torch.no_grad():  # off centre and wide enough for the bounds to cut off a good part of it
        for layer in model.network.hidden:
            layer.weight.mul_(2)
        model.network.output.weight.mul_(2)
        model.network.output.bias.add_(0.8)
    return model


def mass_within(mean, log_scale, bound: float) -> np.ndarray:
    distribution = scipy.stats.logistic(mean.detach().numpy(), log_scale.detach().exp().numpy())
    return distribution.cdf(bound) - distribution.cdf(-bound)


@both_squeezes
def test_the_likelihood_of_one_pixel_integrates_to_the_mass_within_the_bounds(squeeze):
    model = model_of(1, squeeze)
    points, weights = quadrature(40, 12)
    integral = float(density(model, points[:, None]) @ weights)
    mean, log_scale = model.network(torch.zeros(1, 1, dtype=torch.float64))  # the only pixel depends on nothing
    mass = float(mass_within(mean, log_scale, scipy.special.logit(1 - squeeze)).item())
    assert integral == pytest.approx(mass, rel=3e-6)  # the last 1e-7 of the range is clamped
    assert mass < 0.9 if squeeze == 0.05 else mass > 0.99


@both_squeezes
@pytest.mark.parametrize("order", ["natural", "random"])
def test_the_likelihood_of_two_pixels_integrates_to_the_mass_within_the_bounds(squeeze, order):
    model = model_of(2, squeeze, order)
    first, second = model.network.rank[0].argsort().tolist()
    assert (first, second) == ((0, 1) if order == "natural" else (1, 0))
    points, weights = quadrature(40, 10)
    grid = torch.cartesian_prod(points, points)
    integral = float(weights @ density(model, grid).reshape(len(points), -1) @ weights)

    # Independently: integrate over the first pixel's logit, the second in closed form.
    bound = float(scipy.special.logit(1 - squeeze))
    z = torch.linspace(-bound, bound, 4001, dtype=torch.float64)
    x = torch.zeros(len(z), 2, dtype=torch.float64)
    x[:, first] = z
    mean, log_scale = model.network(x)
    outer = scipy.stats.logistic.pdf(
        z.numpy(), mean[:, first].detach().numpy(), log_scale[:, first].detach().exp().numpy()
    )
    inner = mass_within(mean[:, second], log_scale[:, second], bound)
    assert float(np.ptp(inner)) > 1e-4 or squeeze == 1e-6  # the second really depends on the first
    assert integral == pytest.approx(float(np.trapezoid(outer * inner, z.numpy())), rel=1e-4)  # kinks limit it


def test_bits_of_a_uniform_model_are_eight_per_pixel():
    """A model whose density is flat over 256 levels: a logistic of the transform's own shape, lambda near 0."""
    model = MadeModule(MadeOptions(hidden_sizes=[4], logit_lambda=1e-9), (1, 2, 2)).double()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.zero_()
    images = torch.randint(0, LEVELS, (5, 1, 2, 2), dtype=torch.uint8)
    noise = torch.rand(5, 1, 2, 2, dtype=torch.float64)
    bits = -model.log_likelihood(images, noise) / 4 / math.log(2)
    torch.testing.assert_close(bits, torch.full((5,), 8.0, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("squeeze", [1e-9, 1e-6, 0.05])
def test_the_largest_noise_in_single_precision_gives_a_finite_likelihood(squeeze):
    model = MadeModule(MadeOptions(hidden_sizes=[4], logit_lambda=squeeze), (1, 1, 2))
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2)
    for noise in (0.0, 1 - 2**-24):
        assert model.log_likelihood(images, torch.full((1, 1, 1, 2), noise)).isfinite().all()
