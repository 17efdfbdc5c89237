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

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; Lightning calls this for checkpoints after everything else that is done at the end of an epoch."""
        incomplete = self.path.with_name(f"{self.path.name}.incomplete")
        trainer.save_checkpoint(incomplete, weights_only=False)
        if trainer.is_global_zero:
            os.replace(incomplete, self.path)
        trainer.strategy.barrier()  # the file is there for every process
