"""Time on a device, read later, so that nothing waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Stopwatch:
    """Measures the stretch of work in a ``with`` block: by CUDA events, or by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._events = (
            [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        )  # fmt: skip
        self._times = [0.0, 0.0]
        self._finished = False

    def __enter__(self) -> None:
        self._mark(0)

    def __exit__(self, *_: object) -> None:
        self._mark(1)
        self._finished = True

    def milliseconds(self) -> float | None:
        """The time between begin and end, or None if the device has not come so far."""
        if not self._finished:
            return None
        if self._events is None:
            return 1000 * (self._times[1] - self._times[0])
        return self._events[0].elapsed_time(self._events[1]) if self._events[1].query() else None

    def _mark(self, which: int) -> None:
        if self._events is None:
            self._times[which] = time.perf_counter()
        else:
            self._events[which].record()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of work that the device has finished."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
