"""Makes the noise of a training step a function of the seed, the epoch and the step."""

from typing import Any

import pytorch_lightning as pl
import torch

from lit_parallel.seeds import seed_of


class SeededSteps(pl.Callback):
    """Seeds torch's generators, of the host and of the device, before every training batch.

    Dropout, dequantisation and augmentation then depend on nothing that was drawn before, so that training that goes on
    from a checkpoint takes the steps that it would have taken without the interruption.

    Args:
        seed: Not negative. Each process draws numbers of its own.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        torch.manual_seed(seed_of(self.seed, trainer.current_epoch, index, trainer.global_rank))
