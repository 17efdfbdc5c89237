"""Random changes to images that keep their class: a whole batch at once, on its own device.

All randomness comes from torch's generator of the device the images are on.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Augmentation = Callable[[Tensor], Tensor]
"""A function from images ``[batch, channels, height, width]`` to others of the same shape and type."""

PADDING = 4
"""Pixels by which an image of 32x32 may move, as is usual for CIFAR-10 (He et al., 2015, arXiv:1512.03385)."""


def random_crop(images: Tensor, padding: int = PADDING) -> Tensor:
    """Pad images by black pixels and cut each out again at a random place: they move by at most ``padding`` pixels.

    Args:
        images: ``[batch, channels, height, width]``, of any type.
        padding: Pixels on every side.
    """
    number, channels, height, width = images.shape
    device = images.device
    padded = torch.nn.functional.pad(images, (padding, padding, padding, padding))
    top, left = torch.randint(2 * padding + 1, (2, number, 1), device=device)
    rows = top + torch.arange(height, device=device)
    columns = left + torch.arange(width, device=device)
    return padded[
        torch.arange(number, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image, left to right, with probability 1/2.

    Args:
        images: ``[batch, channels, height, width]``, of any type.
    """
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def random_crop_and_flip(images: Tensor) -> Tensor:
    """Both: what small photographs are usually trained with."""
    return random_flip(random_crop(images))
