"""Noise belongs to a sample: pinned by value, by independence of the batch, and by distribution."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from lit_parallel.distributions import CLAMP
from lit_parallel.sampling.noise import logistic_noise, uniform_noise


def test_the_noise_of_seed_7_never_changes():
    # If this fails, every image of every published seed changes with it.
    expected = [
        [0.8720734548204873, 0.29536538151378355, 0.4200976785072422],
        [0.4821286018761155, 0.7241355726248441, 0.05025403948627161],
    ]
    np.testing.assert_array_equal(uniform_noise(7, [0, 3], 3), expected)


def test_noise_is_philox_keyed_by_seed_and_index():
    counter_based = np.random.Generator(np.random.Philox(key=2**63 + 1 + (12 << 64))).random(5)
    np.testing.assert_array_equal(uniform_noise(2**63 + 1, [12], 5)[0], counter_based)


@pytest.mark.parametrize("indices", [[3], [3, 4], [9, 3, 0], list(range(50))])
def test_a_sample_has_the_same_noise_in_every_batch(indices):
    alone = logistic_noise(5, [3], 20)[0]
    assert torch.equal(logistic_noise(5, indices, 20)[indices.index(3)], alone)


def test_a_longer_sample_begins_like_a_shorter_one():
    assert torch.equal(logistic_noise(5, [3], 20)[:, :7], logistic_noise(5, [3], 7))


def test_seeds_and_indices_are_not_interchangeable():
    noise = torch.stack([logistic_noise(seed, [index], 8)[0] for seed in range(6) for index in range(6)])
    assert len({tuple(row.tolist()) for row in noise}) == 36
    assert len(noise.unique()) == 36 * 8


def test_other_random_numbers_drawn_do_not_matter():
    before = logistic_noise(5, [3], 20)
    np.random.rand(3)
    torch.rand(3)
    assert torch.equal(logistic_noise(5, [3], 20), before)


def test_shape_and_dtype():
    noise = logistic_noise(0, [4, 2, 9], 6)
    assert noise.shape == (3, 6)
    assert noise.dtype == torch.float64


def test_noise_is_logistic_within_and_across_samples():
    noise = logistic_noise(1, range(400), 50).numpy()
    assert scipy.stats.kstest(noise.ravel(), "logistic").pvalue > 1e-3
    assert scipy.stats.kstest(noise[:, 17], "logistic").pvalue > 1e-3
    assert scipy.stats.kstest(noise[23], "logistic").pvalue > 1e-3
    # Neighbours in position, in index and in seed are unrelated.
    other = logistic_noise(2, range(400), 50).numpy()
    for a, b in [(noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1]), (noise, other)]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)


def test_extreme_uniforms_are_clamped(monkeypatch):
    extreme = np.array([[0.0, 1e-9, 0.5, 1 - 1e-9]])
    monkeypatch.setattr("lit_parallel.sampling.noise.uniform_noise", lambda *_: extreme)
    largest = math.log((1 - CLAMP) / CLAMP)
    assert CLAMP == 1e-5
    assert logistic_noise(0, [0], 4)[0].tolist() == pytest.approx([-largest, -largest, 0, largest], rel=1e-9)
