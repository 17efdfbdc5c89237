"""What all datasets share: the split, the order and the loaders."""

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_parallel.data.options import LoaderOptions


@dataclass(frozen=True)
class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Samples in memory, each with what belongs to it.

    Attributes:
        inputs: ``[n, ...]``.
        targets: A label or a number for each, ``[n]``.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    # A DataLoader fetches a whole batch by this method: one indexing operation instead of one per sample and a stack.
    __getitems__ = __getitem__


class InMemoryData(pl.LightningDataModule):
    """Train, validation and test loaders of one dataset.

    Every loader yields ``(inputs, targets)``. Which samples are held out for validation, and the order of training,
    depend on the seed alone; the test samples are the same for every seed.

    Attributes:
        name: The name in a config.
        group_size: So many consecutive training samples have something in common; the split keeps them on one side.
    """

    name: str  # pyright: ignore[reportIncompatibleVariableOverride]  (Lightning allows None)
    group_size: int = 1

    def __init__(self, options: LoaderOptions, seed: int):
        """Store the options; nothing is read before `setup`.

        Args:
            options: What stands under ``data`` in a config.
            seed: Chooses the validation samples and the order of training; not negative.
        """
        super().__init__()
        self.options = options
        self.seed = seed
        self._sets: tuple[Samples, Samples, Samples] | None = None
        # Two warnings of Lightning that would be wrong here. The samples are in memory and a batch is one indexing
        # operation, so workers would only slow it down; and an empty list of validation loaders is what was asked for.
        warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, from which a model is built."""

    @abstractmethod
    def all_samples(self) -> tuple[Samples, Samples]:
        """All samples: those to train and validate with, and those to test with."""

    def setup(self, stage: str | None = None) -> None:
        """Read and split the samples, the first time only."""
        if self._sets is None:
            everything, test = self.all_samples()
            self._sets = (*self._split(everything), test)

    def train_dataloader(self) -> DataLoader:
        """Return the training samples, in a new order every epoch."""
        samples = self._set(0)
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
        samples = self._set(1)
        return self._evaluation_loader(samples) if len(samples) else []

    def test_dataloader(self) -> DataLoader:
        """Return the test samples."""
        return self._evaluation_loader(self._set(2))

    def _split(self, samples: Samples) -> tuple[Samples, Samples]:
        """Hold out the validation samples by a permutation of the groups that is drawn from the seed."""
        groups = len(samples) // self.group_size
        order = np.random.default_rng(self.seed).permutation(groups)
        indices = torch.from_numpy(np.arange(len(samples)).reshape(groups, self.group_size)[order])
        held_out = round(groups * self.options.validation_fraction)
        train, validation = indices[held_out:].flatten(), indices[:held_out].flatten()
        return type(samples)(*samples[train]), type(samples)(*samples[validation])

    def _set(self, index: int) -> Samples:
        self.setup()
        assert self._sets is not None
        return self._sets[index]

    def _evaluation_loader(self, samples: Samples) -> DataLoader:
        return self._loader(samples, self.options.evaluation_batch_size or self.options.batch_size)

    def _loader(self, samples: Samples, batch_size: int, **how: Any) -> DataLoader:
        return DataLoader(
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
