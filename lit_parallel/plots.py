"""Pictures: grids of images and figures of convergence, without a display and without global state."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from PIL import Image
from torch import Tensor

# A grid is enlarged by a whole factor up to this side, but a single digit does not fill the screen.
_VIEWING_SIDE = 800
_LARGEST_VIEWING_SCALE = 8
_BACKGROUND = 160  # a grey that neither black nor white images run into

# Okabe and Ito's colours for every kind of colour vision. Line styles and markers tell the lines apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1)), (0, (8, 2, 1, 1, 1, 1, 1, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P")


def check_images(images: Tensor, leading: tuple[str, ...] = ("n",)) -> None:
    """Raise a ValueError unless images are uint8 ``[*leading, channels, height, width]``, not empty, grey or colour."""
    dimensions = (*leading, "channels", "height", "width")
    fits = images.dtype == torch.uint8 and images.ndim == len(dimensions) and images.numel() > 0
    if not fits or images.shape[-3] not in (1, 3):
        raise ValueError(
            f"images must be uint8 of shape [{', '.join(dimensions)}] with 1 or 3 channels and none of them empty, "
            f"not {str(images.dtype).removeprefix('torch.')} of shape {list(images.shape)}"
        )


def image_grid(
    images: Tensor, columns: int | None = None, padding: int = 1, scale: int | None = 1
) -> npt.NDArray[np.uint8]:
    """Lay images out row by row.

    Args:
        images: ``[n, channels, height, width]`` of uint8, with 1 channel (grey) or 3 (red, green, blue).
        columns: Images in a row; without it, as many as make the numbers of rows and columns nearly equal.
        padding: Width of the lines between and around the images, in pixels before enlargement.
        scale: Whole factor of enlargement (nearest neighbour); None chooses one that a person can look at.

    Returns:
        ``[height, width, 3]`` of uint8.

    Raises:
        ValueError: The images are not of that shape or type, or another argument is out of range.
    """
    check_images(images)
    for name, value, least in (("columns", columns, 1), ("padding", padding, 0), ("scale", scale, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    n, _, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = math.ceil(n / columns)

    cells = torch.full((rows * columns, 3, height + padding, width + padding), _BACKGROUND, dtype=torch.uint8)
    cells[:n, :, padding:, padding:] = images.detach().cpu()  # a grey image is the same in all three channels
    grid = cells.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    # Every cell brings the lines above and to the left of its image; the last ones close the frame.
    framed = np.pad(grid.numpy(), ((0, padding), (0, padding), (0, 0)), constant_values=_BACKGROUND)

    if scale is None:
        scale = min(max(_VIEWING_SIDE // max(framed.shape), 1), _LARGEST_VIEWING_SCALE)
    return framed.repeat(scale, axis=0).repeat(scale, axis=1)


def save_image_grid(
    images: Tensor, path: str | Path, columns: int | None = None, padding: int = 1, scale: int | None = None
) -> None:
    """Write a grid of images as PNG, by default enlarged so that a person can look at it; see `image_grid`."""
    Image.fromarray(image_grid(images, columns, padding, scale)).save(path, format="PNG")


def new_figure(
    title: str, width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> Figure:
    """Start a figure of a size in inches that needs no display and that pyplot does not know."""
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    return figure


@dataclass
class Convergence:
    """How one solver approached the sequential result.

    Attributes:
        solver: Its name in the legend.
        error: ``[iterations + 1]`` mean distance to the sequential result, first of the initial guess, then after
            each parallel iteration.
        change: ``[iterations]`` mean forward difference, the change made by each parallel iteration.
    """

    solver: str
    error: Tensor
    change: Tensor

    def __post_init__(self) -> None:
        if self.error.ndim != 1 or self.change.ndim != 1 or len(self.error) != len(self.change) + 1:
            raise ValueError(
                f"error must be [iterations + 1] and change [iterations], not {list(self.error.shape)} and "
                f"{list(self.change.shape)} (solver '{self.solver}')"
            )


def convergence_figure(curves: list[Convergence], length: int) -> Figure:
    """Draw error and forward difference against parallel iterations (the figures of Song et al. 2021, section 5).

    Both axes are logarithmic; the iterations begin with 0, the initial guess. A curve that becomes exactly zero for
    good drops to a marker on the line "0" at the bottom. A curve skips values that are not finite, and zeros after
    which it rises again (an iteration may change nothing and the next one something).

    Args:
        curves: One for each solver, at least one.
        length: Number of equations, T.

    Raises:
        ValueError: There is no curve.
    """
    if not curves:
        raise ValueError("there is no curve to draw")
    figure = new_figure(f"Convergence to the sequential result, T = {length} equations", 10, 4)
    error_axes, change_axes = figure.subplots(1, 2, sharex=True)
    error_axes.set_title("Error (distance to the sequential result)", fontsize=10)
    _draw_panel(error_axes, [(curve.solver, curve.error) for curve in curves], 0, length)
    error_axes.set_ylabel(r"mean over t of $|x^{(k)}_t - x_t|$")
    change_axes.set_title("Forward difference (change in one iteration)", fontsize=10)
    _draw_panel(change_axes, [(curve.solver, curve.change) for curve in curves], 1, length)
    change_axes.set_ylabel(r"mean over t of $|x^{(k)}_t - x^{(k-1)}_t|$")

    lines, names = error_axes.get_legend_handles_labels()
    zero = Line2D([], [], color="0.35", linestyle="none", marker="o", markersize=6)
    figure.legend(
        [*lines, zero],
        [*names, "marker: exactly zero from here on"],
        loc="outside lower center",
        ncols=min(len(curves) + 1, 5),
        frameon=False,
        fontsize=9,
        handlelength=3,
    )
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure; the ending of the path chooses the format (``.png``, ``.pdf``, ``.svg``)."""
    figure.savefig(path, dpi=200)


