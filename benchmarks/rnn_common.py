"""What the benchmarks of recurrent networks share."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from lit_parallel.plots import COLOURS, LINE_STYLES
from lit_parallel.report import environment, write_json


def new_report(name: str, device: torch.device) -> dict[str, Any]:
    """What every report begins with."""
    return {
        "command": f"python -m benchmarks.{name} " + " ".join(sys.argv[1:]).partition("--output")[0].strip(),
        "environment": environment(device) | {"platform": f"{platform.system()}-{platform.machine()}"},
    }


def save_report(report: dict[str, Any], output: Path | None) -> None:
    """Write a report, if it is to be kept: after every case, so that what is measured is not lost."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(report, output)


def look(number: int) -> dict[str, Any]:
    """Colour and line style of a curve."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINE_STYLES[number % len(LINE_STYLES)],
        "linewidth": 1.5,
        "zorder": 3,
    }


def tidy(axes: Axes, x: str, y: str, title: str, *, legend: bool = True) -> None:
    """Labels, a light grid, no box."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=8, handlelength=3)
