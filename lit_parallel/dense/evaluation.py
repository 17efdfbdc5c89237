"""Evaluates a DenseNet by the solver loop, in plain PyTorch: it runs everywhere, and says what is right.

It calls the network's own layers, one after another, and so is no faster than the ordinary forward.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_parallel.dense.options import DenseOptions, check_dense_options
from lit_parallel.dense.structure import Structure
from lit_parallel.dense.system import DenseBlockSystem, DenseNetSystem, LayerSystem
from lit_parallel.errors import UserError
from lit_parallel.solution import Solution, Status
from lit_parallel.solvers import Solver, SolverLoop, SolverOptions, Stopping, build_solver
from lit_parallel.systems import Equations, TriangularSystem


@dataclass
class BlockRecord:
    """What the evaluation of a dense block took; with ``scope=network``, of all of them at once.

    Attributes:
        name: Of the block within the network, such as ``features.denseblock1``; ``features`` for all blocks at once.
        layers: Equations, T.
        iterations: ``[batch]`` parallel iterations.
        evaluations: ``[batch]`` layers evaluated in them; ordinary evaluation needs ``layers``.
        residual: ``[iterations, batch]`` largest change of a layer's features in each iteration, relative to the
            largest of them (0 for a sample that was finished, infinite where a value was not finite), or ``None``
            for sequential evaluation.
        seconds: Wall-clock time.
        solved: ``[batch]`` whether it stopped as asked, not at ``max_iterations`` and not because of values that are
            not finite; ``None`` where nothing was checked.
    """

    name: str
    layers: int
    iterations: Tensor
    evaluations: Tensor
    residual: Tensor | None
    seconds: float
    solved: Tensor | None = None


@dataclass
class EvaluationRecord:
    """What the evaluation of a batch took, and how it compares with the ordinary forward.

    Attributes:
        solver: The solver's name.
        way: ``"plain"`` (this module), ``"fused"`` (kernels) or ``"ordinary"`` (the network's own forward).
        blocks: One record per dense block, in order.
        seconds: Wall-clock time of the whole evaluation.
        top1_agreement: Part of the images with the same class as by the ordinary forward, if it was compared.
        top5_agreement: Part of the images with the same five classes of the highest logits in the same order.
        relative_logit_error: Largest error of an image's logits, relative to the largest of them.
        speedup: Wall-clock time of the ordinary forward, eager, over that of this evaluation.
    """

    solver: str
    way: str
    blocks: list[BlockRecord]
    seconds: float
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    relative_logit_error: float | None = None
    speedup: float | None = None


class FixedWindows(Solver):
    """GS-Jacobi without a look at any value: each window gets the same number of iterations, then comes the next.

    Args:
        window: Equations in the window; by default the system's own choice.
        iterations: Per window; at most as many as it has equations, which always suffice.
    """

    name: ClassVar[str] = "gs_jacobi"

    def __init__(self, window: int | None, iterations: int) -> None:
        self.window, self.iterations = window, iterations

    def equations(self, system: TriangularSystem, frontier: Tensor, step: Any) -> Equations:
        window, iterations = self._sizes(system)
        first = step // iterations * window
        return (first + torch.arange(window, device=system.device)).clamp(max=system.length - 1)

    def total(self, system: TriangularSystem) -> int:
        """Iterations until all windows are done."""
        window, iterations = self._sizes(system)
        whole, rest = divmod(system.length, window)
        return whole * iterations + min(iterations, rest)

    def _sizes(self, system: TriangularSystem) -> tuple[int, int]:
        window = min(self.window or system.window, system.length)
        return window, min(self.iterations, window)


class PlainEvaluation:
    """Evaluates batches of a DenseNet as the options say, with the network's own layers.

    An image for which a value is not finite, and not only on the way to the solution, gets the logits of ordinary
    evaluation, which shows it; its neighbours in the batch are not affected.

    Args:
        structure: The DenseNet.
        options: How; ``solver="auto"`` is sequential here, as nothing else is faster with one layer after another.

    Raises:
        UserError: Options do not fit together, or the network is in training mode.
    """

    def __init__(self, structure: Structure, options: DenseOptions) -> None:
        check_dense_options(options)
        self.structure, self.options = structure, options
        name = "sequential" if options.solver == "auto" else options.solver
        self.solver: Solver
        if name == "gs_jacobi" and options.iterations is not None:
            self.solver = FixedWindows(options.window, options.iterations)
        else:
            self.solver = build_solver(SolverOptions(name=name, block_size=options.block_size, window=options.window))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, EvaluationRecord]:
        """Logits ``[batch, classes]`` of images ``[batch, channels, height, width]``, and what they took."""
        if self.structure.network.training:
            raise UserError("A DenseNet is evaluated in parallel in evaluation mode only: call eval() on it first.")
        began = time.perf_counter()
        evaluate = self._network if self.options.scope == "network" else self._blocks
        logits, blocks, failed = evaluate(images)
        if bool(failed.any()):
            logits = torch.where(failed[:, None], self.structure.ordinary(images), logits)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return logits, EvaluationRecord(self.solver.name, "plain", blocks, time.perf_counter() - began)

    def _blocks(self, images: Tensor) -> tuple[Tensor, list[BlockRecord], Tensor]:
        """One block after the other."""
        structure = self.structure
        records, failures = [], []
        x = structure.stem(images)
        for index, block in enumerate(structure.blocks):
            if index > 0:
                x = structure.transition(index - 1, x)
            system = DenseBlockSystem(block.layers, x, block.mean if self.options.guess == "mean" else None)
            solution, record = self._solve(system, block.name)
            records.append(record)
            failures.append(_failed(solution, system))
            x = system.features(solution.value)
        return structure.head(x), records, torch.stack(failures).any(0)

    def _network(self, images: Tensor) -> tuple[Tensor, list[BlockRecord], Tensor]:
        """All blocks at once."""
        options = self.options
        top_k = options.top_k if options.stop == "top_k" else None
        system = DenseNetSystem(self.structure, images, guess=options.guess, top_k=top_k, patience=options.patience)
        solution, record = self._solve(system, "features")
        failed = _failed(solution, system)
        state = system.new_state()
        system.reset(state, solution.value)
        return system.logits(state), [record], failed

    def _solve(self, system: LayerSystem, name: str) -> tuple[Solution, BlockRecord]:
        options, solver = self.options, self.solver
        if isinstance(solver, FixedWindows):
            stopping = Stopping(max_iterations=solver.total(system))
        elif options.iterations is not None:
            stopping = Stopping(max_iterations=options.iterations)
        else:
            tolerance = options.tolerance if options.stop == "change" else 0.0
            stopping = Stopping(max_iterations=options.max_iterations, relative_tolerance=tolerance)
        solution = SolverLoop(system, solver, stopping, cuda_graph=False).run()
        solved = [status in (Status.CONVERGED, Status.SETTLED) for status in solution.status]
        record = BlockRecord(
            name,
            system.length,
            solution.iterations,
            solution.evaluations,
            torch.stack(system.residual) if system.residual else None,
            solution.seconds,
            torch.tensor(solved, device=system.device) if options.iterations is None else None,
        )
        return solution, record


def _failed(solution: Solution, system: LayerSystem) -> Tensor:
    """``[batch]`` samples with a value that is not finite, or was not when it was too early to tell."""
    unsolved = [status not in (Status.CONVERGED, Status.SETTLED) for status in solution.status]
    non_finite = [status is Status.NON_FINITE for status in solution.status]
    failed, open_ = torch.tensor([non_finite, unsolved], device=system.device)
    return failed | (open_ & system.overflowed)
