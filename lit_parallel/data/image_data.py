"""What all image datasets share: the split, the order and the loaders."""

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_parallel.data.options import DataOptions


@dataclass(frozen=True)
class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory with their labels.

    Attributes:
        images: uint8 ``[n, channels, height, width]``.
        labels: int64 ``[n]``.
    """

    images: Tensor
    labels: Tensor

    @classmethod
    def from_numpy(cls, images: np.ndarray, labels: np.ndarray) -> "ImageSet":
        """Copy arrays of any integer type and layout."""
        return cls(torch.tensor(images, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    # A DataLoader fetches a whole batch by this method: one indexing operation instead of one per image and a stack.
    __getitems__ = __getitem__


class ImageData(pl.LightningDataModule):
    """Train, validation and test loaders of one dataset.

    Every loader yields ``(images, labels)``: uint8 ``[batch, channels, height, width]`` and int64 ``[batch]``. Which
    images are held out for validation, and the order of training, depend on the seed alone; the test images are the
    same for every seed. A dataset is a subclass that says what it is and implements `load`.

    Attributes:
        name: The name in a config.
        image_shape: Channels, height and width.
        num_classes: Labels are ``0 .. num_classes - 1``.
        group_size: So many consecutive training images share pixels; the split keeps them on one side.
    """

    name: str  # pyright: ignore[reportIncompatibleVariableOverride]  (Lightning allows None)
    image_shape: tuple[int, int, int]
    num_classes: int
    group_size: int = 1

    def __init__(self, options: DataOptions, seed: int):
        """Store the options; nothing is read before `setup`.

        Args:
            options: What stands under ``data`` in a config.
            seed: Chooses the validation images and the order of training; not negative.
        """
        super().__init__()
        self.options = options
        self.seed = seed
        self._sets: tuple[ImageSet, ImageSet, ImageSet] | None = None
        # Two warnings of Lightning that would be wrong here. The images are in memory and a batch is one indexing
        # operation, so workers would only slow it down; and an empty list of validation loaders is what was asked for.
        warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")

    @abstractmethod
    def load(self) -> tuple[ImageSet, ImageSet]:
        """Read all images: those to train and validate with, and those to test with."""

    def setup(self, stage: str | None = None) -> None:
        """Read and split the images, the first time only."""
        if self._sets is None:
            everything, test = self.load()
            self._sets = (*self._split(everything), test)

    def train_dataloader(self) -> DataLoader:
        """Return the training images, in a new order every epoch."""
        images = self._set(0)
        processes = self.trainer.world_size if self.trainer else 1
        return self._loader(
            images,
            # Repeats for the same seed, whatever else draws random numbers.
            generator=torch.Generator().manual_seed(self.seed),
            shuffle=True,
            drop_last=len(images) > self.options.batch_size * processes,
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the images held out for validation, or no loader if there are none."""
        images = self._set(1)
        return self._loader(images) if len(images) else []

    def test_dataloader(self) -> DataLoader:
        """Return the test images."""
        return self._loader(self._set(2))

    def test_images(self) -> Tensor:
        """The test images, uint8 ``[n, channels, height, width]``."""
        return self._set(2).images

    def _split(self, images: ImageSet) -> tuple[ImageSet, ImageSet]:
        """Hold out the validation images by a permutation of the groups that is drawn from the seed."""
        groups = len(images) // self.group_size
        order = np.random.default_rng(self.seed).permutation(groups)
        indices = torch.from_numpy(np.arange(len(images)).reshape(groups, self.group_size)[order])
        held_out = round(groups * self.options.validation_fraction)
        train, validation = indices[held_out:].flatten(), indices[:held_out].flatten()
        return ImageSet(*images[train]), ImageSet(*images[validation])

    def _set(self, index: int) -> ImageSet:
        self.setup()
        assert self._sets is not None
        return self._sets[index]

    def _loader(self, images: ImageSet, **how: Any) -> DataLoader:
        return DataLoader(
            images,
            batch_size=self.options.batch_size,
            collate_fn=as_it_is,
            num_workers=self.options.num_workers,
            persistent_workers=self.options.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **how,
        )


def as_it_is(batch: Any) -> Any:
    return batch  # a named function, because worker processes must be able to pickle it
