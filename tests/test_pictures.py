from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from PIL import Image

from lit_parallel.pictures import Strip, iteration_map_figure, strip_iterations, strips_figure
from lit_parallel.plots import image_grid, save_figure


def photographs(n: int, channels: int = 3, height: int = 4, width: int = 5) -> torch.Tensor:
    """Images that all differ."""
    return torch.randint(0, 256, (n, channels, height, width), generator=torch.Generator().manual_seed(0)).byte()


def staircases(n: int, height: int = 4, width: int = 5) -> torch.Tensor:
    """Maps of one more iteration for each pixel in raster order, and ten more for each sample."""
    return 1 + torch.arange(height * width).view(1, height, width) + 10 * torch.arange(n).view(n, 1, 1)


def drawn_maps(figure):
    """Pairs of axes, a sample and its map, in the order of the samples, and the colour bar's axes."""
    *axes, bar = figure.axes
    shown = [a for a in axes if a.images]
    maps = [a for a in shown if a.get_xlabel()]
    samples = [a for a in shown if not a.get_xlabel()]
    return list(zip(samples, maps, strict=True)), bar


@pytest.mark.parametrize("channels", [1, 3])
def test_each_sample_stands_above_its_map(channels):
    images, maps = photographs(3, channels), staircases(3)
    figure = iteration_map_figure(images, maps, 20, "gs_jacobi")
    pairs, _ = drawn_maps(figure)
    assert len(pairs) == 3
    figure.canvas.draw()
    for i, (above, below) in enumerate(pairs):
        np.testing.assert_array_equal(above.images[0].get_array(), image_grid(images[i : i + 1], padding=0))
        np.testing.assert_array_equal(below.images[0].get_array(), maps[i].numpy())
        assert above.get_position().x0 == pytest.approx(below.get_position().x0)
        assert above.get_position().y0 > below.get_position().y1
        for axes in (above, below):
            assert axes.images[0].get_interpolation() == "nearest"
            assert axes.get_aspect() == 1
            assert len(axes.get_xticks()) == len(axes.get_yticks()) == 0


@pytest.mark.parametrize(
    ("n", "rows"), [(1, [1]), (2, [2]), (4, [4]), (5, [3, 2]), (7, [4, 3]), (8, [4, 4]), (9, [4, 4])]
)
def test_samples_stand_in_one_row_or_two_and_the_first_eight_are_drawn(n, rows):
    figure = iteration_map_figure(photographs(n), staircases(n), 20, "jacobi")
    pairs, _ = drawn_maps(figure)
    tops = [above.get_subplotspec().rowspan.start for above, _ in pairs]
    assert [tops.count(top) for top in sorted(set(tops))] == rows
    assert tops == sorted(tops)


def test_title_and_labels_tell_the_iterations_of_the_samples_that_are_drawn():
    figure = iteration_map_figure(photographs(9), 1000 * staircases(9), 1024, "gs_jacobi")
    assert figure.get_suptitle() == "gs_jacobi: 1,024 equations final after 90,000 iterations (largest of 8 samples)"
    pairs, bar = drawn_maps(figure)
    assert [below.get_xlabel() for _, below in pairs] == [f"{20 + 10 * i},000 iterations" for i in range(8)]
    assert bar.get_ylabel() == "iteration at which the pixel became final"

    figure = iteration_map_figure(photographs(1), torch.ones(1, 4, 5, dtype=torch.uint8), 1, "jacobi")
    assert figure.get_suptitle() == "jacobi: 1 equation final after 1 iteration"


def test_all_maps_share_the_colours_of_one_bar():
    figure = iteration_map_figure(photographs(4), staircases(4), 20, "jacobi")
    pairs, bar = drawn_maps(figure)
    assert {below.images[0].get_clim() for _, below in pairs} == {(1, 50)}
    assert bar.get_ylim() == (1, 50)
    last, first = pairs[3][1].images[0], pairs[0][1].images[0]
    assert last.to_rgba(50) == first.to_rgba(50) != first.to_rgba(1)


