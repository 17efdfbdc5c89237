"""Published weights of PixelCNN++: from the state dict of the common PyTorch port to :class:`PixelCNNpp`.

The port (https://github.com/pclucas14/pixel-cnn-pp) and what descends from it name their parameters
``up_layers.0.u_stream.0.conv_input.conv.weight_g``. Its *u* stream is our *down* stream, *ul* our *down-right* stream;
the output parameters have the same order. Its transposed convolutions are normalised per input channel, ours per output
channel, so weights are carried over as what they come to, not as length and direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_parallel.errors import UserError
from lit_parallel.networks.pixelcnnpp import PixelCNNpp
from lit_parallel.weights_file import state_dict_of

_REFUSAL = "Not the weights of a published PixelCNN++"
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, and of torch.compile
_LENGTH_AND_DIRECTION = (
    (".weight_g", ".weight_v"),  # torch.nn.utils.weight_norm
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),  # its successor
)
_ENDS = {
    "rows_above": "u_init.conv",
    "row_above": "ul_init.0.conv",
    "left": "ul_init.1.conv",
    "output": "nin_out.lin_a",
}
_STREAMS = {"down": "u_stream", "down_right": "ul_stream"}
_BLOCKS = {"encoder": "up_layers", "decoder": "down_layers"}
_PARTS = {"first": "conv_input.conv", "skip": "nin_skip.lin_a", "second": "conv_out.conv"}
_CHANGES = {"downsample": ("downsize", "conv"), "upsample": ("upsize", "deconv")}


def from_published(state: Mapping[str, Tensor]) -> PixelCNNpp:
    """Make the network that published weights belong to, of the size that they tell.

    Args:
        state: The port's state dict: weight-normalised (by either of torch's two namings) or plain, with or without the
            prefixes that ``DataParallel`` and ``torch.compile`` leave, alone or as ``state_dict`` or ``model`` of a
            larger checkpoint.

    Returns:
        The network in evaluation mode, on the CPU, in torch's default dtype.

    Raises:
        UserError: If these are not the weights of an unconditional PixelCNN++ as the port builds it.
    """
    parameters = _without_weight_norm(_without_prefix(state_dict_of(state, _REFUSAL)))
    network = _network_for(parameters)
    with torch.no_grad():
        for name, layer in network.named_modules():
            if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                continue
            theirs = _published_name(name)
            # The port writes a 1x1 convolution as a linear layer.
            shape = layer.weight.shape[:2] if theirs.endswith("lin_a") else layer.weight.shape
            _assign(layer, _take(parameters, f"{theirs}.weight", shape).reshape(layer.weight.shape))
            assert layer.bias is not None
            layer.bias.copy_(_take(parameters, f"{theirs}.bias", layer.bias.shape))
    if parameters:
        more = f" (one of {len(parameters)} such names)" if len(parameters) > 1 else ""
        raise _refusal(
            f"'{next(iter(parameters))}'{more} has no place in an unconditional network with "
            f"filters={network.filters}, resnets={network.resnets}."
        )
    return network.eval()


def _without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    while state:
        prefix = next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _without_weight_norm(state: dict[str, Any]) -> dict[str, Any]:
    """Put in the place of each length and direction the weight that they make."""
    plain = dict(state)
    for key in state:
        for length_suffix, direction_suffix in _LENGTH_AND_DIRECTION:
            if not key.endswith(direction_suffix):
                continue
            layer = key.removesuffix(direction_suffix)
            length_key, weight_key = layer + length_suffix, f"{layer}.weight"
            if length_key not in plain:
                raise _refusal(f"'{key}' lacks its companion '{length_key}'.")
            if weight_key in plain:
                raise _refusal(f"'{key}' and '{weight_key}' are both given.")
            plain[weight_key] = _weight(length_key, plain.pop(length_key), key, plain.pop(key))
    return plain


def _weight(length_key: str, length: Any, direction_key: str, direction: Any) -> Tensor:
    """``length * direction / |direction|`` in float64; the length's shape tells over which axes the norm goes."""
    length, direction = _numbers(length_key, length), _numbers(direction_key, direction)
    per_channel = [
        [size if axis == kept else 1 for axis, size in enumerate(direction.shape)]
        for kept in (0, 1)  # the second for transposed convolutions that are normalised per output channel
    ]
    if list(length.shape) not in per_channel:
        raise _refusal(
            f"'{length_key}' has the shape {list(length.shape)}; beside '{direction_key}' of shape "
            f"{list(direction.shape)} it should be {per_channel[0]}."
        )
    norm = torch.linalg.vector_norm(
        direction, dim=[axis for axis, size in enumerate(length.shape) if size == 1], keepdim=True
    )
    if (norm == 0).any():
        raise _refusal(f"'{direction_key}' is zero for a whole channel, which leaves it without a direction.")
    return length * (direction / norm)


