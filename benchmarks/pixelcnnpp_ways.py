"""Ways to sample a PixelCNN++, for the ladder in :mod:`benchmarks.pixelcnnpp_ladder`: set up, run, and summarised."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.densenet_ways import kernels_launched
from lit_parallel.modules.autoregressive import AutoregressiveModule
from lit_parallel.sampling.sampler import Sampler
from lit_parallel.solution import Solution
from lit_parallel.solvers import AUTO, GSJacobi, SolverOptions
from lit_parallel.solvers.options import CACHED_SEQUENTIAL

EAGER, GRAPH, CACHED = "sequential, eager", "sequential, CUDA graph", "cached sequential"
WAYS = ("sequential_eager", "sequential_graph", CACHED_SEQUENTIAL, "gs_jacobi", AUTO, "jacobi", "jacobi_gs")
"""What ``--ways`` names, in the order in which they are run."""

_PROBED = 16  # iterations by which a way's time is estimated
_COUNTED = (8, 40)  # iterations of two runs whose kernels are counted: the difference has no beginning and no end


@dataclass(frozen=True)
class Way:
    """A way to sample.

    Attributes:
        label: Of its row.
        solver: As :class:`~lit_parallel.sampling.sampler.Sampler` takes it.
        steps: So many steps of a sequential sweep are run, and their time is scaled to all; ``None``: all are run.
    """

    label: str
    solver: SolverOptions | str
    steps: int | None = None

    @property
    def is_sequential(self) -> bool:
        """Whether its iterations do not depend on weights and noise."""
        return isinstance(self.solver, str) or self.solver.name == "sequential"


def chosen_ways(args: argparse.Namespace, image_shape: tuple[int, int, int]) -> list[Way]:
    """The ways that the command names."""
    _, height, width = image_shape
    steps = args.sequential_steps if args.sequential_steps and args.sequential_steps < height * width else None
    measuring = min(args.seconds_limit, SolverOptions().measure_seconds)
    known = {
        "sequential_eager": [Way(EAGER, SolverOptions(name="sequential", cuda_graph=False), steps)],
        "sequential_graph": [Way(GRAPH, SolverOptions(name="sequential"), steps)],
        CACHED_SEQUENTIAL: [Way(CACHED, CACHED_SEQUENTIAL)],
        "gs_jacobi": [
            Way(f"GS-Jacobi, {rows} rows", SolverOptions(name="gs_jacobi", window=rows * width))
            for rows in args.window_rows
            if rows <= height
        ],
        AUTO: [Way(AUTO, SolverOptions(name=AUTO, measure_seconds=measuring, remeasure=True))],
        "jacobi": [Way("Jacobi", SolverOptions(name="jacobi"))],
        "jacobi_gs": [Way("Jacobi-GS, blocks of a row", SolverOptions(name="jacobi_gs"))],
    }
    return [way for name in WAYS if name in args.ways for way in known[name]]


class Rung:
    """One way at one batch size.

    Args:
        model: On its device.
        way: The way.
        batch: Images.
        seed: Of their noise.

    Attributes:
        left_out: Why there is no measurement; ``None``: there is one, or will be.
        solution: Of the newest run.
        images: ``[batch, channels, height, width]`` on the CPU, of the first run.
        repeatable: Whether all runs gave the same images.
        full_passes: Whether there is no evaluation from caches, so that each is a full pass of the network.
        window_rows: Of GS-Jacobi, also where ``auto`` has chosen it.
        seconds: Of every run but the first, its certificate included: scaled, if some steps stand for all.
        first_seconds: Of the first run, which warms up.
        setup_seconds: All that came before: folding and packing of weights, compilation of kernels, capture of CUDA
            graphs, drawing of noise; of ``auto`` its measurement too.
        memory: Bytes that set-up and first run added to what was allocated on the GPU, at most.
        kernels: Kernels and copies per iteration.
    """

    def __init__(self, model: AutoregressiveModule, way: Way, batch: int, seed: int) -> None:
        self.model, self.way, self.batch, self.seed = model, way, batch, seed
        self.left_out: str | None = None
        self.solution: Solution | None = None
        self.images = torch.empty(0)
        self.repeatable, self.full_passes = True, False
        self.window_rows: int | None = None
        self.seconds: list[float] = []
        self.first_seconds = self.setup_seconds = 0.0
        self.memory: int | None = None
        self.kernels: float | None = None
        self._certificates: list[float] = []
        self._sampler: Sampler | None = None

    def set_up(self, limit: float, smaller: Rung | None) -> None:
        """Prepare, and run for the first time; or leave the way out, if a run would take longer than so many seconds.

        Args:
            limit: Seconds.
            smaller: The same way at a smaller batch, which bounds the time at this one.
        """
        try:
            if self.model.device.type == "cpu" and self.way.label == GRAPH:
                self.left_out = "there are no CUDA graphs on a CPU"
            elif not self._is_short(limit, smaller):
                self.left_out = self._too_long(limit)
            if self.left_out is None:
                self._first_run()
        except Exception as error:  # refused, out of memory, a kernel that does not compile: the others are wanted
            self.left_out = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.release()

    def run(self) -> None:
        """Sample the batch once more."""
        assert self._sampler is not None
        images, self.solution = self._sampler.batch(range(self.batch))
        self.repeatable &= torch.equal(images.cpu(), self.images)
        self.seconds.append(self.solution.seconds)
        self._certificates.append(self.solution.certificate_seconds)

    def may_run(self, limit: float) -> bool:
        """Whether it is set up, and its runs have not yet taken so many seconds."""
        return self._sampler is not None and self.first_seconds + sum(self.seconds) < limit

    def count_kernels(self) -> None:
        """Count what a GPU runs in one iteration; after all that is timed, since a profiler leaves traces."""
        if self.left_out is not None or self.way.label == AUTO:  # what it has chosen is counted elsewhere
            return
        try:
            if self.way.label == CACHED:  # which of its layers are due differs from pixel to pixel: the mean of all
                sampler = Sampler(self.model, self.way.solver, self.batch, self.seed)
                self.kernels = self._kernels_of(sampler)[0] / sampler.system.length
            else:
                (few, at_few), (more, at_more) = (self._kernels_of(self._shortened(number)) for number in _COUNTED)
                self.kernels = (more - few) / (at_more - at_few) if at_more > at_few else None
        except Exception as error:  # the times stand
            print(f"{self.way.label}, batch {self.batch}: kernels not counted ({error})")

    def release(self) -> None:
        """Give its memory back; the numbers stay."""
        self._sampler = None
        if self.model.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def row(self) -> dict[str, Any]:
        """What was measured, in plain values; times are those of a whole batch."""
        row: dict[str, Any] = {"method": self.way.label}
        if self.left_out is not None or self.solution is None:
            return row | {"left_out": self.left_out or "not run yet"}
        solution, steps = self.solution, self.way.steps
        times = self.seconds or [self.first_seconds]
        certificates = self._certificates[1:] or self._certificates
        iterating = [total - certificate for total, certificate in zip(times, certificates, strict=True)]
        scale = solution.length / steps if steps else 1.0
        row |= solution.summary() | {
            "solver": solution.solver,
            "window_rows": self.window_rows,
            "full_passes": self.full_passes,
            "steps_measured": steps,
            "seconds": scale * statistics.median(times),
            "seconds_of_runs": times,
            "timed_runs": len(self.seconds),
            "certificate_seconds": statistics.median(certificates),
            "setup_seconds": self.setup_seconds,
            "ms_per_iteration": 1e3 * statistics.median(iterating) / max(int(solution.iterations.max()), 1),
            "kernels_per_iteration": self.kernels,
            "memory_bytes": self.memory,
            "certified": int(solution.certified.sum()),
            "repeatable": self.repeatable,
        }
        if steps:
            row |= {"iterations_mean": solution.length, "iterations_max": solution.length, "work": 1.0}
            row |= {"iteration_speedup": 1.0, "status": {}}
        row["images_per_second"] = self.batch / row["seconds"]
        return row

    def equal_images(self, other: Rung) -> int:
        """How many images are the same, bit for bit, as far as both were sampled."""
        sampled = [rung.way.steps for rung in (self, other) if rung.way.steps]
        mine, theirs = (rung.images.flatten(2)[:, :, : min(sampled, default=None)] for rung in (self, other))
        return sum(torch.equal(one, another) for one, another in zip(mine, theirs, strict=True))

    # -- how ----------------------------------------------------------------------------------------------------

    def _first_run(self) -> None:
        device = self.model.device
        allocated = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            allocated = torch.cuda.memory_allocated(device)
        began = time.perf_counter()
        self._sampler = Sampler(self.model, self.way.solver, self.batch, self.seed)
        if self.way.steps:
            self._sampler.loop.limit = self.way.steps
        images, self.solution = self._sampler.batch(range(self.batch))
        self.first_seconds = self.solution.seconds
        self._certificates.append(self.solution.certificate_seconds)
        self.setup_seconds = time.perf_counter() - began - self.first_seconds
        if device.type == "cuda":
            self.memory = torch.cuda.max_memory_allocated(device) - allocated
        self.images = images.cpu()
        system, solver = self._sampler.system, self._sampler.loop.solver
        self.full_passes = system.reference() is system
        if isinstance(solver, GSJacobi):
            self.window_rows = (solver.window or system.window) // self.images.shape[-1]

    def _shortened(self, iterations: int) -> Sampler:
        """A sampler that stops after so many iterations, uncertified; its noise is loaded."""
        sampler = Sampler(self.model, self.way.solver, self.batch, self.seed)
        sampler.loop.limit, sampler.loop.certify = min(iterations, sampler.system.length), False
        sampler.load(range(self.batch))
        return sampler

    def _is_short(self, limit: float, smaller: Rung | None) -> bool:
        """Whether it need not be estimated: the baseline, what limits itself, and what was fast at a smaller batch."""
        if self.way.label in (CACHED, AUTO):
            return True
        if smaller is None or smaller.solution is None:
            return False
        return smaller.first_seconds * self.batch / smaller.batch < limit

    def _too_long(self, limit: float) -> str | None:
        """Why a run is not tried, from a few iterations and how far they came."""
        sampler = self._shortened(_PROBED)
        sampler.loop.run()
        probe = sampler.loop.run()
        done = int(probe.iterations.max())
        wanted = self.way.steps or probe.length
        expected = min(done * wanted / max(int(probe.frontier.min()), 1), wanted)
        seconds = expected * probe.seconds / done
        del sampler
        self.release()
        if seconds <= limit:
            return None
        each = 1e3 * probe.seconds / done
        return f"about {seconds:.0f} s a run ({expected:.0f} iterations of {each:.3g} ms): more than {limit:g} s"

    def _kernels_of(self, sampler: Sampler) -> tuple[int, int]:
        """Kernels and copies of a run, and its iterations."""
        solution = sampler.loop.run()
        nothing = torch.empty(0, device=self.model.device)
        return kernels_launched(lambda _: sampler.loop.run().value, nothing), int(solution.iterations.max())


def rows_of(rungs: list[Rung], *, is_trained: bool) -> list[dict[str, Any]]:
    """All ways at one batch size: each alone, and beside the sequential ones.

    Adds ``over_...``, the ratio of a sequential way's seconds to its own, and how many of its images equal those of
    cached sequential sampling and those of the first way all of whose images are certified.

    Args:
        rungs: Measured or left out.
        is_trained: Whether the number of iterations says something; otherwise only what does not depend on it is
            compared.
    """
    measured = {rung.way.label: rung for rung in rungs if rung.solution is not None and rung.left_out is None}
    certified = next((rung for rung in measured.values() if _all_certified(rung)), None)
    rows = [rung.row() for rung in rungs]
    by_label = {row["method"]: row for row in rows if "left_out" not in row}
    baselines = {"cached": CACHED, "graph": GRAPH, "eager": EAGER}
    for label, row in by_label.items():
        rung = measured[label]
        row["is_compared"] = is_trained or rung.way.is_sequential
        for name, baseline in baselines.items():
            comparable = row["is_compared"] and baseline in by_label and _is_whole(rung)
            row[f"over_{name}"] = by_label[baseline]["seconds"] / row["seconds"] if comparable else None
        row["equal_to_cached"] = rung.equal_images(measured[CACHED]) if CACHED in measured else None
        row["equal_to_certified"] = rung.equal_images(certified) if certified is not None else None
        row["certified_way"] = certified.way.label if certified is not None else None
    return rows


def _all_certified(rung: Rung) -> bool:
    return rung.solution is not None and bool(rung.solution.certified.all())


def _is_whole(rung: Rung) -> bool:
    """Whether its images are results: what was not solved has no speedup."""
    return rung.solution is not None and (bool(rung.way.steps) or rung.solution.all_solved)
