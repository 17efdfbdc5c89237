"""What a DenseNet consists of, by torchvision's attribute names, so that a user's own networks are understood too.

Networks: Huang, Liu, van der Maaten, Weinberger, *Densely Connected Convolutional Networks*, CVPR 2017
(https://arxiv.org/abs/1608.06993). Names: https://github.com/pytorch/vision/blob/main/torchvision/models/densenet.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.errors import UserError

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # into which a Trainer turns the former; the same in evaluation


@dataclass(frozen=True)
class FoldedLayer:
    """A dense layer with batch norm folded: ``conv2(relu(bottleneck @ relu(scale * x + shift) + bias))``.

    Attributes:
        scale: ``[c_l]`` of the layer's input channels, c_l = c_0 + l * growth.
        shift: ``[c_l]``.
        bottleneck: ``[bottleneck, c_l]`` the 1x1 convolution times the second norm's scale.
        bias: ``[bottleneck]`` the second norm's shift.
        growth: ``[growth, bottleneck, 3, 3]`` the 3x3 convolution.
    """

    scale: Tensor
    shift: Tensor
    bottleneck: Tensor
    bias: Tensor
    growth: Tensor


@dataclass(frozen=True)
class DenseBlock:
    """A dense block: layers that each read the block's input and the features of all layers before.

    Attributes:
        name: Within the network, such as ``features.denseblock1``.
        layers: The dense layers in order.
        norm: The batch norm behind the block, which reads all its features: of a transition, or the last one.
    """

    name: str
    layers: tuple[nn.Module, ...]
    norm: nn.BatchNorm2d | nn.SyncBatchNorm

    @property
    def channels(self) -> int:
        """Channels that the block reads, c_0."""
        return _part(self.layers[0], "norm1").num_features

    @property
    def growth(self) -> int:
        """Channels that each layer adds."""
        return _part(self.layers[0], "conv2").out_channels

    @property
    def mean(self) -> Tensor:
        """``[layers, growth]`` mean of each layer's features over the training images, as batch norm has seen it."""
        assert self.norm.running_mean is not None
        return self.norm.running_mean[self.channels :].view(len(self.layers), self.growth)

    def folded(self) -> list[FoldedLayer]:
        """The layers in evaluation mode with batch norm folded, copies of the weights as they are now.

        They are computed in float64; the result is of the parameters' type, but float32 for a shorter one.
        """
        return [_folded(layer) for layer in self.layers]


