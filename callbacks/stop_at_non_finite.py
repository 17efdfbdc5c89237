"""Ends a training whose numbers are no longer finite, and says where."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from lit_parallel.errors import UserError

_READ_EVERY = 50  # batches, where reading costs: a GPU would be waited for, processes have to meet
_OF_LOSS, _OF_GRADIENT = 0, 1


class StopAtNonFinite(pl.Callback):
    """Stops training when a loss or a gradient is not finite; no checkpoint and no validation comes after that batch.

    The device notes the first batch with such a number; the host reads the note after every batch where that is free
    (one process, on the CPU), otherwise every 50 batches and before every validation and end of an epoch. In half
    precision with a gradient scaler, which skips such gradients, the loss alone counts.

    Args:
        checkpoint: Where the last good state is, for the message.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.checkpoint = checkpoint
        self._first: Tensor | None = None  # [2]: which of the batches in _batches was the first one, of each kind
        self._batches: list[tuple[int, int]] = []  # index and step of those that were not read yet

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forget(pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self._batches.append((index, trainer.global_step))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._note(_OF_LOSS, loss.detach())

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients and getattr(trainer.precision_plugin, "scaler", None) is None:
            self._note(_OF_GRADIENT, get_total_norm(gradients, norm_type=float("inf")))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.reading_is_free(trainer, pl_module) or len(self._batches) >= _READ_EVERY:
            self._read(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and self._first is not None:
            self._read(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read(trainer, pl_module)  # Lightning calls those callbacks later that write checkpoints

    def reading_is_free(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether nobody waits for the numbers of a batch."""
        return pl_module.device.type == "cpu" and trainer.world_size == 1

    def _note(self, kind: int, value: Tensor) -> None:
        assert self._first is not None
        bad = ~value.isfinite().all() & (self._first[kind] < 0)
        self._first[kind] = torch.where(bad, len(self._batches) - 1, self._first[kind])

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._first is not None
        found = {kind: place for kind, place in enumerate(self._first.tolist()) if place >= 0}
        if trainer.strategy.reduce_boolean_decision(bool(found), all=False):
            raise UserError(f"training diverged: {self._where(found, trainer.current_epoch)} {self._what_is_left()}")
        self._forget(pl_module)

    def _forget(self, pl_module: pl.LightningModule) -> None:
        self._first, self._batches = torch.full((2,), -1, device=pl_module.device), []

    def _where(self, found: dict[int, int], epoch: int) -> str:
        if not found:
            return f"in epoch {epoch} the loss of another process is not finite."
        kind = min(found, key=lambda kind: (found[kind], kind))
        batch, step = self._batches[found[kind]]
        name = "loss" if kind == _OF_LOSS else "gradient"
        return f"the {name} of epoch {epoch}, batch {batch} (step {step}) is not finite."

    def _what_is_left(self) -> str:
        again = "Train again with a smaller optimizer.lr, or set trainer.gradient_clip_val=1."
        if self.checkpoint is None or not self.checkpoint.is_file():
            return again
        return f"'{self.checkpoint}' holds the epochs before. {again}"
