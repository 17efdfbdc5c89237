"""What all image datasets share: the size of the images and their types."""

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from lit_parallel.data.augmentation import Augmentation, random_crop_and_flip
from lit_parallel.data.in_memory import InMemoryData, Samples
from lit_parallel.data.options import DataOptions
from lit_parallel.errors import UserError

_IMAGES_AT_A_TIME = 4096  # as floating-point numbers they take four times the memory


class ImageSet(Samples):
    """Images in memory with their labels."""

    @classmethod
    def from_numpy(cls, images: np.ndarray, labels: np.ndarray) -> "ImageSet":
        """Copy arrays of any integer type and layout."""
        return cls(torch.tensor(images, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64))

    @property
    def images(self) -> Tensor:
        """The images, uint8 ``[n, channels, height, width]``."""
        return self.inputs

    @property
    def labels(self) -> Tensor:
        """Their labels, int64 ``[n]``."""
        return self.targets


class ImageData(InMemoryData):
    """Train, validation and test loaders of one dataset of images.

    Every loader yields ``(images, labels)``: uint8 ``[batch, channels, height, width]`` and int64 ``[batch]``. A
    dataset is a subclass that says what it is and implements `load`.

    Attributes:
        image_shape: Channels, height and width of the images as they are stored.
        num_classes: Labels are ``0 .. num_classes - 1``.
        augmentation: What a batch of images may go through in training and keep its labels; the model applies it.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    augmentation: Augmentation = staticmethod(random_crop_and_flip)
    options: DataOptions

    def __init__(self, options: DataOptions, seed: int):
        """See `InMemoryData`; raises a `UserError` if the images are too small for ``data.side``."""
        super().__init__(options, seed)
        _, height, width = self.image_shape
        if options.side is not None and options.side > min(height, width):
            raise UserError(
                f"data.side={options.side} would enlarge the images of {self.name}, which have {height}x{width} "
                f"pixels: set at most {min(height, width)}."
            )

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the loaders yield."""
        side = self.options.side
        return self.image_shape if side is None else (self.image_shape[0], side, side)

    @abstractmethod
    def load(self) -> tuple[ImageSet, ImageSet]:
        """Read all images: those to train and validate with, and those to test with."""

    def all_samples(self) -> tuple[ImageSet, ImageSet]:
        """See `InMemoryData`."""
        everything, test = self.load()
        side = self.options.side
        if side is None:
            return everything, test
        return (
            ImageSet(area_average(everything.images, side), everything.labels),
            ImageSet(area_average(test.images, side), test.labels),
        )

    def test_images(self) -> Tensor:
        """The test images, uint8 ``[n, channels, height, width]``."""
        return self.samples("test").inputs


def area_average(images: Tensor, side: int) -> Tensor:
    """Reduce images to ``side x side`` pixels, each the mean of the area that it covers.

    Pixels that lie partly in an area count with that part, unlike in PyTorch's ``interpolate(mode="area")``.

    Args:
        images: uint8 ``[n, channels, height, width]``.
        side: Height and width of the result.

    Returns:
        uint8 ``[n, channels, side, side]``.
    """
    rows, columns = (_shares(size, side) for size in images.shape[2:])
    return torch.cat(
        [(rows @ part.float() @ columns.T).round().to(torch.uint8) for part in images.split(_IMAGES_AT_A_TIME)]
    )


def _shares(size: int, side: int) -> Tensor:
    """The share of each of ``size`` pixels in each of ``side`` means, ``[side, size]``."""
    borders = torch.arange(side + 1, dtype=torch.float64)[:, None] * size / side
    pixels = torch.arange(size, dtype=torch.float64)
    overlap = torch.minimum(borders[1:], pixels + 1) - torch.maximum(borders[:-1], pixels)
    return (overlap.clamp(min=0) * side / size).float()
