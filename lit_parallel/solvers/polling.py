"""Replaying an iteration until the device says that it is enough, with no synchronisation of host and device."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

_LONG = 1e-3  # seconds of an iteration, against which what a launch costs the host is little


def replay_until_finished(iterate: Callable[[], None], flag: Tensor, limit: int, device: torch.device) -> None:
    """Launch iterations until a flag says that all is finished.

    Where they are short, the host looks at the flag while the next one is already under way: the device never waits for
    the host, and at most one surplus iteration is launched. Where they are long, that one would be what costs.

    Args:
        iterate: Launches one iteration, whose last act is to write the flag.
        flag: ``[1]`` int64 in pinned memory: twice the iterations done, plus one once all is finished.
        limit: Most iterations.
        device: Where they run; on a CPU an iteration is done when it has been launched.
    """
    seen = flag.numpy()
    ahead = 0
    began = perf_counter()
    for launched in range(1, limit + 1):
        iterate()
        patience = 0
        while seen[0] // 2 < launched - ahead and not seen[0] % 2:
            patience += 1
            if patience % 100_000 == 0 and torch.cuda.current_stream(device).query():
                break  # the stream is idle: the flag is as new as it gets (and a CUDA error has been raised)
        if seen[0] % 2:
            return
        if launched == 1:
            ahead = int(perf_counter() - began < _LONG)
