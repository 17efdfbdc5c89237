"""Published weights of DenseNets: torchvision's files for ImageNet, fetched once by torch.hub, or a file of one's own.

The published files (https://pytorch.org/vision/stable/models/densenet.html) are older than the modules' names: what is
now ``denselayer1.norm1.weight`` they call ``denselayer1.norm.1.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_parallel.errors import UserError, did_you_mean, one_line
from lit_parallel.networks.densenet import densenet121, densenet161, densenet169, densenet201
from lit_parallel.weights_file import read, state_dict_of

_BUILDERS = {build.__name__: build for build in (densenet121, densenet161, densenet169, densenet201)}

PUBLISHED = {
    name: f"https://download.pytorch.org/models/{name}-{digest}.pth"
    for name, digest in (
        ("densenet121", "a639ec97"),
        ("densenet161", "8d451a50"),
        ("densenet169", "b2777c0a"),
        ("densenet201", "c1103571"),
    )
}
"""Where the weights of each network are; a file's name ends in the beginning of its SHA-256."""

_FIRST = "features.conv0.weight"
_OLDER_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_COUNTER = ".num_batches_tracked"  # files older than PyTorch 0.4.1 have none, and evaluation reads none


def load_published(network: nn.Module, weights: str | Path) -> None:
    """Give a DenseNet published weights, all or none.

    Args:
        network: A :class:`lit_parallel.networks.DenseNet`, or torchvision's. Its dtype, device and memory format stay.
        weights: ``"densenet121"``, ``"densenet161"``, ``"densenet169"`` or ``"densenet201"``: torchvision's weights for
            ImageNet, kept in torch.hub's cache; their hash is checked when they arrive. Or a file: a state dict, alone
            or as ``state_dict`` or ``model`` of a checkpoint, its names today's or the older ones, with or without a
            prefix (``module.`` of ``DataParallel``, ``network.`` of a LightningModule). It is read with
            ``weights_only=True``: nothing in it is executed.

    Raises:
        UserError: If the weights cannot be fetched or read, or do not fit the network; the network is then unchanged.
    """
    name = str(weights)
    if name in PUBLISHED:
        with torch.device("meta"):
            _check_fit(network, _BUILDERS[name]().state_dict(), name)  # sooner than 30 to 110 MB have been fetched
        state, source = _fetch(name), name
    else:
        state, source = _read(Path(weights)), f"'{weights}'"
    state = _with_todays_names(state, source)
    _check_fit(network, state, source)
    for key, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"The weights {source} hold values that are not finite, first in '{key}': use others.")
    network.load_state_dict(state)  # batch norm supplies a counter that is missing


def _fetch(name: str) -> Any:
    url = PUBLISHED[name]
    cached = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    by_hand = f"fetch {url} by hand, and set model.weights=PATH to that file instead of model.pretrained=true."
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # a network, a server, a disk, and torch's reader fail in many ways
        if cached.exists():
            reason = f"'{cached}' is damaged or cannot be read: delete it and try again, or"
        else:  # torch.hub puts a file there only when it is whole and has the right hash
            reason = f"{one_line(error) or type(error).__name__}:"
        raise UserError(f"Cannot get the weights of {name}, {reason} {by_hand}") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(
            f"There is no file '{path}', nor are weights published under this name.{did_you_mean(str(path), PUBLISHED)}"
        )
    try:
        return read(path)
    except UserError as error:
        raise UserError(f"Cannot use the weights '{path}'. {error}") from error


def _with_todays_names(state: Any, source: str) -> dict[str, Tensor]:
    """The state dict without wrapper and prefix."""
    refusal = f"Cannot use the weights {source}"
    state = state_dict_of(state, refusal)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{refusal}: '{key}' is not a tensor.")
    prefix = next((key.removesuffix(_FIRST) for key in state if key.endswith(_FIRST)), "")
    return {_OLDER_NAME.sub(r"\1\2", key.removeprefix(prefix)): value for key, value in state.items()}


def _check_fit(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raise a `UserError` that names the first parameter which is missing, of another shape, or without a place."""
    own = network.state_dict()
    refusal = f"The weights {source} do not fit the network:"
    for key, value in own.items():
        if key not in state:
            if key.endswith(_COUNTER):
                continue
            raise UserError(f"{refusal} '{key}' is missing{_first_of(state)}.")
        theirs, ours = list(state[key].shape), list(value.shape)
        if theirs == ours:
            continue
        if key == "classifier.weight" and theirs[1:] == ours[1:]:
            raise UserError(
                f"{refusal} they know {theirs[0]} classes and the network {ours[0]}: make it with "
                f"num_classes={theirs[0]} (model.num_classes={theirs[0]}); to train it on other classes, replace its "
                "`classifier` afterwards."
            )
        raise UserError(f"{refusal} '{key}' has the shape {theirs}, and the network's is {ours}.")
    surplus = [key for key in state if key not in own]
    if surplus:
        more = f" (one of {len(surplus)} such names)" if len(surplus) > 1 else ""
        raise UserError(f"{refusal} '{surplus[0]}'{more} of shape {list(state[surplus[0]].shape)} has no place in it.")


def _first_of(state: Mapping[str, Tensor]) -> str:
    """What the names look like, if they are not a DenseNet's at all."""
    return f"; the names begin with '{next(iter(state))}'" if state and _FIRST not in state else ""
