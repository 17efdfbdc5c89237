"""Pictures of parallel sampling: when each pixel became final, and what the iterates looked like on the way."""

import math
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lit_parallel.plots import check_images, image_grid, new_figure

_MAP_SAMPLES = 8
_MAP_SAMPLES_IN_A_ROW = 4
_STRIP_SAMPLES = 3

# Sizes in inches.
_MAP_SIDE = 1.9
_STRIP_SIDE = 0.8
_LEAST_SIDE = 0.25  # of an image of one row or one column of pixels, which would vanish
_TITLE_WIDTH = 6.0  # the least width of a figure, so that its title fits
_BAR_HEIGHT = 3.4  # the least height of one with a colour bar, so that the bar's label fits

_MAP_COLOURS = "viridis"
_GIVEN = "0.75"  # no colour of the map is grey
_FRAME = "0.6"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def iteration_map_figure(images: Tensor, maps: Tensor, length: int, solver: str) -> Figure:
    """Draw samples and, below each, when its pixels became final: the picture that explains the method.

    Only the first 8 samples are drawn, and the numbers in the figure are those of the samples drawn. All maps share
    one scale of colours; pixels that never changed are grey.

    Args:
        images: The samples, ``[n, channels, height, width]`` of uint8, with 1 or 3 channels.
        maps: For each pixel, the parallel iteration at which it became final, ``[n, height, width]`` of whole numbers;
            the first iteration is 1, and 0 marks a pixel that had its value from the start (given, or guessed).
        length: Number of equations, T.
        solver: Its name in the title.

    Raises:
        ValueError: The images or the maps are not of that shape or type, or an iteration is negative.
    """
    check_images(images)
    n, _, height, width = images.shape
    if maps.dtype not in _INTEGERS or maps.shape != (n, height, width):
        raise ValueError(
            f"maps must be whole numbers of shape [n, height, width] = {[n, height, width]}, "
            f"not {str(maps.dtype).removeprefix('torch.')} of shape {list(maps.shape)}"
        )
    if maps.min() < 0:
        raise ValueError(f"an iteration in maps must be at least 0, not {int(maps.min())}")
    n = min(n, _MAP_SAMPLES)
    samples = images[:n].detach().cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    iterations = maps[:n].detach().cpu().numpy()
    largest = int(iterations.max())

    rows = math.ceil(n / _MAP_SAMPLES_IN_A_ROW)
    columns = math.ceil(n / rows)
    cell_width, cell_height = _cell(height, width, _MAP_SIDE)
    of = f" (largest of {n} samples)" if n > 1 else ""
    figure = new_figure(
        f"{solver}: {_count(length, 'equation')} final after {_count(largest, 'iteration')}{of}",
        max(columns * (cell_width + 0.1) + 1.0, _TITLE_WIDTH),
        max(rows * (2 * cell_height + 0.4) + 0.4, _BAR_HEIGHT),
        layout="compressed",  # constrained, without gaps between axes of equal aspect
    )

    axes = figure.subplots(2 * rows, columns, squeeze=False)
    colours = matplotlib.colormaps[_MAP_COLOURS].with_extremes(under=_GIVEN)
    for i in range(rows * columns):
        above, below = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        if i >= n:
            above.set_axis_off()
            below.set_axis_off()
            continue
        above.imshow(samples[i], interpolation="nearest")
        heat = below.imshow(iterations[i], interpolation="nearest", cmap=colours, vmin=1, vmax=max(largest, 2))
        below.set_xlabel(_count(int(iterations[i].max()), "iteration"), size=8, labelpad=3)
        _frame(above)
        _frame(below)

    bar = figure.colorbar(heat, ax=axes, aspect=40 * rows, pad=0.08 / columns, ticks=_ticks(largest))
    given = "\n(grey: from the start)" if (iterations == 0).any() else ""
    bar.set_label(f"iteration at which the pixel became final{given}", size=9)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)
    return figure


