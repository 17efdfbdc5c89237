"""The datasets by name."""

from typing import overload

from lit_parallel.data.adding import AddingData
from lit_parallel.data.characters import CharactersData
from lit_parallel.data.cifar10 import Cifar10Data
from lit_parallel.data.image_data import ImageData
from lit_parallel.data.image_folder import ImageFolderData
from lit_parallel.data.mnist import MnistData
from lit_parallel.data.mnist5k import Mnist5kData
from lit_parallel.data.options import DataOptions, LoaderOptions
from lit_parallel.data.photos32 import Photos32Data
from lit_parallel.data.split_data import SplitData
from lit_parallel.errors import UserError, did_you_mean

_KINDS: tuple[type[SplitData], ...] = (
    *(Mnist5kData, MnistData, Cifar10Data, Photos32Data),
    *(AddingData, CharactersData, ImageFolderData),
)
DATASETS: dict[str, type[SplitData]] = {kind.name: kind for kind in _KINDS}


@overload
def build_data(options: DataOptions, seed: int) -> ImageData: ...
@overload
def build_data(options: LoaderOptions, seed: int) -> SplitData: ...
def build_data(options: LoaderOptions, seed: int) -> SplitData:
    """Return the dataset of a config.

    Args:
        options: What stands under ``data`` in a config.
        seed: Chooses the validation samples and the order of training; not negative.

    Raises:
        UserError: If there is no dataset of that name.
    """
    if options.name not in DATASETS:
        raise UserError(f"Unknown dataset '{options.name}' (data.name).{did_you_mean(options.name, DATASETS)}")
    return DATASETS[options.name](options, seed)
