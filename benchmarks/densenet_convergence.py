"""How many Jacobi iterations a DenseNet takes, for the benchmark of DenseNets.

What counts are the logits: the five classes of the highest ones in their order (the authors' script sorted the other
way round and compared the five lowest), their distance to those of the ordinary forward in the same precision, and
their bits. An image has arrived in the iteration from which on they stay so.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.rnn_backprop import tf32
from benchmarks.rnn_common import look, tidy
from lit_parallel.dense.evaluation import PlainEvaluation
from lit_parallel.dense.options import DenseOptions
from lit_parallel.dense.structure import Structure, structure_of
from lit_parallel.dense.system import DenseBlockSystem, DenseNetSystem
from lit_parallel.plots import new_figure, save_figure

TOP = 5
CRITERIA = ("top5", "1e-4", "1e-5", "bits")
IN_ORDER, AS_ONE = "blocks in order", "the network as one system"
_CHUNK = 512  # images at a time

Systems = dict[str, list[Tensor]]  # for each, the logits [images, classes] after 1, 2, ... iterations


@torch.no_grad()
def convergence(network: nn.Module, images: Tensor, dtype: torch.dtype, windows: list[int]) -> dict[str, Any]:
    """Iterations that each block, all blocks in order and the network as one system take, without TF32.

    Args:
        network: A DenseNet with trained weights; of random ones this says nothing.
        images: ``[n, channels, height, width]`` as the network reads them.
        dtype: float32 or float64.
        windows: Of GS-Jacobi, for which the iterations per window are counted; those longer than a block are left out.
    """
    network = copy.deepcopy(network).to(dtype).eval()
    structure = structure_of(network)
    parts: list[dict[str, Any]] = []
    with tf32(False):
        for chunk in images.to(dtype).split(_CHUNK):
            expected = structure.ordinary(chunk)
            systems = _all_systems(structure, chunk, windows)
            parts.append({name: _compared(found, expected) for name, found in systems.items()})
    sizes = sizes_of(structure, windows)
    rows = {}
    for name in parts[0]:
        joined = {key: torch.cat([part[name][key] for part in parts], 1) for key in ("error", "top5", "bits")}
        rows[name] = {"layers": sizes[name], **_counted(joined)}
    return {"dtype": str(dtype).removeprefix("torch."), "images": len(images), "systems": rows}


def sizes_of(structure: Structure, windows: list[int]) -> dict[str, int]:
    """For each system, how many equations it solves at once: iterations that surely suffice."""
    each = [len(block.layers) for block in structure.blocks]
    return {
        **{f"block {index + 1} alone": layers for index, layers in enumerate(each)},
        IN_ORDER: max(each),
        AS_ONE: sum(each),
        **{f"windows of {window}": window for window in windows if window < max(each)},
    }


def _all_systems(structure: Structure, images: Tensor, windows: list[int]) -> Systems:
    systems = {
        f"block {index + 1} alone": list(_of_one_block(structure, images, index))
        for index in range(len(structure.blocks))
    }
    sizes = sizes_of(structure, windows)
    systems[IN_ORDER] = list(_of_blocks(structure, images, DenseOptions(solver="jacobi"), sizes[IN_ORDER]))
    systems[AS_ONE] = list(_of_the_network(structure, images))
    for window in windows:
        if (name := f"windows of {window}") in sizes:
            systems[name] = list(_of_blocks(structure, images, DenseOptions("gs_jacobi", window=window), window))
    return systems


def _of_one_block(structure: Structure, images: Tensor, index: int) -> Iterator[Tensor]:
    """Logits after each iteration of one block, everything else being evaluated as usual."""
    x = structure.stem(images)
    for before in range(index):
        x = structure.transition(before, structure.all_features(before, x))
    block = structure.blocks[index]
    system = DenseBlockSystem(block.layers, x, block.mean)
    state = system.new_state()
    nobody = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for _ in block.layers:
        system.evaluate(state, None, nobody, None)
        features = system.features(state)
        for after in range(index + 1, len(structure.blocks)):
            features = structure.all_features(after, structure.transition(after - 1, features))
        yield structure.head(features)


def _of_blocks(structure: Structure, images: Tensor, options: DenseOptions, most: int) -> Iterator[Tensor]:
    """Logits with 1, 2, ... iterations in every block (or window), one after another."""
    for iterations in range(1, most + 1):
        options.iterations = iterations
        yield PlainEvaluation(structure, options)(images)[0]


def _of_the_network(structure: Structure, images: Tensor) -> Iterator[Tensor]:
    """Logits after each iteration of all layers of all blocks at once, as the paper counts them."""
    system = DenseNetSystem(structure, images)
    state = system.new_state()
    nobody = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for _ in range(system.length):
        system.evaluate(state, None, nobody, None)
        yield system.logits(state)


def _compared(found: list[Tensor], expected: Tensor) -> dict[str, Tensor]:
    """For every iteration and image ``[iterations, images]``: distance of the logits, same top five, same bits."""
    top = _top(expected)
    size = expected.abs().amax(1)
    return {
        "error": torch.stack([(logits - expected).abs().amax(1) / size for logits in found]).double().cpu(),
        "top5": torch.stack([(_top(logits) == top).all(1) for logits in found]).cpu(),
        "bits": torch.stack([(logits == expected).all(1) for logits in found]).cpu(),
    }


def _top(logits: Tensor) -> Tensor:
    """The classes of the highest logits, in order, ``[images, 5]``."""
    return logits.argsort(dim=1, descending=True, stable=True)[:, :TOP]


def _counted(joined: dict[str, Tensor]) -> dict[str, Any]:
    error = joined["error"]
    hits = {"top5": joined["top5"], "1e-4": error <= 1e-4, "1e-5": error <= 1e-5, "bits": joined["bits"]}
    return {
        "iterations_until": {name: _mean_and_most(arrived(hits[name])) for name in CRITERIA},
        "largest_error": error.amax(1).tolist(),
        "median_error": error.median(1).values.tolist(),
        "top5_agreement": joined["top5"].double().mean(1).tolist(),
    }


def arrived(hits: Tensor) -> Tensor:
    """The iteration, from 1, from which on all are hits, ``[images]``; one more than there are if the last is none.

    Args:
        hits: ``[iterations, images]``.
    """
    trailing = hits.flip(0).to(torch.int64).cumprod(0).sum(0)
    return len(hits) - trailing + 1


def _mean_and_most(iterations: Tensor) -> dict[str, float]:
    return {"mean": float(iterations.double().mean()), "max": int(iterations.max())}


def print_convergence(title: str, found: dict[str, Any]) -> None:
    """Print mean and largest number of iterations of the images."""
    table = Table(title=title, title_justify="left", title_style="")
    for column in ("iterations of", "layers", "same top five", "logits to 1e-4", "1e-5", "same bits"):
        table.add_column(column, justify="left" if column == "iterations of" else "right")
    for name, row in found["systems"].items():
        counts = [row["iterations_until"][criterion] for criterion in CRITERIA]
        shown = (
            f"{count['mean']:.1f} / {count['max']}" if count["max"] <= row["layers"] else "never" for count in counts
        )
        table.add_row(name, str(row["layers"]), *shown)
    Console(width=140).print(table)


def save_convergence_figure(found: dict[str, Any], title: str, path: Any) -> None:
    """Draw distance of the logits and top-five agreement against iterations."""
    figure = new_figure(title, 10, 4.4)
    error_axes, top_axes = figure.subplots(1, 2, sharex=True)
    systems = {name: row for name, row in found["systems"].items() if "alone" not in name}
    errors = [error for row in systems.values() for error in row["largest_error"] if error > 0]
    low, high = math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))
    zero = 10.0 ** (low - 1)  # where the axis shows 0, which has no logarithm
    for number, (name, row) in enumerate(systems.items()):
        iterations = range(1, len(row["largest_error"]) + 1)
        label = f"{name}, {row['layers']} layers at once"
        error_axes.plot(iterations, [max(error, zero) for error in row["largest_error"]], label=label, **look(number))
        top_axes.plot(iterations, [100 * part for part in row["top5_agreement"]], **look(number))
        for axes in (error_axes, top_axes):
            axes.axvline(row["layers"], color=look(number)["color"], linewidth=0.8, linestyle=":")
    error_axes.set_yscale("log")
    error_axes.set_xscale("log", base=2)
    ticks = [2**k for k in range(12) if 2**k <= max(row["layers"] for row in systems.values())]
    error_axes.set_xticks(ticks, [str(tick) for tick in ticks])
    exponents = range(low, high + 1)
    shown = exponents[:: math.ceil(len(exponents) / 7)]
    error_axes.set_yticks([zero, *(10.0**e for e in shown)], ["0", *(f"$10^{{{e}}}$" for e in shown)])
    error_axes.yaxis.set_minor_locator(NullLocator())
    error_axes.axhline(zero, color="0.6", linewidth=0.8)
    x = "iterations (dotted: as many as layers at once)"
    tidy(error_axes, x, "largest relative error of all images", "Logits", legend=False)
    tidy(top_axes, x, "% of the images", "Same five highest logits, in order", legend=False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, handlelength=3)
    save_figure(figure, path)
