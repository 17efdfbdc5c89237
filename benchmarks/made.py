"""Sampling a MADE: every solver against every baseline, same noise, same run, equality checked bit for bit.

``python -m benchmarks.made`` trains a MADE for 28x28x1 and one for 32x32x3 images (on embedded data; ``--mnist`` and
``--cifar10`` name folders with the official files), samples 100 images by each method, and prints a table. Times are
medians of repeated runs and include the certificate where there is one; capture of CUDA graphs is not included and is
reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import trained
from benchmarks.rnn_common import new_report, save_report
from lit_parallel.cublas import keep_sums_whole
from lit_parallel.modules.made import MadeModule
from lit_parallel.sampling.made import FoldedMADE, IncrementalMadeSystem, MadeSystem
from lit_parallel.sampling.made_fused import FusedMadeSystem
from lit_parallel.solvers import GSJacobi, Jacobi, JacobiGS, Sequential, SolverLoop


def methods(model: MadeModule, args: argparse.Namespace, noise: Tensor) -> dict[str, SolverLoop]:
    """Every method, on systems that share the folded weights and the noise."""
    folded = FoldedMADE.from_module(model.network)
    bound = model.transform.bound
    on_gpu = noise.is_cuda

    def plain() -> MadeSystem:
        return MadeSystem(folded, noise, bound)

    def incremental() -> IncrementalMadeSystem:
        return IncrementalMadeSystem(folded, noise, bound)

    loops = {"sequential, eager": SolverLoop(plain(), Sequential(), cuda_graph=False)}
    graph = ", CUDA graph" if on_gpu else ", eager"
    if on_gpu:
        loops["sequential, CUDA graph"] = SolverLoop(plain(), Sequential())
    loops[f"cached sequential{graph}"] = SolverLoop(incremental(), Sequential())
    loops["Jacobi, eager"] = SolverLoop(plain(), Jacobi(), certify=True, cuda_graph=False)
    if on_gpu:
        loops["Jacobi, CUDA graph"] = SolverLoop(plain(), Jacobi(), certify=True)
    block = model.image_shape[2]
    loops[f"Jacobi-GS, blocks of {block}{graph}"] = SolverLoop(plain(), JacobiGS(block), certify=True)
    loops[f"GS-Jacobi, PyTorch{graph}"] = SolverLoop(incremental(), GSJacobi(args.window), certify=True)
    if FusedMadeSystem.covers(folded, noise):
        for window in args.kernel_windows:
            for certify in (False, True) if window == args.kernel_windows[0] else (True,):
                label = f"GS-Jacobi, kernel, window {window}{graph}{'' if certify else ', not certified'}"
                loops[label] = SolverLoop(FusedMadeSystem(folded, noise, bound), GSJacobi(window), certify=certify)
    return loops


def measure(model: MadeModule, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time every method; the runs take turns."""
    model = model.to(device).eval()
    system = model.sampling_system(args.samples, incremental=False)
    assert isinstance(system, MadeSystem)
    model.load_noise(system, args.seed, list(range(args.samples)))
    loops = methods(model, args, system.noise)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    solutions = {name: loop.run() for name, loop in loops.items()}  # warm-up and capture
    setup = {name: solution.setup_seconds for name, solution in solutions.items()}
    for repeat in range(args.repeats):
        for name, loop in loops.items():
            if repeat < 3 or statistics.median(seconds[name]) < 0.5:  # three runs of the slow ones
                solutions[name] = loop.run()
                seconds[name].append(solutions[name].seconds)
    exact = solutions["sequential, eager"].value
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    cached = next(name for name in loops if name.startswith("cached"))
    rows = []
    for name, solution in solutions.items():
        row = {"method": name, **solution.summary(), "seconds": medians[name], "seconds_of_runs": seconds[name]}
        row["setup_seconds"] = setup[name]
        row["bitwise_equal_to_sequential_eager"] = torch.equal(solution.value, exact)
        row["largest_difference"] = float((solution.value - exact).abs().max())
        for baseline in ("sequential, eager", "sequential, CUDA graph", cached):
            if baseline in medians:
                row[f"speedup over {baseline}"] = medians[baseline] / medians[name]
        rows.append(row)
    return rows


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the short table."""
    table = Table(title=title, title_justify="left", title_style="")
    speedups = [key for key in rows[0] if key.startswith("speedup")]
    for column in ("method", "iterations", "work", "ms", *speedups, "bitwise equal"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        extra = f" + {row['certificate_iterations_max']}" if row["certificate_iterations_max"] else ""
        equal = "yes" if row["bitwise_equal_to_sequential_eager"] else f"no ({row['largest_difference']:.0e})"
        table.add_row(
            row["method"],
            f"{row['iterations_mean']:.1f} / {row['iterations_max']}{extra}",
            f"{row['work']:.1f}",
            f"{row['seconds'] * 1e3:.3f}",
            *(f"{row[key]:.2f}x" for key in speedups),
            equal,
        )
    Console(width=180).print(table)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.made", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mnist", metavar="FOLDER", help="folder with MNIST's files (default: train on mnist5k)")
    parser.add_argument("--cifar10", metavar="FOLDER", help="folder with CIFAR-10's files (default: photos32)")
    parser.add_argument("--mnist-checkpoint", type=Path, help="sample this one instead of training")
    parser.add_argument("--cifar10-checkpoint", type=Path, help="sample this one instead of training")
    parser.add_argument("--epochs", type=int, default=None, help="epochs of training (default: the config's)")
    parser.add_argument("--samples", type=int, default=100, help="images in the batch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--repeats", type=int, default=11, help="timed runs; 3 of methods slower than 0.5 s")
    parser.add_argument("--window", type=int, default=None, help="window of the PyTorch evaluation")
    parser.add_argument(
        "--kernel-windows", type=int, nargs="+", default=[64], metavar="N", help="windows of the kernel"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (here: %(default)s)"
    )
    shapes = ["28x28x1", "32x32x3"]
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=shapes, metavar="SHAPE", help="of %(choices)s")
    parser.add_argument("--runs-folder", type=Path, help="keep the training runs here")
    parser.add_argument(
        "--split-sums", action="store_true", help="let cuBLAS split inner dimensions, as it does by default"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)

    if not args.split_sums:
        keep_sums_whole()
    device = torch.device(args.device)
    report = new_report("made", device) | {
        "cublas_workspace_config": os.environ.get("CUBLAS_WORKSPACE_CONFIG", "default"),
        "samples": args.samples,
        "shapes": {},
    }
    for shape in args.shapes:
        grey = shape == "28x28x1"
        folder = args.mnist if grey else args.cifar10
        config = ("made_mnist.yaml" if folder else "made_mnist5k.yaml") if grey else "made_cifar10.yaml"
        if not grey and not folder:
            config = "made_photos32.yaml"
        overrides = [f"data.folder={json.dumps(folder)}", "data.allow_partial=true"] if folder else []
        overrides += [f"trainer.max_epochs={args.epochs}"] if args.epochs else []
        checkpoint = args.mnist_checkpoint if grey else args.cifar10_checkpoint
        model, facts = trained(config, overrides, checkpoint, args.runs_folder)
        assert isinstance(model, MadeModule)
        rows = measure(model, args, device)
        report["shapes"][shape] = {"model": facts, "rows": rows}
        print_rows(f"{shape}, {args.samples} images, {report['environment']['device_name']}, float32", rows)
    save_report(report, args.output)
    return report


if __name__ == "__main__":
    main()
