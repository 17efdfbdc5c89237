"""The mixture of discretised logistics: likelihood, gradients and tables of levels against NumPy and SciPy."""

import numpy as np
import pytest
import torch
from exact_mixture import ExactMixture

from lit_parallel.conditionals import DiscretizedLogisticMixture

MIXTURES = 4
LEVELS = torch.arange(256)
both_widths = pytest.mark.parametrize("channels", [1, 3])


def parameters_of(channels: int, kind: str) -> torch.Tensor:
    """Parameters of one pixel, float64, of which float32 holds every bit."""
    conditional = DiscretizedLogisticMixture(channels, MIXTURES)
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(conditional.num_parameters, generator=generator)
    shape = (channels, -1, MIXTURES)
    means, log_scales = values[MIXTURES:].reshape(shape)[:, 0], values[MIXTURES:].reshape(shape)[:, 1]
    if kind == "usual":
        log_scales -= 3
    elif kind == "sharp":
        log_scales.fill_(-9)  # -7 counts
    elif kind == "wide":
        log_scales.copy_(torch.linspace(0, 10, MIXTURES).expand_as(log_scales))
    elif kind == "outside":
        means.copy_(torch.tensor([-30.0, -1.5, 1.5, 30.0]).expand_as(means))
        log_scales.sub_(2)
    elif kind == "mixed":
        means.copy_(torch.tensor([-4.0, 0.1, 0.9, 8.0]).expand_as(means))
        log_scales.copy_(torch.tensor([10.0, -7.0, -5.0, 1.0]).expand_as(log_scales))
        values[:MIXTURES] = torch.tensor([-60.0, 3.0, 1.0, 20.0])
    return values.double()


KINDS = ("usual", "sharp", "wide", "outside", "mixed")
every_kind = pytest.mark.parametrize("kind", KINDS)


def colours(exact: ExactMixture, channels: int) -> list[tuple[int, ...]]:
    """Values of the channels before the last: the likeliest, and some at the ends and in between."""
    if channels == 1:
        return [()]
    red = int(exact.conditional(()).argmax())
    likeliest = (red, int(exact.conditional((red,)).argmax()))
    return [likeliest, (0, 0), (255, 255), (0, 255), (97, 141)]


