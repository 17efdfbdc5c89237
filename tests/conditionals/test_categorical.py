"""The categorical distribution against NumPy."""

import numpy as np
import pytest
import scipy.special
import torch

from lit_parallel.conditionals import Categorical


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_the_likelihood_is_the_log_softmax_and_sums_to_one(dtype, precision, spread):
    conditional = Categorical(9)
    logits = spread * torch.randn(4, 9, dtype=dtype)
    levels = torch.arange(9).to(dtype)
    log_prob = conditional.log_prob(logits[:, None].expand(4, 9, 9), levels.expand(4, 9)[..., None])
    assert log_prob.dtype == dtype
    expected = scipy.special.log_softmax(logits.double().numpy(), axis=1)
    np.testing.assert_allclose(log_prob, expected, rtol=precision, atol=precision)
    torch.testing.assert_close(log_prob.exp().sum(dim=1), torch.ones(4, dtype=dtype), rtol=0, atol=precision)


def test_gradients_are_finite_and_those_of_finite_differences():
    conditional = Categorical(5)
    logits = torch.tensor([[0.0, 1.0, -700.0, 3.0, 700.0], [1.0, -1.0, 0.0, 0.5, 2.0]], dtype=torch.float64)
    x = torch.tensor([[2.0], [4.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: conditional.log_prob(p, x), logits.requires_grad_())


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_the_table_is_proportional_to_the_probabilities(spread):
    logits = spread * torch.randn(3, 11, dtype=torch.float64)
    (table,) = Categorical(11).probabilities(logits)
    np.testing.assert_allclose(table / table.sum(dim=1, keepdim=True), scipy.special.softmax(logits, axis=1), rtol=1e-9)


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("levels", [7, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_has_the_same_bits_for_any_number_of_rows(rows, levels, dtype):
    logits = 3 * torch.randn(64, levels, dtype=dtype)
    (together,) = Categorical(levels).probabilities(logits)
    for start in range(0, 64, rows):
        (table,) = Categorical(levels).probabilities(logits[start : start + rows])
        assert torch.equal(table, together[start : start + rows])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_uniform_numbers_on_the_border_of_two_levels_choose_one_in_any_number_of_rows(device, rows):
    """Sums of a row in floating point have other bits in another order, and a GPU's order depends on the rows."""
    logits = torch.randn(2000, 256, device=device)
    cumulated = logits.softmax(dim=1).double().cumsum(dim=1)
    border = torch.randint(0, 255, (2000, 1), device=device)
    noise = cumulated.gather(1, border).float()
    together = Categorical(256).sample(logits, noise, "inverse_cdf", 1.0)
    assert ((together - border) - 0.5).abs().max() == 0.5  # the level below the border, or the one above
    for start in range(0, 2000, 10 * rows):
        some = slice(start, start + rows)
        assert torch.equal(Categorical(256).sample(logits[some], noise[some], "inverse_cdf", 1.0), together[some])


def test_every_level_survives_as_a_pixel():
    for levels in range(2, 257):
        conditional = Categorical(levels)
        x = torch.arange(float(levels))
        pixels = conditional.to_pixels(x)
        assert pixels.dtype == torch.uint8
        assert (pixels[0], pixels[-1]) == (0, 255)
        assert torch.equal(conditional.from_pixels(pixels), x)
        assert torch.equal(conditional.from_pixels(pixels, torch.rand(levels).double()), x.double())


@pytest.mark.parametrize("levels", [2, 3, 7, 128, 255, 256])
def test_a_pixel_becomes_the_nearest_level(levels):
    distance = np.abs(np.arange(256)[:, None] * (levels - 1) - np.arange(levels) * 255)
    chosen = Categorical(levels).from_pixels(torch.arange(256, dtype=torch.uint8)).long().numpy()
    assert (distance[np.arange(256), chosen] == distance.min(axis=1)).all()


def test_the_network_reads_integers():
    encoded = Categorical(4).encode(torch.tensor([[[3.0], [0.0]]]))
    assert encoded.dtype == torch.int64
    assert encoded.tolist() == [[3, 0]]


@pytest.mark.parametrize("levels", [0, 1, 257])
def test_levels_out_of_range_are_refused(levels):
    with pytest.raises(ValueError, match=f"from 2 to 256, not {levels}"):
        Categorical(levels)
