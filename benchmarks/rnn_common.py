"""What the benchmarks of recurrent networks share."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from lit_parallel.plots import COLOURS, LINE_STYLES
from lit_parallel.recurrent.stopwatch import synchronize
from lit_parallel.report import environment, write_json


def new_report(name: str, device: torch.device) -> dict[str, Any]:
    """What every report begins with."""
    return {
        "command": f"python -m benchmarks.{name} " + " ".join(sys.argv[1:]).partition("--output")[0].strip(),
        "environment": environment(device) | {"platform": platform.platform()},
    }


def save_report(report: dict[str, Any], output: Path | None) -> None:
    """Write a report, if it is to be kept: after every case, so that what is measured is not lost."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(report, output)


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Norm of the difference of all gradients together, relative to the norm of the exact ones."""
    distance = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, exact, strict=True))
    size = sum(float(b.double().square().sum()) for b in exact)
    return math.sqrt(distance / size) if size > 0 else math.sqrt(distance)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of work that the device has finished."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def look(number: int) -> dict[str, Any]:
    """Colour and line style of a curve."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINE_STYLES[number % len(LINE_STYLES)],
        "linewidth": 1.5,
        "zorder": 3,
    }


def tidy(axes: Axes, x: str, y: str, title: str) -> None:
    """Labels, a light grid, no box."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
