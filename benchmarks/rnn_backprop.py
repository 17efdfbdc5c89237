"""Backpropagation through recurrent layers: parallel in time against PyTorch's own (cuDNN's on a GPU), same run.

``python -m benchmarks.rnn_backprop`` measures every cell and shape in two regimes. *Short memory*: fresh weights,
random inputs with as many features as hidden units, a loss on all outputs. *Long memory*: weights that this script
trains on the adding problem with the ordinary backward pass, then the task's own sequences at the shape's length and
its loss on the last state; how well they solve it and how far their gradient reaches stands in the report.

Both ways go through autograd: gradients of weights, biases, input and initial states. *Backward* is that alone, *step*
the forward pass and it together. Times are wall-clock, with the device synchronised, medians of runs in which the ways
take turns. The first passes of the parallel way compile and tune; they are not among them, their total is reported.

Errors are norms over all gradients together, relative to float64. The *error* is that to a run in float64, forward pass
included; the *backward's error* that to a float64 backward pass at the very hidden states of the float32 forward pass,
which is all that a backward pass can be held to: trained to remember, a network amplifies the forward pass's rounding,
for both ways alike. A speedup counts if the error is at most 1e-6, with a star if only the backward's is; where
``auto`` fell back on the ordinary way, there is no other error to hold it to.

``--tf32 on`` lets cuDNN round to TF32, as it does by default, in the ordinary way; the parallel way (and the ordinary
one where ``auto`` falls back on it) never does here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.rnn_common import new_report, save_report
from benchmarks.rnn_memory import Problem, long_memory, short_memory, train_on_adding
from lit_parallel.networks.rnn import LastState
from lit_parallel.recurrent import parallelize, records
from lit_parallel.recurrent.comparison import relative_error
from lit_parallel.recurrent.stopwatch import seconds_of

CELLS = ("rnn", "lstm", "gru")
SOLVERS = ("auto", "jacobi_gs", "two_level")
LARGEST_ERROR = 1e-6
_ORDINARY = "ordinary"
_WARM_UP = 10  # passes, in which halos and ranks settle
_ORDINARY_WARM_UP = 3
_FEWEST = 3  # timed runs, however slow


class Shape(NamedTuple):
    """Batch, time steps, hidden units."""

    batch: int
    length: int
    hidden: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read such as ``64x784x128``."""
        return cls(*(int(number) for number in text.split("x")))

    def __str__(self) -> str:
        return "x".join(map(str, self))


# The first three matter most; shapes of the same width share a training.
GPU_SHAPES = [
    Shape(64, 784, 128),
    Shape(32, 4096, 128),
    Shape(1, 32768, 128),
    Shape(1, 100, 128),
    Shape(64, 784, 256),
    Shape(16, 2048, 512),
]
CPU_SHAPES = [Shape(1, 784, 128), Shape(8, 784, 128)]


class Aim(NamedTuple):
    """At least so many times as fast as the ordinary backward pass."""

    memory: str
    cells: tuple[str, ...]
    shape: Shape
    solver: str
    speedup: float


_GATED = ("lstm", "gru")
AIMS = {
    "cuda": [
        *(Aim("short", ("rnn",), shape, "auto", x) for shape, x in zip(GPU_SHAPES, (2, 6, 100), strict=False)),
        *(Aim("short", _GATED, shape, "auto", x) for shape, x in zip(GPU_SHAPES, (3, 6, 100), strict=False)),
        Aim("long", CELLS, Shape(1, 32768, 128), "two_level", 10),
        Aim("long", CELLS, Shape(32, 4096, 128), "two_level", 2),
    ],
    "cpu": [Aim("short", CELLS, Shape(1, 784, 128), "auto", 1), Aim("long", CELLS, Shape(1, 784, 128), "auto", 1)],
}
NEVER_SLOWER = 0.95  # auto, anywhere


