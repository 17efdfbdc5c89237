"""The Weights & Biases workspace of this project as code: ``python -m lit_parallel.dashboard``.

Without an account it says what it would create, and where to look instead. With one (``wandb login``) it saves the
workspace: runs in groups by experiment and job type, and sections that put side by side what belongs together.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lit_parallel.errors import UserError, one_line

NAME = "lit-parallel"
"""Of the workspace."""

_MOST_BYTES = 64 << 20  # of a report


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: Above it.
        kind: ``line``, ``bar``, ``images`` or ``table``.
        metrics: What it shows, by the names that runs log; of lines, one regular expression is allowed instead.
        x: What lines are drawn against.
        log: Whether lines are drawn on a logarithmic axis.
    """

    title: str
    kind: str
    metrics: tuple[str, ...] = ()
    x: str = "trainer/global_step"
    log: bool = False
    regex: str | None = None


def _lines(title: str, *metrics: str, **options: Any) -> Panel:
    return Panel(title, "line", metrics, **options)


def _bars(title: str, *metrics: str) -> Panel:
    return Panel(title, "bar", metrics)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Training": (
        _lines("Loss", "train/loss", "val/loss"),
        _lines("Bits per dimension", "train/bits_per_dim", "val/bits_per_dim"),
        _lines("Accuracy", "train/accuracy", "val/accuracy", "val/top5"),
        _lines("Bits per character", "train/bits_per_character", "val/bits_per_character"),
        _lines("Relative error", "train/relative_error", "val/relative_error"),
        _lines("Sample grids: parallel iterations", "sample_grid/iterations_mean", "sample_grid/iterations_max"),
        Panel("Sample grids", "images", ("sample_grid/images",)),
    ),
    "Sampling: iterations, work, wall-clock": (
        _bars("Iteration speedup (T / iterations)", "solver/iteration_speedup"),
        _bars("Work (sequential = 1)", "solver/work"),
        _bars("Wall-clock speedup over the first baseline", "solver/wall_clock_speedup"),
        _bars("Part certified bit for bit", "solver/certified"),
        Panel("Solvers, same noise, same device", "table", ("solvers",)),
        Panel("What auto measured", "table", ("solver_candidates",)),
    ),
    "Residuals": (
        _lines("Largest change in an iteration", "solver/residual", x="solver/iteration", log=True),
        _lines("By block", regex="solver/residual/.*", x="solver/iteration", log=True),
    ),
    "Samples and iteration maps": (
        Panel("Samples", "images", ("samples",)),
        Panel("When each pixel became final", "images", ("iterations",)),
        Panel("Iterates on their way", "images", ("strips",)),
        Panel("Error and change per iteration", "images", ("convergence",)),
    ),
    "Recurrent networks": (
        _lines("Parallel iterations of a backward pass", regex="jacobi_backprop/.*/(forward_)?iterations"),
        _lines("Estimated error", regex="jacobi_backprop/.*/(forward_)?estimated_error", log=True),
        _lines("Difference from the ordinary backward pass", regex="jacobi_backprop/.*/probe_error", log=True),
        _lines("Speedup over the ordinary pass", regex="jacobi_backprop/.*_speedup"),
    ),
    "DenseNets": (
        _lines("Parallel iterations per block", regex="jacobi_evaluation/.*iterations.*"),
        _lines("Agreement with the ordinary forward", regex="jacobi_evaluation/.*_agreement"),
        _lines("Speedup over the ordinary forward (eager)", regex="jacobi_evaluation/.*speedup.*"),
    ),
    "Benchmark ladder": (
        _lines("Seconds for a batch", regex="ladder/seconds/.*", x="ladder/batch", log=True),
        _lines("Parallel iterations", regex="ladder/iterations/.*", x="ladder/batch", log=True),
        Panel("All rows", "table", ("ladder",)),
    ),
}


