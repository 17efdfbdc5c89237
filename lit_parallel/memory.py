"""What fits into memory: asked before it is taken, so that a mistake or a hostile file ends with one line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from lit_parallel.errors import UserError


def machine_memory() -> int:
    """Bytes of main memory that this machine has; where that is not known, no bound."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


def check_memory(needed: int, what: str) -> None:
    """Raise a `UserError` if something takes more memory than the machine has.

    Args:
        needed: Bytes.
        what: What takes them and how to make it smaller, for the message.
    """
    if needed > machine_memory():
        raise UserError(
            f"{what}: it would take {_gigabytes(needed)}, and this machine has {_gigabytes(machine_memory())}."
        )


@contextlib.contextmanager
def weights_at_most(limit: int, refusal: str) -> Iterator[None]:
    """Stop making a module as soon as its weights are too large, mostly before anything is written into them.

    Args:
        limit: Bytes of all parameters and buffers that are made inside, replaced ones included.
        refusal: The message.

    Raises:
        UserError: If there are more, or memory cannot be had.
    """
    total = 0

    def count(module: Any, name: str, value: Any) -> None:
        nonlocal total
        total += 0 if value is None else value.nbytes
        if total > limit:
            raise UserError(refusal)

    handles = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):  # torch's word for it is a RuntimeError
            raise UserError(refusal) from error
        raise
    finally:
        for handle in handles:
            handle.remove()


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:,.1f} GB"
