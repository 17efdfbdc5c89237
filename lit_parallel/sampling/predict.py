"""Sampling through Lightning's ``Trainer.predict``: batches are shared out to processes, results go to shards.

Whole batches are dealt to the processes, so which images share a batch, and with it every bit of them, does not depend
on how many processes there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_parallel.data.split_data import as_it_is
from lit_parallel.errors import UserError
from lit_parallel.modules.autoregressive import AutoregressiveModule
from lit_parallel.sampling.auto import Choice, choose
from lit_parallel.sampling.sampler import Sampler, What
from lit_parallel.sampling.shards import Shards
from lit_parallel.solution import Solution
from lit_parallel.solvers import AUTO, SolverOptions


class SamplingModule(pl.LightningModule):
    """Turns a batch of sample indices into images and a solution.

    Args:
        model: The trained model.
        solver: How to sample.
        batch_size: Samples per batch; shorter batches are padded.
        what: Seed and options of what is sampled.

    Attributes:
        choice: What ``auto`` chose, once sampling has begun; the same in every process.
    """

    def __init__(self, model: AutoregressiveModule, solver: SolverOptions, batch_size: int, what: What) -> None:
        super().__init__()
        self.model = model
        self.solver, self.batch_size, self.what = solver, batch_size, what
        self.choice: Choice | None = None
        self._sampler: Sampler | None = None

    def on_predict_start(self) -> None:
        # Only now are the weights on their device and in their precision.
        solver = self.solver
        if solver.name == AUTO:
            first = self.trainer.is_global_zero
            choice = choose(self.model, solver, self.batch_size, self.what) if first else None
            self.choice = self.trainer.strategy.broadcast(choice)
            assert self.choice is not None
            solver = self.choice.solver
        self._sampler = Sampler(self.model, solver, self.batch_size, self.what, record_residual=True)

    def predict_step(self, batch: list[int], batch_index: int) -> tuple[Tensor, Solution] | tuple[()]:
        assert self._sampler is not None
        if not batch:
            return ()
        images, solution = self._sampler.batch(batch)
        return images.cpu(), solution.cpu()

    def on_predict_end(self) -> None:
        self._sampler = None  # its memory is needed for what comes next


class SampleIndices(pl.LightningDataModule):
    """Deals whole batches of sample indices to the processes, in strides.

    Args:
        batches: Those to be drawn; the first process's word counts.
    """

    def __init__(self, batches: Sequence[range]) -> None:
        super().__init__()
        self.batches = batches

    def setup(self, stage: str) -> None:
        if self.trainer:
            self.batches = self.trainer.strategy.broadcast(self.batches)

    def predict_dataloader(self) -> DataLoader:
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        mine = self.batches[rank::processes] or [range(0)]  # Lightning refuses a process without a batch
        return DataLoader(_Lists(mine), batch_size=None, collate_fn=as_it_is)


class _Lists(Dataset[list[int]]):
    """Makes lists of ranges as they are asked for."""

    def __init__(self, ranges: Sequence[range]) -> None:
        self.ranges = ranges

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, number: int) -> list[int]:
        return list(self.ranges[number])


class ShardWriter(BasePredictionWriter):
    """Writes every batch as a shard; memory stays flat.

    Args:
        folder: Where the shards go; the first process's word counts.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.shards = Shards(folder)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.shards = Shards(Path(trainer.strategy.broadcast(str(self.shards.folder))))

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: list[int],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if prediction:
            images, solution = prediction
            self.shards.write(batch[0], images, solution, trainer.global_rank)


@contextlib.contextmanager
def fitting_into_memory(what: str, advice: str) -> Iterator[None]:
    """Turn the end of memory into one line.

    Args:
        what: What is done inside.
        advice: The option to change.

    Raises:
        UserError: If memory, the machine's or a GPU's, does not suffice for what is done inside.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Of the machine's memory, and sometimes of a GPU's, torch says it in words only.
        words = ("out of memory", "allocate memory", "not enough memory")
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(w in str(error) for w in words):
            raise
        raise UserError(f"Memory does not suffice for {what}: {advice}.") from error
