"""How options are declared: a dataclass field with a default and one line of explanation."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """Declare an option of a config group.

    Args:
        default: The default value; a list or dict is copied for every instance.
        help: One line of explanation, shown by ``--help``.
        choices: The allowed values of a string option.
    """
    metadata = {"help": help, "choices": tuple(choices) if choices is not None else None}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