@dataclass(frozen=True)
class Strip:
    """Iterates of one solver.

    Attributes:
        solver: Its name at the left.
        iterations: The parallel iterations k after which the iterates were taken, increasing; 0 is the initial guess,
            and the last one is the result.
        images: The iterates, ``[len(iterations), n, channels, height, width]`` of uint8, with 1 or 3 channels.
    """

    solver: str
    iterations: list[int]
    images: Tensor

    def __post_init__(self) -> None:
        check_images(self.images, ("iterations", "n"))
        if len(self.iterations) != len(self.images):
            raise ValueError(
                f"images of {len(self.images)} iterations need {len(self.images)} numbers of iterations, "
                f"not {len(self.iterations)} (solver '{self.solver}')"
            )
        if self.iterations[0] < 0 or any(k >= after for k, after in pairwise(self.iterations)):
            raise ValueError(
                f"iterations must increase and start with 0 or more, not {self.iterations} (solver '{self.solver}')"
            )


def strip_iterations(total: int, columns: int = 10) -> list[int]:
    """Choose the iterations to show in a strip: whole numbers from 0 to the total, evenly spaced, both included.

    Args:
        total: The last iteration.
        columns: How many to choose; all of them if there are not so many.

    Raises:
        ValueError: An argument is out of range.
    """
    for name, value, least in (("total", total, 0), ("columns", columns, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    steps = min(columns - 1, total)
    return [0, *(round(total * i / steps) for i in range(1, steps + 1))]


def strips_figure(strips: list[Strip], length: int) -> Figure:
    """Draw the iterates of several solvers over time (as the figures with samples in Song et al. 2021).

    Each solver has a panel with a row for each of the first 3 samples and a column for each iteration, whose number
    stands above it; that of the result is bold.

    Args:
        strips: One for each solver, at least one; their numbers of iterations may differ, their images' sizes not.
        length: Number of equations, T.

    Raises:
        ValueError: There is no strip, or their images do not have the same shape.
    """
    if not strips:
        raise ValueError("there is no strip to draw")
    shape = strips[0].images.shape[1:]
    for strip in strips:
        if strip.images.shape[1:] != shape:
            raise ValueError(
                f"all strips must show the same samples, {list(shape)} for each iteration, "
                f"not {list(strip.images.shape[1:])} (solver '{strip.solver}')"
            )
    rows, (height, width) = min(shape[0], _STRIP_SAMPLES), shape[2:]
    columns = max(len(strip.iterations) for strip in strips)
    cell_width, cell_height = _cell(height, width, _STRIP_SIDE)
    figure = new_figure(
        f"Iterates after k parallel iterations (T = {_count(length, 'equation')})",
        max(columns * cell_width + 1.2, _TITLE_WIDTH),
        len(strips) * (rows * cell_height + 0.4) + 0.4,
        layout="compressed",
    )

    panels = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axes, strip in zip(panels, strips, strict=True):
        # Image by image along each sample's row.
        by_sample = strip.images[:, :rows].transpose(0, 1).flatten(0, 1)
        axes.imshow(image_grid(by_sample, columns=len(strip.iterations)), interpolation="nearest")
        axes.set_xlim(-0.5, columns * (width + 1) + 0.5)  # the same scale for all, the shorter strips at the left
        centres = [i * (width + 1) + (width + 1) / 2 for i in range(len(strip.iterations))]
        first, *others = strip.iterations
        axes.set_xticks(centres, [f"k = {first:,}", *(f"{k:,}" for k in others)])
        axes.tick_params(top=False, bottom=False, labeltop=True, labelbottom=False, labelsize=9, pad=1)
        axes.get_xticklabels()[-1].set_fontweight("bold")  # those that are shown by now, at the top
        axes.set_yticks([])
        axes.set_ylabel(strip.solver, size=10, rotation="horizontal", ha="right", va="center")
        axes.spines[:].set_visible(False)
    return figure


def _cell(height: int, width: int, side: float) -> tuple[float, float]:
    """Width and height in inches of an image whose longer side is given."""
    longer = max(height, width)
    return max(side * width / longer, _LEAST_SIDE), max(side * height / longer, _LEAST_SIDE)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _ticks(largest: int) -> list[int]:
    """Ticks of the colour bar: 1, the largest, and round numbers between them that do not run into these."""
    apart = largest / 12
    between = MaxNLocator(5, steps=[1, 2, 5, 10], integer=True).tick_values(1, max(largest, 2))
    return sorted({1, max(largest, 1), *(int(tick) for tick in between if 1 + apart < tick < largest - apart)})


def _frame(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=_FRAME, linewidth=0.5)
