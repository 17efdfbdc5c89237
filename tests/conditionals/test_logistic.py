"""The logistic conditional: its likelihood is the derivative of a distribution function, and MADE's own."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from lit_parallel.conditionals import Logistic
from lit_parallel.modules.made import MadeModule
from lit_parallel.modules.options import MadeOptions

both_squeezes = pytest.mark.parametrize("squeeze", [1e-6, 0.05])


@both_squeezes
def test_the_likelihood_is_the_slope_of_the_distribution_function_of_the_pixel(squeeze):
    conditional = Logistic(squeeze)
    pixels = np.linspace(0.5, 255.5, 200)

    def mass_below(pixel):
        z = scipy.special.logit(squeeze + (1 - 2 * squeeze) * pixel / 256)
        return scipy.stats.logistic.cdf(z, 0.7, np.exp(-0.4))

    slope = (mass_below(pixels + 1e-4) - mass_below(pixels - 1e-4)) / 2e-4
    whole = torch.from_numpy(np.floor(pixels))
    x = conditional.from_pixels(whole, torch.from_numpy(pixels) - whole)
    log_prob = conditional.log_prob(torch.tensor([0.7, -0.4]).double().expand(200, 2), x[:, None])
    np.testing.assert_allclose(log_prob.exp(), slope, rtol=1e-5)


def test_pixels_without_noise_lie_in_the_middle_of_their_level():
    conditional = Logistic()
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(conditional.from_pixels(pixels), conditional.from_pixels(pixels, torch.full((256,), 0.5)))
    assert torch.equal(conditional.to_pixels(conditional.from_pixels(pixels)), pixels)


def test_made_has_this_likelihood():
    model = MadeModule(MadeOptions(hidden_sizes=[8]), (1, 2, 3)).double()
    images = torch.randint(0, 256, (4, 1, 2, 3), dtype=torch.uint8)
    noise = torch.rand(images.shape, dtype=torch.float64)
    x = Logistic(1e-6).from_pixels(images.flatten(1), noise.flatten(1))
    mean, log_scale = model.network(x)
    z = scipy.special.logit(1e-6 + (1 - 2e-6) * (images.double() + noise).flatten(1).numpy() / 256)
    density = scipy.stats.logistic.logpdf(z, mean.detach().numpy(), log_scale.detach().exp().numpy())
    slope = (1 - 2e-6) / 256 / (scipy.special.expit(z) * scipy.special.expit(-z))
    expected = (density + np.log(slope)).sum(axis=1)
    np.testing.assert_allclose(model.log_likelihood(images, noise).detach(), expected, rtol=1e-9)
    direct = Logistic(1e-6).log_prob(torch.stack([mean, log_scale], dim=-1), x[..., None]).sum(dim=1)
    np.testing.assert_allclose(direct.detach(), expected, rtol=1e-9)


def test_values_stay_within_the_bounds_and_the_network_reads_them_flat():
    conditional = Logistic(0.05)
    parameters = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.1, -3.0]])
    values = conditional.sample(parameters, torch.zeros(3, 1), "inverse_cdf", 1.0)
    bound = float(scipy.special.logit(0.95))
    assert values.flatten().tolist() == pytest.approx([bound, -bound, 0.1])
    assert torch.equal(conditional.encode(values[None]), values[None, :, 0])


def test_noise_is_logit_of_uniform():
    noise = Logistic().draw_noise(np.random.default_rng(2), 5000, "inverse_cdf")[:, 0]
    np.testing.assert_allclose(noise, scipy.special.logit(np.random.default_rng(2).random(5000)), rtol=1e-9)
