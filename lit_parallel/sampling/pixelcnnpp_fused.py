"""PixelCNN++ sampling by fused kernels, in CUDA graphs that serve every position; the PyTorch evaluation stays beside.

Two passes over images share one set of layers, laid out by ``pixelcnnpp_layers.py``:

- :class:`WindowSweep`, parallel iteration. A *slot* holds an image that is in work, and what the layers remember of it.
  Its window of rows stands where its own frontier is, known on the device alone, so one captured iteration serves all
  positions of all images, a slow image holds up nobody, and a slot whose image is finished takes the next one.
- :class:`PixelSweep`, cached sequential sampling: pixel by pixel, the layers that are due.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_parallel.cuda_graphs import captured
from lit_parallel.kernels import triton_runs_on
from lit_parallel.networks.pixelcnnpp import STRIDE
from lit_parallel.sampling.autoregressive import AutoregressiveSystem
from lit_parallel.sampling.pixelcnnpp import IncrementalPixelCNNppSystem, Memories, levels_due
from lit_parallel.sampling.pixelcnnpp_layers import LaidOut, lay_out
from lit_parallel.solvers import GSJacobi, Sequential
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
    """The incremental system with kernels for GS-Jacobi and cached sequential sampling on a GPU.

    What they do not cover in spite of :meth:`covered` (another solver, a tolerance, sampling without CUDA graphs) takes
    full passes on a GPU, and the PyTorch evaluation of the parent class on a CPU.
    """

    self_paced = True
    unroll = False

    @dataclass
    class Swept(IncrementalPixelCNNppSystem.State):
        """The iterate of a sweep, which remembers what is to be remembered."""

        sweep: WindowSweep | PixelSweep

    def __init__(self, plain: AutoregressiveSystem) -> None:
        super().__init__(plain)
        self._next: WindowSweep | PixelSweep | None = None  # of the state that is made next
        self._in_full = plain.device.type != "cpu"

    @property
    def window(self) -> int:
        return min(self.length, ROWS * self.image[1])

    @staticmethod
    def covered(plain: AutoregressiveSystem) -> bool:
        """Whether there are kernels for sampling with these options here."""
        if not triton_runs_on(plain.device) or plain.options.precision != "full":
            return False
        from lit_parallel.kernels import mixture, pixelcnnpp

        return pixelcnnpp.run_on(plain.device) and mixture.covers(plain.conditional, plain.coupling, plain.dtype)

    def prepare(self, solver: object, limit: int, *, exact: bool, record_residual: bool) -> bool:
        if isinstance(solver, Sequential):
            self._next = PixelSweep(self.plain, limit)
        elif isinstance(solver, GSJacobi) and exact:
            rows = self._rows(solver.window or self.window)
            self._next = WindowSweep(self.plain, rows, SLOTS, limit, record_residual)
        else:
            super().prepare(solver, limit, exact=exact, record_residual=record_residual)
        return self._next is not None

    def new_state(self) -> Any:
        sweep, self._next = self._next, None
        if sweep is not None:
            return self.Swept(sweep.x, Memories(), sweep)
        return self.plain.new_state() if self._in_full else super().new_state()

    def reset(self, state: Any, value: Tensor | None = None) -> None:
        if isinstance(state, self.Swept):
            self.plain.reset(state.x, value)
        elif self._in_full:
            self.plain.reset(state, value)
        else:
            super().reset(state, value)

    def value(self, state: Any) -> Tensor:
        return self.plain.value(state) if isinstance(state, Tensor) else super().value(state)

    def evaluate(self, state: Any, equations: Equations, frontier: Tensor, running: Tensor | None) -> Evaluation:
        if isinstance(state, self.Swept):
            return Evaluation(None, state.x[:, :1, 0], fused=state.sweep.run())
        if self._in_full:
            return self.plain.evaluate(state, equations, frontier, running)
        return super().evaluate(state, equations, frontier, running)


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
        """How many slots fit into most of the memory that is left."""
        if device.type != "cuda":
            return _MOST
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(1, (torch.cuda.mem_get_info(device)[0] + unused) * 4 // 5 // (_BYTES * self.laid_out.elements))

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


class WindowSweep(_Sweep):
    """Parallel iteration to the end, each image in a window of its own.

    Args:
        plain: The equations.
        rows: Of a window, a multiple of 4.
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
        self._iterate = captured(self._iteration, plain.device)

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
        """Iterate from the iterate until every image is finished.

        One more iteration may be under way when this returns: synchronise before the next run, as the solver loop does.
        """
        self.restart()
        self._flag.zero_()
        replay_until_finished(self._iterate, self._flag, self.limit * self.plain.batch_size, self.plain.device)
        return self.windows.books


class PixelSweep(_Sweep):
    """Cached sequential sampling: a graph of a row for each number of levels that are due in it.

    Args:
        plain: The equations.
        limit: How many pixels are drawn of each image; by default all.
    """

    def __init__(self, plain: AutoregressiveSystem, limit: int | None = None) -> None:
        super().__init__(plain, _MOST, 1, 1)
        self.limit = plain.length if limit is None else limit
        self.restart()
        rows = {levels_due(row, 0): row for row in range(STRIDE)}
        self._row = {due: captured(partial(self._pass_row, row), plain.device) for due, row in rows.items()}

    def _windows(self, slots: int) -> Windows:
        from lit_parallel.kernels.windows import Windows

        return Windows(self.plain.batch_size, slots, self.height, self.width, STRIDE, device=self.plain.device)

    def _pass_row(self, row: int) -> None:
        for column in range(self.width):
            self.launch(self.laid_out.launches(levels_due(row, column), down=column == 0), solve=False)

    def run(self) -> FusedBooks:
        """Draw every pixel once, row by row; what lies behind the limit is the guess again in the end."""
        for first in range(0, self.plain.batch_size, self.windows.slots):
            self.restart()
            samples = first + torch.arange(self.windows.slots, device=self.x.device)
            self.windows.sample.copy_(torch.where(samples < self.plain.batch_size, samples, -1))
            for row in range(-(-self.limit // self.width)):
                self._row[levels_due(row, 0)]()
        self.x[:, self.limit :] = self.plain.guess[:, self.limit :]
        return self.windows.books
