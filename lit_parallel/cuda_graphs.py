"""How work is recorded in a CUDA graph."""

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """Record what is launched meanwhile, on any device and beside other threads.

    Not by ``torch.cuda.graph``, whose own stream belongs to the device of the first capture, and which waits for the
    device and gives all cached memory back. Other threads may go on with their work. No garbage is collected: a graph
    that is destroyed during a capture, as one of a model that is no longer used would be, spoils it.

    Args:
        graph: A new one.
        stream: Of the device that the work is done on, which is the current device meanwhile.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
    finally:
        if collects:
            gc.enable()


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Work that only launches kernels, recorded after a warm-up: what is returned replays it.

    Args:
        work: Launches on one device, with no host synchronisation.
        device: Where; on a CPU the work itself is returned.
    """
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay
