"""PixelCNN++ as a LightningModule."""

from __future__ import annotations

from typing import Any

import torch

from lit_parallel.conditionals import DiscretizedLogisticMixture
from lit_parallel.errors import UserError
from lit_parallel.kernels import triton_runs_on
from lit_parallel.modules.conditional import ConditionalModule
from lit_parallel.modules.options import OptimizerOptions, PixelCNNppOptions
from lit_parallel.networks import PixelCNNpp
from lit_parallel.networks.initialisation import initialise_from_data
from lit_parallel.networks.pixelcnnpp import STRIDE
from lit_parallel.sampling.autoregressive import AutoregressiveSystem, Given
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.sampling.pixelcnnpp import IncrementalPixelCNNppSystem
from lit_parallel.systems import TriangularSystem


class PixelCNNppModule(ConditionalModule):
    """PixelCNN++ with its mixture of discretised logistics (Salimans et al., 2017; Song et al., 2021, section 4.4).

    Args:
        options: Architecture.
        image_shape: Channels (1 or 3), height, width (multiples of 4).
        optimizer: Optimiser and schedule.
        config: The resolved config as plain containers, kept in the checkpoint.
    """

    network: PixelCNNpp
    initialised: torch.Tensor

    def __init__(
        self,
        options: PixelCNNppOptions,
        image_shape: tuple[int, int, int],
        optimizer: OptimizerOptions | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        channels, height, width = image_shape
        if channels not in (1, 3) or height % STRIDE or width % STRIDE:
            raise UserError(
                f"PixelCNN++ needs images of 1 or 3 channels whose height and width are multiples of {STRIDE}, not "
                f"{channels}x{height}x{width}."
            )
        conditional = DiscretizedLogisticMixture(channels, options.mixtures)
        network = PixelCNNpp(
            channels,
            conditional.num_parameters,
            filters=options.filters,
            resnets=options.resnets,
            dropout=options.dropout,
            num_classes=options.num_classes,
        )
        super().__init__(
            network, conditional, image_shape, optimizer, config, layout="image", num_classes=options.num_classes
        )
        self.options = options
        # Part of the state, so that weights which were trained or converted are left alone.
        self.register_buffer("initialised", torch.tensor(False))

    @property
    def incremental(self) -> bool:  # type: ignore[override]
        """Not with another network in this one's place."""
        return type(self.network) is PixelCNNpp

    def sampling_system(
        self, batch_size: int, *, incremental: bool, options: SamplingOptions | None = None, given: Given | None = None
    ) -> TriangularSystem:
        plain = super().sampling_system(batch_size, incremental=False, options=options, given=given)
        assert isinstance(plain, AutoregressiveSystem)
        if not (incremental and self.incremental):
            return plain
        if triton_runs_on(self.device):
            from lit_parallel.sampling.pixelcnnpp_fused import FusedPixelCNNppSystem

            if FusedPixelCNNppSystem.covered(plain):
                return FusedPixelCNNppSystem(plain)
        # On a GPU full passes are faster than layer after layer, each with what it remembers.
        return IncrementalPixelCNNppSystem(plain) if self.device.type == "cpu" else plain

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.initialised:  # a checkpoint to go on from has been read by now
            self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise from the first training images; every process gets the first one's result."""
        data: Any = getattr(self.trainer, "datamodule", None)
        loader = data.train_dataloader() if data is not None else self.trainer.fit_loop._data_source.dataloader()
        count, batches = 0, []
        for batch in loader:
            batches.append(batch)
            count += len(batch[0])
            if count >= self.options.initial_images:
                break
        columns = [torch.cat(parts)[: self.options.initial_images] for parts in zip(*batches, strict=True)]
        images = self.conditional.from_pixels(columns[0].to(self.device))
        labels = columns[1].to(self.device) if self.num_classes is not None else None
        initialise_from_data(self.network, self.conditional.encode(images).to(self.dtype), labels)
        for parameter in self.network.parameters():
            parameter.copy_(self.trainer.strategy.broadcast(parameter.detach().cpu()))
        self.initialised.fill_(True)
