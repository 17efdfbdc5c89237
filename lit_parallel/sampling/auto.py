"""``solver.name=auto``: the solver, and its window, that samples a model fastest here, as measured on one real batch.

Every candidate samples the same batch: cached sequential sampling (without caches, plain sequential sampling), Jacobi,
and GS-Jacobi with the windows that the system names. All are certified, as ``solver.certify`` says, so the choice is
one of time alone: whatever is chosen, the images are the same. What was measured is kept in the user's cache folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import pooch
import torch
from torch import Tensor, nn

from lit_parallel.environment import environment
from lit_parallel.errors import UserError, first_line
from lit_parallel.options import check_options
from lit_parallel.sampling.sampler import Sampler, SamplingModel, What, has_caches
from lit_parallel.solution import Solution
from lit_parallel.solvers import SolverOptions
from lit_parallel.solvers.options import CACHED_SEQUENTIAL
from lit_parallel.systems import TriangularSystem

logger = logging.getLogger(__name__)

_TRIAL_ITERATIONS = 8  # of parallel candidates, which tell what an iteration costs
_TRIAL_PART = 8  # of sequential ones: this part of the T steps
_CLEARLY = 2.0  # times the best so far: a candidate that takes longer is not run to the end
_RUNS, _RUN_SECONDS = 3, 0.5  # a candidate runs so often, of which the fastest counts, unless that takes longer

MEASURED = "measured"
"""The outcome of a candidate that was run to the end."""


@dataclass
class Candidate:
    """One solver in the measurement.

    Attributes:
        label: Its name, and its window.
        outcome: ``"measured"``, or what the seconds are otherwise, or why there are none.
        seconds_per_image: Wall-clock time of a batch over its size, certificate included, setup excluded. A lower bound
            where the candidate was stopped.
        iterations_mean: Parallel iterations, the certificate's not counted.
        iterations_max: The same, of the slowest sample.
        certified: Whether one full evaluation confirmed every sample bit for bit.
        equal: Whether the images are, bit for bit, those that the others agree on; ``None``: it has none.
    """

    label: str
    outcome: str
    seconds_per_image: float | None = None
    iterations_mean: float | None = None
    iterations_max: int | None = None
    certified: bool | None = None
    equal: bool | None = None

    @property
    def eligible(self) -> bool:
        return self.outcome == MEASURED and self.equal is True

    @property
    def time(self) -> str:
        """Seconds per image in words, for a line."""
        if self.seconds_per_image is None:
            return self.outcome
        stopped = "> " if self.outcome.startswith("stopped") else ""
        about = "about " if self.outcome.startswith("extrapolated") else ""
        return f"{stopped}{about}{self.seconds_per_image:.2g}"


@dataclass(frozen=True)
class Choice:
    """What ``auto`` chose, and why.

    Attributes:
        solver: What to sample with; it is named.
        label: Its name, and its window.
        candidates: All that were measured.
        kept_in: The file that an earlier measurement was read from; ``None``: measured now.
    """

    solver: SolverOptions
    label: str
    candidates: list[Candidate]
    kept_in: str | None = None

    def __str__(self) -> str:
        chosen = next(each for each in self.candidates if each.label == self.label)
        others = [each for each in self.candidates if each is not chosen]
        others.sort(key=lambda each: math.inf if each.seconds_per_image is None else each.seconds_per_image)
        seconds = f"{self.label}, {chosen.time} s per image" if chosen.eligible else f"{self.label}: nothing was solved"
        line = "; ".join([f"solver auto: {seconds}", ", ".join(f"{each.label} {each.time}" for each in others)])
        return line if self.kept_in is None else f"{line} (measured earlier; solver.remeasure=true measures again)"

    def report(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return {
            "asked": "auto",
            "chosen": {"name": self.solver.name, "window": self.solver.window},
            "measured_earlier": self.kept_in is not None,
            "candidates": [dataclasses.asdict(candidate) for candidate in self.candidates],
        }


_chosen: dict[Path, Choice] = {}  # in this process, by the file that keeps it


def check(options: SolverOptions) -> None:
    """Raise a `UserError` about an option that says how a named solver works."""
    check_options(options, "solver")
    for name in ("block_size", "window", "max_iterations"):
        if getattr(options, name) is not None:
            raise UserError(f"solver.{name} belongs to a solver that is named, and auto chooses one: leave it out")


def choose(model: SamplingModel, options: SolverOptions, batch_size: int, what: What) -> Choice:
    """Choose the fastest solver for a model, a batch size and the device that the model is on.

    Measured once; after that, what was kept is taken, in this process or from the user's cache folder. It is logged.
    Several processes must call it in one of them and share its answer, since measurements differ.

    Args:
        model: The model, on its device.
        options: With the name ``auto``; tolerances, certificate and CUDA graph are those of every candidate.
        batch_size: Samples per batch.
        what: What is sampled: seed, coupling, arithmetic, given pixels. The first batch is what is measured.

    Raises:
        UserError: If an option does not go with ``auto``.
    """
    check(options)
    system = model.sampling_system(batch_size, incremental=True, options=what.options, given=what.given)
    solvers = _candidates(model, options, system)
    about = _about(model, options, what, system, list(solvers))
    path = cache_folder() / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]}.json"
    if path in _chosen and not options.remeasure:
        return _chosen[path]
    length, block, device = system.length, system.block_size, system.device
    del system  # its noise may be large
    choice = None if options.remeasure else _read(path, solvers, options.measure_seconds)
    if choice is None:
        contest = _Contest(model, batch_size, what, length, block, options.measure_seconds)
        candidates = contest.measure(solvers)
        eligible = [candidate for candidate in candidates if candidate.eligible]
        best = min(eligible, key=lambda each: each.seconds_per_image or 0, default=candidates[0])
        choice = Choice(solvers[best.label], best.label, candidates)
        if eligible:
            hurried = any("out of time" in candidate.outcome for candidate in candidates)
            _write(path, about, choice, options.measure_seconds if hurried else math.inf)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    logger.info(str(choice))
    _chosen[path] = choice
    return choice


def cache_folder() -> Path:
    """Where measurements are kept: beside the data that were downloaded."""
    return Path(pooch.os_cache("lit-parallel")) / "solvers"


def _candidates(model: SamplingModel, options: SolverOptions, system: TriangularSystem) -> dict[str, SolverOptions]:
    """What is measured, by label, in the order in which it is tried."""
    default = SolverOptions()
    named = functools.partial(
        dataclasses.replace, options, measure_seconds=default.measure_seconds, remeasure=default.remeasure
    )
    sizes = [size for size in system.windows if size <= system.length] or [system.window]
    sizes.sort(key=lambda size: size != system.window)  # the usual one first, the others as the system names them
    row = getattr(getattr(system.reference(), "positions", None), "row", None)
    solvers = {_label_of_window(size, row): named(name="gs_jacobi", window=size) for size in sizes}
    sequential = CACHED_SEQUENTIAL if has_caches(system) else "sequential"
    return solvers | {name: named(name=name) for name in (sequential, "jacobi")}


def _label_of_window(size: int, row: int | None) -> str:
    label = f"gs_jacobi with window {size}"
    return f"{label} ({size // row} rows)" if row and size % row == 0 else label


class _Contest:
    """Measures candidates on one batch.

    First each is tried for a few iterations, which tells what one costs. Then they are run to the end, the cheapest
    first, unless one is clearly slower than the best so far, or time is up.
    """

    def __init__(
        self, model: SamplingModel, batch_size: int, what: What, length: int, block: int, seconds: float
    ) -> None:
        self.model, self.batch_size, self.what, self.length, self.block = model, batch_size, what, length, block
        self.ends = monotonic() + seconds
        self.best = math.inf  # seconds of a batch
        self.images: dict[str, Tensor] = {}

    def measure(self, solvers: dict[str, SolverOptions]) -> list[Candidate]:
        candidates = {label: Candidate(label, "not tried: out of time") for label in solvers}
        costs: dict[str, float] = {}
        for label, solver in solvers.items():
            if costs and self._remaining() <= 0:
                break
            cost = self._unless_too_large(candidates[label], functools.partial(self._try, solver))
            if cost is not None:
                costs[label] = cost
        # The cheapest is certain to be finished soonest; T full passes are the slowest, whatever one of them costs.
        for label in sorted(costs, key=lambda label: (solvers[label].name == "sequential", costs[label])):
            run = functools.partial(self._run, candidates[label], solvers[label], costs[label])
            self._unless_too_large(candidates[label], run)
        self._compare(list(candidates.values()))
        return list(candidates.values())

    def _try(self, solver: SolverOptions) -> float:
        """Seconds of one iteration."""
        solution, _ = self._sample(dataclasses.replace(solver, max_iterations=self._trial(solver), certify=False))
        return max(solution.seconds / max(int(solution.iterations.max()), 1), 1e-9)

    def _trial(self, solver: SolverOptions) -> int:
        """Iterations of a trial."""
        if not _is_sequential(solver):
            return min(_TRIAL_ITERATIONS, self.length)
        # Whole blocks, such as rows of an image: in one the steps need not cost the same.
        return min(-(-self.length // (_TRIAL_PART * self.block)) * self.block, self.length)

    def _run(self, candidate: Candidate, solver: SolverOptions, cost: float) -> None:
        """Run to the end, or for as many iterations as can still be of use."""
        allowed = min(_CLEARLY * self.best, self._remaining()) if self.best < math.inf else math.inf
        limit = int(min(max(allowed, 0) / cost, self.length))
        trial = self._trial(solver)
        if limit < self.length and _is_sequential(solver):
            candidate.outcome = f"extrapolated from {trial} of {self.length} steps"
            candidate.seconds_per_image = cost * self.length / self.batch_size
            return
        why = "slower" if allowed == _CLEARLY * self.best else "out of time"
        if limit < 1 or limit <= trial < self.length:
            candidate.outcome = f"stopped after {trial} iterations: {why}"
            candidate.seconds_per_image = cost * trial / self.batch_size
            return
        solution, images = self._sample(dataclasses.replace(solver, max_iterations=limit))
        candidate.seconds_per_image = solution.seconds / self.batch_size
        candidate.iterations_mean = float(solution.iterations.double().mean())
        candidate.iterations_max = int(solution.iterations.max())
        candidate.certified = bool(solution.certified.all())
        if solution.all_solved:
            candidate.outcome = MEASURED
            self.best = min(self.best, solution.seconds)
            self.images[candidate.label] = images
        elif limit < self.length and bool((solution.iterations >= limit).any()):
            candidate.outcome = f"stopped after {limit} iterations: {why}"
        else:
            candidate.outcome = "not solved"

    def _sample(self, solver: SolverOptions) -> tuple[Solution, Tensor]:
        """The first batch, and its images on the CPU; the seconds are those of the fastest run."""
        began = monotonic()
        sampler = Sampler(self.model, solver, self.batch_size, self.what)
        sampler.load(range(self.batch_size))
        solution = sampler.loop.run()
        seconds = [solution.seconds]
        while len(seconds) < _RUNS and sum(seconds) < _RUN_SECONDS:
            seconds.append(sampler.loop.run().seconds)
        images = self.model.images(sampler.system, solution.value).cpu()
        # Only sampling counts: kernels are compiled once and for all, weights laid out and graphs captured anyway.
        self.ends += monotonic() - began - sum(seconds)
        solution.seconds = min(seconds)
        return solution, images

    def _compare(self, candidates: Sequence[Candidate]) -> None:
        """Hold all images against those that are the most certain: certified, or the plain system's own."""
        solved = [candidate for candidate in candidates if candidate.label in self.images]
        if not solved:
            return
        expected = max(solved, key=lambda each: (bool(each.certified), each.label in ("sequential", "jacobi")))
        for candidate in solved:
            candidate.equal = torch.equal(self.images[candidate.label], self.images[expected.label])

    def _remaining(self) -> float:
        return self.ends - monotonic()

    def _unless_too_large(self, candidate: Candidate, run: Callable[[], float | None]) -> float | None:
        try:
            return run()
        except torch.OutOfMemoryError:
            candidate.outcome = "not measured: out of memory"
            return None


