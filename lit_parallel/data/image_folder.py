"""Image files in folders of their classes, as ImageNet comes, read when they are needed."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_parallel.data.options import ImageFolderOptions
from lit_parallel.data.split_data import Part, SplitData
from lit_parallel.errors import UserError, one_line
from lit_parallel.seeds import seed_of

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
TRAINING, TEST = "train", "val"

_AREA = (0.08, 1.0)
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_ATTEMPTS = 10


@dataclass(frozen=True)
class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """Image files with their labels; the names alone are in memory.

    Attributes:
        folder: What the names are relative to.
        names: ``[n]`` file names as bytes: an array is not copied into every worker, as a list of texts would be.
        labels: int64 ``[n]``.
        options: How they are resized and cropped.
        augment: Crop and mirror at random, as in training.
        seed: Of the randomness of a batch, which depends on nothing else but the batch's files and their order: not on
            the process that loads it, nor on the batches before.
    """

    folder: Path
    names: np.ndarray
    labels: Tensor
    options: ImageFolderOptions
    augment: bool = False
    seed: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def part(self, indices: Tensor) -> ImageFiles:
        """Some of the files."""
        return dataclasses.replace(self, names=self.names[indices.numpy()], labels=self.labels[indices])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = read_image(self.folder / os.fsdecode(bytes(self.names[index])))
        resize, crop = self.options.resize, self.options.crop
        cut = random_resized_crop(image, crop) if self.augment else center_crop(image, resize, crop)
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1), self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor] | UserError:
        # A worker process would wrap an exception into its traceback: the loader raises it instead.
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(self.seed, *indices))
                images, labels = zip(*(self[index] for index in indices), strict=True)
        except UserError as error:
            return error
        return torch.stack(images), torch.stack(labels)


class _FileLoader(DataLoader):
    """Raises what went wrong in a worker as it was there: one line."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


