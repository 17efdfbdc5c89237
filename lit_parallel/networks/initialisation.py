"""Data-dependent initialisation of weight-normalised layers.

Salimans and Kingma, "Weight Normalization", NeurIPS 2016, section 3, https://arxiv.org/abs/1602.07868: one pass over a
batch of data sets scale and bias of every layer so that its outputs have mean 0 and variance 1. Without it PixelCNN++
diverges when it is wide and deep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

_SMALLEST_DEVIATION = 1e-3  # features that hardly vary in the batch are not blown up


@torch.no_grad()
def initialise_from_data(network: nn.Module, *inputs: Any) -> None:
    """Set scale and bias of every weight-normalised convolution, layer after layer, in one forward pass.

    A layer's outputs get mean 0 and a standard deviation of its attribute ``initial_scale`` (default 1), per channel
    over batch and positions. Dropout is off meanwhile.

    Args:
        network: A network with layers under ``torch.nn.utils.parametrizations.weight_norm``.
        inputs: What its ``forward`` takes: a batch of data.
    """
    handles = [
        module.register_forward_hook(_standardise)
        for module in network.modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and is_parametrized(module, "weight")
    ]
    was_training = network.training
    try:
        network.eval()(*inputs)
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()


def _standardise(layer: Any, _: Any, output: Tensor) -> Tensor:
    """Rescale a layer so that this very output becomes standard, and return the new output to the layers behind."""
    dims = [0, *range(2, output.dim())]
    mean = output.mean(dim=dims)
    deviation = output.std(dim=dims, correction=0).clamp(min=_SMALLEST_DEVIATION)
    scale = getattr(layer, "initial_scale", 1.0) / deviation
    magnitude = layer.parametrizations.weight.original0
    channel = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    like_magnitude = [-1 if dim == channel else 1 for dim in range(magnitude.dim())]
    magnitude.mul_(scale.reshape(like_magnitude))
    layer.bias.sub_(mean).mul_(scale)
    shape = [1, -1, *[1] * (output.dim() - 2)]
    return (output - mean.reshape(shape)) * scale.reshape(shape)
