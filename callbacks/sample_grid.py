"""Draws samples while a model trains, with the solver it will be sampled with."""

import dataclasses
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn

from lit_parallel.plots import save_image_grid
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.sampling.sampler import sample
from lit_parallel.solvers import SolverOptions
from lit_parallel.tracking import log_images


class SampleGrid(pl.Callback):
    """Samples a grid of images every few epochs, after validation, and logs it with the iterations it took.

    With a weight average, put this callback before it in the list: the average's weights are then still in place.
    Without validation a grid shows the weights in training, because an average is in place for validation only.

    Args:
        solver: Solver of the samples.
        every_n_epochs: Epochs between two grids.
        num_samples: Images in a grid; the same noise every time, so that grids are comparable.
        seed: Seed of the noise.
        folder: Where the pictures go too, as ``epoch-0005.png``; without one they are only logged.
        options: Coupling, temperature, class.
    """

    def __init__(
        self,
        solver: SolverOptions | None = None,
        *,
        every_n_epochs: int = 5,
        num_samples: int = 16,
        seed: int = 0,
        folder: Path | None = None,
        options: SamplingOptions | None = None,
    ) -> None:
        self.solver = solver or SolverOptions()
        self.every_n_epochs = every_n_epochs
        self.num_samples = num_samples
        self.seed = seed
        self.folder = folder
        self.options = options

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.enable_validation or trainer.val_dataloaders == []:
            self._draw(trainer, pl_module)

    @torch.no_grad()
    def _draw(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        images, solution = sample(pl_module, self.num_samples, solver=self.solver, seed=self.seed, options=self.options)
        self.solver = dataclasses.replace(self.solver, remeasure=False)  # auto measures for the first grid only
        if not solution.all_solved:
            rank_zero_warn(f"sample grid of epoch {trainer.current_epoch}: {solution.summary()['status']}")
        numbers = solution.summary()
        for logger in trainer.loggers:
            names = ("iterations_mean", "iterations_max", "iteration_speedup")
            logger.log_metrics({f"sample_grid/{name}": numbers[name] for name in names}, step=trainer.global_step)
            log_images(logger, "sample_grid/images", images, caption=f"epoch {trainer.current_epoch}")
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_image_grid(images, self.folder / f"epoch-{trainer.current_epoch:04d}.png")
