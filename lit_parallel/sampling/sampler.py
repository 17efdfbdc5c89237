"""Sampling a model with any solver, in batches of one fixed shape."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from lit_parallel.errors import UserError, did_you_mean
from lit_parallel.options import MAX_SEED, check_options
from lit_parallel.sampling.autoregressive import Given
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.solution import Solution, concatenate
from lit_parallel.solvers import AUTO, SOLVER_NAMES, SolverLoop, SolverOptions, Stopping, build_solver
from lit_parallel.solvers.loop import Observer
from lit_parallel.solvers.options import CACHED_SEQUENTIAL
from lit_parallel.systems import TriangularSystem


class SamplingModel(Protocol):
    """What a model must offer to be sampled (see :class:`lit_parallel.modules.AutoregressiveModule`)."""

    incremental: bool

    def sampling_system(
        self, batch_size: int, *, incremental: bool, options: SamplingOptions | None, given: Given | None
    ) -> TriangularSystem: ...

    def load_noise(self, system: TriangularSystem, seed: int, indices: list[int]) -> None: ...

    def images(self, system: TriangularSystem, value: Tensor) -> Tensor: ...

    def pixel_map(self, system: TriangularSystem, numbers: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class What:
    """What is sampled, whatever the solver: the same for all that are to be compared.

    Attributes:
        seed: Seed of the noise; sample i of a seed is always the same image.
        options: Coupling, temperature, class, arithmetic.
        given: Pixels that are known.
    """

    seed: int = 0
    options: SamplingOptions = field(default_factory=SamplingOptions)
    given: Given | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed must be from 0 to {MAX_SEED}, got {self.seed}")


class Sampler:
    """Samples batches of a fixed size; keeps the system, and on a GPU the captured graph, from batch to batch.

    Args:
        model: The model, on its device, with the weights to use.
        solver: ``SolverOptions``, or the name of a solver; ``"cached_sequential"``, which as a name alone is the
            ordinary algorithm without a certificate; or ``"auto"``, the fastest here as measured (or as kept from an
            earlier measurement, see :mod:`lit_parallel.sampling.auto`).
        batch_size: Samples per batch.
        what: Seed and options of what is sampled, or the seed alone.
        record_residual: Keep the largest change of every iteration.
    """

    def __init__(
        self,
        model: SamplingModel,
        solver: SolverOptions | str,
        batch_size: int,
        what: What | int = 0,
        *,
        record_residual: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        what = What(what) if isinstance(what, int) else what
        check_options(what.options, "sampling")
        options = as_options(solver)
        if options.name == AUTO:
            from lit_parallel.sampling.auto import choose  # which makes samplers to measure them

            options = choose(model, options, batch_size, what).solver
        cached = options.name == CACHED_SEQUENTIAL
        self.model, self.batch_size, self.seed, self.given = model, batch_size, what.seed, what.given is not None
        self.name = options.name
        schedule = build_solver(replace(options, name="sequential") if cached else options)
        incremental = cached or self.name == "gs_jacobi"
        self.system = model.sampling_system(batch_size, incremental=incremental, options=what.options, given=what.given)
        if cached and not has_caches(self.system):
            here = " with these sampling options on this device" if model.incremental else ""
            raise UserError(
                f"{type(model).__name__} has no evaluation from caches{here}: name another solver than "
                f"{CACHED_SEQUENTIAL}, and leave it out of compare.baselines."
            )
        tolerance = self.system.tolerance if options.absolute_tolerance is None else options.absolute_tolerance
        self._new_loop = functools.partial(
            SolverLoop,
            self.system,
            schedule,
            Stopping(options.max_iterations, tolerance, options.relative_tolerance),
            # Plain sequential evaluation is the definition: nothing to certify.
            certify=options.certify and self.name != "sequential",
            record_residual=record_residual,
            cuda_graph=options.cuda_graph,
        )
        self.loop = self._new_loop()

    def batch(self, indices: Sequence[int], observer: Observer | None = None) -> tuple[Tensor, Solution]:
        """Sample the images with these indices.

        Args:
            indices: At most ``batch_size`` sample indices; a shorter batch is padded, so that the shape of the
                network's evaluation, and with it every bit of the result, stays the same.
            observer: Called with every iterate (slow).

        Returns:
            8-bit images ``[len(indices), channels, height, width]``, and the solution for them.
        """
        count = len(indices)
        if not 1 <= count <= self.batch_size:
            raise UserError(f"a batch holds 1 to {self.batch_size} samples, got {count}")
        self.load(indices)
        # A loop that is watched runs eagerly, and one that ran to the end in one evaluation cannot be watched.
        solution = self.loop.run() if observer is None else self._new_loop().run(observer=observer)
        solution.solver, solution.given = self.name, self.given
        solution = solution.first(count)
        return self.model.images(self.system, solution.value), solution

    def load(self, indices: Sequence[int]) -> None:
        """Fill the system's noise for these samples, and for others to fill up the batch."""
        missing = self.batch_size - len(indices)
        self.model.load_noise(self.system, self.seed, [*indices, *range(indices[-1] + 1, indices[-1] + 1 + missing)])

    def pixel_map(self, solution: Solution) -> Tensor | None:
        """For each pixel the iteration in which it took its final value, ``[batch, height, width]`` on the CPU."""
        if solution.final_iteration is None:
            return None
        return self.model.pixel_map(self.system, solution.final_iteration).cpu()


