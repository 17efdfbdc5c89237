import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from lit_parallel.plots import Convergence, convergence_figure, image_grid, save_figure, save_image_grid

BACKGROUND = 160


def numbered(n: int, channels: int = 1, height: int = 2, width: int = 3) -> torch.Tensor:
    """Images of one value each: 1, 2, 3, ...; in colour, with 10 more in each further channel."""
    values = torch.arange(1, n + 1).view(n, 1, 1, 1) + 10 * torch.arange(channels).view(1, channels, 1, 1)
    return values.expand(n, channels, height, width).to(torch.uint8)


def test_grid_places_images_row_by_row_between_lines():
    grid = image_grid(numbered(3), columns=2)
    assert grid.dtype == np.uint8
    assert grid.shape == (2 * 3 + 1, 2 * 4 + 1, 3)
    b = BACKGROUND
    assert grid[:, :, 0].tolist() == [
        [b] * 9,
        [b, 1, 1, 1, b, 2, 2, 2, b],
        [b, 1, 1, 1, b, 2, 2, 2, b],
        [b] * 9,
        [b, 3, 3, 3, b, b, b, b, b],
        [b, 3, 3, 3, b, b, b, b, b],
        [b] * 9,
    ]
    assert (grid == grid[:, :, :1]).all(), "a grey image is grey"


def test_grid_keeps_pixels_and_colours_in_place():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    grid = image_grid(images, columns=2, padding=0)
    assert grid.shape == (4, 10, 3)
    assert (grid[:, :5] == images[0].permute(1, 2, 0).numpy()).all()
    assert (grid[:, 5:] == images[1].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (4, 2, 2), (5, 2, 3), (10, 3, 4), (64, 8, 8)])
def test_grid_is_nearly_square_by_default(n, rows, columns):
    assert image_grid(numbered(n), padding=0).shape == (rows * 2, columns * 3, 3)


def test_grid_has_no_more_columns_than_images():
    assert image_grid(numbered(2), columns=10, padding=0).shape == (2, 6, 3)


def test_grid_is_enlarged_without_new_values():
    small, large = image_grid(numbered(4)), image_grid(numbered(4), scale=3)
    assert large.shape == (3 * small.shape[0], 3 * small.shape[1], 3)
    for row in range(3):
        for column in range(3):
            assert (large[row::3, column::3] == small).all()


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(4, 1, 8, 8),
        torch.zeros(4, 8, 8, dtype=torch.uint8),
        torch.zeros(4, 2, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
    ],
)
def test_grid_says_what_images_it_wants(images):
    with pytest.raises(ValueError, match=r"uint8 of shape \[n, channels, height, width\]"):
        image_grid(images)


@pytest.mark.parametrize("wrong", [{"columns": 0}, {"padding": -1}, {"scale": 0}])
def test_grid_says_which_argument_is_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
        image_grid(numbered(4), **wrong)


@pytest.mark.parametrize(("n", "channels", "side", "scale"), [(64, 1, 28, 3), (1, 1, 28, 8), (1000, 3, 32, 1)])
def test_saved_grid_is_a_png_that_a_person_can_look_at(tmp_path, n, channels, side, scale):
    images = numbered(n, channels, side, side)
    save_image_grid(images, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert (np.asarray(picture) == image_grid(images, scale=scale)).all()


def curves() -> list[Convergence]:
    slow = 0.5 ** torch.arange(21.0)
    exact = torch.tensor([8.0, 4.0, 1e-3, 0.0, 0.0])
    return [Convergence("sequential", slow, slow[1:]), Convergence("jacobi", exact, exact[1:])]


def test_figure_has_a_line_for_each_solver_in_both_panels():
    figure = convergence_figure(curves(), 20)
    error, change = figure.axes
    assert "T = 20" in figure.get_suptitle()
    for axes, first in ((error, 0), (change, 1)):
        slow, exact = (line for line in axes.lines if not line.get_label().startswith("_"))
        assert (slow.get_label(), exact.get_label()) == ("sequential", "jacobi")
        assert slow.get_color() != exact.get_color()
        assert slow.get_linestyle() != exact.get_linestyle(), "told apart without colour"
        assert list(slow.get_xdata()) == list(range(first, 21))
        np.testing.assert_array_equal(slow.get_ydata(), 0.5 ** np.arange(first, 21))
        assert axes.get_yscale() == "log"
        assert axes.get_xlabel() == "parallel iteration k"
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == ["sequential", "jacobi", "marker: exactly zero from here on"]


def test_curve_ends_with_a_marker_where_it_becomes_exactly_zero():
    error, change = convergence_figure(curves(), 20).axes
    for axes, first in ((error, 0), (change, 1)):
        slow, exact = (line for line in axes.lines if not line.get_label().startswith("_"))
        zero = axes.get_yticks()[0]
        assert axes.get_yticklabels()[0].get_text() == "0"
        assert list(exact.get_xdata()) == list(range(first, 4)), "3: the first exact iterate"
        assert exact.get_ydata()[-1] == zero < 0.5**20
        assert exact.get_markevery() == [3 - first]
        assert slow.get_markevery() == [], "never exactly zero: no marker"


def test_curve_skips_what_cannot_be_drawn_and_claims_no_zero_after_it():
    nan, inf = float("nan"), float("inf")
    change = torch.tensor([1.0, 0.0, inf, 0.1, nan])
    axes = convergence_figure([Convergence("gs_jacobi", torch.ones(6), change)], 5).axes[1]
    line = axes.lines[0]
    assert list(line.get_xdata()) == [1, 4]
    np.testing.assert_allclose(line.get_ydata(), [1.0, 0.1])
    assert line.get_markevery() == []


@pytest.mark.parametrize("length", [1, 2, 10, 784, 1024, 3072])
def test_iterations_axis_shows_zero_powers_of_ten_and_the_length(length):
    axes = convergence_figure([Convergence("jacobi", torch.zeros(2), torch.zeros(1))], length).axes[0]
    ticks = [float(label.get_text()) for label in axes.get_xticklabels()]
    assert ticks[0] == 0
    assert ticks[-1] == length
    assert ticks == sorted(set(ticks))
    assert all(tick * 2 < length for tick in ticks[1:-1]), "no tick runs into T"


def test_saved_figure_is_a_png_and_leaves_no_trace(tmp_path):
    settings = dict(matplotlib.rcParams)
    save_figure(convergence_figure(curves(), 20), tmp_path / "convergence.png")
    with Image.open(tmp_path / "convergence.png") as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (2000, 800))
        assert len(picture.convert("RGB").getcolors(2000 * 800)) > 10, "something is drawn"
    assert dict(matplotlib.rcParams) == settings


def test_convergence_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"iterations \+ 1.*'jacobi'"):
        Convergence("jacobi", torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="no curve"):
        convergence_figure([], 10)
