"""What all datasets share: the split, the order and the loaders."""

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sized
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lit_parallel.data.options import LoaderOptions
from lit_parallel.seeds import seed_of

Part = Literal["train", "validation", "test"]


class Shuffled(DistributedSampler):
    """A new order every epoch, a function of the seed and the epoch; each process gets its part of it.

    Lightning sets the epoch. Whoever iterates without it gets one epoch after the other.

    Args:
        samples: What is put in order.
        seed: Not negative.
        epoch: The first one.
        processes: How many share the samples.
        rank: Which of them this is.
    """

    def __init__(self, samples: Sized, seed: int, epoch: int = 0, processes: int = 1, rank: int = 0) -> None:
        # Spread first: torch adds the epoch to the seed, and seeds 1 and 2 are not to go through the same orders.
        super().__init__(samples, processes, rank, shuffle=True, seed=seed_of(seed))  # type: ignore[arg-type]
        self.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        order = super().__iter__()
        self.set_epoch(self.epoch + 1)
        return order


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
        self._first_epoch = 0
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
        processes, rank = self._processes_and_rank()
        return self._loader(
            samples,
            self.options.batch_size,
            sampler=Shuffled(samples, self.seed, self._first_epoch, processes, rank),
            # Seeds the worker processes, whatever else draws random numbers.
            generator=torch.Generator().manual_seed(self.seed),
            drop_last=len(samples) > self.options.batch_size * processes,
        )

    def state_dict(self) -> dict[str, Any]:
        """The epoch that comes next; Lightning keeps it in checkpoints."""
        progress: Any = self.trainer.fit_loop.epoch_progress.current if self.trainer else None
        return {"epoch": progress.processed if progress else 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin with that epoch. Lightning sets it too, but too late for worker processes, which begin at once."""
        self._first_epoch = state_dict["epoch"]

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

    def _processes_and_rank(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _evaluation_loader(self, samples: Sized) -> DataLoader:
        batch_size = self.options.evaluation_batch_size or self.options.batch_size
        processes, rank = self._processes_and_rank()
        if processes == 1 or len(samples) < processes:  # then Lightning lets some of them take the same ones
            return self._loader(samples, batch_size)
        return self._loader(
            samples,
            size_of_even_shares(len(samples), processes, batch_size),
            sampler=UnrepeatedDistributedSampler(samples, processes, rank, shuffle=False),
        )

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


def size_of_even_shares(number: int, processes: int, batch_size: int) -> int:
    """A batch size with which processes that share samples, each of them once, have equally many batches.

    While a model trains, processes meet at every batch, those of validation included.

    Args:
        number: Of the samples, at least as many as processes; some of these have one more than the others.
        processes: Of them there are so many.
        batch_size: What was asked for.

    Returns:
        The nearest size that does it: below, if there is one, and only of single-digit sizes there may be none.
    """
    least, more = divmod(number, processes)
    sizes = (*range(batch_size, 0, -1), *range(batch_size + 1, least + 2))
    return batch_size if not more else next(size for size in sizes if least % size)


def as_it_is(batch: Any) -> Any:
    return batch  # a named function, because worker processes must be able to pickle it