@pytest.mark.parametrize("largest", [0, 1, 2, 3, 10, 37, 60, 784, 1024])
def test_colour_bar_shows_whole_numbers_from_one_to_the_largest(largest):
    figure = iteration_map_figure(photographs(1), torch.full((1, 4, 5), largest), 20, "jacobi")
    ticks = list(drawn_maps(figure)[1].get_yticks())
    assert (ticks[0], ticks[-1]) == (1, max(largest, 1))
    assert ticks == sorted({round(tick) for tick in ticks})
    assert len(ticks) <= 7
    assert all(later - earlier > largest / 12 for earlier, later in pairwise(ticks))


def test_given_pixels_are_grey_and_explained():
    maps = staircases(2)
    maps[1, :2] = 0
    figure = iteration_map_figure(photographs(2), maps, 20, "jacobi")
    pairs, bar = drawn_maps(figure)
    heat = pairs[1][1].images[0]
    colours = heat.to_rgba(heat.get_array())
    assert (colours[:2] == to_rgba("0.75")).all()
    assert (np.ptp(colours[2:, :, :3], axis=2) > 0.05).all(), "no iteration has a grey colour"
    assert "grey: from the start" in bar.get_ylabel()


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize(("height", "width"), [(1, 100), (100, 1), (1, 1), (10, 30)])
def test_images_of_every_form_are_drawn_without_a_warning(tmp_path, n, height, width):
    images, maps = photographs(n, 1, height, width), staircases(n, height, width)
    save_figure(iteration_map_figure(images, maps, height * width, "jacobi"), tmp_path / "maps.png")
    strip = Strip("jacobi", [0, 1], torch.stack([images, images]))
    save_figure(strips_figure([strip], height * width), tmp_path / "strips.png")


def test_iteration_maps_that_do_not_fit_are_refused():
    images, maps = photographs(2), staircases(2)
    with pytest.raises(ValueError, match=r"uint8 of shape \[n, channels, height, width\]"):
        iteration_map_figure(images.float(), maps, 20, "jacobi")
    for wrong in (maps.float(), maps > 3, maps[:1], maps[:, None], maps.mT):
        with pytest.raises(ValueError, match=r"whole numbers of shape \[n, height, width\] = \[2, 4, 5\]"):
            iteration_map_figure(images, wrong, 20, "jacobi")
    with pytest.raises(ValueError, match="at least 0, not -9"):
        iteration_map_figure(images, maps - 10, 20, "jacobi")


def strip(solver: str = "jacobi", iterations: tuple[int, ...] = (0, 5, 9), n: int = 4, channels: int = 3) -> Strip:
    images = photographs(len(iterations) * n, channels)
    return Strip(solver, list(iterations), images.unflatten(0, (len(iterations), n)))


@pytest.mark.parametrize("channels", [1, 3])
def test_strip_has_a_row_for_each_sample_and_a_column_for_each_iteration(channels):
    shown = strip(channels=channels)
    (axes,) = strips_figure([shown], 20).axes
    grid = axes.images[0].get_array()
    assert grid.shape == (3 * 5 + 1, 3 * 6 + 1, 3), "3 of the 4 samples, with lines between and around the images"
    assert axes.images[0].get_interpolation() == "nearest"
    for column, centre in enumerate(axes.get_xticks()):
        left = 1 + 6 * column
        assert centre == left + 2, "the number stands above the middle of 5 pixels"
        for sample in range(3):
            top = 1 + 5 * sample
            image = shown.images[column, sample].permute(1, 2, 0).expand(-1, -1, 3)
            np.testing.assert_array_equal(grid[top : top + 4, left : left + 5], image.numpy())


