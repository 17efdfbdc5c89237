"""Every coupling samples its model's distribution, row by row with the same bits in any company."""

import functools
import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from exact_mixture import ExactMixture

from lit_parallel.conditionals import Categorical, Conditional, DiscretizedLogisticMixture, Logistic, base
from lit_parallel.errors import UserError

CONDITIONALS: dict[str, Conditional] = {
    "grey": DiscretizedLogisticMixture(1, 3),
    "colour": DiscretizedLogisticMixture(3, 3),
    "categorical": Categorical(7),
    "bytes": Categorical(256),
    "logistic": Logistic(1e-6),
}
ALL = [(name, coupling) for name, conditional in CONDITIONALS.items() for coupling in conditional.couplings]
every_coupling = pytest.mark.parametrize(("name", "coupling"), ALL)
every_coupling_of_levels = pytest.mark.parametrize(("name", "coupling"), [pair for pair in ALL if pair[1] != "paper"])


def pixel(channels: int) -> torch.Tensor:
    """Parameters that give nearly all probability to a handful of levels; the channels depend on each other."""
    split = torch.zeros(channels, 3 if channels == 3 else 2, 3)
    split[:, 0] = torch.tensor([-0.43, -0.4, -0.38])
    split[:, 1] = torch.tensor([-6.0, -5.4, -6.5])
    if channels == 3:
        split[:, 2] = torch.tensor([[0.5, 0.45, -0.3], [-0.6, -0.65, 0.7], [0.4, 0.42, -0.5]])
    return torch.cat([torch.tensor([0.3, 0.0, -0.5]), split.flatten()])


def drawn(conditional: Conditional, parameters: torch.Tensor, coupling: str, temperature: float, number: int):
    """Independent samples ``[number, channels]`` from one set of parameters."""
    noise = torch.from_numpy(conditional.draw_noise(np.random.default_rng(5), number, coupling)).to(parameters)
    return conditional.sample(parameters.expand(number, -1), noise, coupling, temperature)


def p_value(samples: torch.Tensor, expected: dict[tuple[int, ...], float]) -> float:
    """Chi-square test against exact probabilities; what is expected less than five times is one bin."""
    number = len(samples)
    counts = dict(zip(expected, itertools.repeat(0), strict=False))
    outside = 0
    for value in map(tuple, samples.long().tolist()):
        if value in counts:
            counts[value] += 1
        else:
            outside += 1
    observed = np.array([*counts.values()])
    mean = number * np.array([*expected.values()])
    rare = mean < 5
    observed = np.append(observed[~rare], observed[rare].sum() + outside)
    mean = np.append(mean[~rare], number - mean[~rare].sum())
    assert len(mean) > 4
    return float(scipy.stats.chisquare(observed[mean > 0.5], mean[mean > 0.5], sum_check=False).pvalue)


@functools.cache
def reference(name: str, mixture: bool, temperature: float) -> dict[tuple[int, ...], float]:
    channels = CONDITIONALS[name].channels
    if mixture:  # the temperature goes into the mixture
        return ExactMixture(pixel(channels).numpy(), channels, 3, temperature).likely()
    return ExactMixture(pixel(channels).numpy(), channels, 3).likely(temperature)


# -- the distribution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grey", "colour"])
@pytest.mark.parametrize("coupling", ["gumbel", "inverse_cdf", "mixture_8bit"])
@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.0])
def test_couplings_sample_the_mixture(name, coupling, temperature):
    conditional = CONDITIONALS[name]
    samples = drawn(conditional, pixel(conditional.channels), coupling, temperature, 10_000)
    assert p_value(samples, reference(name, coupling == "mixture_8bit", temperature)) > 1e-4


def test_the_test_tells_distributions_apart():
    samples = drawn(CONDITIONALS["colour"], pixel(3), "gumbel", 1.0, 10_000)
    # A logit; a mean and a log-scale of red; the coefficients from red to green, red to blue, green to blue.
    for parameter, difference in ((0, 0.3), (3, 0.003), (6, 0.2), (9, 0.02), (18, 0.02), (27, 0.02)):
        other = pixel(3)
        other[parameter] += difference
        assert p_value(samples, ExactMixture(other.numpy(), 3, 3).likely()) < 1e-4
    assert p_value(samples, reference("colour", False, 1.1)) < 1e-4


def test_continuous_values_have_the_first_channels_distribution_when_rounded():
    samples = drawn(CONDITIONALS["colour"], pixel(3), "paper", 1.0, 10_000)
    assert (samples != samples.round()).float().mean() > 0.99
    red = ExactMixture(pixel(3).numpy(), 3, 3).conditional(())
    assert p_value(samples[:, :1].round(), {(level,): p for level, p in enumerate(red) if p > 1e-5}) > 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_grey_values_of_the_paper_round_to_those_of_mixture_8bit(temperature):
    grey = CONDITIONALS["grey"]
    parameters = torch.randn(500, grey.num_parameters) * 2
    noise = torch.from_numpy(grey.draw_noise(np.random.default_rng(5), 500, "paper")).float()
    continuous = grey.sample(parameters, noise, "paper", temperature)
    assert torch.equal(continuous.round(), grey.sample(parameters, noise, "mixture_8bit", temperature))
    assert continuous.min() == 0  # values beyond black and white are cut off
    assert continuous.max() == 255


