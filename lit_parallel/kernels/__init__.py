"""Triton kernels, each beside the plain function that says what it computes."""

import functools
import importlib.util
import os

import torch


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_runs_on(device: torch.device) -> bool:
    """Whether a Triton kernel can be launched for tensors on this device."""
    return triton_is_installed() and (interpreted() or (device.type == "cuda" and torch.version.hip is None))


#: Programs of a launch that may start, and load weights, before the launch before it has ended (from Hopper on). It
#: saves two microseconds a launch; wide ones, whose programs would be in the way, are slower by it.
MOST_OVERLAPPING = 264


def overlap(device: torch.device, programs: int) -> dict[str, bool]:
    """What a launch of so many programs is told."""
    if interpreted() or programs > MOST_OVERLAPPING or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
