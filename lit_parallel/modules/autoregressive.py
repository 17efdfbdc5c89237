"""What every autoregressive model of images shares: training on the negative log-likelihood, and sampling hooks."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lit_parallel.metrics import BitsPerDimension
from lit_parallel.modules.base import TrainableModule
from lit_parallel.modules.options import OptimizerOptions
from lit_parallel.sampling.autoregressive import Given
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.systems import TriangularSystem


class AutoregressiveModule(TrainableModule):
    """Base of the models that can be trained here and sampled by any solver.

    Args:
        image_shape: Channels, height, width.
        optimizer: Optimiser and schedule.
        config: The resolved config as plain containers; stored in checkpoints, so that these suffice for sampling.

    Attributes:
        incremental: Whether there is an evaluation from caches, and with it cached sequential sampling.
        num_classes: Number of labels that condition the model, or ``None``.
    """

    metrics = ("bits_per_dim",)
    incremental: bool = False

    def __init__(
        self, image_shape: tuple[int, int, int], optimizer: OptimizerOptions, config: dict[str, Any] | None = None
    ) -> None:
        super().__init__(image_shape, optimizer, config)
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self.length = math.prod(image_shape)
        self.validation_bits = BitsPerDimension()
        self.test_bits = BitsPerDimension()

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

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        images = batch[0]
        noise = torch.rand(images.shape, device=images.device)
        loss = -self.log_likelihood(images, noise, self._labels(batch)).mean() / self.length
        self.log("train/loss", loss.detach(), sync_dist=True)
        self.log("train/bits_per_dim", loss.detach() / math.log(2), prog_bar=True, sync_dist=True)
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
