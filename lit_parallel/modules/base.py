"""What every model that train.py trains shares: optimiser, schedule, compilation, and what a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from lit_parallel.errors import UserError
from lit_parallel.modules.options import OptimizerOptions


class TrainableModule(pl.LightningModule):
    """Base of the models that can be trained here.

    Args:
        sample_shape: Shape of one sample of the data.
        optimizer: Optimiser and schedule.
        config: The resolved config as plain containers; stored in checkpoints, so that these suffice to make the model.

    Attributes:
        network: What is trained.
        compile_network: Compile the network for training with ``torch.compile``; evaluation and sampling stay plain.
        metrics: What is logged of training, validation and test, as ``val/<name>``: the smaller the first one, the
            better the model.
        num_classes: Number of labels that the model knows, or ``None``.
        initial_weights: Weights that training starts from, or that are tested where no checkpoint is named: a file or
            the name of published ones; ``None``: fresh ones.
    """

    network: torch.nn.Module
    compile_network: bool = False
    metrics: tuple[str, ...] = ("loss",)
    num_classes: int | None = None
    initial_weights: str | None = None

    def __init__(
        self, sample_shape: Sequence[int], optimizer: OptimizerOptions, config: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        defaults = OptimizerOptions()
        if optimizer.name == "sgd" and (optimizer.beta1, optimizer.beta2) != (defaults.beta1, defaults.beta2):
            raise UserError("optimizer.beta1 and beta2 belong to adamw: leave them out, or set optimizer.name=adamw.")
        if optimizer.name != "sgd" and (optimizer.momentum, optimizer.nesterov) != (0, False):
            raise UserError("optimizer.momentum and nesterov belong to sgd: leave them out, or set optimizer.name=sgd.")
        if optimizer.nesterov and not optimizer.momentum:
            raise UserError("optimizer.nesterov needs a momentum: set optimizer.momentum=0.9, or leave nesterov out.")
        self.optimizer_options = optimizer
        # Plain containers only: torch.load(weights_only=True) refuses anything else.
        self.hparams.update({"config": config, "sample_shape": list(sample_shape)})
        self._compiled: Any = None

    @property
    def monitor(self) -> str:
        """The metric that says which checkpoint is best: the smallest."""
        return f"val/{self.metrics[0]}"

    def setup(self, stage: str) -> None:
        self.check_data(getattr(self.trainer, "datamodule", None))

    def check_data(self, data: Any) -> None:
        """Raise a `UserError` if a data module has labels that the model does not know."""
        known = getattr(data, "num_classes", 0)
        if self.num_classes is not None and known > self.num_classes:
            raise UserError(f"the data have {known} classes: set model.num_classes={known}, not {self.num_classes}.")

    def load_initial_weights(self) -> None:
        """Load :attr:`initial_weights`, if there are any; a checkpoint never needs it, since it holds its weights.

        Raises:
            UserError: If they cannot be had, or do not fit.
        """

    def on_fit_start(self) -> None:
        if self.compile_network:
            # Of the method, not the module: the state dict stays as it is.
            self._compiled = torch.compile(self.network.forward)

    @property
    def network_in_use(self) -> Any:
        """The network, or for training its compiled form, if one was asked for."""
        return self._compiled if self.training and self._compiled is not None else self.network

    def configure_optimizers(self) -> Any:
        options = self.optimizer_options
        optimizer: torch.optim.Optimizer
        if options.name == "sgd":
            optimizer = torch.optim.SGD(
                self.parameters(),
                lr=options.lr,
                momentum=options.momentum,
                nesterov=options.nesterov,
                weight_decay=options.weight_decay,
            )
        else:
            optimizer = torch.optim.AdamW(
                self.parameters(),
                lr=options.lr,
                betas=(options.beta1, options.beta2),
                weight_decay=options.weight_decay,
            )
        steps = float(self.trainer.estimated_stepping_batches)
        # Without an end there is no schedule to fit in: a short warm-up, then the highest rate.
        total = max(int(steps), 1) if math.isfinite(steps) else None
        warmup = max(int(options.warmup_fraction * (total or 5000)), 1)
        final = options.final_lr_fraction

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if total is None:
                return 1.0
            progress = min((step - warmup) / max(total - warmup, 1), 1.0)
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
