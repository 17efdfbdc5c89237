"""A whole training step of recurrent layers, forward and backward, parallel in time against PyTorch's own, same run.

``python -m benchmarks.rnn_step`` measures every cell and shape in the two regimes of
:mod:`benchmarks.rnn_backprop`, short and long memory, in three ways that take turns: *ordinary* (cuDNN's on a GPU),
*backward* (``parallelize(layer)``: the forward pass stays the ordinary one) and *both* (``parallelize(layer,
forward=True)``), with ``solver=auto``, which takes the ordinary way where that is faster. A step is the forward pass
and the gradients of weights, biases, input and initial states, by autograd. Times are wall-clock, with the device
synchronised, medians; the first steps, which compile and tune, are not among them.

Errors are norms relative to a run in float64: of the outputs, and of all gradients together. A speedup counts if both
are at most 1e-5, or at most the ordinary way's own: networks trained to remember amplify every rounding.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.rnn_backprop import CELLS, CPU_SHAPES, Shape, cases_of, print_training, tf32
from benchmarks.rnn_common import new_report, save_report
from benchmarks.rnn_memory import Problem, long_memory, short_memory, train_on_adding
from lit_parallel.networks.rnn import LastState
from lit_parallel.recurrent import parallelize, records
from lit_parallel.recurrent.comparison import relative_error
from lit_parallel.recurrent.stopwatch import seconds_of

WAYS: dict[str, dict[str, Any] | None] = {"ordinary": None, "backward": {}, "both": {"forward": True}}
LARGEST_ERROR = 1e-5
GPU_SHAPES = [Shape(64, 784, 128), Shape(32, 4096, 128), Shape(1, 32768, 128), Shape(1, 100, 128)]
_WARM_UP = {"ordinary": 3, "backward": 10, "both": 12}
_FEWEST = 3  # timed runs, however slow


class Aim(NamedTuple):
    """A whole step at least so many times as fast as the ordinary one."""

    memory: str
    shape: Shape
    speedup: float


AIMS = [
    Aim("short", Shape(32, 4096, 128), 5),
    Aim("short", Shape(1, 32768, 128), 50),
    Aim("short", Shape(64, 784, 128), 2),
    Aim("long", Shape(1, 32768, 128), 3),
]
NEVER_SLOWER = 0.95


def outputs_of(problem: Problem) -> list[Tensor]:
    """The output and the last states, as a step computes them."""
    output, last = problem._run()
    return [output.detach(), *(state.detach() for state in last)]


def measure(problem: Problem, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all ways in turns, and compare outputs and gradients with float64."""
    device, rows = problem.input.device, {}
    exact = problem.copy(torch.float64)
    exact_outputs, exact_gradients = outputs_of(exact), exact.step()
    ways = {name: problem.copy(torch.float32) for name in WAYS}
    for name, way in ways.items():
        options = WAYS[name]
        if options is not None:
            parallelize(way.layer, probe_every=0, **options)
        warm_up = sum(seconds_of(way.step, device) for _ in range(_WARM_UP[name]))
        before = records(way.layer)
        gradients = way.step()
        rows[name] = {
            "way": name,
            **_what_was_done(way, before),
            "output_error": relative_error(outputs_of(way), exact_outputs),
            "gradient_error": relative_error(gradients, exact_gradients),
            "warm_up_seconds": warm_up,
        }
        del gradients
    del exact, exact_outputs, exact_gradients
    times: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    for repeat in range(args.repeats):
        if repeat >= _FEWEST and time.perf_counter() - began > args.case_seconds:
            break
        for name, way in ways.items():
            way.step()  # whatever the turn of the others has displaced
            times[name].append(seconds_of(way.step, device))
    ordinary = statistics.median(times["ordinary"])
    for name, row in rows.items():
        row["step_ms"] = 1e3 * statistics.median(times[name])
        row["step_ms_of_runs"] = [1e3 * seconds for seconds in times[name]]
        row["speedup"] = 1e3 * ordinary / row["step_ms"]
        row["counts"] = all(
            row[error] <= max(LARGEST_ERROR, rows["ordinary"][error]) for error in ("output_error", "gradient_error")
        )
    return list(rows.values())


