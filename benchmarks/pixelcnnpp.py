"""Sampling a PixelCNN++: every coupling and solver, same noise, same run, equality checked bit for bit.

``python -m benchmarks.pixelcnnpp`` trains the small network on embedded digits, or takes ``--checkpoint``; for every
coupling it samples one batch sequentially and by each parallel solver, and reports iterations (mean and largest of
T), work and wall-clock time, the certificate included. Capture of CUDA graphs is not timed. An evaluation of
``sequential``, ``Jacobi`` and ``Jacobi-GS`` is one full pass of the network; ``cached sequential`` computes each
activation once, and the windows of ``GS-Jacobi`` are evaluated from the same caches (on a CPU; elsewhere there are none
yet, and they are full passes too).
"""

from __future__ import annotations

import argparse
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
from lit_parallel.modules.autoregressive import AutoregressiveModule
from lit_parallel.plots import save_image_grid
from lit_parallel.sampling.compare import compare
from lit_parallel.sampling.options import COUPLINGS, PRECISIONS, SamplingOptions
from lit_parallel.sampling.sampler import Sampler, What, has_caches
from lit_parallel.solution import Solution
from lit_parallel.solvers import SolverOptions
from lit_parallel.solvers.options import CACHED_SEQUENTIAL

CACHED = "cached sequential"


def solvers(args: argparse.Namespace, row: int) -> dict[str, SolverOptions | str]:
    """The solvers that are compared, by the label of their row; the sequential ones first."""
    windows = {f"GS-Jacobi, window {rows} rows": rows * row for rows in args.window_rows}
    return {
        "sequential": SolverOptions(name="sequential"),
        CACHED: CACHED_SEQUENTIAL,
        "Jacobi": SolverOptions(name="jacobi", absolute_tolerance=0.0),
        "Jacobi-GS, blocks of a row": SolverOptions(name="jacobi_gs", absolute_tolerance=0.0),
        **{
            label: SolverOptions(name="gs_jacobi", window=window, absolute_tolerance=0.0)
            for label, window in windows.items()
        },
    }


def measure(
    model: AutoregressiveModule, args: argparse.Namespace, coupling: str, precision: str
) -> list[dict[str, Any]]:
    """One coupling in one precision by all solvers."""
    what = What(args.seed, SamplingOptions(coupling=coupling, precision=precision))
    chosen = solvers(args, model.image_shape[2])
    if not has_caches(model.sampling_system(1, incremental=True, options=what.options)):
        del chosen[CACHED]
    first = coupling == args.couplings[0] and precision == "full"
    if not first and args.brief:
        chosen = {label: options for label, options in chosen.items() if "Jacobi-GS" not in label}
    measured = compare(
        model,
        list(chosen.values()),
        [],
        batch_size=args.samples,
        what=what,
        indices=list(range(args.samples)),
        repeats=args.repeats if first or not args.brief else 1,
    )
    exact = measured[0].solution.value
    by_label = dict(zip(chosen, measured, strict=True))
    named = {"sequential": by_label["sequential"], "cached_sequential": by_label.get(CACHED)}
    baselines = {name: baseline for name, baseline in named.items() if baseline is not None}
    rows = []
    for label, measurement in zip(chosen, measured, strict=True):
        row = {"coupling": coupling, "precision": precision, "method": label, **measurement.row()}
        row["bitwise_equal_to_sequential"] = torch.equal(measurement.solution.value, exact)
        row["largest_difference"] = float((measurement.solution.value - exact).abs().max())
        for name, baseline in baselines.items():
            solved = measurement.solution.all_solved and baseline.solution.all_solved
            speedup = baseline.median_seconds / measurement.median_seconds
            row[f"speedup_over_{name}"] = speedup if solved else None
        rows.append(row)
    if coupling == "paper":
        rows.append({"coupling": coupling, "precision": precision, **_with_tolerance(model, args, what, exact)})
    if first and args.eager and torch.cuda.is_available():
        rows.append(_eager(model, args, rows[0], exact))
    return rows


def _with_tolerance(model: AutoregressiveModule, args: argparse.Namespace, what: What, exact: Tensor) -> dict[str, Any]:
    """Continuous values, stopped by their tolerance and left at that."""
    sampler = Sampler(model, SolverOptions(name="jacobi", certify=False), args.samples, what)
    solutions = [sampler.batch(list(range(args.samples)))[1] for _ in range(args.repeats + 1)]
    row = _plain(solutions[-1], statistics.median(solution.seconds for solution in solutions[1:]))
    row["method"] = f"Jacobi until no value moves by {sampler.system.tolerance} levels"
    row["bitwise_equal_to_sequential"] = torch.equal(solutions[-1].value, exact)
    row["largest_difference"] = float((solutions[-1].value - exact).abs().max())
    return row


