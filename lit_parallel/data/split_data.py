"""What all datasets share: the split, the order and the loaders."""

import warnings
from abc import abstractmethod
from collections.abc import Sized
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_parallel.data.options import LoaderOptions

Part = Literal["train", "validation", "test"]


class SplitData(pl.LightningDataModule):
    """Train, validation and test loaders of one dataset.

    Every loader yields ``(inputs, targets)``. Which samples are held out for validation, and the order of training,
    depend on the seed alone; the test samples are the same for every seed.

    Attributes:
        name: The name in a config.
        group_size: So many consecutive training samples have something in common; the split keeps them on one side.
        loader_kind: Makes the loaders.
    """

    name: str  # pyright: ignore[reportIncompatibleVariableOverride]  (Lightning allows None)
    group_size: int = 1
    loader_kind: type[DataLoader] = DataLoader

    def __init__(self, options: LoaderOptions, seed: int):
        """Store the options; nothing is read before `setup`.

        Args:
            options: What stands under ``data`` in a config.
            seed: Chooses the validation samples and the order of training; not negative.
        """
        super().__init__()
        self.options = options
        self.seed = seed
        # A warning of Lightning that would be wrong here: an empty list of validation loaders is what was asked for.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, from which a model is built."""

    @abstractmethod
    def samples(self, part: Part) -> Any:
        """The samples of one part, read now if they have not been: a dataset whose ``__getitems__`` yields a batch."""

    def train_dataloader(self) -> DataLoader:
        """Return the training samples, in a new order every epoch."""
        samples = self.samples("train")
        processes = self.trainer.world_size if self.trainer else 1
        return self._loader(
            samples,
            self.options.batch_size,
            # Repeats for the same seed, whatever else draws random numbers.
            generator=torch.Generator().manual_seed(self.seed),
            shuffle=True,
            drop_last=len(samples) > self.options.batch_size * processes,
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the samples held out for validation, or no loader if there are none."""
        samples = self.samples("validation")
        return self._evaluation_loader(samples) if len(samples) else []

    def test_dataloader(self) -> DataLoader:
        """Return the test samples."""
        return self._evaluation_loader(self.samples("test"))

    def split(self, number: int) -> tuple[Tensor, Tensor]:
        """Indices of the samples to train with and of those held out for validation.

        They follow a permutation of the groups that is drawn from the seed.

        Args:
            number: How many samples there are.
        """
        groups = number // self.group_size
        order = np.random.default_rng(self.seed).permutation(groups)
        indices = torch.from_numpy(np.arange(number).reshape(groups, self.group_size)[order])
        held_out = round(groups * self.options.validation_fraction)
        return indices[held_out:].flatten(), indices[:held_out].flatten()

    def _evaluation_loader(self, samples: Sized) -> DataLoader:
        return self._loader(samples, self.options.evaluation_batch_size or self.options.batch_size)

    def _loader(self, samples: Any, batch_size: int, **how: Any) -> DataLoader:
        return self.loader_kind(
            samples,
            batch_size=batch_size,
            collate_fn=as_it_is,
            num_workers=self.options.num_workers,
            persistent_workers=self.options.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **how,
        )


def as_it_is(batch: Any) -> Any:
    return batch  # a named function, because worker processes must be able to pickle it
