"""GS-Jacobi sampling of a MADE by one kernel launch; the PyTorch evaluation stays beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_parallel.kernels import triton_runs_on
from lit_parallel.sampling.made import FoldedMADE, IncrementalMadeSystem, due_units
from lit_parallel.solvers import GSJacobi
from lit_parallel.systems import Equations, Evaluation, FusedBooks

WINDOW = 64
"""Equations per window of the kernel: a power of two near which iterations and the cost of one balance."""

LARGEST_WINDOW = 128
"""Wider windows, and those that are no power of two, take the PyTorch evaluation."""


class FusedMadeSystem(IncrementalMadeSystem):
    """The incremental system with a kernel for GS-Jacobi at exact equality, per sample and to the end in one launch.

    Whatever the kernel does not cover (other solvers, a tolerance, float64, another number of hidden layers) takes the
    PyTorch evaluation of the parent class.
    """

    def __init__(self, network: FoldedMADE, noise: Tensor, bound: float) -> None:
        super().__init__(network, noise, bound)
        self._kernel: _Kernel | None = None

    @staticmethod
    def covers(network: FoldedMADE, noise: Tensor) -> bool:
        """Whether the kernel can sample this network here."""
        return len(network.weights) == 2 and noise.dtype == torch.float32 and triton_runs_on(noise.device)

    @property
    def windows(self) -> list[int]:
        return [WINDOW, WINDOW // 2, LARGEST_WINDOW]

    def prepare(self, solver: object, limit: int, *, exact: bool, record_residual: bool) -> bool:
        self._kernel = None
        if isinstance(solver, GSJacobi) and exact and self.covers(self.network, self.noise):
            window = solver.window or WINDOW
            if window & (window - 1) == 0 and window <= LARGEST_WINDOW:
                self._kernel = _Kernel(self, window, limit, record_residual)
        return self._kernel is not None

    def evaluate(
        self, state: IncrementalMadeSystem.State, equations: Equations, frontier: Tensor, running: Tensor | None
    ) -> Evaluation:
        if self._kernel is None:
            return super().evaluate(state, equations, frontier, running)
        return self._kernel.run(state)


class _Kernel:
    """Weights laid out for the kernel, and its output buffers."""

    def __init__(self, system: FusedMadeSystem, window: int, limit: int, record_residual: bool) -> None:
        import triton

        from lit_parallel.kernels.made import SweepWeights

        network, device = system.network, system.device
        batch, length = system.batch_size, system.length
        starts = torch.arange(0, length, window)
        bounds = [bound for degree in network.degrees for bound in due_units(degree, starts, window)]
        lanes = [
            triton.next_power_of_2(max(int((end - first).max()), 2))
            for first, end in zip(bounds[::2], bounds[1::2], strict=True)
        ]
        first1, end1, first2, end2 = (bound.to(device, torch.int32) for bound in bounds)
        self.system, self.limit = system, limit
        self.weights = SweepWeights(
            weight1=network.weights[0].T.contiguous(),
            bias1=network.biases[0],
            weight2=network.weights[1].T.contiguous(),
            bias2=network.biases[1],
            weight_out=network.output_weight.unflatten(0, (length, 2)).permute(2, 1, 0).contiguous(),
            bias_out=network.output_bias.unflatten(0, (length, 2)).T.contiguous(),
            first1=first1,
            end1=end1,
            first2=first2,
            end2=end2,
            window=window,
            lanes1=lanes[0],
            lanes2=lanes[1],
        )

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        residual = torch.zeros(limit, batch, device=device) if record_residual else None
        self.books = FusedBooks(zeros(batch), zeros(batch), zeros(batch), zeros(batch), zeros(batch, length), residual)
        self.change = torch.zeros(batch, 1, device=device)
        units = sum(len(bias) for bias in network.biases)
        self.cache = torch.zeros(batch, units + 2 * length, device=device)

    def run(self, state: IncrementalMadeSystem.State) -> Evaluation:
        from lit_parallel.kernels.made import sweep

        self.books.changed_in.zero_()  # a sample that fails leaves windows unreached
        if self.books.residual is not None:
            self.books.residual.zero_()
        sweep(
            state.x,
            state.hidden,
            self.cache,
            self.system.noise,
            self.weights,
            self.books,
            self.system.bound,
            self.limit,
        )
        return Evaluation(None, self.change, fused=self.books)
