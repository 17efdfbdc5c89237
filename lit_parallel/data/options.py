"""The options of the data, as they stand under ``data`` in a config."""

from dataclasses import dataclass

from lit_parallel.options import option

IMAGE_NAMES = ("mnist5k", "mnist", "cifar10", "photos32")


@dataclass
class LoaderOptions:
    """How samples are dealt out, whatever they are."""

    name: str = option("", "the data")  # the first option of every kind, which says what it may be
    batch_size: int = option(100, "samples per batch and process", minimum=1)
    evaluation_batch_size: int | None = option(
        None, "the same for validation and test (null: data.batch_size)", minimum=1
    )
    validation_fraction: float = option(
        0.1, "part of the training samples held out for validation", minimum=0, maximum=0.5
    )
    num_workers: int = option(0, "loader processes (0: load in the main process)", minimum=0, maximum=1024)


@dataclass
class DataOptions(LoaderOptions):
    """Which images, where they are, and how they are dealt out."""

    name: str = option("mnist5k", "the images; mnist5k and photos32 need no download", choices=IMAGE_NAMES)
    side: int | None = option(None, "reduce the images to side x side pixels, by area (null: as they are)", minimum=1)
    folder: str | None = option(None, "folder with the official files (null: the user's cache folder)")
    download: bool = option(True, "fetch missing official files, with their checksums verified")
    allow_partial: bool = option(False, "accept official files that hold only a part of the images")


@dataclass
class AddingOptions(LoaderOptions):
    """The adding problem: sequences of numbers, two of which are marked and to be added up."""

    name: str = option("adding", "the kind of data", choices=("adding",))
    length: int = option(200, "time steps of a sequence", minimum=2, maximum=1 << 24)
    size: int = option(10_000, "sequences to train and validate with", minimum=1)
    test_size: int = option(1000, "sequences to test with", minimum=1)


@dataclass
class CharactersOptions(LoaderOptions):
    """A text, cut into pieces whose characters are predicted one after another."""

    name: str = option("characters", "the kind of data", choices=("characters",))
    length: int = option(256, "characters of a piece", minimum=2, maximum=1 << 24)
    file: str | None = option(None, "a text file in UTF-8 (null: the manual that comes with Python)")


@dataclass
class ImageFolderOptions(LoaderOptions):
    """Image files in folders of their classes, as ImageNet comes: train/CLASS/*.JPEG and val/CLASS/*.JPEG."""

    name: str = option("image_folder", "the kind of data", choices=("image_folder",))
    folder: str | None = option(None, "folder that holds the folders train and val")
    resize: int = option(256, "evaluation: pixels of the shorter side after resizing", minimum=1, maximum=1 << 12)
    crop: int = option(
        224, "height and width of the images; evaluation cuts out the centre", minimum=1, maximum=1 << 12
    )
    augment: bool = option(True, "training: cut out and mirror at random (false: as in evaluation)")


DATA_OPTIONS: dict[str, type] = {
    **dict.fromkeys(IMAGE_NAMES, DataOptions),
    "adding": AddingOptions,
    "characters": CharactersOptions,
    "image_folder": ImageFolderOptions,
}