def build_workspace(entity: str, project: str) -> Any:
    """The workspace, not saved.

    Args:
        entity: User or team.
        project: Where the runs are.

    Returns:
        A ``wandb_workspaces.workspaces.Workspace``.

    Raises:
        UserError: If wandb-workspaces is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the library's own use of pydantic
            import wandb_workspaces.reports.v2 as wr
            import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError("This needs wandb-workspaces: pip install -e '.[dashboard]'.") from error

    def panel(each: Panel) -> Any:
        if each.kind == "line":
            # Raw numbers: a smoothed count of iterations is none.
            shown = {"metric_regex": each.regex} if each.regex else {"y": list(each.metrics)}
            return wr.LinePlot(title=each.title, x=each.x, log_y=each.log, smoothing_type="none", **shown)
        if each.kind == "bar":
            return wr.BarPlot(title=each.title, metrics=list(each.metrics))
        if each.kind == "images":
            return wr.MediaBrowser(title=each.title, media_keys=list(each.metrics))
        return wr.WeavePanelSummaryTable(table_name=each.metrics[0])

    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(name=name, panels=[panel(each) for each in panels], is_open=True)
            for name, panels in SECTIONS.items()
        ],
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group"), ws.Metric("JobType")]),
    )


def describe() -> list[str]:
    """Lines that say what the workspace shows."""
    lines = []
    for name, panels in SECTIONS.items():
        lines.append(name)
        lines += [f"  {each.title}: {', '.join(each.metrics) or each.regex}" for each in panels]
    return lines


def log_ladder(path: Path, options: Any, folder: Path) -> list[str]:
    """Log a report of ``benchmarks/pixelcnnpp_ladder.py`` as a run of job type ``benchmark``.

    Args:
        path: The report.
        options: The config's ``wandb`` group.
        folder: What the run's files are kept in.

    Returns:
        Lines that say how to look at it.

    Raises:
        UserError: If the file is no such report.
    """
    from lit_parallel.tracking import build_logger, finish, how_to_look, log_table

    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
        report = json.loads(content)
        points: list[dict[str, float]] = []
        rows = []
        for case in report["cases"]:
            batch = int(case["batch"])
            points.append({"ladder/batch": batch})
            for row in case["rows"]:
                method = str(row["method"])[:100]
                points[-1][f"ladder/seconds/{method}"] = float(row["seconds"])
                points[-1][f"ladder/iterations/{method}"] = float(row["iterations_mean"])
                plain = {key: value for key, value in row.items() if isinstance(value, str | float | int | None)}
                rows.append({"batch": batch} | plain)
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{path}' is no report of benchmarks.pixelcnnpp_ladder ({one_line(error)}).") from error
    config = {key: report.get(key) for key in ("command", "environment", "model")}
    logger = build_logger(options, folder / path.stem, config=config, experiment="benchmarks", job_type="benchmark")
    try:
        if logger is not None:
            for point in points:
                logger.experiment.log(point)
            log_table(logger, "ladder", rows)
    finally:
        finish(logger)
    return how_to_look(logger)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = _Parser(
        prog="python -m lit_parallel.dashboard",
        description="Save the Weights & Biases workspace of this project; without an account, say what is in it.",
    )
    parser.add_argument("--project", metavar="NAME", default="lit-parallel", help="where the runs are (%(default)s)")
    parser.add_argument("--entity", metavar="NAME", help="user or team (default: your own)")
    parser.add_argument(
        "--ladder",
        metavar="REPORT",
        nargs="+",
        type=Path,
        default=[],
        help="log these reports of benchmarks.pixelcnnpp_ladder first, as runs of job type benchmark",
    )
    parser.add_argument("--runs-folder", metavar="PATH", type=Path, default=Path("runs"), help="for those runs (runs)")
    arguments = parser.parse_args(argv)

    from lit_parallel.config import WandbOptions
    from lit_parallel.tracking import has_account

    online = has_account()
    options = WandbOptions(mode="online" if online else "offline", project=arguments.project, entity=arguments.entity)
    for path in arguments.ladder:
        for line in log_ladder(path, options, arguments.runs_folder / "benchmarks"):
            print(line)
    if not online:
        print(f"The workspace '{NAME}' of the project '{arguments.project}' would show:\n")
        print("\n".join(describe()))
        print("\nIt needs an account: run 'wandb login', upload runs with 'wandb sync', and then this again.")
        print("Without one, look at a run in the terminal:  wandb leet runs/EXPERIMENT/TIME/wandb")
        return
    import wandb

    try:
        workspace = build_workspace(arguments.entity or str(wandb.Api().default_entity), arguments.project)
        workspace.save()
    except UserError:
        raise
    except Exception as error:  # whatever the server, or the way to it, has against it
        raise UserError(f"Weights & Biases did not take the workspace: {one_line(error)[:300]}") from error
    print(f"look at:  {workspace.url}")


if __name__ == "__main__":
    from lit_parallel.cli import run_command

    sys.exit(run_command(main))