class ImageFolderData(SplitData):
    """Images in folders of their classes: ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``, ImageNet's own layout.

    Every loader yields ``(images, labels)``: uint8 ``[batch, 3, crop, crop]`` and int64 ``[batch]``. The labels count
    the class folders in the order of their names. ``val`` holds the test images; those to validate with are held out
    from ``train``. A test alone needs no ``train``, or an empty one.

    Evaluation is as published: the shorter side to ``resize`` pixels (bilinear, antialiased), then the centre.
    Training cuts out a random part of random shape, resizes it and mirrors every second one (Szegedy et al., 2014,
    arXiv:1409.4842).

    Attributes:
        augmentation: None for the model to apply: it is done here, to every image before it is reduced.
    """

    name = "image_folder"
    loader_kind = _FileLoader
    options: ImageFolderOptions
    augmentation = None

    def __init__(self, options: ImageFolderOptions, seed: int):
        """See `SplitData`; raises a `UserError` if the crop is larger than the image."""
        super().__init__(options, seed)
        if options.crop > options.resize:
            raise UserError(f"data.crop={options.crop} exceeds data.resize={options.resize}: set at most as much.")
        self._classes: list[str] = []
        self._sets: dict[Part, ImageFiles] = {}

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the loaders yield."""
        return 3, self.options.crop, self.options.crop

    @property
    def num_classes(self) -> int:
        """Labels are ``0 .. num_classes - 1``."""
        return len(self.classes)

    @property
    def classes(self) -> list[str]:
        """The names of the class folders, sorted; those of ``train``, if it has any."""
        if not self._classes:
            training = self._folder(TRAINING, needed=False)
            found = _class_folders(training) if training.is_dir() else []
            self._classes = found or _class_names(self._folder(TEST))
        return self._classes

    def setup(self, stage: str | None = None) -> None:
        """List the files of the parts that the stage needs."""
        parts: tuple[Part, ...] = ("test",) if stage == "test" else ("train", "test")
        for part in parts:
            self.samples(part)

    def samples(self, part: Part) -> ImageFiles:
        """See `SplitData`."""
        if part not in self._sets:
            if part == "test":
                self._sets["test"] = self._list(TEST)
            else:
                everything = self._list(TRAINING)
                train, validation = map(everything.part, self.split(len(everything)))
                self._sets["train"] = dataclasses.replace(train, augment=self.options.augment, seed=self.seed)
                self._sets["validation"] = validation
        return self._sets[part]

    def test_images(self) -> Tensor:
        """Refused: these images are not in memory."""
        raise UserError("inpaint.images=test is not for data.name=image_folder: name a file, inpaint.images=PATH.")

    def _list(self, name: str) -> ImageFiles:
        folder = self._folder(name)
        known = {class_name: label for label, class_name in enumerate(self.classes)}
        names, labels = [], []
        for class_name in _class_names(folder):
            if class_name not in known:
                raise UserError(
                    f"'{folder / class_name}' is a class that '{TRAINING}' beside it does not have: move it away, or "
                    f"add it to '{TRAINING}'."
                )
            found = sorted(entry for entry in os.listdir(folder / class_name) if _is_image(entry))
            if not found:
                raise UserError(
                    f"'{folder / class_name}' holds no images ({', '.join(SUFFIXES)}): remove the folder, or fill it."
                )
            names += [os.fsencode(os.path.join(class_name, entry)) for entry in found]
            labels += [known[class_name]] * len(found)
        return ImageFiles(folder, np.array(names, dtype=bytes), torch.tensor(labels), self.options)

    def _folder(self, name: str, *, needed: bool = True) -> Path:
        if self.options.folder is None:
            raise UserError(
                "data.name=image_folder needs a place: set data.folder=PATH, a folder that holds "
                f"{TRAINING}/CLASS/*.JPEG and {TEST}/CLASS/*.JPEG."
            )
        folder = Path(self.options.folder).expanduser() / name
        if needed and not folder.is_dir():
            raise UserError(
                f"There is no folder '{folder}': set data.folder to a folder that holds {TRAINING}/CLASS/*.JPEG and "
                f"{TEST}/CLASS/*.JPEG."
            )
        return folder


def read_image(path: Path) -> Image.Image:
    """Read an image file as red, green and blue, 8 bits each.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # on damaged bytes Pillow raises almost anything
        reason = one_line(error) or type(error).__name__
        raise UserError(f"Cannot read the image '{path}' ({reason}): copy it again, or remove it.") from error


def center_crop(image: Image.Image, resize: int, crop: int) -> Image.Image:
    """Resize the shorter side (bilinear, antialiased) and cut out the centre, with torchvision's rounding.

    Args:
        image: Any size.
        resize: Pixels of the shorter side.
        crop: Height and width of the result, at most ``resize``.
    """
    shorter = min(image.size)
    width, height = (resize if side == shorter else int(resize * side / shorter) for side in image.size)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + crop, top + crop))


def random_resized_crop(image: Image.Image, size: int) -> Image.Image:
    """Cut out a random part, 8 to 100 % of the area and 3:4 to 4:3 in shape, resize it, and mirror every second one.

    Where no such part is found in ten attempts (the image is very long), its centre is taken, of the nearest shape.

    Args:
        image: Any size.
        size: Height and width of the result.
    """
    width, height = image.size
    for area, log_ratio in torch.rand(_ATTEMPTS, 2).tolist():
        pixels = width * height * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
        ratio = math.exp(_LOG_RATIO[0] + log_ratio * (_LOG_RATIO[1] - _LOG_RATIO[0]))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(torch.randint(width - w + 1, ())), int(torch.randint(height - h + 1, ()))
            break
    else:
        w = min(width, round(height * math.exp(_LOG_RATIO[1])))
        h = min(height, round(width / math.exp(_LOG_RATIO[0])))
        left, top = (width - w) // 2, (height - h) // 2
    cut = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else cut


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _class_names(folder: Path) -> list[str]:
    names = _class_folders(folder)
    if not names:
        hint = " but images without classes" if any(map(_is_image, os.listdir(folder))) else ""
        raise UserError(f"'{folder}' holds no class folders{hint}: sort the images into one folder per class.")
    return names