def _what_was_done(way: Problem, before: dict[str, Any]) -> dict[str, Any]:
    """From the record of the newest pass; one that is not new says that the layer went the ordinary way."""
    record = records(way.layer).get("l0")
    if record is None or record is before.get("l0"):
        return {"backward": "ordinary", "forward": "ordinary"}
    done: dict[str, Any] = {"backward": record.solver, "backward_iterations": record.iterations, "forward": "ordinary"}
    if record.forward is not None:
        done["forward"] = "jacobi_gs"
        for name in ("iterations", "sweeps", "block", "halo", "residual", "error"):
            done[f"forward_{name}"] = getattr(record.forward, name)
    return done


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the table of one case."""
    table = Table(title=title, title_justify="left", title_style="")
    for column in ("way", "forward", "backward", "step ms", "speedup", "outputs' error", "gradients'", "sweeps"):
        table.add_column(column, justify="left" if column in ("way", "forward", "backward") else "right")
    for row in rows:
        block = f" {row['forward_block']} + {row['forward_halo']}" if "forward_block" in row else ""
        table.add_row(
            row["way"],
            row["forward"] + block,
            f"{row['backward']} {row.get('backward_iterations', '')}",
            f"{row['step_ms']:.3f}",
            f"{row['speedup']:.2f}x" if row["counts"] else "too inexact",
            f"{row['output_error']:.1e}",
            f"{row['gradient_error']:.1e}",
            str(row.get("forward_sweeps", "")),
        )
    Console(width=140).print(table)


def compare_with_aims(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every aim with what was measured of it, for each cell."""
    found = []
    rows = [(case, row) for case in cases for row in case["rows"] if row["way"] == "both"]
    for aim in AIMS:
        for case, row in rows:
            if (case["memory"], case["shape"]) == (aim.memory, str(aim.shape)):
                # Falling back on the baseline is never a speedup over it, whatever two timings of it say.
                met = row["counts"] and row["backward"] != "ordinary" and row["speedup"] >= aim.speedup
                name = f"{case['cell']}, {aim.shape}, {aim.memory} memory: {aim.speedup:g}x"
                found.append({"aim": name, "measured": row["speedup"], "met": met})
    if rows:
        case, row = min(rows, key=lambda each: each[1]["speedup"])
        name = f"slowest case ({case['cell']}, {case['shape']}, {case['memory']} memory): {NEVER_SLOWER:g}x"
        found.append({"aim": name, "measured": row["speedup"], "met": row["speedup"] >= NEVER_SLOWER})
    return found


def run(args: argparse.Namespace, device: torch.device, report: dict[str, Any]) -> None:
    """Measure every case, and keep the report after each."""
    trained: dict[tuple[str, int], tuple[LastState, dict[str, Any]]] = {}
    for shape, memory, cell in cases_of(args.shapes, args.memory, args.cells):
        case: dict[str, Any] = {"cell": cell, "shape": str(shape), "memory": memory, "rows": []}
        report["cases"].append(case)
        if memory == "short":
            problem = short_memory(cell, *shape, device, args.seed)
        else:
            if (cell, shape.hidden) not in trained:
                trained[cell, shape.hidden] = train_on_adding(
                    cell, shape.hidden, args.train_length, args.train_seconds, device, args.seed
                )
                print_training(cell, shape.hidden, trained[cell, shape.hidden][1])
            network, case["training"] = trained[cell, shape.hidden]
            problem = long_memory(network, shape.batch, shape.length, args.seed)
        case["input_size"] = problem.input.shape[2]
        case["load_average"] = os.getloadavg()[0]
        title = f"{cell}, {shape} (batch x time x hidden), {memory} memory, {report['environment']['device_name']}"
        try:
            with tf32(False):
                case["rows"] = measure(problem, args)
        except Exception as error:  # out of memory, a kernel that does not compile: the other cases are still wanted
            case["failed"] = f"{type(error).__name__}: {error}"
            print(f"{title}: {case['failed']}")
        else:
            print_rows(title, case["rows"])
        save_report(report, args.output)
    report["aims"] = compare_with_aims(report["cases"])
    save_report(report, args.output)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns the report."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rnn_step", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--cells", nargs="+", default=list(CELLS), choices=CELLS, metavar="CELL", help="%(choices)s (default: all)"
    )
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, metavar="BxTxH", help="batch x time x hidden")
    parser.add_argument(
        "--memory",
        nargs="+",
        default=["short", "long"],
        choices=["short", "long"],
        metavar="MEMORY",
        help="short: fresh weights; long: trained ones (default: both)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of every way")
    parser.add_argument("--case-seconds", type=float, default=2.0, help="fewer runs (3 at least) of slower cases")
    parser.add_argument("--train-seconds", type=float, default=20.0, help="at most, for each network of long memory")
    parser.add_argument("--train-length", type=int, help="steps of its sequences (default: 200; on a CPU 100)")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sequences")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="where to run (here: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    args.shapes = args.shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    args.train_length = args.train_length or (200 if device.type == "cuda" else 100)
    report = new_report("rnn_step", device) | {"cases": []}
    logger = logging.getLogger("lit_parallel.recurrent")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the tables say which way was taken
    try:
        run(args, device, report)
    finally:
        logger.setLevel(level)
    for aim in report["aims"]:
        print(f"{aim['aim']}: {aim['measured']:.2f}x, {'met' if aim['met'] else 'not met'}")
    return report


if __name__ == "__main__":
    main()
