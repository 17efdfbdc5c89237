"""The options of sampling, as they stand under ``sampling`` and ``inpaint`` in a config."""

from dataclasses import dataclass

from lit_parallel.options import option

COUPLINGS = ("gumbel", "inverse_cdf", "mixture_8bit", "paper")
PRECISIONS = ("full", "tf32", "bf16")
REGIONS = ("top", "bottom", "left", "right", "border")


@dataclass
class SamplingOptions:
    """What is sampled: how noise becomes pixels, temperature, class, arithmetic."""

    coupling: str | None = option(
        None, "how noise becomes pixels (null: the model's best, gumbel for 8-bit levels)", choices=COUPLINGS
    )
    temperature: float = option(1.0, "below 1: more likely, less varied images", above=0, maximum=5)
    label: int | None = option(
        None, "class-conditional models: the class to draw (null: all classes in turn)", minimum=0
    )
    precision: str = option(
        "full", "arithmetic of the network: full (as its weights), tf32 or bf16 (other functions)", choices=PRECISIONS
    )


@dataclass
class InpaintOptions:
    """Pixels that are given; the others are sampled around them."""

    images: str | None = option(
        None, "test (the data's test images), an .npy of uint8 [n, channels, height, width], or a picture (null: none)"
    )
    given: str = option(
        "top",
        "what is kept: the top, bottom, left or right half, the border, or a black-and-white picture (white: kept)",
    )
    folder: str | None = option(None, "folder with the official files, for images=test (null: as in training)")