@dataclass(frozen=True)
class Structure:
    """A DenseNet in the order of its evaluation: stem, blocks with transitions between them, head.

    Its functions call the network's own modules, and so give the bits of its ordinary forward in evaluation mode.

    Attributes:
        network: The DenseNet.
        blocks: Its dense blocks.
    """

    network: nn.Module
    blocks: tuple[DenseBlock, ...]

    def stem(self, images: Tensor) -> Tensor:
        """What the first block reads, from images ``[batch, channels, height, width]``."""
        return self._between(-1, images)

    def transition(self, index: int, features: Tensor) -> Tensor:
        """What block ``index + 1`` reads.

        Args:
            index: Of the block before.
            features: All features of that block, ``[batch, c_0 + layers * growth, height, width]``.
        """
        return self._between(index, features)

    def head(self, features: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` from all features of the last block, as in :meth:`transition`."""
        x = F.relu(self._between(len(self.blocks) - 1, features), inplace=True)
        return _part(self.network, "classifier")(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))

    def ordinary(self, images: Tensor) -> Tensor:
        """Logits of the ordinary evaluation, layer after layer, whatever ``network.forward`` is just now."""
        features = self.stem(images)
        for index in range(len(self.blocks)):
            if index > 0:
                features = self.transition(index - 1, features)
            features = self.all_features(index, features)
        return self.head(features)

    def all_features(self, index: int, features: Tensor) -> Tensor:
        """All features of a block, its layers one after another; as in :meth:`transition`.

        Args:
            index: Of the block.
            features: ``[batch, c_0, height, width]``, which it reads.
        """
        for layer in self.blocks[index].layers:
            features = torch.cat([features, layer(features)], 1)
        return features

    def _between(self, index: int, x: Tensor) -> Tensor:
        """Apply what stands in ``features`` between a block (-1: the start) and the next one (or the end)."""
        children = list(_part(self.network, "features").named_children())
        places = [place for place, (name, _) in enumerate(children) if name.startswith("denseblock")]
        first = 0 if index < 0 else places[index] + 1
        last = places[index + 1] if index + 1 < len(places) else len(children)
        for _, module in children[first:last]:
            x = module(x)
        return x


def structure_of(network: nn.Module) -> Structure:
    """Take a DenseNet apart.

    Raises:
        UserError: It is none, or one with parts of another kind; the message names the part.
    """
    if not _is_dense_net(network):
        raise UserError(
            f"{type(network).__name__} is no DenseNet: it has no features.denseblock1.denselayer1 (and so on, as "
            "torchvision names them)."
        )
    children = dict(_part(network, "features").named_children())
    names = [name for name in children if name.startswith("denseblock")]
    expected = [f"denseblock{number + 1}" for number in range(len(names))]
    if names != expected:
        raise UserError(f"The DenseNet's blocks should be {', '.join(expected)}, in this order: {', '.join(names)}.")
    order = list(children)
    blocks = []
    for number, name in enumerate(names, start=1):
        behind = "norm5" if number == len(names) else f"transition{number}"
        if behind not in order or not (order.index(behind) == order.index(name) + 1):
            raise UserError(f"The DenseNet's features.{name} should be followed by {behind}, and is not.")
        if number == len(names):
            norm = _expect(network, f"features.{behind}", *NORMS)
        else:
            norm = _check_transition(network, f"features.{behind}")
        _check_norm(f"features.{behind}", norm)
        layers = tuple(_check_layer(network, f"features.{name}.{layer}") for layer in _layer_names(children[name]))
        block = DenseBlock(f"features.{name}", layers, norm)
        _check_channels(block)
        blocks.append(block)
    if not isinstance(getattr(network, "classifier", None), nn.Module):
        raise UserError(f"The DenseNet {type(network).__name__} has no classifier: logits need one.")
    return Structure(network, tuple(blocks))


def find_dense_nets(module: nn.Module) -> dict[str, nn.Module]:
    """All DenseNets in a module, itself included, by qualified name.

    They are known by the names of their parts alone; :func:`structure_of` says whether these are what they should be.
    """
    return {name: part for name, part in module.named_modules() if _is_dense_net(part)}


def fold(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation mode as ``scale * x + shift``: both ``[channels]``, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.detach().double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def _folded(layer: nn.Module) -> FoldedLayer:
    conv1, conv2 = _part(layer, "conv1"), _part(layer, "conv2")
    scale, shift = fold(_part(layer, "norm1"))
    scale2, bias = fold(_part(layer, "norm2"))
    bottleneck = conv1.weight.detach().double()[:, :, 0, 0] * scale2[:, None]
    dtype = torch.promote_types(conv1.weight.dtype, torch.float32)
    tensors = (scale, shift, bottleneck, bias, conv2.weight.detach().clone())
    return FoldedLayer(*(tensor.to(dtype) for tensor in tensors))


def _is_dense_net(module: nn.Module) -> bool:
    for name in ("features", "denseblock1", "denselayer1"):
        # Not by getattr: a compiled network's wrapper shows all attributes of what it wraps.
        child = dict(module.named_children()).get(name)
        if child is None:
            return False
        module = child
    return True


def _part(module: nn.Module, name: str) -> Any:
    return module.get_submodule(name)


def _layer_names(block: nn.Module) -> list[str]:
    names = [name for name, _ in block.named_children()]
    expected = [f"denselayer{number + 1}" for number in range(len(names))]
    if names != expected:
        raise UserError(f"A dense block's layers should be {', '.join(expected)}, in this order: {', '.join(names)}.")
    return names


def _check_layer(network: nn.Module, name: str) -> nn.Module:
    """A dense layer whose parts are the usual ones, and no others with parameters."""
    layer = network.get_submodule(name)
    for part in ("norm1", "norm2"):
        _check_norm(f"{name}.{part}", _expect(network, f"{name}.{part}", *NORMS))
    for part in ("relu1", "relu2"):
        _expect(network, f"{name}.{part}", nn.ReLU)
    for part, size in (("conv1", 1), ("conv2", 3)):
        _check_convolution(f"{name}.{part}", _expect(network, f"{name}.{part}", nn.Conv2d), size)
    _check_no_others(layer, name, ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2"))
    return layer


def _check_transition(network: nn.Module, name: str) -> nn.BatchNorm2d | nn.SyncBatchNorm:
    norm = _expect(network, f"{name}.norm", *NORMS)
    _expect(network, f"{name}.relu", nn.ReLU)
    _check_convolution(f"{name}.conv", _expect(network, f"{name}.conv", nn.Conv2d), 1)
    _expect(network, f"{name}.pool", nn.AvgPool2d)
    _check_no_others(network.get_submodule(name), name, ("norm", "relu", "conv", "pool"))
    return norm


def _check_no_others(module: nn.Module, name: str, known: tuple[str, ...]) -> None:
    for child, part in module.named_children():
        if child not in known and not isinstance(part, (nn.Identity, nn.Dropout, nn.Dropout2d)):
            raise UserError(
                f"The DenseNet's {name} has a part '{child}' ({type(part).__name__}), which a DenseNet has not."
            )


def _check_norm(name: str, norm: Any) -> None:
    if norm.running_mean is None or norm.running_var is None:
        raise UserError(
            f"The DenseNet's {name} has no running statistics: what it makes of an image depends on the others of the "
            "batch, so that images cannot be evaluated each for itself."
        )


def _check_convolution(name: str, convolution: Any, size: int) -> None:
    expected = {
        "kernel_size": (size, size),
        "stride": (1, 1),
        "padding": (size // 2, size // 2),
        "dilation": (1, 1),
        "groups": 1,
        "padding_mode": "zeros",
        "bias": None,
    }
    for attribute, value in expected.items():
        found = getattr(convolution, attribute)
        if found is not None and found != value:
            shown = "a bias" if attribute == "bias" else f"{attribute}={found}"
            raise UserError(f"The DenseNet's {name} has {shown}, where a DenseNet has {value if value else 'none'}.")


def _check_channels(block: DenseBlock) -> None:
    for index, layer in enumerate(block.layers):
        reads, adds = _part(layer, "norm1").num_features, _part(layer, "conv2").out_channels
        if adds != block.growth or reads != block.channels + index * block.growth:
            raise UserError(
                f"The DenseNet's {block.name}.denselayer{index + 1} reads {reads} channels and adds {adds}, where "
                f"{block.channels + index * block.growth} and {block.growth} were expected."
            )


def _expect(network: nn.Module, name: str, *kinds: type) -> Any:
    try:
        part = network.get_submodule(name)
    except AttributeError:
        raise UserError(f"The DenseNet has no {name}: a {kinds[0].__name__} was expected there.") from None
    if not isinstance(part, kinds):
        raise UserError(f"The DenseNet's {name} is a {type(part).__name__}, where a {kinds[0].__name__} was expected.")
    return part
