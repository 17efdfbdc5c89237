"""The ladder of ways to sample a PixelCNN++: from sequential sampling, launch by launch, to parallel iteration.

``python -m benchmarks.pixelcnnpp_ladder`` takes a ``--checkpoint``, or a network with the weights that a training
starts from (``--random``: its number of iterations says nothing about trained ones, so only costs per iteration are
compared), and samples the same noise by every way, at every batch size:

- *sequential*: T full passes of the network, eager (kernel by kernel) and in a CUDA graph. All steps cost the same, so
  ``--sequential-steps`` may stand for all of them: the table then says that the time is scaled;
- *cached sequential*: T steps, each activation computed once. This is the baseline, and always runs;
- *GS-Jacobi* with windows of some rows, *Jacobi* and *Jacobi-GS* (``--ways``), and what *auto* chooses.

*Seconds* are wall-clock of a batch, the certificate included: medians of runs that take turns, after one that warms
up. Set-up (weights, kernels, CUDA graphs, noise) is kept apart. *ms* is that of one iteration or sequential step,
without the certificate. *Work* is equation evaluations relative to sequential sampling. *Kernels* are those and the
copies that a GPU runs in one iteration; *memory* is what set-up and the first run add, at most, to what is allocated
on the GPU.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common import trained
from benchmarks.pixelcnnpp_ways import CACHED, EAGER, GRAPH, WAYS, Rung, chosen_ways, rows_of
from benchmarks.rnn_common import look, new_report, save_report, tidy
from lit_parallel.cublas import keep_sums_whole
from lit_parallel.errors import UserError
from lit_parallel.modules.options import PixelCNNppOptions
from lit_parallel.modules.pixelcnnpp import PixelCNNppModule
from lit_parallel.networks.initialisation import initialise_from_data
from lit_parallel.plots import new_figure, save_figure

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
_INITIAL_IMAGES = 16
_BASELINES = ("cached", "graph", "eager")


@torch.no_grad()
def random_model(args: argparse.Namespace) -> PixelCNNppModule:
    """A network as a training starts from, initialised from images of noise."""
    torch.manual_seed(args.seed)
    shape = SHAPES[args.random]
    model = PixelCNNppModule(PixelCNNppOptions(filters=args.filters, resnets=args.resnets), shape).to(args.device)
    images = torch.randint(0, 256, (_INITIAL_IMAGES, *shape), dtype=torch.uint8).to(args.device)
    initialise_from_data(model.network, model.conditional.encode(model.conditional.from_pixels(images)).to(model.dtype))
    return model


def the_model(args: argparse.Namespace) -> tuple[PixelCNNppModule, dict[str, Any]]:
    """The model, on its device, and facts about it for the report."""
    model: Any
    if args.random is None:
        model, facts = trained("", [], args.checkpoint, None)
        if not isinstance(model, PixelCNNppModule):
            raise UserError(f"{args.checkpoint} is not a PixelCNN++: name a checkpoint of one.")
    else:
        model, facts = random_model(args), {"random": args.random, "seed": args.seed}
    network = model.network
    facts |= {"trained": args.random is None, "filters": network.filters, "resnets": network.resnets}
    facts |= {"image_shape": list(model.image_shape), "length": math.prod(model.image_shape[1:])}
    facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return model.to(args.device).eval(), facts


def climb(model: PixelCNNppModule, args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Measure every way at every batch size; the report is kept after every run."""
    ways = chosen_ways(args, model.image_shape)
    ladders: list[list[Rung]] = []

    def keep() -> None:
        report["cases"] = [
            {"batch": ladder[0].batch, "rows": rows_of(ladder, is_trained=report["model"]["trained"])}
            for ladder in ladders
        ]
        save_report(report, args.output)

    for batch in args.batches:
        ladder = [Rung(model, way, batch, args.seed) for way in ways]
        smaller: list[Rung | None] = [*ladders[-1]] if ladders else [None] * len(ways)
        ladders.append(ladder)
        for rung, before in zip(ladder, smaller, strict=True):
            rung.set_up(args.seconds_limit, before)
            keep()
            told = rung.left_out or f"first run {rung.first_seconds:.3f} s, set-up {rung.setup_seconds:.1f} s"
            print(f"batch {batch}, {rung.way.label}: {told}", flush=True)
        for _ in range(args.repeats):
            for rung in ladder:
                if rung.may_run(args.seconds_limit):
                    rung.run()
                    keep()
        for rung in ladder:
            rung.release()
        if args.output is not None:
            save_figure(figure(report), args.output.with_suffix(".png"))
    for rung in [rung for ladder in ladders for rung in ladder if model.device.type == "cuda"]:
        rung.count_kernels()
        keep()


