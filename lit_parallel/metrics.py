"""torchmetrics metrics; correct under update, compute, reset, and when several processes reduce them."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_parallel.solution import Solution


class BitsPerDimension(Metric):
    """Mean negative log-likelihood in bits per pixel and channel."""

    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, log_likelihood: Tensor, dimensions: int) -> None:
        """Add samples.

        Args:
            log_likelihood: ``[batch]`` in nats.
            dimensions: Pixels times channels of a sample.
        """
        # Not in place: what inference mode has made may be met again outside of it (validate, then fit).
        self.total = self.total - log_likelihood.detach().double().sum() / math.log(2)
        self.count = self.count + log_likelihood.numel() * dimensions

    def compute(self) -> Tensor:
        return (self.total / self.count).float()


class Iterations(Metric):
    """Parallel iterations until a sample is solved: mean and largest number over all samples."""

    full_state_update = False
    total: Tensor
    count: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("largest", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")

    def update(self, solution: Solution) -> None:
        """Add the samples of a solution, the certificate's iterations included."""
        iterations = solution.total_iterations.to(self.total)
        self.total = self.total + iterations.sum()
        self.count = self.count + iterations.numel()
        self.largest = torch.maximum(self.largest, iterations.max())

    def compute(self) -> dict[str, Tensor]:
        return {"mean": (self.total / self.count).float(), "max": self.largest.float()}


class Speedup(Metric):
    """Ratio of two totals: what the baseline needed over what the solver needed, for the same samples.

    Totals are added before they are divided, over batches and over processes, so a slow batch weighs what it costs.
    Iterations with T as the baseline give the iteration speedup; seconds give the wall-clock speedup.
    """

    full_state_update = False
    higher_is_better = True
    baseline: Tensor
    solver: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("baseline", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("solver", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, baseline: float | Tensor, solver: float | Tensor) -> None:
        """Add what both needed for the same samples (seconds, or iterations)."""
        self.baseline = (
            self.baseline + torch.as_tensor(baseline, dtype=torch.float64, device=self.baseline.device).sum()
        )
        self.solver = self.solver + torch.as_tensor(solver, dtype=torch.float64, device=self.solver.device).sum()

    def compute(self) -> Tensor:
        return (self.baseline / self.solver).float()
