"""Keeps the state that a training has reached, however it compares with earlier ones."""

import os
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` at the end of every epoch, and where training stops within one.

    Lightning's ``ModelCheckpoint(save_last=True)`` with a ``monitor`` writes it only after epochs that are better than
    all before them. A new file takes the old one's place when it is complete; Lightning's own way, by a temporary
    folder, can leave half of it where that folder lies on another disk.

    Args:
        folder: Where the file goes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "last.ckpt"
        self._max_steps = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write where the first process does, wherever a strategy lets every process write its part."""
        self.path = trainer.strategy.broadcast(self.path)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where steps are limited, Lightning takes any checkpoint for one within an epoch and ends that one again."""
        loop = trainer.fit_loop.epoch_loop
        self._max_steps = loop.max_steps
        if trainer.ckpt_path is not None:
            loop.max_steps = -1  # while the checkpoint is read

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self._max_steps

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; Lightning calls this for checkpoints after everything else that is done at the end of an epoch."""
        incomplete = self.path.with_name(f"{self.path.name}.incomplete")
        try:
            trainer.save_checkpoint(incomplete, weights_only=False)
            if trainer.is_global_zero:
                os.replace(incomplete, self.path)
        except OSError as error:
            incomplete.unlink(missing_ok=True)  # it may fill what is left of the disk
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        trainer.strategy.barrier()  # the file is there for every process
