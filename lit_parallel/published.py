"""Make a checkpoint of published PixelCNN++ weights: ``python -m lit_parallel.published WEIGHTS --output PATH``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lit_parallel.errors import UserError

_DATA = {1: ("mnist", 28), 3: ("cifar10", 32)}
"""What the port trains on and the size of its images, by channels."""


def convert(weights: str | Path, output: str | Path, image_size: int | None = None) -> Any:
    """Read the port's weights and write a checkpoint that :func:`lit_parallel.load` opens.

    Args:
        weights: The port's file. It is read with ``weights_only=True``: nothing in it is executed.
        output: The checkpoint, which must not exist yet.
        image_size: Height and width of the images, a multiple of 4 (default: 28 for grey images, 32 for colour); the
            weights do not tell.

    Returns:
        The model that the checkpoint holds, a :class:`lit_parallel.modules.pixelcnnpp.PixelCNNppModule`.

    Raises:
        UserError: If the file is missing or damaged, does not hold such weights, or the output exists.
    """
    import torch

    from lit_parallel.checkpoint import as_checkpoint, build_model
    from lit_parallel.conditionals import DiscretizedLogisticMixture
    from lit_parallel.config import TrainConfig, from_container
    from lit_parallel.networks.pixelcnnpp import STRIDE
    from lit_parallel.networks.published import from_published
    from lit_parallel.weights_file import read

    weights, output = Path(weights), Path(output)
    if image_size is not None and (image_size < 1 or image_size % STRIDE):
        raise UserError(f"--image-size must be a positive multiple of {STRIDE}, not {image_size}.")
    if output.exists():
        raise UserError(f"'{output}' exists already: name another --output.")
    try:
        network = from_published(read(weights))
    except UserError as error:
        raise UserError(f"Cannot convert '{weights}'. {error}") from error
    per_component = DiscretizedLogisticMixture(network.channels, 1).num_parameters
    mixtures, rest = divmod(network.outputs, per_component)
    if rest:
        raise UserError(
            f"Cannot convert '{weights}': {network.outputs} outputs per pixel are no mixture of discretised logistics, "
            f"which has {per_component} for each component."
        )
    data, usual_size = _DATA[network.channels]
    size = image_size or usual_size
    container = {
        "experiment": "pixelcnnpp_published",
        "model": {
            "name": "pixelcnnpp",
            "filters": network.filters,
            "resnets": network.resnets,
            "mixtures": mixtures,
            "dropout": network.dropout,
        },
        "data": {"name": data},
    }
    model: Any = build_model(from_container(TrainConfig, container), (network.channels, size, size))
    model.network.load_state_dict(network.state_dict())
    model.initialised.fill_(True)  # training would otherwise begin by initialising the weights
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("xb") as file:
        torch.save(as_checkpoint(model), file)
    return model.eval()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = _Parser(
        prog="python -m lit_parallel.published",
        description="Make a checkpoint for sample.py from the weights of a PixelCNN++ that the common PyTorch port "
        "(github.com/pclucas14/pixel-cnn-pp) trained.",
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="the port's file, a state dict (.pth)")
    parser.add_argument("--output", metavar="PATH", required=True, help="the checkpoint to write (.ckpt)")
    parser.add_argument(
        "--image-size", metavar="N", type=int, help="height and width of the images (default: 28 if grey, 32 if colour)"
    )
    arguments = parser.parse_args(argv)
    model = convert(arguments.weights, arguments.output, arguments.image_size)
    options, shape = model.options, "x".join(map(str, model.image_shape))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"PixelCNN++ for {shape} images: {options.filters} filters, {options.resnets} resnets, a mixture of "
        f"{options.mixtures}; {size:,} parameters"
    )
    print(f"checkpoint: {arguments.output}")
    print(f"sample it:  python sample.py --checkpoint {arguments.output}")


if __name__ == "__main__":
    from lit_parallel.cli import run_command

    sys.exit(run_command(main))
