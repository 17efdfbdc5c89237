"""Files of weights: what they hold, with nothing in them executed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_parallel.errors import UserError

_WRAPPERS = ("state_dict", "model", "model_state_dict")


class ForeignFileError(UserError):
    """A file that holds more than tensors and plain values, or is not PyTorch's at all."""


def read(path: Path) -> Any:
    """What a file holds, its tensors on the CPU; it is read with ``weights_only=True``: nothing in it is executed.

    Raises:
        ForeignFileError: If the file holds anything but tensors and plain values.
        UserError: If it is missing or damaged. No message names the file.
    """
    if not path.is_file():
        raise UserError("There is no such file.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ForeignFileError(
            "It holds more than tensors and plain values (save the model's state_dict), or is no PyTorch file at all; "
            "nothing in it was executed."
        ) from error
    except Exception as error:  # on damaged bytes torch's reader raises almost anything
        raise UserError("It is damaged or incomplete: copy it again.") from error


def state_dict_of(content: Any, refusal: str) -> dict[str, Any]:
    """The state dict that a file holds, alone or as ``state_dict`` or ``model`` of a larger checkpoint.

    Args:
        content: What :func:`read` gives.
        refusal: How the message begins if there is none.

    Raises:
        UserError: If there is none. Whether its values are tensors is not looked at.
    """
    if isinstance(content, Mapping):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not (isinstance(content, Mapping) and all(isinstance(key, str) for key in content)):
        raise UserError(f"{refusal}: a state dict maps names to tensors, and this is of type {type(content).__name__}.")
    return dict(content)
