"""What a sampling run leaves: ``report.json``, pictures, and the table that is printed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from lit_parallel.config import SampleConfig, to_container
from lit_parallel.environment import environment
from lit_parallel.modules.autoregressive import AutoregressiveModule
from lit_parallel.pictures import Strip, iteration_map_figure, strip_iterations, strips_figure
from lit_parallel.plots import Convergence, convergence_figure, save_figure, save_image_grid
from lit_parallel.runs import short_path, written_whole
from lit_parallel.sampling.auto import Choice
from lit_parallel.sampling.compare import Measurement, Trace, compare, trace
from lit_parallel.sampling.sampler import Sampler, What, has_caches
from lit_parallel.sampling.shards import Shards
from lit_parallel.solution import Solution, Status
from lit_parallel.solvers import SolverOptions
from lit_parallel.solvers.options import CACHED_SEQUENTIAL

GRID_IMAGES = 64
"""At most so many images are drawn in ``samples.png``."""

_MOST_NAMED = 1000
"""At most so many samples that were not solved are named in ``report.json``."""

_SHORT = {"sequential": "seq.", "cached_sequential": "cached"}  # as baselines stand above a column

_MOST_SHOWN = 10
"""At most so many samples that are not finite are named on the screen."""

PICTURES = {
    "samples.png": "the samples",
    "iterations.png": "when each pixel became final",
    "strips.png": "the iterates on their way",
    "convergence.png": "error and change per iteration",
}


@dataclass
class SamplingResults:
    """What a sampling run found.

    Attributes:
        folder: With ``report.json`` and the pictures.
        images: The first 8-bit images ``[<= 64, channels, height, width]``; :attr:`shards` hold all.
        solution: Of all samples, without value.
        shards: All images, with the numbers of each.
        measurements: The solver and the baselines, on the first batch.
        report: What ``report.json`` holds.
        title: What the measurements were made on.
        notes: Lines for the user.
    """

    folder: Path
    images: torch.Tensor
    solution: Solution
    shards: Shards
    measurements: list[Measurement]
    report: dict[str, Any]
    title: str
    notes: list[str]

    @property
    def pictures(self) -> dict[str, Path]:
        """The figures that were drawn, by name."""
        return {
            name.removesuffix(".png"): self.folder / name
            for name in list(PICTURES)[1:]
            if (self.folder / name).is_file()
        }

    @property
    def wall_clock_speedup(self) -> float | None:
        """Of the solver over the first baseline."""
        return next(iter(self.measurements[0].speedup.values()), None) if self.measurements else None


def write_results(
    config: SampleConfig,
    model: AutoregressiveModule,
    what: What,
    shards: Shards,
    folder: Path,
    drawn_from: dict[str, str],
    choice: Choice | None = None,
) -> SamplingResults:
    """Read what the processes wrote, measure the baselines on the first batch, and write report and pictures.

    They are kept in the shards' parent folder; the run folder, if that is another one, always holds the newest.

    Args:
        config: The resolved config.
        model: The model, on the device to measure on.
        what: What was sampled.
        shards: All that was sampled.
        folder: The run folder.
        drawn_from: What the model was loaded from: ``checkpoint``, its path, and ``checkpoint_sha256`` of its content.
        choice: What ``solver.name=auto`` chose.
    """
    solver = config.solver if choice is None else choice.solver
    images, solution = shards.read_first(GRID_IMAGES)
    batch_size = min(config.batch_size, config.num_samples)
    first_batch = list(range(batch_size))
    kept = shards.folder.parent
    save_image_grid(images, kept / "samples.png")
    if config.png:
        write_pngs(shards, kept / "png")
    cached = has_caches(model.sampling_system(1, incremental=True, options=what.options, given=what.given))
    baselines = [name for name in config.compare.baselines if name != CACHED_SEQUENTIAL or cached]
    # As a solver it is certified, as a baseline it is not.
    certified_baseline = solver.name == CACHED_SEQUENTIAL and solver.certify
    measurements = compare(
        model,
        [] if solver.name in baselines and not certified_baseline else [solver],
        baselines,
        batch_size=batch_size,
        what=what,
        indices=first_batch,
        repeats=config.compare.repeats,
    )
    measurements.sort(key=lambda measurement: measurement.solver != solver.name)  # the chosen one first
    exact = next((m.solution for m in measurements if m.solver == "sequential"), None)
    if exact is None:
        first = measurements[0].solution
        exact = first if first.certified.all() else Sampler(model, "sequential", batch_size, what).batch(first_batch)[1]
    pixel_map = measurements[0].pixel_map
    if pixel_map is not None and measurements[0].solution.all_solved:
        drawn = images[:batch_size]
        figure = iteration_map_figure(drawn, pixel_map[: len(drawn)], exact.length, solver.name)
        save_figure(figure, kept / "iterations.png")
    if config.compare.curves:
        others = [name for name in config.compare.curves_of if name != solver.name]
        solvers: list[SolverOptions | str] = [solver, *others]
        traces = [
            trace(model, each, batch_size=batch_size, what=what, indices=first_batch, exact=exact.value)
            for each in solvers
        ]
        curves = [Convergence(each.solver, each.error, each.change) for each in traces]
        save_figure(convergence_figure(curves, exact.length), kept / "convergence.png")
        save_figure(strips_figure([_strip(each) for each in traces], exact.length), kept / "strips.png")
    facts = environment(exact.value.device)
    arithmetic = "float64" if exact.value.dtype == torch.float64 else "float32"
    if what.options.precision != "full":
        arithmetic = f"{what.options.precision} network"
    title = (
        f"{batch_size} images of {exact.length} equations each, {facts['device_name']}, {arithmetic}, "
        f"median of up to {config.compare.repeats} runs"
    )
    report = {
        **drawn_from,
        "config": to_container(config),
        "environment": facts,
        "certified": bool(solution.certified.all()),
        "solver": _solver_report(solver) if choice is None else choice.report(),
        "solution": solution.summary(),
        "not_solved": not_solved(solution),
        "comparison": {"what": title, "rows": [measurement.row() for measurement in measurements]},
    }
    write_json(report, kept / "report.json")
    if folder != kept:
        _copy(kept, folder)
    notes = _notes(solution, short_path(folder), short_path(shards.folder), len(shards))
    if len(baselines) < len(config.compare.baselines):
        notes.insert(1, "not compared with cached sequential sampling: no evaluation of this model from caches here")
        notes.insert(2, "every iteration of every solver is one full pass of the network, whatever the work says")
    return SamplingResults(folder, images, solution, shards, measurements, report, title, notes)


def _solver_report(solver: SolverOptions) -> dict[str, Any]:
    return {"asked": solver.name, "chosen": {"name": solver.name, "window": solver.window}}


def _strip(each: Trace) -> Strip:
    iterations = strip_iterations(len(each.frames) - 1)
    return Strip(each.solver, iterations, each.frames[iterations])


def _copy(kept: Path, folder: Path) -> None:
    """Copy report and pictures."""
    for name in ("report.json", *PICTURES):
        if (kept / name).is_file():
            shutil.copyfile(kept / name, folder / name)
        else:  # an older one would not belong to the new report
            (folder / name).unlink(missing_ok=True)


def _notes(solution: Solution, folder: Path, shards: Path, files: int) -> list[str]:
    summary = solution.summary()
    certified = int(solution.certified.sum())
    how = f"{certified} certified bit for bit by a full evaluation"
    if solution.solver == "sequential":
        how = "sequential evaluation is the definition, so there is nothing to certify"
    lines = [f"{len(solution.status)} images sampled; {how}"]
    if not solution.all_solved:
        lines.append(f"NOT all were solved, and no speedup counts: {summary['status']}")
    if bad := not_solved(solution).get("non_finite"):
        which = ", ".join(map(str, bad[:_MOST_SHOWN])) + (", ..." if len(bad) > _MOST_SHOWN else "")
        number = summary["status"]["non_finite"]
        lines.append(f"{number} of them are not finite ({which}): marked in the report, the index and the shards")
    drawn = [(folder / name, about) for name, about in PICTURES.items() if (folder / name).is_file()]
    widest = max(len(str(path)) for path, _ in drawn)
    for number, (path, about) in enumerate(drawn):
        lines.append(f"{'look at:' if number == 0 else '':8}  {path!s:{widest}}  {about}")
    lines.append(f"numbers:  {folder / 'report.json'}")
    lines.append(f"images:   {shards} (files: {files}, and index.json)")
    return lines


def not_solved(solution: Solution) -> dict[str, list[int]]:
    """The samples that were not solved, by status; of each the first 1,000."""
    failed: dict[str, list[int]] = {}
    for index, status in enumerate(solution.status):
        if status not in (Status.CONVERGED, Status.SETTLED):
            failed.setdefault(status.name.lower(), []).append(index)
    return {name: indices[:_MOST_NAMED] for name, indices in failed.items()}


def write_pngs(shards: Shards, folder: Path) -> None:
    """Write every image as a PNG named by its index; those that are there are left alone.

    Raises:
        UserError: If that is not possible.
    """
    folder.mkdir(exist_ok=True)
    for first, images, _ in shards.read():
        for index, image in enumerate(images, start=first):
            path = folder / f"{index:08d}.png"
            if path.exists():
                continue
            pixels = image.permute(1, 2, 0).numpy()
            with written_whole(path) as incomplete:
                Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(incomplete, format="PNG")


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a report; a number that JSON cannot hold becomes null."""
    with written_whole(path) as incomplete:
        incomplete.write_text(json.dumps(_finite(content), indent=2, default=str, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def print_table(measurements: Sequence[Measurement], *, title: str) -> None:
    """Print one line per solver: iterations, work and time side by side, never mixed."""
    baselines = list(measurements[0].speedup)
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("solver", no_wrap=True)
    columns = ["iterations\nmean/max", "iter.\nspeedup", "work", "seconds"]
    columns += [f"over\n{_SHORT.get(name, name)}" for name in baselines]
    for name in (*columns, "equal\nbits"):
        table.add_column(name, justify="right", no_wrap=True)
    for measurement in measurements:
        numbers = measurement.solution.summary()
        certificate = numbers["certificate_iterations_max"]
        iterations = f"{_short(numbers['iterations_mean'], 1).removesuffix('.0')}/{numbers['iterations_max']}"
        table.add_row(
            measurement.solver,
            iterations + (f"+{certificate}" if certificate else ""),
            _times(numbers["iteration_speedup"], measurement),
            _short(numbers["work"], 1),
            _short(measurement.median_seconds, 4),
            *(_times(measurement.speedup[name], measurement) for name in baselines),
            _equality(measurement),
            style="bold" if measurement is measurements[0] else None,
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(title, highlight=False)  # not as the table's title, which would be broken at the table's width
    console.print(table)
    console.print(
        "iterations: + those of the certificate; iter. speedup: equations over iterations; work: equations evaluated, "
        "relative to sequential; over: wall-clock speedup; equal bits: as sequential sampling"
    )
    if measurements[0].solution.given:
        console.print("no speedups: given equations cost nothing, whatever the solver")


def _short(number: float, digits: int) -> str:
    """At most so many digits behind the point, and fewer of a large number; never an exponent."""
    before = len(str(int(number)))
    return f"{number:.{max(0, min(digits, 5 - before))}f}"


def _times(speedup: float, measurement: Measurement) -> str:
    if speedup == speedup:
        return f"{_short(speedup, 2)}x"
    return "-" if measurement.solution.all_solved else "unsolved"


def _equality(measurement: Measurement) -> str:
    if measurement.equal is None:
        return "?"
    return "yes" if measurement.equal else f"no {measurement.largest_difference:.0e}"
