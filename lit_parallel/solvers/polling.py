"""Replaying an iteration until the device says that it is enough, with no synchronisation of host and device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def replay_until_finished(iterate: Callable[[], None], flag: Tensor, limit: int, device: torch.device) -> None:
    """Launch iterations; the host looks at a flag while the next one is already under way.

    So the device never waits for the host, and at most one surplus iteration is launched.

    Args:
        iterate: Launches one iteration, whose last act is to write the flag.
        flag: ``[1]`` int64 in pinned memory: twice the iterations done, plus one once all is finished.
        limit: Most iterations.
        device: Where they run; on a CPU an iteration is done when it has been launched.
    """
    seen = flag.numpy()
    for launched in range(1, limit + 1):
        iterate()
        patience = 0
        while seen[0] // 2 < launched - 1 and not seen[0] % 2:
            patience += 1
            if patience % 100_000 == 0 and torch.cuda.current_stream(device).query():
                break  # the stream is idle: the flag is as new as it gets (and a CUDA error has been raised)
        if seen[0] % 2:
            return
