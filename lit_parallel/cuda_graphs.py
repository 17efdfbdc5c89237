"""How work is recorded in a CUDA graph."""

import contextlib
import gc
from collections.abc import Iterator

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