def test_strips_tell_solver_iterations_and_length():
    figure = strips_figure([strip("sequential", (0, 500, 1024)), strip("gs_jacobi", (0, 7))], 1024)
    assert figure.get_suptitle() == "Iterates after k parallel iterations (T = 1,024 equations)"
    long, short = figure.axes
    assert (long.get_ylabel(), short.get_ylabel()) == ("sequential", "gs_jacobi")
    assert [label.get_text() for label in long.get_xticklabels()] == ["k = 0", "500", "1,024"]
    assert [label.get_text() for label in short.get_xticklabels()] == ["k = 0", "7"]
    figure.canvas.draw()
    for axes in figure.axes:
        labels = axes.get_xticklabels()
        assert [label.get_fontweight() for label in labels] == ["normal"] * (len(labels) - 1) + ["bold"]
        assert all(label.get_window_extent().y0 > axes.get_window_extent().y1 for label in labels), "above the column"


def test_strips_of_different_lengths_are_drawn_at_one_scale_from_the_left():
    figure = strips_figure([strip(iterations=(0, 1, 2, 3)), strip(iterations=(0, 7))], 20)
    figure.canvas.draw()
    long, short = figure.axes
    assert long.get_xlim() == short.get_xlim() == (-0.5, 4 * 6 + 0.5)
    assert long.get_position().bounds[0::2] == pytest.approx(short.get_position().bounds[0::2])
    right = [axes.images[0].get_extent()[1] for axes in figure.axes]
    assert right == [4 * 6 + 0.5, 2 * 6 + 0.5]


def test_strips_that_do_not_fit_are_refused():
    images = photographs(6).unflatten(0, (3, 2))
    for wrong in (images.float(), images[0], images[:, :0], images[:, :, :2]):
        with pytest.raises(ValueError, match=r"uint8 of shape \[iterations, n, channels, height, width\]"):
            Strip("jacobi", [0, 1, 2], wrong)
    with pytest.raises(ValueError, match=r"images of 3 iterations.*not 2 .*'jacobi'"):
        Strip("jacobi", [0, 1], images)
    for numbers in ([0, 2, 2], [0, 2, 1], [-1, 0, 1]):
        with pytest.raises(ValueError, match=r"must increase and start with 0 or more.*'jacobi'"):
            Strip("jacobi", numbers, images)
    with pytest.raises(ValueError, match="no strip"):
        strips_figure([], 20)
    with pytest.raises(ValueError, match=r"same samples.*\[4, 3, 4, 5\].*\[2, 3, 4, 5\].*'gs_jacobi'"):
        strips_figure([strip(), strip("gs_jacobi", n=2)], 20)


@pytest.mark.parametrize(
    ("total", "columns", "expected"),
    [
        (0, 10, [0]),
        (1, 10, [0, 1]),
        (4, 5, [0, 1, 2, 3, 4]),
        (9, 10, list(range(10))),
        (7, 2, [0, 7]),
        (10, 4, [0, 3, 7, 10]),
        (108, 10, [0, 12, 24, 36, 48, 60, 72, 84, 96, 108]),
    ],
)
def test_strip_iterations_are_known(total, columns, expected):
    assert strip_iterations(total, columns) == expected


def test_strip_iterations_are_even_without_duplicates_and_include_both_ends():
    for total in range(1, 60):
        for columns in range(2, 15):
            numbers = strip_iterations(total, columns)
            steps = np.diff(numbers)
            assert (numbers[0], numbers[-1], len(numbers)) == (0, total, min(columns, total + 1))
            assert steps.min() > 0
            assert steps.max() - steps.min() <= 2, "each is rounded by at most a half"


@pytest.mark.parametrize(("total", "columns", "name"), [(-1, 10, "total"), (5, 1, "columns")])
def test_strip_iterations_say_which_argument_is_out_of_range(total, columns, name):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        strip_iterations(total, columns)


def test_saved_pictures_show_their_images_and_leave_no_trace(tmp_path):
    settings = dict(matplotlib.rcParams)
    flat = torch.tensor([250, 30, 10], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    save_figure(iteration_map_figure(flat, staircases(2), 20, "jacobi"), tmp_path / "maps.png")
    save_figure(strips_figure([Strip("jacobi", [0], flat[None])], 20), tmp_path / "strips.png")
    for name in ("maps", "strips"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert (pixels == (250, 30, 10)).all(axis=2).sum() > 20_000
    assert dict(matplotlib.rcParams) == settings
