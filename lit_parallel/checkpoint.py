"""From a config to a model, and from a checkpoint back to both."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lit_parallel.config import TrainConfig, from_container, to_container
from lit_parallel.errors import UserError
from lit_parallel.memory import machine_memory, weights_at_most
from lit_parallel.modules.base import TrainableModule
from lit_parallel.modules.densenet import DenseNetModule
from lit_parallel.modules.made import MadeModule
from lit_parallel.modules.pixelcnnpp import PixelCNNppModule
from lit_parallel.modules.sequence import build_sequence_module
from lit_parallel.options import format_value
from lit_parallel.weights_file import ForeignFileError, read, state_dict_of

_MODULES: dict[str, Callable[..., TrainableModule]] = {
    "made": MadeModule,
    "pixelcnnpp": PixelCNNppModule,
    "rnn": build_sequence_module,
    "densenet": DenseNetModule,
}

_PER_BYTE = 16
"""The weights in memory may take so many times the bytes of their file, which may hold halves of them (``bf16-true``);
masks and what weight normalisation replaces count as well."""

_MOST_NUMBERS = 1 << 26
"""A saved sample shape of more numbers is no image and no sequence that anything here was trained on."""


def build_model(config: TrainConfig, sample_shape: tuple[int, ...]) -> TrainableModule:
    """Make the model that a config describes, with fresh weights.

    Args:
        config: The resolved config; the checkpoint will hold it as plain containers.
        sample_shape: Shape of one sample of the data: channels, height, width of images.

    Raises:
        UserError: If there is no such model, or it fits neither the data nor this machine's memory.
    """
    if len(sample_shape) != 3 and config.model.name != "rnn":
        raise UserError(
            f"model.name={config.model.name} is a model of images, and data.name={config.data.name} has none: set "
            "data.name=mnist5k, or model.name=rnn."
        )
    build = _MODULES[config.model.name]
    too_large = "this model is larger than the memory of this machine: set smaller sizes under 'model'."
    with weights_at_most(machine_memory(), too_large):
        return build(config.model, sample_shape, config.optimizer, to_container(config))


def load(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Load a model from a checkpoint alone, ready to be used: sampled, if it is one of images.

    Args:
        path: A checkpoint that ``train.py`` wrote. It is read with ``weights_only=True``: nothing in it is executed.
        device: Where the model goes.

    Raises:
        UserError: If the file is missing, damaged, or not a checkpoint of one of this project's models.
    """
    path = Path(path)
    content = _read(path)
    saved = content.get("hyper_parameters")
    if not (isinstance(saved, dict) and isinstance(saved.get("config"), dict) and "state_dict" in content):
        raise UserError(f"'{path}' is not a checkpoint of this project: it holds no config. Make one with train.py.")
    try:
        config = from_container(TrainConfig, saved["config"])
        shape = _sample_shape(saved["sample_shape"] if "sample_shape" in saved else saved["image_shape"])  # older name
        with weights_at_most(_PER_BYTE * path.stat().st_size, "it describes a larger model than the file holds"):
            model = build_model(config, shape)
        # A dict of its own: what else a saved state dict carries would tell torch how to load it.
        state = state_dict_of(content, "it holds no weights")
        model.load_state_dict(state)
        for name, value in model.state_dict().items():
            if value.is_floating_point() != state[name].is_floating_point():
                raise UserError(f"'{name}' is of type {state[name].dtype}, not {value.dtype}")
    except (UserError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"The checkpoint '{path}' does not fit its own config ({reason}): train again, or use another one."
        ) from error
    bad = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise UserError(
            f"The checkpoint '{path}' holds values that are not finite (first in '{bad[0]}'): training diverged; "
            "use an earlier checkpoint, or train with a smaller optimizer.lr."
        )
    return model.eval().to(device)


def as_checkpoint(model: TrainableModule) -> dict[str, Any]:
    """What a checkpoint of a model holds when it was not Lightning that wrote it; :func:`load` opens it."""
    return {
        "state_dict": {name: value.cpu() for name, value in model.state_dict().items()},
        "hyper_parameters": dict(model.hparams),
        "pytorch-lightning_version": pl.__version__,  # Lightning asks for it when training goes on from here
    }


def saved_config(model: TrainableModule) -> TrainConfig:
    """The config that a loaded model was trained with."""
    return from_container(TrainConfig, model.hparams["config"])


def _sample_shape(saved: Any) -> tuple[int, ...]:
    sizes = tuple(saved)
    if len(sizes) not in (2, 3) or not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"a sample cannot have the shape {format_value(saved)}")
    if math.prod(sizes) > _MOST_NUMBERS:
        raise UserError(f"a sample of the shape {format_value(saved)} is too large")
    return sizes


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = sorted(file.name for file in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        hint = f" In that folder: {', '.join(near)}." if near else ""
        raise UserError(f"There is no checkpoint '{path}'.{hint}")
    try:
        content = read(path)
    except ForeignFileError as error:
        raise UserError(
            f"'{path}' is not a checkpoint of this project: it holds more than tensors and plain values, or is no "
            "checkpoint at all. Nothing in it was executed."
        ) from error
    except UserError as error:
        raise UserError(f"The checkpoint '{path}' is damaged or incomplete: copy it again, or use another.") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is not a checkpoint of this project. Make one with train.py.")
    return content