def has_caches(system: TriangularSystem) -> bool:
    """Whether a system is evaluated from caches, and not by full passes: then these are its reference."""
    return system.reference() is not system


def as_options(solver: SolverOptions | str) -> SolverOptions:
    """The options that a solver's name alone stands for.

    Raises:
        UserError: If there is no such solver.
    """
    if isinstance(solver, str):
        solver = SolverOptions(name=solver, certify=solver != CACHED_SEQUENTIAL)
    known = (AUTO, *SOLVER_NAMES, CACHED_SEQUENTIAL)
    if solver.name not in known:
        raise UserError(f"unknown solver '{solver.name}'.{did_you_mean(solver.name, known)}")
    return solver


def check_sampler(model: SamplingModel, solver: SolverOptions | str, what: What) -> None:
    """Raise the `UserError` that a :class:`Sampler` would raise; nothing is measured."""
    options = as_options(solver)
    if options.name == AUTO:
        from lit_parallel.sampling.auto import check

        check(options)
        options = SolverOptions()
    Sampler(model, options, 1, what)


def batches(num_samples: int, batch_size: int) -> Iterator[list[int]]:
    """Sample indices in batches; which batch an index is in depends on nothing but the batch size."""
    for start in range(0, num_samples, batch_size):
        yield list(range(start, min(start + batch_size, num_samples)))


def sample(
    model: SamplingModel,
    num_samples: int = 64,
    *,
    solver: SolverOptions | str = "gs_jacobi",
    seed: int = 0,
    batch_size: int | None = None,
    options: SamplingOptions | None = None,
    given: Given | None = None,
) -> tuple[Tensor, Solution]:
    """Sample images from a trained model.

    Args:
        model: The model, on the device to use.
        num_samples: How many images.
        solver: ``SolverOptions`` or the name of a solver; ``"auto"`` measures which is the fastest here.
        seed: Image i of a seed is the same for every solver and batch size (between batch sizes up to the rounding
            of the matrix products).
        batch_size: Images per batch; by default 64, or all if there are fewer.
        options: Coupling, temperature, class, arithmetic.
        given: Pixels that are known; the others are sampled around them.

    Returns:
        8-bit images ``[num_samples, channels, height, width]`` on the CPU, and the :class:`Solution` of all of them.

    Example:
        >>> model = lit_parallel.load("runs/made_mnist5k/2026-01-01_12-00-00/checkpoints/last.ckpt")
        >>> images, solution = lit_parallel.sample(model, 64, solver="gs_jacobi", seed=7)
    """
    if num_samples < 1:
        raise UserError(f"num_samples must be at least 1, got {num_samples}")
    size = min(64, num_samples) if batch_size is None else batch_size
    sampler = Sampler(model, solver, size, What(seed, options or SamplingOptions(), given))
    images, solutions = [], []
    for indices in batches(num_samples, size):
        batch_images, solution = sampler.batch(indices)
        images.append(batch_images.cpu())
        solutions.append(solution.cpu())
    return torch.cat(images), concatenate(solutions)
