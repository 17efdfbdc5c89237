"""DenseNet as a LightningModule: telling the classes of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lit_parallel.data.augmentation import Augmentation, random_crop, random_crop_and_flip
from lit_parallel.errors import UserError
from lit_parallel.modules.options import DenseNetOptions, OptimizerOptions
from lit_parallel.modules.supervised import SupervisedModule
from lit_parallel.networks import densenet as networks
from lit_parallel.networks.densenet import DenseNet, densenet_cifar
from lit_parallel.networks.densenet_weights import load_published

# Of the pixels of ImageNet in [0, 1], per colour; a grey image gets the means of the three.
MEAN, STANDARD_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SMALL = 64
"""Images of fewer pixels a side are small: the usual first layers would leave too little of them."""

_DEFAULT_DEPTH, _DEFAULT_GROWTH_RATE = 100, 12
_TOP = 5


class DenseNetModule(SupervisedModule):
    """A DenseNet that tells the class of an image (Huang et al., 2017, arXiv:1608.06993).

    ``loss`` is the cross-entropy in nats (with smoothed labels in training alone), ``accuracy`` the part of the images
    whose label is the first guess, ``top5`` the part whose label is among the first five.

    Args:
        options: Architecture.
        sample_shape: Channels, height, width.
        optimizer: Optimiser and schedule.
        config: The resolved config as plain containers, kept in the checkpoint.

    Raises:
        UserError: If there is no such network, or the images are too small for it.
    """

    network: DenseNet
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        options: DenseNetOptions,
        sample_shape: Sequence[int],
        optimizer: OptimizerOptions | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        network = build_densenet(options, sample_shape)
        num_classes = network.classifier.out_features
        metrics = ("loss", "accuracy", "top5") if num_classes > _TOP else ("loss", "accuracy")
        super().__init__(sample_shape, metrics, optimizer, config)
        self.options = options
        self.network = network
        self.num_classes = num_classes
        self.initial_weights = options.weights or (options.architecture if options.pretrained else None)
        colours = sample_shape[0] == len(MEAN)
        self.augmentation: Augmentation = random_crop_and_flip if colours else random_crop
        mean, deviation = torch.tensor(MEAN), torch.tensor(STANDARD_DEVIATION)
        if not colours:
            mean, deviation = mean.mean(), deviation.mean()
        self.register_buffer("scale", 1 / (255 * deviation).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / deviation).reshape(-1, 1, 1), persistent=False)

    def channels_last_on(self, device: torch.device) -> bool:
        """Whether the features of a pixel lie side by side on such a device."""
        chosen = self.options.channels_last
        return device.type == "cuda" if chosen is None else chosen

    def load_initial_weights(self) -> None:
        if self.initial_weights is not None:
            load_published(self.network, self.initial_weights)

    def check_data(self, data: Any) -> None:
        super().check_data(data)
        augmentation = getattr(data, "augmentation", self.augmentation)
        if augmentation is None and not self.options.augment:
            raise UserError(f"model.augment is not for data.name={data.name}: leave it out and set data.augment=false.")
        self.augmentation = augmentation or _unchanged

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # The weights are laid out as the images will be, or else every convolution would do it anew.
        if self.channels_last_on(self.trainer.strategy.root_device):
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def normalized(self, images: Tensor) -> Tensor:
        """What the network reads: pixels 0 .. 255 with about mean 0 and standard deviation 1, in its own type."""
        pixels = images.to(self.scale.dtype) * self.scale + self.shift
        return pixels.contiguous(memory_format=torch.channels_last) if self.channels_last_on(pixels.device) else pixels

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[batch, num_classes]``, never in half precision.

        Args:
            images: uint8 ``[batch, channels, height, width]``.
        """
        logits = self.network_in_use(self.normalized(images))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        images, labels = batch
        if self.options.augment:
            images = self.augmentation(images)
        return super().training_step((images, labels), batch_index)

    def measure(self, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
        smoothing = self.options.label_smoothing if self.training else 0.0
        measured = {
            "loss": F.cross_entropy(answers, targets, reduction="none", label_smoothing=smoothing),
            "accuracy": _among_the_first(1, answers, targets),
        }
        if "top5" in self.metrics:
            measured["top5"] = _among_the_first(_TOP, answers, targets)
        return measured


def build_densenet(options: DenseNetOptions, sample_shape: Sequence[int]) -> DenseNet:
    """The network that the options describe, with fresh weights.

    Args:
        options: Architecture.
        sample_shape: Channels, height, width.

    Raises:
        UserError: If options do not belong to the architecture, or the images are too small.
    """
    architecture = options.architecture
    published = architecture not in ("cifar", "custom")
    for name, owners in (
        ("depth", ("cifar",)),
        ("growth_rate", ("cifar", "custom")),
        ("block_config", ("custom",)),
        ("compression", ("custom",)),
    ):
        if getattr(options, name) is not None and architecture not in owners:
            raise UserError(
                f"model.{name} belongs to model.architecture={' or '.join(owners)}: leave it out, or choose that."
            )
    if options.pretrained and options.weights is not None:
        raise UserError("model.pretrained and model.weights name two sets of weights: leave one of them out.")
    if options.pretrained and not published:
        raise UserError(
            f"no weights are published for model.architecture={architecture}: set model.pretrained=false, or name a "
            "file by model.weights."
        )
    channels, height, width = sample_shape
    small = options.small_images
    if small is None:
        small = architecture == "cifar" or min(height, width) < SMALL
    if options.pretrained and small:
        raise UserError("the published weights are not for small images: set model.small_images=false.")
    if options.pretrained and channels != 3:
        raise UserError(
            f"the published weights read 3 colours, and the images have {channels}: set model.pretrained=false."
        )
    common: dict[str, Any] = {
        "drop_rate": options.drop_rate,
        "num_classes": options.num_classes or (1000 if published else 10),
        "in_channels": channels,
        "small_images": small,
    }
    growth_rate = options.growth_rate or _DEFAULT_GROWTH_RATE
    if architecture == "cifar":
        network = densenet_cifar(options.depth or _DEFAULT_DEPTH, growth_rate, **common)
    elif architecture == "custom":
        if options.block_config is None:
            raise UserError("model.architecture=custom needs the layers of each block: set model.block_config=[3,3,3].")
        network = DenseNet(
            growth_rate,
            tuple(options.block_config),
            2 * growth_rate,
            compression=options.compression or 0.5,
            **common,
        )
    else:
        network = getattr(networks, architecture)(**common)
    _check_size(network, height, width, small)
    return network


def _check_size(network: DenseNet, height: int, width: int, small: bool) -> None:
    """Raise a `UserError` if nothing is left of the images at the last block."""
    transitions = sum(name.startswith("transition") for name, _ in network.features.named_children())
    rows, columns = ((side if small else -(-side // 4)) >> transitions for side in (height, width))
    if min(rows, columns) < 1:
        raise UserError(
            f"images of {height}x{width} pixels are too small for this DenseNet, which halves them "
            f"{transitions + 2 * (not small)} times: use a network of fewer blocks, or larger images."
        )


def _among_the_first(number: int, logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the label is among so many of the largest logits, else 0, ``[batch]``."""
    return (logits.topk(number, dim=1).indices == labels[:, None]).any(dim=1).to(logits.dtype)


def _unchanged(images: Tensor) -> Tensor:
    return images
