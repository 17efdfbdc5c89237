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
