"""What every autoregressive model of images shares: training on the negative log-likelihood, and sampling hooks."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lit_parallel.errors import UserError
from lit_parallel.metrics import BitsPerDimension
from lit_parallel.modules.options import OptimizerOptions
from lit_parallel.sampling.autoregressive import Given
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.systems import TriangularSystem


class AutoregressiveModule(pl.LightningModule):
    """Base of the models that can be trained here and sampled by any solver.

    Args:
        image_shape: Channels, height, width.
        optimizer: Optimiser and schedule.
        config: The resolved config as plain containers; stored in checkpoints, so that these suffice for sampling.

    Attributes:
        network: What is trained.
        compile_network: Compile the network for training with ``torch.compile``; evaluation and sampling stay plain.
        incremental: Whether there is an evaluation from caches, and with it cached sequential sampling.
        num_classes: Number of labels that condition the model, or ``None``.
    """

    network: torch.nn.Module
    compile_network: bool = False
    incremental: bool = False
    num_classes: int | None = None

    def __init__(
        self, image_shape: tuple[int, int, int], optimizer: OptimizerOptions, config: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self.length = math.prod(image_shape)
        self.optimizer_options = optimizer
        # Plain containers only: torch.load(weights_only=True) refuses anything else.
        self.hparams.update({"config": config, "image_shape": list(image_shape)})
        self.validation_bits = BitsPerDimension()
        self.test_bits = BitsPerDimension()
        self._compiled: Any = None

    # -- what a model must say ----------------------------------------------------------------------------------

    @abstractmethod
    def log_likelihood(self, images: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log-likelihood of 8-bit images ``[batch, channels, height, width]`` in nats, ``[batch]``.

        Args:
            images: The images.
            noise: Uniform noise in [0, 1), same shape, for models of dequantised pixels.
            labels: ``[batch]`` classes, for a class-conditional model.
        """

    @abstractmethod
    def sampling_system(
        self, batch_size: int, *, incremental: bool, options: SamplingOptions | None = None, given: Given | None = None
    ) -> TriangularSystem:
        """Sampling as a triangular system with buffers for the noise of a batch.

        Args:
            batch_size: Samples per batch, fixed: the last batch is padded.
            incremental: Evaluate from caches, if the model can; otherwise every evaluation is a full forward pass.
            options: Coupling, temperature, class, arithmetic.
            given: Pixels that are known.

        Raises:
            UserError: If the model cannot do what the options ask for.
        """

    @abstractmethod
    def load_noise(self, system: TriangularSystem, seed: int, indices: list[int]) -> None:
        """Fill the system's noise for the samples with these indices; each sample's depends on nothing else."""

    @abstractmethod
    def images(self, system: TriangularSystem, value: Tensor) -> Tensor:
        """A solution ``[batch, length, ...]`` as 8-bit images ``[batch, channels, height, width]``."""

    @abstractmethod
    def pixel_map(self, system: TriangularSystem, numbers: Tensor) -> Tensor:
        """A number per equation ``[batch, length]`` as one per pixel ``[batch, height, width]``: the largest of it."""

    # -- training -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self.check_data(getattr(self.trainer, "datamodule", None))

    def check_data(self, data: Any) -> None:
        """Raise a `UserError` if a data module has labels that the model does not know."""
        known = getattr(data, "num_classes", 0)
        if self.num_classes is not None and known > self.num_classes:
            raise UserError(f"the data have {known} classes: set model.num_classes={known}, not {self.num_classes}.")

    def on_fit_start(self) -> None:
        if self.compile_network:
            # Of the method, not the module: the state dict stays as it is.
            self._compiled = torch.compile(self.network.forward)

    @property
    def network_in_use(self) -> Any:
        """The network, or for training its compiled form, if one was asked for."""
        return self._compiled if self.training and self._compiled is not None else self.network

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        images = batch[0]
        noise = torch.rand(images.shape, device=images.device)
        loss = -self.log_likelihood(images, noise, self._labels(batch)).mean() / self.length
        self.log("train/loss", loss)
        self.log("train/bits_per_dim", loss.detach() / math.log(2), prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self._evaluate(batch, batch_index, self.validation_bits, "val/bits_per_dim")

    def test_step(self, batch: Any, batch_index: int) -> None:
        self._evaluate(batch, batch_index, self.test_bits, "test/bits_per_dim")

    def _evaluate(self, batch: Any, batch_index: int, metric: BitsPerDimension, name: str) -> None:
        images = batch[0]
        # The same dequantisation in every epoch, so that curves and checkpoints are comparable.
        generator = torch.Generator().manual_seed(batch_index)
        noise = torch.rand(images.shape, generator=generator).to(images.device)
        metric.update(self.log_likelihood(images, noise, self._labels(batch)), self.length)
        self.log(name, metric, prog_bar=True)

    def _labels(self, batch: Any) -> Tensor | None:
        return batch[1] if self.num_classes is not None else None

    def configure_optimizers(self) -> Any:
        options = self.optimizer_options
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
