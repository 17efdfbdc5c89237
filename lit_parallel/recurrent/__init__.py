"""Recurrent layers, parallel in time: backpropagation, and with ``forward=True`` the forward pass.

Example:
    >>> from lit_parallel.recurrent import parallelize, records, restore
    >>> parallelize(model)  # its nn.RNN, nn.GRU, nn.LSTM and Recurrence, at any depth
    >>> loss(model).backward()
    >>> records(model)  # what it took
    >>> restore(model)
"""

from typing import TYPE_CHECKING, Any

from lit_parallel.recurrent.options import RecurrentOptions

if TYPE_CHECKING:
    from lit_parallel.recurrent.controller import BackwardRecord
    from lit_parallel.recurrent.forward_controller import ForwardRecord
    from lit_parallel.recurrent.swap import parallelize, records, restore

_HOMES = {
    "BackwardRecord": "lit_parallel.recurrent.controller",
    "ForwardRecord": "lit_parallel.recurrent.forward_controller",
    "parallelize": "lit_parallel.recurrent.swap",
    "records": "lit_parallel.recurrent.swap",
    "restore": "lit_parallel.recurrent.swap",
}

__all__ = ["BackwardRecord", "ForwardRecord", "RecurrentOptions", "parallelize", "records", "restore"]


def __getattr__(name: str) -> Any:
    # Imported when first used: the options are needed for --help, which need not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_parallel.recurrent' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
