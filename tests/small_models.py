"""Small causal models whose pixels depend strongly on one another, and a sampler that uses nothing of the package's."""

import copy

import torch
from torch import Tensor, nn

from lit_parallel.conditionals import Categorical
from lit_parallel.modules.conditional import ConditionalModule
from lit_parallel.modules.options import PixelCNNppOptions
from lit_parallel.modules.pixelcnnpp import PixelCNNppModule
from lit_parallel.networks.initialisation import initialise_from_data
from lit_parallel.sampling.noise import generator

MIXTURES = 2


def pixelcnnpp(
    shape: tuple[int, int, int] = (1, 4, 8), *, num_classes: int | None = None, filters: int = 6
) -> PixelCNNppModule:
    """An untrained PixelCNN++, initialised from noise; narrow distributions and large weights between pixels."""
    options = PixelCNNppOptions(filters=filters, resnets=1, mixtures=MIXTURES, num_classes=num_classes)
    model = PixelCNNppModule(options, shape)
    images = torch.randint(0, 256, (16, *shape), dtype=torch.uint8)
    labels = None if num_classes is None else torch.arange(16) % num_classes
    network = model.network
    initialise_from_data(network, model.conditional.encode(model.conditional.from_pixels(images)), labels)
    with torch.no_grad():
        for name, module in network.named_modules():
            if name.endswith("second") and shape[0] == 1:
                module.parametrizations.weight.original0.mul_(5)
            if name.endswith("label"):
                module.weight.mul_(10)
        log_scales = network.output.bias[MIXTURES:].unflatten(0, (shape[0], -1, MIXTURES))[:, 1]
        log_scales -= 2
    return model.eval()


class MaskedNetwork(nn.Module):
    """Two masked layers over one-hot levels: output t reads positions before t, and the label if there is one.

    ``[batch, length]`` integers to ``[batch, length, outputs]``.
    """

    def __init__(self, length: int, levels: int, outputs: int, num_classes: int | None = None, units: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(levels, units)
        self.hidden = nn.Parameter(torch.randn(length, units, length, units) / units**0.5)
        self.output = nn.Parameter(torch.randn(length, outputs, length, units) / units**0.5)
        self.label = nn.Embedding(num_classes, units) if num_classes else None
        earlier = torch.ones(length, length).tril()
        self.register_buffer("up_to", earlier[:, None, :, None])
        self.register_buffer("before", (earlier - torch.eye(length))[:, None, :, None])

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = torch.einsum("tusv,bsv->btu", self.hidden * self.up_to, self.embedding(x))
        if self.label is not None:
            assert labels is not None
            assert labels.shape == x.shape[:1]
            hidden = hidden + 2 * self.label(labels)[:, None]
        output = torch.einsum("tosu,bsu->bto", self.output * self.before, hidden.tanh())
        if self.label is not None:  # position 0 reads nothing before it
            output = output + self.label(labels)[:, None, : output.shape[2]]
        return output


def categorical(
    shape: tuple[int, int, int] = (1, 2, 2), levels: int = 3, *, num_classes: int | None = None
) -> ConditionalModule:
    """A masked network with a categorical distribution over a few levels."""
    length = shape[0] * shape[1] * shape[2]
    network = MaskedNetwork(length, levels, levels, num_classes)
    return ConditionalModule(network, Categorical(levels), shape, num_classes=num_classes).eval()


@torch.no_grad()
def pixel_by_pixel(
    model: ConditionalModule,
    indices: list[int],
    *,
    seed: int = 0,
    coupling: str = "gumbel",
    temperature: float = 1.0,
    label: int | None = None,
    given: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Levels ``[batch, channels, height, width]`` of a model with the layout ``image``, drawn in two plain loops.

    Every pixel: the whole network, then the conditional's ``sample`` for this pixel alone.

    Args:
        model: A model whose network reads pixels in [-1, 1].
        indices: Sample indices.
        seed: Seed of the noise.
        coupling: Coupling.
        temperature: Temperature.
        label: Class of all samples.
        given: Levels of given pixels ``[batch, channels, height, width]``.
        mask: Bool ``[batch, height, width]``, where they are given.
    """
    network = copy.deepcopy(model.network).eval()
    dtype = next(network.parameters()).dtype
    channels, height, width = model.image_shape
    drawn = [model.conditional.draw_noise(generator(seed, index), height * width, coupling) for index in indices]
    noise = torch.stack([torch.from_numpy(of_sample).to(dtype) for of_sample in drawn])
    x = torch.zeros(len(indices), channels, height, width, dtype=dtype)
    classes = model.num_classes
    labels = [] if classes is None else [torch.tensor([i % classes if label is None else label for i in indices])]
    for row in range(height):
        for column in range(width):
            parameters = network(x * (2 / 255) - 1, *labels)[:, :, row, column]
            noise_here = noise[:, row * width + column]
            drawn_here = model.conditional.sample(parameters, noise_here, coupling, temperature)
            if given is not None and mask is not None:
                drawn_here = torch.where(mask[:, row, column, None], given[:, :, row, column], drawn_here)
            x[:, :, row, column] = drawn_here
    return x