def test_continuous_green_follows_the_continuous_red():
    colour = DiscretizedLogisticMixture(3, 1)
    parameters = torch.zeros(1, colour.num_parameters)
    parameters[0, [2, 5, 8]] = -20.0  # log-scales, of which -7 counts: 0.001
    parameters[0, 6] = 20.0  # coefficient 1 from red to blue ([3, 6, 9] are the coefficients)
    parameters[0, 9] = -20.0  # -1 from green to blue
    noise = torch.tensor([[1.0, 300.0, -200.0, 0.0]])  # race, then the logistic noise of each channel
    red, green, blue = colour.sample(parameters, noise, "paper", 1.0)[0].double().sub(127.5).div(127.5).tolist()
    scale = np.exp(-7)
    assert (red, green) == pytest.approx((300 * scale, -200 * scale), abs=1e-6)
    assert blue == pytest.approx(red - green, abs=1e-6)


@pytest.mark.parametrize("coupling", ["gumbel", "inverse_cdf"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_couplings_sample_the_categorical_distribution(coupling, temperature):
    logits = torch.tensor([0.0, 1.0, -2.0, 0.5, -40.0, 0.3, -1.0])
    samples = drawn(CONDITIONALS["categorical"], logits, coupling, temperature, 10_000)
    p = scipy.special.softmax(logits.double().numpy() / temperature)
    assert p_value(samples, {(level,): float(p[level]) for level in range(7)}) > 1e-4
    assert (samples == 4).sum() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_the_logistic_distribution_is_sampled(temperature):
    samples = drawn(CONDITIONALS["logistic"], torch.tensor([0.7, -0.4]).double(), "inverse_cdf", temperature, 10_000)
    exact = scipy.stats.logistic(0.7, np.exp(np.float32(-0.4)) * temperature)
    assert scipy.stats.kstest(samples[:, 0].numpy(), exact.cdf).pvalue > 1e-4


@every_coupling_of_levels
@pytest.mark.parametrize("temperature", [1e-3, 1e-12])
def test_a_low_temperature_gives_the_mode(name, coupling, temperature):
    conditional = CONDITIONALS[name]
    if isinstance(conditional, Logistic):
        samples = drawn(conditional, torch.tensor([0.7, -0.4]), coupling, temperature, 50)
        torch.testing.assert_close(samples, torch.full((50, 1), 0.7), rtol=0, atol=1e-1 if temperature > 1e-6 else 1e-6)
        return
    if isinstance(conditional, Categorical):
        logits = torch.randn(conditional.levels)
        logits[5] = 6.0
        assert (drawn(conditional, logits, coupling, temperature, 50) == 5).all()
        return
    exact = ExactMixture(pixel(conditional.channels).numpy(), conditional.channels, 3)
    mode: tuple[int, ...] = ()
    for channel in range(conditional.channels):
        if coupling == "mixture_8bit":  # the mean of the component with the largest weight
            exact.weights = np.eye(3)[0]
        mode = (*mode, int(exact.conditional(mode).argmax()))
        assert len(mode) == channel + 1
    samples = drawn(conditional, pixel(conditional.channels), coupling, temperature, 50)
    assert samples.tolist() == [list(mode)] * 50


# -- the same bits in any company -------------------------------------------------------------------------------------


def inputs(name: str, coupling: str, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    conditional = CONDITIONALS[name]
    parameters = 2 * torch.randn(rows, conditional.num_parameters, dtype=dtype)
    noise = conditional.draw_noise(np.random.default_rng(3), rows, coupling)
    return parameters, torch.from_numpy(noise).to(dtype)


@every_coupling
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_gives_the_same_bits_in_any_number_of_rows(name, coupling, dtype):
    conditional = CONDITIONALS[name]
    parameters, noise = inputs(name, coupling, 1000, dtype)
    before = parameters.clone(), noise.clone()
    together = conditional.sample(parameters, noise, coupling, 0.9)
    assert together.shape == (1000, conditional.channels)
    assert together.dtype == dtype
    assert together.isfinite().all()
    for rows, starts in ((1, range(0, 1000, 40)), (7, range(0, 994, 142)), (64, range(0, 936, 312))):
        for start in starts:
            some = slice(start, start + rows)
            assert torch.equal(conditional.sample(parameters[some], noise[some], coupling, 0.9), together[some])
    assert torch.equal(parameters, before[0])
    assert torch.equal(noise, before[1])


@every_coupling
def test_parameters_need_not_be_contiguous(name, coupling):
    conditional = CONDITIONALS[name]
    parameters, noise = inputs(name, coupling, 50, torch.float32)
    strided = parameters.T.contiguous().T
    assert torch.equal(
        conditional.sample(strided, noise, coupling, 1.0), conditional.sample(parameters, noise, coupling, 1.0)
    )


@pytest.mark.parametrize(("name", "coupling"), [pair for pair in ALL if pair[1] in ("gumbel", "inverse_cdf")])
def test_large_batches_are_cut_into_chunks_that_change_nothing(monkeypatch, name, coupling):
    conditional = CONDITIONALS[name]
    parameters, noise = inputs(name, coupling, 100, torch.float32)
    expected = conditional.sample(parameters, noise, coupling, 1.0)
    if isinstance(conditional, Logistic):
        return  # has no tables
    rows: list[int] = []
    original = conditional._sample_rows
    monkeypatch.setattr(conditional, "_sample_rows", lambda p, *rest: rows.append(len(p)) or original(p, *rest))
    for bound in (0, 3 * conditional.levels, 64 * conditional.levels + 1):
        monkeypatch.setitem(base._TABLE_ELEMENTS, "cpu", bound)
        rows.clear()
        assert torch.equal(conditional.sample(parameters, noise, coupling, 1.0), expected)
        assert sum(rows) == 100
        assert max(rows) == max(bound // conditional.levels, 1)


@every_coupling
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_parameters_that_are_not_finite_give_not_a_number_in_their_own_row(name, coupling, bad):
    conditional = CONDITIONALS[name]
    number = conditional.num_parameters
    parameters, noise = inputs(name, coupling, 2 * number, torch.float32)
    expected = conditional.sample(parameters, noise, coupling, 1.0)
    spoilt = torch.arange(0, 2 * number, 2)
    parameters[spoilt, torch.arange(number)] = bad  # each parameter in turn
    values = conditional.sample(parameters, noise, coupling, 1.0)
    assert values[spoilt].isnan().all()
    assert torch.equal(values[spoilt + 1], expected[spoilt + 1])


# -- noise ------------------------------------------------------------------------------------------------------------

WIDTHS = {
    ("grey", "gumbel"): 256,
    ("grey", "inverse_cdf"): 1,
    ("grey", "mixture_8bit"): 3 + 1,
    ("grey", "paper"): 3 + 1,
    ("colour", "gumbel"): 3 * 256,
    ("colour", "inverse_cdf"): 3,
    ("colour", "mixture_8bit"): 3 + 3,
    ("colour", "paper"): 3 + 3,
    ("categorical", "gumbel"): 7,
    ("categorical", "inverse_cdf"): 1,
    ("bytes", "gumbel"): 256,
    ("bytes", "inverse_cdf"): 1,
    ("logistic", "inverse_cdf"): 1,
}


@every_coupling
def test_noise_depends_on_the_generator_alone(name, coupling):
    conditional = CONDITIONALS[name]
    noise = conditional.draw_noise(np.random.default_rng(3), 11, coupling)
    assert noise.shape == (11, WIDTHS[name, coupling])
    assert noise.dtype in (np.float32, np.float64)
    np.testing.assert_array_equal(conditional.draw_noise(np.random.default_rng(3), 11, coupling), noise)
    assert (conditional.draw_noise(np.random.default_rng(4), 11, coupling) != noise).any()
    assert len(np.unique(noise)) > 0.99 * noise.size  # every number is its own


class Extreme:
    """A generator whose uniform numbers are all the largest possible, its exponential ones the smallest."""

    def random(self, shape):
        return np.full(shape, 1 - 2.0**-53)

    def standard_exponential(self, shape, dtype=np.float64):
        return np.zeros(shape, dtype)


@pytest.mark.parametrize("name", ["grey", "colour", "categorical", "bytes"])
def test_the_smallest_exponential_number_cannot_make_an_impossible_level_win(name):
    conditional = CONDITIONALS[name]
    race = conditional.draw_noise(Extreme(), 2, "gumbel")
    assert (race > 0).all()
    assert (race < 1e-7).all()


@pytest.mark.parametrize("name", ["grey", "colour", "categorical", "bytes"])
def test_the_largest_uniform_number_chooses_the_last_possible_level(name):
    conditional = CONDITIONALS[name]
    noise = torch.from_numpy(conditional.draw_noise(Extreme(), 1, "inverse_cdf")).float()
    assert (noise < 1).all()
    if isinstance(conditional, DiscretizedLogisticMixture):
        parameters = pixel(conditional.channels)[None]
        value = conditional.sample(parameters, noise, "inverse_cdf", 1.0)
        assert (value < 250).all()
    else:
        logits = torch.full((1, conditional.levels), -1e4)
        logits[0, 2:4] = 0
        assert conditional.sample(logits, noise, "inverse_cdf", 1.0).item() == 3


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONALS)
def test_the_default_coupling_is_the_first_and_unknown_ones_are_refused_in_one_line(name):
    conditional = CONDITIONALS[name]
    assert conditional.check_coupling(None) == ("inverse_cdf" if name == "logistic" else "gumbel")
    for coupling in conditional.couplings:
        assert conditional.check_coupling(coupling) == coupling
    with pytest.raises(UserError, match=r"no coupling 'gumble' \(sampling.coupling\)") as error:
        conditional.check_coupling("gumble")
    assert "\n" not in str(error.value)
    assert conditional.couplings[0] in str(error.value)
