"""Any causal network with a conditional distribution per position: trained and sampled like the models that ship."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_parallel.conditionals import Conditional
from lit_parallel.errors import UserError
from lit_parallel.modules.autoregressive import AutoregressiveModule
from lit_parallel.modules.options import OptimizerOptions
from lit_parallel.sampling.autoregressive import AutoregressiveSystem, Given, check_shape, folded
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.sampling.positions import Positions
from lit_parallel.systems import TriangularSystem


class ConditionalModule(AutoregressiveModule):
    """An autoregressive model of images from a network and a conditional distribution: bring your own.

    The network's output at position t must depend on the values before position t only (positions run through the
    rows from the top, and in a row from the left); :func:`lit_parallel.check_causality` tells whether it does. It reads
    what ``conditional.encode`` gives, ``[batch, length, ...]``, and returns ``[batch, length, num_parameters]``; with
    the layout ``image`` it reads ``[batch, channels, height, width]`` and returns ``[batch, num_parameters, height,
    width]``.

    Args:
        network: The network, trained or not.
        conditional: :class:`~lit_parallel.conditionals.Categorical`, ``DiscretizedLogisticMixture``, ``Logistic``, or
            your own.
        image_shape: Channels, height, width.
        optimizer: Optimiser and schedule, for training.
        config: Kept in checkpoints, as plain containers.
        layout: ``sequence`` or ``image``.
        num_classes: If given, the network is called with labels ``[batch]`` as its second argument.

    Example:
        >>> model = ConditionalModule(MyTransformer(), Categorical(256), (1, 28, 28))
        >>> images, solution = lit_parallel.sample(model, 16, solver="jacobi")
    """

    def __init__(
        self,
        network: nn.Module,
        conditional: Conditional,
        image_shape: tuple[int, int, int],
        optimizer: OptimizerOptions | None = None,
        config: dict[str, Any] | None = None,
        *,
        layout: str = "sequence",
        num_classes: int | None = None,
    ) -> None:
        super().__init__(image_shape, optimizer or OptimizerOptions(), config)
        self.network = network
        self.conditional = conditional
        self.positions = Positions(image_shape, conditional.channels, layout)
        self.num_classes = num_classes

    def log_likelihood(self, images: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if images.is_floating_point() or tuple(images.shape[1:]) != self.image_shape:
            # Images scaled to 0 .. 1 would all be black, and train without complaint.
            raise UserError(
                "The loader must yield tuples that start with 8-bit images (0 to 255), uint8 of shape "
                f"[batch, {', '.join(map(str, self.image_shape))}], not {str(images.dtype).removeprefix('torch.')} of "
                f"shape {list(images.shape)}."
            )
        # Half precision cannot tell 256 levels apart: only the network may compute in it.
        noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
        x = self.positions.from_images(self.conditional.from_pixels(images, noise))
        encoded = self.conditional.encode(x)
        encoded = encoded.to(self.dtype) if encoded.is_floating_point() else encoded
        if self.num_classes is not None and labels is None:
            raise UserError("a class-conditional model needs labels: the loader must yield (images, labels).")
        parameters = self.positions.parameters(self.network_in_use, encoded, labels)
        check_shape(self.network, parameters, [*x.shape[:2], self.conditional.num_parameters])
        return self.conditional.log_prob(parameters.to(x.dtype), x).sum(dim=1)

    def sampling_system(
        self, batch_size: int, *, incremental: bool, options: SamplingOptions | None = None, given: Given | None = None
    ) -> TriangularSystem:
        return AutoregressiveSystem(
            folded(self.network),
            self.conditional,
            self.positions,
            batch_size,
            options or SamplingOptions(),
            num_classes=self.num_classes,
            given=given,
        )

    def load_noise(self, system: TriangularSystem, seed: int, indices: list[int]) -> None:
        _reference(system).load(seed, indices)

    def images(self, system: TriangularSystem, value: Tensor) -> Tensor:
        return _reference(system).images(value)

    def pixel_map(self, system: TriangularSystem, numbers: Tensor) -> Tensor:
        return self.positions.to_map(numbers)


def _reference(system: TriangularSystem) -> AutoregressiveSystem:
    """The system that holds noise, labels and given pixels, also where another evaluation stands before it."""
    reference = system.reference()
    assert isinstance(reference, AutoregressiveSystem)
    return reference