def _numbers(key: str, value: Any) -> Tensor:
    """A value of the state dict as a tensor of its own in float64."""
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided):
        raise _refusal(f"'{key}' is not a tensor of floating-point numbers.")
    if not value.float().isfinite().all():
        raise _refusal(f"'{key}' holds values that are not finite: another checkpoint of that training may be sound.")
    return value.detach().to("cpu", torch.float64, copy=True)


def _network_for(parameters: dict[str, Any]) -> PixelCNNpp:
    """A network of the size that the shapes tell, with fresh weights."""
    first, last = "u_init.conv.weight", "nin_out.lin_a.weight"
    for key in (first, last):
        if key not in parameters:
            found = f"; the names begin with '{next(iter(parameters))}'" if parameters else ""
            raise _missing(key, found)
    seen, made = _numbers(first, parameters[first]), _numbers(last, parameters[last])
    if seen.dim() != 4 or seen.shape[1] not in (2, 4) or 0 in seen.shape:
        raise _refusal(
            f"'{first}' has the shape {list(seen.shape)}; it should be [filters, 2, 2, 3] for grey images or "
            "[filters, 4, 2, 3] for colour: the channels and one of ones."
        )
    if made.dim() != 2 or 0 in made.shape:
        raise _refusal(f"'{last}' has the shape {list(made.shape)}; it should be [outputs, filters].")
    # Counted, not read off the largest number: a gap is then named as missing, however large the number behind it.
    block = "up_layers.0.u_stream."
    resnets = len({key.removeprefix(block).partition(".")[0] for key in parameters if key.startswith(block)})
    return PixelCNNpp(seen.shape[1] - 1, made.shape[0], filters=seen.shape[0], resnets=max(resnets, 1))


def _published_name(name: str) -> str:
    """The port's name of a layer of :class:`PixelCNNpp`."""
    match name.split("."):
        case [end]:
            return _ENDS[end]
        case [change, level, stream]:
            verb, layer = _CHANGES[change]
            return f"{verb}_{_STREAMS[stream]}.{level}.{layer}"
        case [block, level, step, stream, part]:
            return f"{_BLOCKS[block]}.{level}.{_STREAMS[stream]}.{step}.{_PARTS[part]}"
    raise AssertionError(f"PixelCNNpp has a layer '{name}' that the port has not")


def _take(parameters: dict[str, Any], key: str, shape: torch.Size) -> Tensor:
    """Remove a parameter of the expected shape, in float64."""
    if key not in parameters:
        raise _missing(key)
    value = _numbers(key, parameters.pop(key))
    if value.shape != shape:
        raise _refusal(f"'{key}' has the shape {list(value.shape)}; it should be {list(shape)}.")
    return value


def _assign(layer: Any, weight: Tensor) -> None:
    layer.weight = weight.to(layer.weight.dtype)  # the parametrisation turns it into length and direction
    length, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    # A channel whose weights are zero has the length zero and needs some direction, or it would come to 0 / 0.
    direction.copy_(torch.where(length == 0, torch.ones_like(direction), direction))


def _missing(key: str, found: str = "") -> UserError:
    norm = " (neither plain nor as weight_g and weight_v)" if key.endswith(".weight") else ""
    return _refusal(f"'{key}' is missing{norm}{found}.")


def _refusal(reason: str) -> UserError:
    return UserError(f"{_REFUSAL}: {reason}")