def completed(earlier: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """These channels followed by every level of the next, ``[256, channels]``."""
    return torch.cat([torch.tensor(earlier).expand(256, len(earlier)), LEVELS[:, None]], dim=1).to(dtype)


# -- the likelihood ---------------------------------------------------------------------------------------------------


@both_widths
@every_kind
def test_the_likelihood_is_scipys(channels, kind):
    conditional = DiscretizedLogisticMixture(channels, MIXTURES)
    parameters = parameters_of(channels, kind)
    exact = ExactMixture(parameters.numpy(), channels, MIXTURES)
    for earlier in colours(exact, channels):
        expected = exact.marginal(earlier)
        actual = conditional.log_prob(parameters.expand(256, -1), completed(earlier, torch.float64))
        representable = expected > 1e-290
        assert representable.any() or earlier != colours(exact, channels)[0]
        np.testing.assert_allclose(
            actual.numpy()[representable], np.log(expected[representable]), rtol=1e-10, atol=1e-9
        )
        assert (actual.numpy()[~representable] < -600).all()


@both_widths
@every_kind
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_last_channel_sums_to_one_given_the_earlier_ones(channels, kind, dtype, precision):
    conditional = DiscretizedLogisticMixture(channels, MIXTURES)
    parameters = parameters_of(channels, kind)
    exact = ExactMixture(parameters.numpy(), channels, MIXTURES)
    earlier = colours(exact, channels)[0]
    before = 1.0 if channels == 1 else exact.marginal(earlier[:1])[earlier[1]]
    log_prob = conditional.log_prob(parameters.to(dtype).expand(256, -1), completed(earlier, dtype))
    assert log_prob.dtype == dtype
    assert log_prob.double().exp().sum() / before == pytest.approx(1, abs=precision)


@every_kind
def test_green_sums_to_one_given_red_and_red_by_itself(kind):
    parameters = parameters_of(3, kind)
    exact = ExactMixture(parameters.numpy(), 3, MIXTURES)
    assert exact.marginal(()).sum() == pytest.approx(1, abs=1e-12)
    conditional = DiscretizedLogisticMixture(3, MIXTURES)
    red = colours(exact, 3)[0][0]
    everything = torch.cartesian_prod(torch.tensor([red]), LEVELS, LEVELS).double()
    sums = conditional.log_prob(parameters.expand(len(everything), -1), everything).exp().reshape(256, 256).sum(dim=1)
    np.testing.assert_allclose(sums, exact.marginal((red,)), rtol=1e-9, atol=1e-14)
    assert float(sums.sum()) == pytest.approx(exact.marginal(())[red], rel=1e-10)


def test_the_likelihood_works_position_by_position():
    conditional = DiscretizedLogisticMixture(3, MIXTURES)
    parameters = torch.randn(2, 5, conditional.num_parameters, dtype=torch.float64)
    x = torch.randint(0, 256, (2, 5, 3)).double()
    together = conditional.log_prob(parameters, x)
    assert together.shape == (2, 5)
    assert float(together[1, 3]) == pytest.approx(float(conditional.log_prob(parameters[1, 3], x[1, 3])), rel=1e-12)


@both_widths
@pytest.mark.parametrize("kind", ["usual", "wide", "outside", "mixed"])  # sharp: clamped, no gradient
def test_gradients_are_those_of_finite_differences(channels, kind):
    conditional = DiscretizedLogisticMixture(channels, MIXTURES)
    parameters = parameters_of(channels, kind)
    parameters[parameters == -7] += 0.01  # off the kink of the clamp
    x = torch.tensor([[0.0] * 3, [255.0] * 3, [97, 141, 3], [140, 128, 120]], dtype=torch.float64)[:, :channels]
    batch = parameters.repeat(len(x), 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: conditional.log_prob(p, x), batch, eps=1e-6, atol=1e-4, rtol=1e-4)


@both_widths
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_for_every_level(channels, kind, dtype):
    conditional = DiscretizedLogisticMixture(channels, MIXTURES)
    batch = parameters_of(channels, kind).to(dtype).repeat(256, 1).requires_grad_()
    x = torch.stack([LEVELS, LEVELS.flip(0), LEVELS.roll(100)], dim=1)[:, :channels].to(dtype)
    log_prob = conditional.log_prob(batch, x)
    assert (log_prob <= 1e-6).all()
    log_prob.sum().backward()
    assert batch.grad.isfinite().all()
    assert log_prob.isfinite().all()


def test_scales_below_the_smallest_get_no_gradient():
    parameters = parameters_of(1, "sharp").requires_grad_()
    DiscretizedLogisticMixture(1, MIXTURES).log_prob(parameters, torch.tensor([128.0]).double()).backward()
    assert (parameters.grad[2 * MIXTURES :] == 0).all()
    assert (parameters.grad[: 2 * MIXTURES] != 0).any()


# -- the tables of levels ---------------------------------------------------------------------------------------------


@both_widths
@every_kind
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_the_tables_are_the_exact_conditionals(channels, kind, dtype, precision):
    conditional = DiscretizedLogisticMixture(channels, MIXTURES)
    parameters = parameters_of(channels, kind)
    exact = ExactMixture(parameters.numpy(), channels, MIXTURES)
    likeliest = colours(exact, channels)[0]
    second = [int(exact.conditional(likeliest[:1]).argsort()[-2])] if channels == 3 else []
    for chosen in {likeliest, (*likeliest[:1], *second)}:
        listing = conditional.probabilities(parameters.to(dtype)[None])
        table = next(listing)
        for channel in range(channels):
            assert table.shape == (1, 256)
            assert table.dtype == dtype
            actual = (table[0] / table[0].sum()).numpy()
            np.testing.assert_allclose(actual, exact.conditional(chosen[:channel]), rtol=0, atol=precision)
            if channel < len(chosen):
                table = listing.send(torch.tensor([chosen[channel]], dtype=dtype))


def test_tables_follow_an_unlikely_level_too():
    """A red value that no component expects leaves the component that expects it least badly."""
    conditional = DiscretizedLogisticMixture(3, 2)
    parameters = torch.zeros(1, conditional.num_parameters)
    split = parameters[0, 2:].reshape(3, 3, 2)
    split[:, 0] = torch.tensor([-0.5, 0.0])  # means
    split[:, 1] = -6.5  # log-scales: red 255 has a probability of about exp(-660) under the second component
    listing = conditional.probabilities(parameters)
    next(listing)
    green = listing.send(torch.tensor([255.0]))
    expected = ExactMixture(parameters[0].numpy(), 3, 2)
    expected.weights = np.array([0.0, 1.0])
    np.testing.assert_allclose(green[0] / green[0].sum(), expected.components((255,))[1], atol=2e-5)


@both_widths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64])
def test_a_table_has_the_same_bits_for_any_number_of_rows(channels, dtype, rows):
    conditional = DiscretizedLogisticMixture(channels, MIXTURES)
    parameters = 2 * torch.randn(128, conditional.num_parameters, dtype=dtype)
    levels = torch.randint(0, 256, (128, 2)).to(dtype)

    def tables(part: slice) -> torch.Tensor:
        listing = conditional.probabilities(parameters[part].contiguous())
        return torch.stack([next(listing), *(listing.send(levels[part, c]) for c in range(channels - 1))], dim=1)

    together = tables(slice(None))
    for start in range(0, 128, rows):
        part = slice(start, start + rows)
        assert torch.equal(tables(part), together[part])


# -- values and pixels ------------------------------------------------------------------------------------------------


def test_pixels_are_levels_and_the_network_reads_minus_one_to_one():
    conditional = DiscretizedLogisticMixture()
    pixels = LEVELS.to(torch.uint8)
    for noise in (None, torch.rand(256), torch.rand(256, dtype=torch.float64)):
        levels = conditional.from_pixels(pixels, noise)
        assert levels.dtype == (torch.float32 if noise is None else noise.dtype)
        assert torch.equal(levels, LEVELS.to(levels.dtype))
        assert torch.equal(conditional.to_pixels(levels), pixels)
        torch.testing.assert_close(conditional.encode(levels), torch.linspace(-1, 1, 256, dtype=levels.dtype))
    continuous = torch.tensor([-3.0, 0.4, 0.6, 99.9, 254.6, 300.0])
    assert conditional.to_pixels(continuous).tolist() == [0, 0, 1, 100, 255, 255]


@pytest.mark.parametrize(("channels", "mixtures", "expected"), [(1, 10, 30), (3, 10, 100), (1, 1, 3), (3, 5, 50)])
def test_the_number_of_parameters_is_that_of_the_paper(channels, mixtures, expected):
    assert DiscretizedLogisticMixture(channels, mixtures).num_parameters == expected


def test_two_channels_are_refused():
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        DiscretizedLogisticMixture(2)


def test_only_continuous_values_are_stopped_by_a_tolerance():
    conditional = DiscretizedLogisticMixture()
    assert {name: conditional.tolerance(name) for name in conditional.couplings} == {
        "gumbel": 0,
        "inverse_cdf": 0,
        "mixture_8bit": 0,
        "paper": 0.01,
    }
