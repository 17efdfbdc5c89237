"""Datasets that are held in memory."""

import warnings
from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset

from lit_parallel.data.options import LoaderOptions
from lit_parallel.data.split_data import Part, SplitData


@dataclass(frozen=True)
class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Samples in memory, each with what belongs to it.

    Attributes:
        inputs: ``[n, ...]``.
        targets: A label or a number for each, ``[n]``, or a row of them, ``[n, time]``.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    # A DataLoader fetches a whole batch by this method: one indexing operation instead of one per sample and a stack.
    __getitems__ = __getitem__


class InMemoryData(SplitData):
    """Base of the datasets that are held in memory; see `SplitData`."""

    def __init__(self, options: LoaderOptions, seed: int):
        """See `SplitData`."""
        super().__init__(options, seed)
        self._sets: dict[Part, Samples] = {}
        # A warning of Lightning that would be wrong here. The samples are in memory and a batch is one indexing
        # operation, so workers would only slow it down.
        warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")

    @abstractmethod
    def all_samples(self) -> tuple[Samples, Samples]:
        """All samples: those to train and validate with, and those to test with."""

    def setup(self, stage: str | None = None) -> None:
        """Read and split the samples, the first time only."""
        if not self._sets:
            everything, test = self.all_samples()
            train, validation = (type(everything)(*everything[part]) for part in self.split(len(everything)))
            self._sets = {"train": train, "validation": validation, "test": test}

    def samples(self, part: Part) -> Samples:
        """See `SplitData`."""
        self.setup()
        return self._sets[part]
