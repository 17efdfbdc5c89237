"""The picture of ``docs/idea.md``: Jacobi iteration of one image, from a real run.

``python -m benchmarks.idea --checkpoint PATH --output docs/figures/idea.png`` samples one image of a trained model of
images (without ``--checkpoint`` a MADE is trained first) and draws its iterates, when each pixel became final, and how
many leading pixels are exact after each iteration. The last one is the *prefix property*: after k iterations at least
the first k equations are exact.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common import trained
from lit_parallel.modules.autoregressive import AutoregressiveModule
from lit_parallel.plots import COLOURS, new_figure, save_figure
from lit_parallel.sampling.compare import trace
from lit_parallel.sampling.sampler import Sampler, What

_SHOWN = 6  # iterates


def iterates(model: AutoregressiveModule, seed: int) -> Tensor:
    """The images after 0, 1, 2, ... Jacobi iterations, until nothing changes: ``[iterations + 1, channels, h, w]``."""
    what = What(seed)
    exact = Sampler(model, "sequential", 1, what).batch([0])[1].value
    return trace(model, "jacobi", batch_size=1, what=what, indices=[0], exact=exact, shown=1).frames[:, 0]


def became_final(frames: Tensor) -> Tensor:
    """For each pixel of ``[iterations + 1, channels, h, w]`` the iteration of its last change, ``[h, w]``; 0: none."""
    changed = (frames[1:] != frames[:-1]).any(dim=1)
    iteration = torch.arange(1, len(frames))[:, None, None]
    return (changed * iteration).amax(dim=0)


def exact_prefix(frames: Tensor) -> list[int]:
    """After each iteration, the number of leading pixels (row by row) that have their final value."""
    equal = (frames == frames[-1]).all(dim=1).flatten(1)
    return equal.long().cumprod(dim=1).sum(dim=1).tolist()


def figure(frames: Tensor) -> Figure:
    """Iterates above; below, when each pixel became final, and the exact prefix."""
    last = len(frames) - 1
    final, prefix = became_final(frames), exact_prefix(frames)
    _, _, height, width = frames.shape
    length = height * width
    drawn = new_figure(f"One image, {length} pixels, sequential: {length} steps, Jacobi: {int(final.max())}", 11, 6.2)
    parts: Any = drawn.subfigures(2, 1, height_ratios=[1, 1.35])
    above, below = parts
    shown = sorted({round((last - 1) * (number / (_SHOWN - 1)) ** 1.6) for number in range(_SHOWN)})
    for axes, k in zip(above.subplots(1, len(shown)), shown, strict=True):
        axes.imshow(frames[k].permute(1, 2, 0).expand(-1, -1, 3))
        axes.set_title("first guess" if k == 0 else f"iteration {k}", fontsize=10)
        rows, rest = divmod(min(prefix[k], length), width)
        # What lies before this line is exact.
        line = [(-0.5, rows + 0.5), (rest - 0.5, rows + 0.5), (rest - 0.5, rows - 0.5), (width - 0.5, rows - 0.5)]
        axes.plot(*zip(*line, strict=True), color=COLOURS[1], linewidth=2, clip_on=False)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
        axes.set_xticks([])
        axes.set_yticks([])
    left, right = below.subplots(1, 2, width_ratios=[1, 1.6])
    image = left.imshow(final, cmap="viridis")
    left.set_title("The iteration in which each pixel became final", fontsize=10)
    left.set_xticks([])
    left.set_yticks([])
    below.colorbar(image, ax=left, shrink=0.9)
    right.plot(range(last + 1), prefix, color=COLOURS[1], linewidth=2, label="this run: leading pixels that are exact")
    right.fill_between(
        range(last + 1), range(last + 1), color="0.85", label="guaranteed: the first k after k iterations"
    )
    right.axhline(length, color="0.6", linewidth=0.8, linestyle=":")
    right.set_yticks([0, *(length * part // 4 for part in range(1, 5))])
    right.set_xlabel("parallel iteration k")
    right.set_title("The exact prefix (above: what lies before the line)", fontsize=10)
    right.set_xlim(0, math.ceil(last * 1.02))
    right.legend(frameon=False, fontsize=9, loc="upper left")
    right.spines[["top", "right"]].set_visible(False)
    return drawn


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns the counts of the run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idea", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="of a model of images (default: train a MADE on digits)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--output", type=Path, default=Path("docs/figures/idea.png"), help="the figure")
    args = parser.parse_args(argv)
    model, facts = trained("made_mnist5k.yaml", [], args.checkpoint, None)
    frames = iterates(model, args.seed)
    save_figure(figure(frames), args.output)
    counts = {"pixels": frames[0, 0].numel(), "iterations": int(became_final(frames).max()), "model": facts}
    print(f"{counts['pixels']} pixels, exact after {counts['iterations']} Jacobi iterations")
    print(f"look at: {args.output}")
    return counts


if __name__ == "__main__":
    main()