def _is_sequential(solver: SolverOptions) -> bool:
    return solver.name in ("sequential", CACHED_SEQUENTIAL)


def _about(
    model: SamplingModel, options: SolverOptions, what: What, system: TriangularSystem, labels: list[str]
) -> dict[str, Any]:
    """All that a measurement holds for, in plain values."""
    parameters = model.state_dict() if isinstance(model, nn.Module) else {}
    shapes = [(name, list(value.shape), str(value.dtype)) for name, value in parameters.items()]
    masks = what.given.mask.cpu().numpy().tobytes() if what.given is not None else b""
    return {
        "environment": environment(system.device),
        "model": type(model).__name__,
        "architecture": hashlib.sha256(repr((repr(model), shapes)).encode()).hexdigest(),
        "system": type(system).__name__,
        "equations": system.length,
        "batch_size": system.batch_size,
        "sampling": dataclasses.asdict(what.options),
        "given": hashlib.sha256(masks).hexdigest() if masks else None,
        "solver": {
            name: getattr(options, name)
            for name in ("absolute_tolerance", "relative_tolerance", "certify", "cuda_graph")
        },
        "candidates": labels,
    }


def _read(path: Path, solvers: dict[str, SolverOptions], seconds: float) -> Choice | None:
    """What an earlier measurement chose, or ``None`` if there is none that can be read, or was given less time."""
    try:
        content = json.loads(path.read_text())
        if content["enough_for_seconds"] is not None and float(content["enough_for_seconds"]) < seconds:
            return None
        candidates = [Candidate(**row) for row in content["candidates"]]
        choice = Choice(solvers[content["chosen"]], content["chosen"], candidates, str(path))
        str(choice)  # so that whatever is amiss shows here
        return choice
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        logger.warning(f"solver auto: cannot read '{path}' ({first_line(error)}), so solvers are measured again.")
        return None


def _write(path: Path, about: dict[str, Any], choice: Choice, enough_for: float) -> None:
    """Keep a choice for measurements of at most so many seconds; infinite: nothing was cut short."""
    candidates = [dataclasses.asdict(candidate) for candidate in choice.candidates]
    seconds = enough_for if math.isfinite(enough_for) else None
    content = {"chosen": choice.label, "enough_for_seconds": seconds, "candidates": candidates, "about": about}
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.replace(path)  # so that a file by this name is always whole
    except OSError as error:
        logger.warning(f"solver auto: cannot keep what was measured in '{path.parent}': {error.strerror}.")