def measure(problem: Problem, solvers: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the ordinary way and every solver, in turns, and compare their gradients with float64."""
    device = problem.input.device
    with tf32(False):
        in_float64 = problem.copy(torch.float64).step()
        exact_backward = problem.exact_backward()
    ways = {_ORDINARY: problem} | {solver: problem.copy(torch.float32) for solver in solvers}
    rows: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        if name != _ORDINARY:
            parallelize(way.layer, solver=name, probe_every=0)
        with tf32(name == _ORDINARY and args.tf32 == "on"):
            passes = _ORDINARY_WARM_UP if name == _ORDINARY else _WARM_UP
            warm_up = sum(seconds_of(way.step, device) for _ in range(passes))
            before = records(way.layer)
            gradients = way.step()
        rows[name] = {
            "method": name,
            "error": relative_error(gradients, in_float64),
            "backward_error": relative_error(gradients, exact_backward),
            "warm_up_seconds": warm_up,
            **_what_was_done(way, before),
        }
    times = _take_turns(ways, args, device)
    ordinary = rows[_ORDINARY]
    for name, row in rows.items():
        for phase in ("backward", "step"):
            row[f"{phase}_ms"] = 1e3 * statistics.median(times[name, phase])
            row[f"{phase}_ms_of_runs"] = [1e3 * seconds for seconds in times[name, phase]]
            row[f"{phase}_speedup"] = ordinary[f"{phase}_ms"] / row[f"{phase}_ms"]
        row |= judge(row)
    return list(rows.values())


def judge(row: dict[str, Any]) -> dict[str, bool]:
    """Whether a row's speedups count, and whether only because the forward pass is what differs from float64."""
    if row["solved_by"] == _ORDINARY:  # the baseline itself, or where auto fell back on it
        return {"counts": True, "forward_differs": False}
    exact, backward_exact = (bool(row[name] <= LARGEST_ERROR) for name in ("error", "backward_error"))
    return {"counts": exact or backward_exact, "forward_differs": backward_exact and not exact}


def _take_turns(
    ways: dict[str, Problem], args: argparse.Namespace, device: torch.device
) -> dict[tuple[str, str], list[float]]:
    times: dict[tuple[str, str], list[float]] = {(name, phase): [] for name in ways for phase in ("backward", "step")}
    began = time.perf_counter()
    for repeat in range(args.repeats):
        if repeat >= _FEWEST and time.perf_counter() - began > args.case_seconds:
            break
        for name, way in ways.items():
            with tf32(name == _ORDINARY and args.tf32 == "on"):
                times[name, "step"].append(seconds_of(way.step, device))
                result = way.forward()
                times[name, "backward"].append(seconds_of(functools.partial(way.backward, result), device))
    return times


def _what_was_done(way: Problem, before: dict[str, Any]) -> dict[str, Any]:
    """From the record of the newest pass; a record that is not new says that the layer went the ordinary way."""
    newest = records(way.layer)
    if not newest or newest["l0"] is before.get("l0"):
        return {"solved_by": _ORDINARY}
    record = newest["l0"]
    names = ("iterations", "sweeps", "residual", "block", "halo", "rank")
    return {
        "solved_by": record.solver,
        "estimated_error": record.error,
        **{name: getattr(record, name) for name in names},
    }


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether cuDNN may round products to TF32, as PyTorch lets it by default."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, allowed
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the short table of one case."""
    table = Table(title=title, title_justify="left", title_style="")
    for column in (
        "method", "solved by", "backward ms", "speedup", "step ms", "speedup", "error", "backward's", "estimated",
        "iterations", "sweeps", "block + halo", "rank",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("method", "solved by") else "right")
    for row in rows:
        solved = "iterations" in row
        table.add_row(
            row["method"],
            row["solved_by"],
            f"{row['backward_ms']:.3f}",
            shown_speedup(row, "backward"),
            f"{row['step_ms']:.3f}",
            shown_speedup(row, "step"),
            f"{row['error']:.1e}",
            f"{row['backward_error']:.1e}",
            f"{row['estimated_error']:.1e}" if solved else "",
            str(row["iterations"]) if solved else "",
            str(row["sweeps"]) if solved else "",
            f"{row['block']} + {row['halo']}" if solved else "",
            str(row["rank"]) if solved else "",
        )
    Console(width=160).print(table)


def shown_speedup(row: dict[str, Any], phase: str) -> str:
    """A speedup, unless the error is too large; with a star if the forward pass's is."""
    if row["method"] == _ORDINARY:
        return ""
    return f"{row[f'{phase}_speedup']:.2f}x{'*' if row['forward_differs'] else ''}" if row["counts"] else "too inexact"


def compare_with_aims(device: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every aim with what was measured of it."""
    found = []
    for aim in AIMS[device]:
        for cell in aim.cells:
            key = (aim.memory, cell, str(aim.shape))
            rows = [
                row
                for case in cases
                if (case["memory"], case["cell"], case["shape"]) == key
                for row in case["rows"]
                if row["method"] == aim.solver
            ]
            met, measured = None, "not measured"
            if rows:
                # Falling back on the baseline is never a speedup over it, whatever two timings of it say.
                fell_back = rows[0]["solved_by"] == _ORDINARY
                met = rows[0]["counts"] and not fell_back and rows[0]["backward_speedup"] >= aim.speedup
                measured = shown_speedup(rows[0], "backward") + (" (the ordinary way)" if fell_back else "")
            found.append(
                {
                    "aim": f"{cell}, {aim.shape}, {aim.memory} memory, {aim.solver}: backward {aim.speedup:g}x",
                    "measured": measured,
                    "met": met,
                }
            )
    autos = [(case, row) for case in cases for row in case["rows"] if row["method"] == "auto"]
    for phase in ("backward", "step") if autos else ():
        case, row = min(autos, key=lambda each: each[1][f"{phase}_speedup"])
        found.append(
            {
                "aim": f"auto, {phase}, slowest case: {NEVER_SLOWER:g}x",
                "measured": f"{row[f'{phase}_speedup']:.2f}x ({case['cell']}, {case['shape']}, {case['memory']})",
                "met": row[f"{phase}_speedup"] >= NEVER_SLOWER,
            }
        )
    return found


def print_aims(title: str, aims: list[dict[str, Any]]) -> None:
    """Print the last table."""
    table = Table(title=title, title_justify="left", title_style="")
    for column in ("aim", "measured", "met"):
        table.add_column(column)
    for aim in aims:
        table.add_row(aim["aim"], aim["measured"], {True: "yes", False: "no", None: ""}[aim["met"]])
    console = Console(width=160)
    console.print(table)
    console.print("* the error to float64 is above 1e-6 by the forward pass's rounding; the backward's own is not")


def cases_of(shapes: Sequence[Shape], memories: Sequence[str], cells: Sequence[str]) -> list[tuple[Shape, str, str]]:
    """Shapes, regimes and cells in the order of measurement: per width, so that its networks are trained once."""
    widths = list(dict.fromkeys(shape.hidden for shape in shapes))
    return [
        (shape, memory, cell)
        for width in widths
        for memory in memories
        for shape in shapes
        if shape.hidden == width
        for cell in cells
    ]


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
            case["gradient_reaches"] = problem.reach()
        case["input_size"] = problem.input.shape[2]
        title = (
            f"{cell}, {shape} (batch x time x hidden), {memory} memory, {report['environment']['device_name']}, "
            f"float32, TF32 {'in the ordinary way only' if args.tf32 == 'on' else 'off'}"
        )
        if device.type == "cpu":
            title += f", {torch.get_num_threads()} threads"
        if memory == "long":
            reached = ", ".join(f"{size:.0e} after {steps}" for steps, size in case["gradient_reaches"].items())
            title += f"; gradient {reached}"
        case["load_average"] = os.getloadavg()[0]  # of the minute before: what else the machine was doing
        try:
            case["rows"] = measure(problem, args.solvers, args)
        except Exception as error:  # out of memory, a kernel that does not compile: the other cases are still wanted
            case["failed"] = f"{type(error).__name__}: {error}"
            print(f"{title}: {case['failed']}")
        else:
            print_rows(title, case["rows"])
        save_report(report, args.output)
    report["aims"] = compare_with_aims(device.type, report["cases"])
    save_report(report, args.output)


def print_training(cell: str, hidden: int, facts: dict[str, Any]) -> None:
    """One line about a training."""
    print(
        f"trained {cell}, {hidden} hidden units ({facts['network']}): {facts['task']}, {facts['steps']} steps in "
        f"{facts['seconds']:.1f} s, {'solved' if facts['solved'] else 'NOT solved'}: error "
        f"{facts['test_relative_error']:.3f} of the mean's, {100 * facts['test_accuracy']:.0f} % of answers right"
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns the report."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rnn_backprop", description=(__doc__ or "").partition("\n")[0]
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
    parser.add_argument(
        "--solvers",
        nargs="+",
        default=list(SOLVERS),
        choices=SOLVERS,
        metavar="SOLVER",
        help="%(choices)s (default: all)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of every way")
    parser.add_argument("--case-seconds", type=float, default=2.0, help="fewer runs (3 at least) of slower cases")
    parser.add_argument("--train-seconds", type=float, default=20.0, help="at most, for each network of long memory")
    parser.add_argument("--train-length", type=int, help="steps of its sequences (default: 200; on a CPU 100)")
    parser.add_argument("--tf32", default="off", choices=["off", "on"], help="on: in the ordinary way, as by default")
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
    report = new_report("rnn_backprop", device) | {"tf32": args.tf32, "cases": []}
    began = time.perf_counter()
    logger = logging.getLogger("lit_parallel.recurrent")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the tables say which way was taken
    try:
        run(args, device, report)
    finally:
        logger.setLevel(level)
    report["seconds"] = time.perf_counter() - began
    save_report(report, args.output)
    print_aims(f"aims and measurements, TF32 {args.tf32}, {report['seconds']:.0f} s in all", report["aims"])
    return report


if __name__ == "__main__":
    main()