def print_case(report: dict[str, Any], case: dict[str, Any]) -> None:
    """Print the short table of one batch size."""
    model = report["model"]
    shape = "x".join(str(side) for side in model["image_shape"])
    title = (
        f"{shape}, {model['filters']} filters x {model['resnets']} resnets, batch {case['batch']}, T = "
        f"{model['length']:,}, {report['environment']['device_name']}"
    )
    if not model["trained"]:
        title += ", RANDOM WEIGHTS: iterations say nothing about trained ones"
    certified = next((row["certified_way"] for row in case["rows"] if row.get("certified_way")), "none: no way was")
    caption = f"exact: images equal bit for bit to those of cached sequential sampling; to certified ones ({certified})"
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (
        "method", "images/s", "seconds", "runs", "iterations", "work", "ms", "kernels", "memory", "over cached",
        "over graph", "over eager", "exact",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("method", "exact") else "right")
    left_out: list[str] = []
    for row in case["rows"]:
        if "left_out" in row:
            left_out.append(f"{row['method']} left out: {row['left_out']}")
            continue
        extra = f" + {row['certificate_iterations_max']}" if row["certificate_iterations_max"] else ""
        memory, kernels = row["memory_bytes"], row["kernels_per_iteration"]
        table.add_row(
            _named(row, model["length"]),
            f"{row['images_per_second']:.3g}" if row["is_compared"] else "",
            f"{row['seconds']:.4f}",
            str(row["timed_runs"] or "first"),
            f"{row['iterations_mean']:.1f} / {row['iterations_max']}{extra}",
            f"{row['work']:.1f}",
            f"{row['ms_per_iteration']:.3f}",
            "" if kernels is None else f"{kernels:.0f}",
            "" if memory is None else f"{memory / 2**20:,.0f} MiB",
            *("" if row[f"over_{name}"] is None else f"{row[f'over_{name}']:.2f}x" for name in _BASELINES),
            exactness(row, case["batch"]),
        )
    Console(width=190).print(title, table, *left_out, "", sep="\n", highlight=False)


def _named(row: dict[str, Any], length: int) -> str:
    """A way's label, and what its time stands for."""
    if row["steps_measured"]:
        return f"{row['method']} ({row['steps_measured']} of {length:,} steps, scaled)"
    if row["method"] == "auto":
        return f"auto: {row['solver']}" + (f", {row['window_rows']} rows" if row["window_rows"] else "")
    windowed = row["method"].startswith(("cached", "GS-"))
    return f"{row['method']} (full passes)" if windowed and row["full_passes"] else row["method"]


def exactness(row: dict[str, Any], batch: int) -> str:
    """What was compared, in words: certificates, and images bit for bit."""

    def counted(number: int, what: str) -> str:
        return what if number == batch else f"{number} of {batch} {what}"

    told = [counted(row["certified"], "certified")] if row["certificate_iterations_max"] else []
    for name, other in (("cached", CACHED), ("certified", row["certified_way"])):
        if row[f"equal_to_{name}"] is not None and other != row["method"]:
            told.append(counted(row[f"equal_to_{name}"], f"= {name}"))
    told += [f"in {row['steps_measured']} pixels"] if told and row["steps_measured"] else []
    told += [] if row["repeatable"] else ["NOT THE SAME in every run"]
    return ", ".join(told) or "nothing to compare with"


def figure(report: dict[str, Any]) -> Figure:
    """Images per second over the batch size, a line for each way; with random weights, milliseconds per iteration."""
    model = report["model"]
    number, axis = ("images_per_second", "images per second") if model["trained"] else (
        "ms_per_iteration", "ms per iteration or sequential step"
    )  # fmt: skip
    shape = "x".join(str(side) for side in model["image_shape"])
    size = f"PixelCNN++, {shape}, {model['filters']} filters x {model['resnets']} resnets"
    drawn = new_figure(f"{size}{'' if model['trained'] else ', random weights'}", 7, 4.5)
    axes = drawn.subplots()
    labels = dict.fromkeys(row["method"] for case in report["cases"] for row in case["rows"] if number in row)
    for which, label in enumerate(labels):
        points = [
            (case["batch"], row[number])
            for case in report["cases"]
            for row in case["rows"]
            if row["method"] == label and number in row
        ]
        scaled = model["trained"] and report["sequential_steps"] and label in (EAGER, GRAPH)
        axes.plot(
            *zip(*points, strict=True),
            label=f"{label} (scaled)" if scaled else label,
            marker="o",
            markersize=4,
            **look(which),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = [case["batch"] for case in report["cases"]]
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    tidy(axes, "images in a batch", axis, report["environment"]["device_name"])
    return drawn


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pixelcnnpp_ladder", description=(__doc__ or "").partition("\n")[0]
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, metavar="PATH", help="a trained PixelCNN++")
    model.add_argument("--random", choices=SHAPES, metavar="SET", help="random weights, for images of %(choices)s")
    parser.add_argument("--filters", type=int, default=160, help="with --random")
    parser.add_argument("--resnets", type=int, default=5, help="with --random")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64], help="images, from few to many")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=list(WAYS[:-1]),
        metavar="WAY",
        help="%(choices)s (default: all but jacobi_gs)",
    )
    parser.add_argument("--window-rows", type=int, nargs="*", default=[4, 8, 12, 16], help="windows of GS-Jacobi")
    parser.add_argument(
        "--sequential-steps", type=int, metavar="N", help="steps of sequential sampling to run (default: all)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of every way")
    parser.add_argument(
        "--seconds-limit",
        type=float,
        default=60,
        help="a way is left out where a run would take longer, and not run again when its runs have taken so long",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise, and of random weights")
    parser.add_argument("--threads", type=int, help="on a CPU (default: all)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (here: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results; a figure goes beside it")
    args = parser.parse_args(argv)

    keep_sums_whole()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    report = new_report("pixelcnnpp_ladder", device)
    report["cublas_workspace_config"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "default")
    report |= {name: getattr(args, name) for name in ("sequential_steps", "repeats", "seconds_limit", "seed")}
    net, report["model"] = the_model(args)
    climb(net, args, report)
    for case in report["cases"]:
        print_case(report, case)
    return report


if __name__ == "__main__":
    main()
