"""Which equation generates which pixel, and how a network is asked about all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("sequence", "image")


@dataclass(frozen=True)
class Positions:
    """The positions of an image in order of generation: rows from the top, pixels from the left.

    A position is a pixel with all its channels, or, where a conditional has one channel, a channel of a pixel.

    Args:
        image_shape: Channels, height, width.
        channels: Values per position.
        layout: What the network reads and puts out: ``sequence``, ``[batch, length, ...]`` in order of generation, or
            ``image``, ``[batch, ..., height, width]``.
    """

    image_shape: tuple[int, int, int]
    channels: int
    layout: str = "sequence"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not '{self.layout}'")
        if self.channels not in (1, self.image_shape[0]):
            raise ValueError(
                f"a conditional of {self.channels} channels does not fit images of {self.image_shape[0]} channels"
            )
        if self.layout == "image" and self.channels != self.image_shape[0]:
            raise ValueError("the layout 'image' needs a conditional of all the image's channels: use 'sequence'")

    @property
    def row(self) -> int:
        """Positions in a row of the image."""
        return self.image_shape[2] * self.image_shape[0] // self.channels

    @property
    def length(self) -> int:
        return self.image_shape[1] * self.row

    def from_images(self, images: Tensor) -> Tensor:
        """``[batch, channels of the image, height, width] -> [batch, length, channels]``."""
        return images.permute(0, 2, 3, 1).reshape(len(images), self.length, self.channels)

    def to_images(self, x: Tensor) -> Tensor:
        """``[batch, length, channels] -> [batch, channels of the image, height, width]``."""
        channels, height, width = self.image_shape
        return x.reshape(len(x), height, width, channels).permute(0, 3, 1, 2)

    def to_map(self, x: Tensor) -> Tensor:
        """A number per equation to one per pixel, the largest of its channels: ``[batch, length]`` to images' size."""
        return x.reshape(len(x), *self.image_shape[1:], -1).amax(dim=-1)

    def parameters(self, network: Any, encoded: Tensor, labels: Tensor | None) -> Tensor:
        """The network's output at every position, ``[batch, length, parameters]``.

        Args:
            network: Called with the input, and the labels if there are any.
            encoded: ``[batch, length, ...]`` its input, from :meth:`lit_parallel.conditionals.Conditional.encode`.
            labels: ``[batch]``, or ``None``.
        """
        inputs = encoded
        if self.layout == "image":
            # Not Tensor.contiguous: with one channel the strides would say "channels last" as well, and convolutions
            # choose another algorithm, with other bits, by them.
            inputs = self.to_images(encoded).clone(memory_format=torch.contiguous_format)
        outputs = network(inputs) if labels is None else network(inputs, labels)
        return outputs.flatten(2).transpose(1, 2) if self.layout == "image" and outputs.dim() > 2 else outputs
