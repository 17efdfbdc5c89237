"""Windows of rows that slide over many images at once, and their books: one launch after every parallel iteration.

`batch` images are to be solved, `slots` of them are in work at a time. Each slot has a window of rows of its image,
the one that holds the first equation that is not final; when its image is finished it takes the next one that waits.
All of it lies on the device, so that one CUDA graph serves every iteration.

A window is evaluated as a whole, from the iterate as it was, and everything before its image's frontier is final. Then
the rule of :meth:`lit_parallel.solvers.books.Books.enter` is short: the first equation that changed is the last one
that is known to be final, unless it is not finite.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lit_parallel.kernels import overlap, triton_runs_on
from lit_parallel.networks.pixelcnnpp import STRIDE
from lit_parallel.systems import FusedBooks

_BLOCK = 512


class Windows:
    """Which slot works on what, and the books of every image.

    All are int32, lie on the device and are changed in place only (a CUDA graph captures them). An image is a sample;
    its equations are its pixels in raster order.

    Args:
        batch: Samples.
        slots: How many are in work at a time.
        height, width: Of an image.
        rows: Of a window, which begins at a multiple of 4: another one, or the whole height.
        limit: Most iterations of a sample; by default the number of its equations, which always suffices.
        record_residual: Keep the largest change of every iteration.
        device: Where everything lies.

    Attributes:
        sample: ``[slots]`` whose image a slot works on; -1: idle.
        top, left: ``[slots]`` the first row and column of its window. The column is 0, unless single pixels are drawn.
        frontier, iterations, evaluations, failed: ``[batch]``, see :class:`lit_parallel.systems.FusedBooks`.
        changed_in: ``[batch, length]`` iteration, counted per sample, in which each equation changed last.
        residual: ``[limit, batch]`` float32, the largest change in each iteration of a sample, or ``None``.
        waiting: ``[1]`` the next sample that has not begun; beyond the last once all have.
        finished: ``[1]`` how many samples are.
        step: ``[1]`` parallel iterations done.
        progress: ``[1]`` int64, twice the step, plus one once every sample is finished: one word, so that the host
            never sees half an update.
    """

    def __init__(
        self,
        batch: int,
        slots: int,
        height: int,
        width: int,
        rows: int,
        *,
        limit: int | None = None,
        record_residual: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < rows <= height or (rows % STRIDE and rows != height):
            raise ValueError(f"a window has {STRIDE}, {2 * STRIDE}, ... or all {height} rows, not {rows}")
        self.height, self.width, self.rows = height, width, rows
        self.length = height * width
        self.limit = min(limit or self.length, self.length)
        # One buffer, so that starting again is one copy; progress first, where eight bytes are aligned.
        sizes = [2, 1, 1, 1, 1, slots, slots, slots, batch, batch, batch, batch, batch * self.length]
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        parts = self._numbers.split(sizes)
        self.progress = parts[0].view(torch.int64)
        self.step, self.waiting, self.finished, self.arrived = parts[1:5]  # arrived: slots that are done with a step
        self.sample, self.top, self.left = parts[5:8]
        self.frontier, self.iterations, self.evaluations, self.failed = parts[8:12]
        self.changed_in = parts[12].view(batch, self.length)
        self.residual = torch.zeros(self.limit, batch, device=device) if record_residual else None
        first = torch.arange(slots, device=device)
        self.sample.copy_(torch.where(first < batch, first, -1))
        self.waiting.fill_(min(slots, batch))
        self._beginning = self._numbers.clone()

    @property
    def batch(self) -> int:
        return len(self.frontier)

    @property
    def slots(self) -> int:
        return len(self.sample)

    @property
    def pixels(self) -> int:
        """Of a window."""
        return self.rows * self.width

    @property
    def books(self) -> FusedBooks:
        """The same tensors as the solver loop takes them over, once every sample is finished."""
        return FusedBooks(self.iterations, self.evaluations, self.frontier, self.failed, self.changed_in, self.residual)

    def reset(self) -> None:
        """Back to the beginning: the first samples at their first rows."""
        self._numbers.copy_(self._beginning)
        if self.residual is not None:
            self.residual.zero_()


@triton.jit
def _advance(
    change, sample, top, frontier, iterations, evaluations, failed, changed_in, residual,
    progress, step, waiting, finished, arrived,
    batch, slots, length, width, last_top, limit, pixels,
    RECORD: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    owner = tl.load(sample + slot)
    begin = tl.load(top + slot) * width
    if owner >= 0:
        before = tl.load(frontier + owner)
        now = tl.load(iterations + owner) + 1
        work = tl.load(evaluations + owner) + pixels
        end = begin + pixels
        first = end  # the first equation that changed
        first_bad = end  # the first that is not finite
        largest = 0.0
        for start in range(0, pixels, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            t = begin + offset
            moved = tl.load(change + slot.to(tl.int64) * pixels + offset, mask=offset < pixels, other=0.0)
            is_open = (offset < pixels) & (t >= before)
            bad = is_open & (moved != moved)
            changed = is_open & (bad | (moved != 0.0))
            tl.store(changed_in + owner.to(tl.int64) * length + t, t * 0 + now, mask=changed)
            first = tl.minimum(first, tl.min(tl.where(changed, t, end), axis=0))
            first_bad = tl.minimum(first_bad, tl.min(tl.where(bad, t, end), axis=0))
            if RECORD:
                moved = tl.where(bad, float("inf"), moved)
                largest = tl.maximum(largest, tl.max(tl.where(is_open, moved, 0.0), axis=0))
        at_fault = (first_bad == first) & (first < end)  # evaluated from what is final
        final = tl.where(at_fault, first, tl.minimum(first + 1, end))
        tl.store(frontier + owner, final)
        tl.store(iterations + owner, now)
        tl.store(evaluations + owner, work)
        tl.store(failed + owner, at_fault.to(tl.int32))
        if RECORD:
            tl.store(residual + (now - 1).to(tl.int64) * batch + owner, largest)
        if at_fault | (final == length) | (now == limit):
            tl.atomic_add(finished, 1)
            following = tl.atomic_add(waiting, 1)
            tl.store(sample + slot, tl.where(following < batch, following, -1))
            tl.store(top + slot, 0)
        else:
            tl.store(top + slot, tl.minimum(final // (STRIDE * width) * STRIDE, last_top))
    # Atomics are ordered among the programs: who arrives last sees what all others have finished.
    if tl.atomic_add(arrived, 1) == slots - 1:
        steps = tl.load(step) + 1
        ended = tl.atomic_add(finished, 0)
        tl.store(arrived, 0)
        tl.store(step, steps)
        tl.store(progress, steps.to(tl.int64) * 2 + tl.where(ended == batch, 1, 0))


def advance_plainly(windows: Windows, change: Tensor) -> None:
    """What :func:`advance` does."""
    height, width, batch, limit = windows.height, windows.width, windows.batch, windows.limit
    for slot, owner in enumerate(windows.sample.tolist()):
        if owner < 0:
            continue
        begin = int(windows.top[slot]) * width
        end = begin + windows.pixels
        before = int(windows.frontier[owner])
        windows.iterations[owner] += 1
        windows.evaluations[owner] += windows.pixels
        iteration = int(windows.iterations[owner])
        still_open = change[slot, before - begin :]
        moved = ((still_open != 0).nonzero()[:, 0] + before).tolist()  # not-a-number is not 0 either
        windows.changed_in[owner, moved] = iteration
        if windows.residual is not None:
            windows.residual[iteration - 1, owner] = still_open.nan_to_num(nan=float("inf")).max()
        final = moved[0] + 1 if moved else end
        at_fault = bool(moved) and bool(change[slot, moved[0] - begin].isnan())
        final -= at_fault
        windows.frontier[owner] = final
        windows.failed[owner] = at_fault
        if at_fault or final == windows.length or iteration == limit:
            following = int(windows.waiting)
            windows.finished += 1
            windows.waiting += 1
            windows.sample[slot] = following if following < batch else -1
            windows.top[slot] = 0
        else:
            windows.top[slot] = min(final // (STRIDE * width) * STRIDE, height - windows.rows)
    windows.step += 1
    windows.progress.copy_(windows.step.long() * 2 + (windows.finished == batch))


def advance(windows: Windows, change: Tensor) -> None:
    """Enter a parallel iteration into the books, move the windows, and give idle slots the next samples.

    Args:
        windows: Whose windows were all evaluated; changed in place.
        change: ``[slots, pixels]`` float32 distance between the old and the new value of each pixel of a slot's window,
            not-a-number where the new value was not finite. 0: unchanged. That of an idle slot does not matter.
    """
    if not triton_runs_on(change.device):
        return advance_plainly(windows, change)
    _advance[(windows.slots,)](
        change,
        windows.sample,
        windows.top,
        windows.frontier,
        windows.iterations,
        windows.evaluations,
        windows.failed,
        windows.changed_in,
        change if windows.residual is None else windows.residual,
        windows.progress,
        windows.step,
        windows.waiting,
        windows.finished,
        windows.arrived,
        windows.batch,
        windows.slots,
        windows.length,
        windows.width,
        windows.height - windows.rows,
        windows.limit,
        windows.pixels,
        windows.residual is not None,
        STRIDE,
        min(_BLOCK, triton.next_power_of_2(windows.pixels)),
        num_warps=1,  # nobody reads a slot's numbers while they are changed
        **overlap(change.device, windows.slots),
    )
