"""The options of the data, as they stand under ``data`` in a config."""

from dataclasses import dataclass

from lit_parallel.options import option

DATASET_NAMES = ("mnist5k", "mnist", "cifar10", "photos32")


@dataclass
class DataOptions:
    """Which images, where they are, and how they are dealt out."""

    name: str = option("mnist5k", "the images; mnist5k and photos32 need no download", choices=DATASET_NAMES)
    folder: str | None = option(None, "folder with the official files (null: the user's cache folder)")
    download: bool = option(True, "fetch missing official files, with their checksums verified")
    allow_partial: bool = option(False, "accept official files that hold only a part of the images")
    batch_size: int = option(100, "images per batch and process", minimum=1)
    validation_fraction: float = option(
        0.1, "part of the training images held out for validation", minimum=0, maximum=0.5
    )
    num_workers: int = option(0, "loader processes (0: load in the main process)", minimum=0)
