"""Sampling through Lightning's ``Trainer.predict``: batches are shared out to processes, results go to files.

Whole batches are dealt to the processes, so which images share a batch, and with it every bit of them, does not depend
on how many processes there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader

from lit_parallel.data.split_data import as_it_is
from lit_parallel.errors import UserError, one_line
from lit_parallel.metrics import Iterations, Speedup
from lit_parallel.modules.autoregressive import AutoregressiveModule
from lit_parallel.sampling.auto import Choice, choose
from lit_parallel.sampling.sampler import Sampler, What, batches
from lit_parallel.solution import Solution, Status, concatenate
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
        totals: Iterations and iteration speedup over all processes, once it has ended.
    """

    def __init__(self, model: AutoregressiveModule, solver: SolverOptions, batch_size: int, what: What) -> None:
        super().__init__()
        self.model = model
        self.solver, self.batch_size, self.what = solver, batch_size, what
        self.iterations = Iterations()
        self.iteration_speedup = Speedup()
        self.choice: Choice | None = None
        self.totals: dict[str, Any] = {}
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

    def predict_step(self, batch: list[int], batch_index: int) -> tuple[Tensor, Solution] | None:
        assert self._sampler is not None
        if not batch:
            return None
        images, solution = self._sampler.batch(batch)
        self.iterations.update(solution)
        self.iteration_speedup.update(solution.length * len(batch), solution.total_iterations.sum())
        return images.cpu(), solution.cpu()

    def on_predict_epoch_end(self) -> None:
        iterations = self.iterations.compute()  # over all processes
        self.totals = {
            "iterations_mean": float(iterations["mean"]),
            "iterations_max": float(iterations["max"]),
            "iteration_speedup": float(self.iteration_speedup.compute()),
        }


class SampleIndices(pl.LightningDataModule):
    """Deals whole batches of sample indices to the processes, in strides.

    Args:
        num_samples: How many images in all.
        batch_size: Samples per batch.
    """

    def __init__(self, num_samples: int, batch_size: int) -> None:
        super().__init__()
        self.batches = list(batches(num_samples, batch_size))

    def predict_dataloader(self) -> DataLoader:
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        mine: Any = self.batches[rank::processes] or [[]]  # Lightning refuses a process without a batch
        return DataLoader(mine, batch_size=None, collate_fn=as_it_is)


class PartWriter(BasePredictionWriter):
    """Writes every batch to a file of its own, named by its first sample; memory stays flat.

    Args:
        folder: Where the parts go; the first process's word counts.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        self.folder.mkdir(parents=True, exist_ok=True)

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
        if prediction is None:
            return
        images, solution = prediction
        content = {"images": images, **vars(solution), "status": [status.name for status in solution.status]}
        path = self.folder / f"part-{batch[0]:08d}.pt"
        unfinished = path.with_suffix(".unfinished")
        try:
            torch.save(content, unfinished)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write '{unfinished}' ({one_line(error)}): is the disk full?") from error
        unfinished.replace(path)  # so that a file by this name is always whole


def read_parts(folder: Path, num_samples: int) -> tuple[Tensor, Solution]:
    """Join the parts that all processes wrote, in order of the sample index.

    Raises:
        UserError: If samples are missing.
    """
    images, solutions = [], []
    for path in sorted(folder.glob("part-*.pt")):
        content = torch.load(path, weights_only=True)
        images.append(content.pop("images"))
        content["status"] = [Status[name] for name in content["status"]]
        solutions.append(Solution(**content))
    found = sum(len(part) for part in images)
    if found != num_samples:
        raise UserError(f"only {found} of {num_samples} samples were written to '{folder}': run the command again.")
    return torch.cat(images), concatenate(solutions)
