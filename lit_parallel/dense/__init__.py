"""Evaluation of DenseNets, parallel over the layers of a dense block.

Example:
    >>> from lit_parallel.dense import evaluate_in_parallel, records, restore
    >>> evaluate_in_parallel(model.eval())  # its DenseNets, torchvision's too, at any depth
    >>> with torch.no_grad():
    ...     logits = model(images)
    >>> records(model)  # what it took
    >>> restore(model)
"""

from typing import TYPE_CHECKING, Any

from lit_parallel.dense.options import DenseOptions

if TYPE_CHECKING:
    from lit_parallel.dense.evaluation import EvaluationRecord
    from lit_parallel.dense.swap import evaluate_in_parallel, records, refresh, restore

_HOMES = {
    "EvaluationRecord": "lit_parallel.dense.evaluation",
    "evaluate_in_parallel": "lit_parallel.dense.swap",
    "records": "lit_parallel.dense.swap",
    "refresh": "lit_parallel.dense.swap",
    "restore": "lit_parallel.dense.swap",
}

__all__ = ["DenseOptions", "EvaluationRecord", "evaluate_in_parallel", "records", "refresh", "restore"]


def __getattr__(name: str) -> Any:
    # Imported when first used: the options are needed for --help, which need not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_parallel.dense' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
