"""Several sampling runs side by side: ``python -m lit_parallel.compare RUN [RUN ...]``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lit_parallel.errors import UserError, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_BYTES = 64 << 20  # of a report
_MOST_ROWS = 200  # in a figure
_BASELINES = {"sequential": "seq.", "cached_sequential": "cached"}  # as they stand above a column
_PIPED_WIDTH = 100


@dataclass(frozen=True)
class Row:
    """One solver of one report.

    Attributes:
        run: Number of the report, from 1.
        solver: Its name.
        equations: T.
        iterations: Mean and largest number of parallel iterations over the samples, those of the certificate apart.
        certificate: Iterations of the certificate.
        iteration_speedup: T over the iterations.
        work: Evaluations of equations relative to sequential evaluation.
        milliseconds: Wall-clock time per sample, the certificate included.
        speedup: Wall-clock speedup over the baselines of the same report, by their names.
        equal: Whether the bits are those of sequential evaluation; ``None`` if they were not compared.
        solved: Whether all samples were; what was not has no speedup.
    """

    run: int
    solver: str
    equations: int
    iterations: tuple[float, int]
    certificate: int
    iteration_speedup: float
    work: float
    milliseconds: float
    speedup: dict[str, float]
    equal: bool | None
    solved: bool


@dataclass(frozen=True)
class Report:
    """What is compared of one ``report.json``: where it lies, what was measured, and the rows of its table."""

    path: Path
    what: str
    rows: list[Row]


def read_report(path: Path, number: int = 1) -> Report:
    """Read the comparison in a sampling run's report.

    Args:
        path: ``report.json``, or the folder that it lies in.
        number: Under which the report is shown.

    Raises:
        UserError: If there is none, or it cannot be read, or it is not one of ``sample.py``.
    """
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"There is no '{file}': name the folder of a sampling run, as sample.py prints it.")
    try:
        with file.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UserError(f"'{file}' is larger than {_MOST_BYTES:,} bytes: that is no report.")
        report = json.loads(content)
    except OSError as error:
        raise UserError(f"Cannot read '{file}': {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{file}' is not JSON: {one_line(error)}.") from error
    comparison = report.get("comparison") if isinstance(report, dict) else None
    if comparison is None:
        raise UserError(f"'{file}' compares no solvers: name the report of a sampling run (python sample.py).")
    try:
        rows = [_row(number, row) for row in comparison["rows"]]
        return Report(file, _text(comparison["what"]), rows)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"'{file}' is damaged, or of another version: {type(error).__name__} {one_line(error)}."
        ) from error


def _row(number: int, row: dict[str, Any]) -> Row:
    samples = int(row["samples"])
    over = {name: _number(row.get(f"speedup_over_{name}")) for name in _BASELINES}
    return Row(
        run=number,
        solver=_text(row["solver"]),
        equations=int(row["equations"]),
        iterations=(float(row["iterations_mean"]), int(row["iterations_max"])),
        certificate=int(row["certificate_iterations_max"]),
        iteration_speedup=_number(row["iteration_speedup"]),
        work=float(row["work"]),
        milliseconds=1e3 * float(row["seconds"]) / samples if samples else math.nan,
        speedup=over,
        equal=row["bitwise_equal_to_sequential"],
        solved=int(row["solved"]) == samples,
    )


def _number(value: Any) -> float:
    """JSON has no NaN: what could not be told is null, or left out."""
    return math.nan if value is None else float(value)


def _text(value: Any) -> str:
    """A report may come from anywhere: nothing but text reaches the terminal, and not pages of it."""
    if not isinstance(value, str):
        raise TypeError("a text was expected")
    return "".join(letter if letter.isprintable() else " " for letter in value[:200])


def print_comparison(reports: Sequence[Report]) -> None:
    """Print what each report measured, and one line per solver; speedups are over baselines of the same report."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    for number, report in enumerate(reports, start=1):
        console.print(f"{number}: {report.path.parent}", soft_wrap=True)
        console.print(f"   {report.what}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("run\nsolver", no_wrap=True)
    over = [f"over\n{short}" for short in _BASELINES.values()]
    for name in ("iterations\nmean/max", "iteration\nspeedup", "work", "ms per\nimage", *over, "equal\nbits"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        for row in report.rows:
            mean, most = row.iterations
            table.add_row(
                f"{row.run} {row.solver}",
                f"{mean:.4g}/{most}" + (f"+{row.certificate}" if row.certificate else ""),
                _times(row.iteration_speedup, row),
                f"{row.work:.1f}",
                _milliseconds(row.milliseconds),
                *(_times(row.speedup[name], row) for name in _BASELINES),
                {None: "?", True: "yes", False: "no"}.get(row.equal, "?"),
            )
        table.add_section()
    console.print(table)
    console.print(
        "iterations: + those of the certificate; work: equations evaluated, relative to sequential; over: wall-clock "
        "speedup over the sequential and cached sequential sampling of the same run; equal bits: as sequential sampling"
    )


def _times(speedup: float, row: Row) -> str:
    if not row.solved:
        return "unsolved"
    return "-" if math.isnan(speedup) else f"{speedup:.3g}x"


def _milliseconds(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"  # never an exponent


def comparison_figure(reports: Sequence[Report]) -> Figure:
    """Iterations, work and time per image side by side, a point for each solver of each report."""
    from matplotlib.ticker import NullFormatter

    from lit_parallel.plots import COLOURS, new_figure

    rows = [row for report in reports for row in report.rows]
    if len(rows) > _MOST_ROWS:
        raise UserError(f"A figure of {len(rows)} solvers cannot be read: compare fewer runs (at most {_MOST_ROWS}).")
    notes = [f"{number}: {report.what}" for number, report in enumerate(reports, start=1)]
    figure = new_figure("Three speeds of sampling: less is better", 12, 1.8 + 0.28 * len(rows) + 0.2 * len(notes))
    columns = {
        "parallel iterations (mean), certificate included": [row.iterations[0] + row.certificate for row in rows],
        "work (sequential = 1)": [row.work for row in rows],
        "wall-clock ms per image": [row.milliseconds for row in rows],
    }
    colours = [COLOURS[(row.run - 1) % len(COLOURS)] for row in rows]
    for axes, (name, values) in zip(figure.subplots(1, 3, sharey=True), columns.items(), strict=True):
        axes.scatter(values, range(len(rows)), color=colours, zorder=3)
        for place, value in enumerate(values):
            axes.annotate(
                f"{value:.3g}" if value < 100 else f"{value:.0f}",
                (value, place),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.25)
        axes.set_xlabel(name)
        axes.set_yticks(range(len(rows)), [f"{row.run} {row.solver}" for row in rows])
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.5 / max(len(rows), 1))
    axes.invert_yaxis()  # shared by all three
    figure.supxlabel("\n".join(notes), fontsize=9, ha="left", x=0.01)
    return figure


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = _Parser(
        prog="python -m lit_parallel.compare",
        description="One table and one figure over several sampling runs: solvers, batch sizes, devices.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a folder with a report.json, or the file")
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        default=Path("comparison.png"),
        help="the figure, .png, .pdf or .svg (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    if arguments.output.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--output must end with .png, .pdf or .svg, not '{arguments.output.name}'.")
    reports = [read_report(path, number) for number, path in enumerate(arguments.runs, start=1)]
    from lit_parallel.plots import save_figure

    print_comparison(reports)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_figure(comparison_figure(reports), arguments.output)
    print(f"look at:  {arguments.output}")


if __name__ == "__main__":
    from lit_parallel.cli import run_command

    sys.exit(run_command(main))