def _draw_panel(axes: Axes, curves: list[tuple[str, Tensor]], first: int, length: int) -> None:
    """Draw ``(solver, values)`` curves whose values belong to the iterations ``first, first + 1, ...``."""
    arrays = [(solver, values.detach().double().cpu().numpy()) for solver, values in curves]
    positive = np.concatenate([values[np.isfinite(values) & (values > 0)] for _, values in arrays])
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    zero_line = 10.0 ** (math.floor(math.log10(low)) - 1)  # where the axis shows 0, which has no logarithm

    for i, (solver, values) in enumerate(arrays):
        drawn = np.flatnonzero(np.isfinite(values) & (values > 0))
        end = drawn[-1] + 1 if drawn.size else 0
        x, y = drawn + first, values[drawn]
        ends_in_zero = end < len(values) and not values[end:].any()  # a NaN counts as true
        if ends_in_zero:
            x, y = np.append(x, end + first), np.append(y, zero_line)
        axes.plot(
            x,
            y,
            label=solver,
            color=COLOURS[i % len(COLOURS)],
            linestyle=LINE_STYLES[i % len(LINE_STYLES)],
            linewidth=1.5,
            marker=_MARKERS[i % len(_MARKERS)],
            markevery=[len(x) - 1] if ends_in_zero else [],
            markersize=6,
            zorder=3,
        )

    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    shown = exponents[:: math.ceil(len(exponents) / 7)]
    axes.set_yscale("log")
    axes.set_yticks([zero_line, *(10.0**e for e in shown)], ["0", *(f"$10^{{{e}}}$" for e in shown)])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(zero_line / 2, 10.0 ** exponents[-1] * 2)
    axes.axhline(zero_line, color="0.6", linewidth=0.8)

    # Linear up to 1, so that iteration 0 has a place; logarithmic from there on.
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    powers = [10**e for e in range(math.ceil(math.log10(length)) + 1) if 10**e < length / 2]
    axes.set_xticks([0, *powers, length], [str(tick) for tick in (0, *powers, length)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(-0.1, length * 1.2)
    axes.axvline(length, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xlabel("parallel iteration k")

    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