def _eager(
    model: AutoregressiveModule, args: argparse.Namespace, graph: dict[str, Any], exact: Tensor
) -> dict[str, Any]:
    """What a user without CUDA graphs has: sequential sampling, launch by launch; one run."""
    what = What(args.seed, SamplingOptions(coupling=args.couplings[0]))
    sampler = Sampler(model, SolverOptions(name="sequential", cuda_graph=False), args.samples, what)
    solution = sampler.batch(list(range(args.samples)))[1]
    row = {"coupling": args.couplings[0], "precision": "full", "method": "sequential, eager"}
    row |= _plain(solution, solution.seconds) | {"speedup_over_sequential": graph["seconds"] / solution.seconds}
    row["bitwise_equal_to_sequential"] = torch.equal(solution.value, exact)
    row["largest_difference"] = float((solution.value - exact).abs().max())
    return row


def _plain(solution: Solution, seconds: float) -> dict[str, Any]:
    return solution.summary() | {"seconds": seconds}


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the short table of one coupling."""
    table = Table(title=title, title_justify="left", title_style="")
    for column in ("method", "iterations", "work", "seconds", "over sequential", "over cached", "bitwise equal"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        extra = f" + {row['certificate_iterations_max']}" if row["certificate_iterations_max"] else ""
        speedups = [row.get(f"speedup_over_{name}") for name in ("sequential", "cached_sequential")]
        equal = "yes" if row["bitwise_equal_to_sequential"] else f"no ({row['largest_difference']:.0e})"
        table.add_row(
            row["method"],
            f"{row['iterations_mean']:.1f} / {row['iterations_max']}{extra}",
            f"{row['work']:.1f}",
            f"{row['seconds']:.3f}",
            *["" if speedup is None else f"{speedup:.2f}x" for speedup in speedups],
            equal,
        )
    Console(width=140).print(table)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pixelcnnpp", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--checkpoint", type=Path, help="sample this one instead of training")
    parser.add_argument("--config", default="pixelcnnpp_mnist5k.yaml", help="what to train (a file in configs/)")
    parser.add_argument("--override", nargs="*", default=[], help="key=value for the training")
    parser.add_argument("--runs-folder", type=Path, help="keep the training run here")
    parser.add_argument("--samples", type=int, default=16, help="images in the batch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; fewer of slow ones")
    parser.add_argument("--window-rows", type=int, nargs="*", default=[4, 8, 12], help="windows of GS-Jacobi")
    parser.add_argument(
        "--couplings",
        nargs="+",
        default=list(COUPLINGS),
        choices=COUPLINGS,
        metavar="NAME",
        help="of %(choices)s (default: all)",
    )
    parser.add_argument("--precisions", nargs="*", default=[], choices=PRECISIONS[1:], help="others than float32")
    parser.add_argument("--brief", action="store_true", help="one timed run of all couplings but the first")
    parser.add_argument("--eager", action="store_true", help="on a GPU: sequential sampling without CUDA graphs too")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (here: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results; a grid of samples goes beside it")
    args = parser.parse_args(argv)

    keep_sums_whole()
    model, facts = trained(args.config, args.override, args.checkpoint, args.runs_folder)
    device = torch.device(args.device)
    model = model.to(device).eval()
    facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    report = new_report("pixelcnnpp", device) | {
        "cublas_workspace_config": os.environ.get("CUBLAS_WORKSPACE_CONFIG", "default"),
        "samples": args.samples,
        "image_shape": list(model.image_shape),
        "model": facts,
        "rows": [],
    }
    cases = [(coupling, "full") for coupling in args.couplings]
    cases[1:1] = [(args.couplings[0], precision) for precision in args.precisions]
    for coupling, precision in cases:
        rows = measure(model, args, coupling, precision)
        print_rows(f"{coupling}, {precision}", rows)
        report["rows"] += rows
        save_report(report, args.output)  # after every case: what is measured is kept
    if args.output:
        images, _ = Sampler(model, "jacobi", args.samples, args.seed).batch(list(range(args.samples)))
        save_image_grid(images, args.output.with_suffix(".png"))
    return report


if __name__ == "__main__":
    main()
