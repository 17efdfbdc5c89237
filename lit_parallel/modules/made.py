"""MADE as a LightningModule: training, likelihood, and how to sample it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_parallel.distributions import LEVELS, LogitTransform, logistic_log_density
from lit_parallel.modules.autoregressive import AutoregressiveModule
from lit_parallel.modules.options import MadeOptions, OptimizerOptions
from lit_parallel.networks import MADE
from lit_parallel.sampling.made import FoldedMADE, IncrementalMadeSystem, MadeSystem
from lit_parallel.sampling.made_fused import FusedMadeSystem
from lit_parallel.sampling.noise import logistic_noise
from lit_parallel.systems import TriangularSystem


class MadeModule(AutoregressiveModule):
    """MADE with a logistic distribution over logit-transformed, uniformly dequantised pixels.

    The setting of Song et al. (2021), section 4.3 and appendix B.3.

    Args:
        options: Architecture.
        image_shape: Channels, height, width.
        optimizer: Optimiser and schedule.
        config: The resolved config as plain containers, kept in the checkpoint.
    """

    def __init__(
        self,
        options: MadeOptions,
        image_shape: tuple[int, int, int],
        optimizer: OptimizerOptions | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(image_shape, optimizer or OptimizerOptions(), config)
        self.options = options
        squeeze = options.logit_lambda
        if squeeze is None:
            squeeze = 1e-6 if image_shape[0] == 1 else 0.05
        self.transform = LogitTransform(squeeze)
        self.network = MADE(
            self.length,
            options.hidden_sizes,
            order=options.order,
            degrees=options.degrees,
            num_masks=options.num_masks,
            seed=options.mask_seed,
        )

    def log_likelihood(self, images: Tensor, noise: Tensor) -> Tensor:
        """Log-density of dequantised pixels, a lower bound on the log-probability of the 8-bit image.

        Args:
            images: ``[batch, channels, height, width]`` 8-bit pixels.
            noise: Uniform noise in [0, 1), same shape.

        Returns:
            ``[batch]`` in nats.
        """
        pixels = (images.to(noise.dtype) + noise).flatten(1)
        # In float32, 255 + u may round up to 256; the density is that of the half-open interval.
        z = self.transform.forward(pixels.clamp(max=LEVELS * (1 - 1e-7)))
        mean, log_scale = self.network(z)
        return (logistic_log_density(z, mean, log_scale) + self.transform.log_derivative(z)).sum(dim=1)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        if self.network.num_masks > 1:
            self.network.use_mask(self.global_step)
        return super().training_step(batch, batch_index)

    def on_validation_epoch_start(self) -> None:
        self.network.use_mask(0)

    def on_test_epoch_start(self) -> None:
        self.network.use_mask(0)

    def sampling_system(self, batch_size: int, *, incremental: bool) -> TriangularSystem:
        self.network.use_mask(0)
        folded = FoldedMADE.from_module(self.network)
        noise = torch.zeros(batch_size, self.length, dtype=folded.output_bias.dtype, device=self.device)
        kind: type[MadeSystem] | type[IncrementalMadeSystem] = MadeSystem
        if incremental:
            kind = FusedMadeSystem if FusedMadeSystem.covers(folded, noise) else IncrementalMadeSystem
        return kind(folded, noise, self.transform.bound)

    def load_noise(self, system: TriangularSystem, seed: int, indices: list[int]) -> None:
        assert isinstance(system, (MadeSystem, IncrementalMadeSystem))
        system.noise.copy_(logistic_noise(seed, indices, self.length))

    def images(self, system: TriangularSystem, value: Tensor) -> Tensor:
        assert isinstance(system, (MadeSystem, IncrementalMadeSystem))
        pixels = torch.empty(value.shape, dtype=torch.uint8, device=value.device)
        pixels[:, system.network.pixel] = self.transform.inverse(value)
        return pixels.unflatten(1, self.image_shape)
