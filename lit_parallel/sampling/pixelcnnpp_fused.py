"""PixelCNN++ sampling by fused kernels, in CUDA graphs that serve every position; the PyTorch evaluation stays beside.

Two passes over images share one set of layers, laid out by ``pixelcnnpp_layers.py``:

- :class:`WindowSweep`, parallel iteration. A *slot* holds an image that is in work, and what the layers remember of it.
  Its window of rows stands where its own frontier is, known on the device alone, so one captured iteration serves all
  positions of all images, a slow image holds up nobody, and a slot whose image is finished takes the next one.
- :class:`PixelSweep`, cached sequential sampling: pixel by pixel, the layers that are due.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_parallel.cuda_graphs import capturing
from lit_parallel.kernels import triton_runs_on
from lit_parallel.networks.pixelcnnpp import RESOLUTIONS, STRIDE
from lit_parallel.sampling.autoregressive import AutoregressiveSystem
from lit_parallel.sampling.pixelcnnpp import IncrementalPixelCNNppSystem, Memories
from lit_parallel.sampling.pixelcnnpp_layers import LaidOut, lay_out
from lit_parallel.solvers import GSJacobi, Jacobi, Sequential
from lit_parallel.solvers.polling import replay_until_finished
from lit_parallel.systems import Equations, Evaluation, FusedBooks

if TYPE_CHECKING:
    from lit_parallel.kernels.windows import Windows

ROWS = 8
"""Rows of a window when the user names none: measured on an H100."""

SLOTS = 64
"""Images in work at a time, of a larger batch: more would only wait for the same multiprocessors."""

_MOST = 256  # of one pixel each, whose layers are small launches: fewer images would not be faster
_BYTES = 12  # of an element of the arena: as it is, and activated


class FusedPixelCNNppSystem(IncrementalPixelCNNppSystem):
    """The incremental system with kernels for Jacobi, GS-Jacobi and cached sequential sampling on a GPU.

    Whatever they do not cover (a tolerance, other precisions than ``full``, the coupling ``paper``) takes the PyTorch
    evaluation of the parent class.
    """

    self_paced = True

    def __init__(self, plain: AutoregressiveSystem) -> None:
        super().__init__(plain)
        self._sweep: WindowSweep | PixelSweep | None = None

    @property
    def window(self) -> int:
        return min(self.length, ROWS * self.image[1]) if self.covered(self.plain) else super().window

    @staticmethod
    def covered(plain: AutoregressiveSystem) -> bool:
        """Whether there are kernels for sampling with these options here."""
        if not triton_runs_on(plain.device) or plain.options.precision != "full":
            return False
        from lit_parallel.kernels import mixture

        return mixture.covers(plain.conditional, plain.coupling, plain.dtype)

    def prepare(self, solver: object, limit: int, *, exact: bool, record_residual: bool) -> bool:
        self._sweep = None
        if not self.covered(self.plain):
            return super().prepare(solver, limit, exact=exact, record_residual=record_residual)
        if isinstance(solver, Sequential):
            self._sweep = PixelSweep(self.plain, limit)
        elif isinstance(solver, (GSJacobi, Jacobi)) and exact:
            rows = self.image[0]
            if isinstance(solver, GSJacobi):
                rows = self._rows(solver.window or self.window)
            self._sweep = WindowSweep(self.plain, rows, SLOTS, limit, record_residual)
        else:
            super().prepare(solver, limit, exact=exact, record_residual=record_residual)
        return self._sweep is not None

    def new_state(self) -> IncrementalPixelCNNppSystem.State:
        if self._sweep is None:
            return super().new_state()
        return self.State(self._sweep.x, Memories())

    def reset(self, state: IncrementalPixelCNNppSystem.State, value: Tensor | None = None) -> None:
        if self._sweep is None:
            super().reset(state, value)
        else:
            self.plain.reset(state.x, value)

    def evaluate(
        self,
        state: IncrementalPixelCNNppSystem.State,
        equations: Equations,
        frontier: Tensor,
        running: Tensor | None,
    ) -> Evaluation:
        if self._sweep is None:
            return super().evaluate(state, equations, frontier, running)
        return Evaluation(None, state.x[:, :1, 0], fused=self._sweep.run())


class _Sweep:
    """What both passes have: the layers, their workspace, the iterate and the image that the network reads.

    Args:
        plain: The equations; its noise, labels and given pixels are read where they lie.
        slots: Most images in work at a time; fewer, if they are more than the batch or than fit.
        rows, columns: Of a slot's window.
    """

    def __init__(self, plain: AutoregressiveSystem, slots: int, rows: int, columns: int) -> None:
        from lit_parallel.kernels.pixelcnnpp import IMAGE_FEATURES, Table, Workspace

        device = plain.device
        channels, self.height, self.width = plain.positions.image_shape
        self.plain, self.channels, self.rows, self.columns = plain, channels, rows, columns
        self.laid_out: LaidOut = lay_out(plain.network, (self.height, self.width))  # type: ignore[arg-type]
        slots = min(slots, plain.batch_size, self._fitting(device))
        self.table = Table(self.laid_out.layers, rows, columns, slots)
        self.x = plain.guess.clone()
        self.windows: Windows = self._windows(slots)
        framed = plain.batch_size, self.height + 2, self.width + 2, IMAGE_FEATURES
        self.workspace = Workspace(
            arena=torch.zeros(slots * self.laid_out.elements, device=device),
            active=torch.zeros(4 * slots * self.laid_out.elements, dtype=torch.float16, device=device),
            image=torch.zeros(framed, device=device),
            parameters=torch.zeros(slots * rows * columns, self.laid_out.pitch, device=device),
            sample=self.windows.sample,
            top=self.windows.top,
            left=self.windows.left,
            label=torch.zeros(1, dtype=torch.int64, device=device) if plain.labels is None else plain.labels,
        )
        self.change = torch.zeros(slots, rows * columns, device=device)
        self._inside = self.workspace.image[:, 2:, 1:-1]
        self._inside[..., channels] = 1

    def _windows(self, slots: int) -> Windows:
        raise NotImplementedError

    def _fitting(self, device: torch.device) -> int:
        """How many slots half of the memory that is left takes."""
        if device.type != "cuda":
            return _MOST
        return max(1, torch.cuda.mem_get_info(device)[0] // 2 // (_BYTES * self.laid_out.elements))

    def restart(self) -> None:
        """Begin again from the iterate."""
        self.windows.reset()
        self._inside[..., : self.channels] = self.plain.conditional.encode(self.x).unflatten(1, self._inside.shape[1:3])

    def launch(self, launches: list[list[int]], *, solve: bool) -> None:
        """Evaluate layers on the windows, and draw their pixels."""
        from lit_parallel.kernels import mixture, pixelcnnpp

        for jobs in launches:
            pixelcnnpp.run(self.table, self.workspace, jobs)
        conditional, options = self.plain.conditional, self.plain.options
        mixture.draw(
            self.workspace.parameters,
            self.x,
            self.workspace.image,
            self.change,
            self.plain.noise,
            self.plain.guess,
            self.plain.is_given,
            self.windows,
            mixture=(self.channels, conditional.mixtures),  # type: ignore[attr-defined]
            coupling=self.plain.coupling,
            temperature=options.temperature,
            rows=self.rows,
            columns=self.columns,
            height=self.height,
            width=self.width,
            solve=solve,
            next_pixel=not solve,
        )

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """The same work as one CUDA graph; on a CPU as it is."""
        if self.plain.device.type != "cuda":
            return work
        return capture(work, self.plain.device)


class WindowSweep(_Sweep):
    """Parallel iteration to the end, each image in a window of its own.

    Args:
        plain: The equations.
        rows: Of a window, a multiple of 4; all of the image's: Jacobi.
        slots: Images in work at a time.
        limit: Most iterations of an image.
        record_residual: Keep the largest change of every iteration.
    """

    def __init__(
        self, plain: AutoregressiveSystem, rows: int, slots: int, limit: int, record_residual: bool = False
    ) -> None:
        self.limit, self.record_residual = limit, record_residual
        super().__init__(plain, slots, rows, plain.positions.image_shape[2])
        self._launches = self.laid_out.launches()
        self._flag = torch.zeros(1, dtype=torch.int64, pin_memory=plain.device.type == "cuda")
        self.restart()
        self._iterate = self.captured(self._iteration)

    def _windows(self, slots: int) -> Windows:
        from lit_parallel.kernels.windows import Windows

        return Windows(
            self.plain.batch_size,
            slots,
            self.height,
            self.width,
            self.rows,
            limit=self.limit,
            record_residual=self.record_residual,
            device=self.plain.device,
        )

    def _iteration(self) -> None:
        from lit_parallel.kernels.windows import advance

        self.launch(self._launches, solve=True)
        advance(self.windows, self.change)
        self._flag.copy_(self.windows.progress, non_blocking=True)

    def run(self) -> FusedBooks:
        """Iterate from the iterate until every image is finished."""
        self.restart()
        self._flag.zero_()
        replay_until_finished(self._iterate, self._flag, self.limit * self.plain.batch_size, self.plain.device)
        return self.windows.books


class PixelSweep(_Sweep):
    """Cached sequential sampling: a graph of a row for each set of levels that are due in it.

    Args:
        plain: The equations.
        limit: How many pixels are drawn of each image; by default all.
    """

    def __init__(self, plain: AutoregressiveSystem, limit: int | None = None) -> None:
        super().__init__(plain, _MOST, 1, 1)
        self.limit = plain.length if limit is None else limit
        self.restart()
        self._row = [self.captured(partial(self._pass_row, due)) for due in range(1, RESOLUTIONS + 1)]

    def _windows(self, slots: int) -> Windows:
        from lit_parallel.kernels.windows import Windows

        return Windows(self.plain.batch_size, slots, self.height, self.width, STRIDE, device=self.plain.device)

    def _pass_row(self, due: int) -> None:
        for column in range(self.width):
            levels = min(due, _due(column))
            self.launch(self.laid_out.launches(levels, down=column == 0), solve=False)

    def run(self) -> FusedBooks:
        """Draw every pixel once, row by row; what lies behind the limit is the guess again in the end."""
        for first in range(0, self.plain.batch_size, self.windows.slots):
            self.restart()
            samples = first + torch.arange(self.windows.slots, device=self.x.device)
            self.windows.sample.copy_(torch.where(samples < self.plain.batch_size, samples, -1))
            for row in range(-(-self.limit // self.width)):
                self._row[_due(row) - 1]()
        self.x[:, self.limit :] = self.plain.guess[:, self.limit :]
        return self.windows.books


def _due(number: int) -> int:
    """How many levels have a pixel that begins at this row or column."""
    return next((level for level in range(RESOLUTIONS) if number >> level & 1), RESOLUTIONS - 1) + 1


def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record work that launches kernels only, after a warm-up; what is returned replays it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay
