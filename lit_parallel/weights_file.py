"""Files of weights: what they hold, with nothing in them executed, and no more memory taken than the file is large."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_parallel.errors import UserError

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_ARCHIVE = b"PK\x03\x04"  # how torch.load itself tells an archive from its older format
_FOLDER = 0x10  # in the attributes of a record, as MS-DOS had them


class ForeignFileError(UserError):
    """A file that holds more than tensors and plain values, or is not PyTorch's at all."""


def read(path: Path) -> Any:
    """What a file holds, its tensors on the CPU; it is read with ``weights_only=True``: nothing in it is executed.

    Every tensor that is returned lies in memory as it lies in the file: none is sparse, or larger than its numbers.

    Raises:
        ForeignFileError: If the file holds anything but such tensors and plain values.
        UserError: If it is missing or damaged. No message names the file.
    """
    if not path.is_file():
        raise UserError("There is no such file.")
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(content)
        return content
    except ForeignFileError:
        raise
    except pickle.UnpicklingError as error:
        raise ForeignFileError(
            "It holds more than tensors and plain values (save the model's state_dict), or is no PyTorch file at all; "
            "nothing in it was executed."
        ) from error
    except Exception as error:  # on damaged bytes torch's reader raises almost anything
        raise UserError("It is damaged or incomplete: copy it again.") from error


def _check_archive(path: Path) -> None:
    """Raise an error unless each record of an archive is a file, as long as it says, and its checksum right.

    ``torch.load`` does not look: a flipped bit would be a wrong weight, a record marked as a folder would leave its
    weights as whatever was in memory, and a record of a compressed archive takes whatever it says that it unpacks to.
    ``torch.save`` does not compress.
    """
    with path.open("rb") as file:
        if file.read(len(_ARCHIVE)) != _ARCHIVE:
            return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise zipfile.BadZipFile("it would unpack to more than it holds")
        if any(record.is_dir() or record.external_attr & _FOLDER for record in records):
            raise zipfile.BadZipFile("it holds a folder")
        if (name := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {name} is wrong")


def _check_tensors(content: Any) -> None:
    """Raise a `ForeignFileError` if a tensor has more numbers than the file, or none: expanded, sparse, ``meta``."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:  # a pickle may hold itself
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ForeignFileError(
                    f"It holds a tensor of shape {list(value.shape)} without as many numbers (sparse, quantised or "
                    "expanded): save it as a plain one."
                )
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value


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
