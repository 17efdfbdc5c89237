"""MADE as a LightningModule: training, likelihood, and how to sample it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_parallel.conditionals import Logistic
from lit_parallel.errors import UserError
from lit_parallel.modules.autoregressive import AutoregressiveModule
from lit_parallel.modules.options import MadeOptions, OptimizerOptions
from lit_parallel.networks import MADE
from lit_parallel.sampling.autoregressive import Given
from lit_parallel.sampling.made import FoldedMADE, IncrementalMadeSystem, MadeSystem
from lit_parallel.sampling.made_fused import FusedMadeSystem
from lit_parallel.sampling.noise import logistic_noise
from lit_parallel.sampling.options import SamplingOptions
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

    network: MADE
    incremental = True

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
        self.conditional = Logistic(squeeze)
        self.transform = self.conditional.transform
        self.network = MADE(
            self.length,
            options.hidden_sizes,
            order=options.order,
            degrees=options.degrees,
            num_masks=options.num_masks,
            seed=options.mask_seed,
        )

    def log_likelihood(self, images: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log-density of dequantised pixels, a lower bound on the log-probability of the 8-bit image."""
        z = self.conditional.from_pixels(images, noise).flatten(1)
        parameters = torch.stack(self.network_in_use(z), dim=-1)
        return self.conditional.log_prob(parameters, z[..., None]).sum(dim=1)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        if self.network.num_masks > 1:
            self.network.use_mask(self.global_step)
        return super().training_step(batch, batch_index)

    def on_validation_epoch_start(self) -> None:
        self.network.use_mask(0)

    def on_test_epoch_start(self) -> None:
        self.network.use_mask(0)

    def sampling_system(
        self, batch_size: int, *, incremental: bool, options: SamplingOptions | None = None, given: Given | None = None
    ) -> TriangularSystem:
        options = options or SamplingOptions()
        self.conditional.check_coupling(options.coupling)
        for asked, what in (
            (given is not None, "inpainting"),
            (options.label is not None, "classes"),
            (options.precision != "full", f"sampling.precision={options.precision}"),
        ):
            if asked:
                raise UserError(f"a MADE does not support {what}: leave it out, or use a PixelCNN++.")
        self.network.use_mask(0)
        folded = FoldedMADE.from_module(self.network)
        noise = torch.zeros(batch_size, self.length, dtype=folded.output_bias.dtype, device=self.device)
        kind: type[MadeSystem] | type[IncrementalMadeSystem] = MadeSystem
        if incremental:
            kind = FusedMadeSystem if FusedMadeSystem.covers(folded, noise) else IncrementalMadeSystem
        system = kind(folded, noise, self.transform.bound)
        system.temperature = options.temperature
        return system

    def load_noise(self, system: TriangularSystem, seed: int, indices: list[int]) -> None:
        assert isinstance(system, (MadeSystem, IncrementalMadeSystem))
        system.noise.copy_(logistic_noise(seed, indices, self.length) * system.temperature)

    def images(self, system: TriangularSystem, value: Tensor) -> Tensor:
        return self._in_pixel_order(system, self.conditional.to_pixels(value))

    def pixel_map(self, system: TriangularSystem, numbers: Tensor) -> Tensor:
        return self._in_pixel_order(system, numbers).amax(dim=1)

    def _in_pixel_order(self, system: TriangularSystem, x: Tensor) -> Tensor:
        assert isinstance(system, (MadeSystem, IncrementalMadeSystem))
        pixels = torch.empty_like(x)
        pixels[:, system.network.pixel] = x
        return pixels.unflatten(1, self.image_shape)
