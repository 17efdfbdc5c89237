"""MNIST, read from its official IDX files."""

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np

from lit_parallel.data.augmentation import random_crop
from lit_parallel.data.download import download
from lit_parallel.data.image_data import ImageSet
from lit_parallel.data.official import OfficialData, damaged, read_at_most, read_bytes

# The original site no longer serves the files.
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist")

# As published with the files.
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}

GZIP_MAGIC = b"\x1f\x8b"
NUM_IMAGES = {"train": 60_000, "t10k": 10_000}


class MnistData(OfficialData):
    """The 70,000 handwritten digits; the files may be compressed by gzip or not."""

    name = "mnist"
    image_shape = (1, 28, 28)
    num_classes = 10
    augmentation = staticmethod(random_crop)  # a mirrored digit is none
    file_names = tuple(MD5)

    def candidates(self, name: str) -> tuple[Path, ...]:
        """See `OfficialData`."""
        return self.folder / name, self.folder / name.removesuffix(".gz")

    def fetch(self, names: list[str]) -> None:
        """See `OfficialData`."""
        for name in names:
            download([f"{mirror}/{name}" for mirror in MIRRORS], MD5[name], self.folder)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """See `ImageData`."""
        found, official, sets = {}, {}, []
        for part, number in NUM_IMAGES.items():
            images_path = self.path(f"{part}-images-idx3-ubyte.gz")
            labels_path = self.path(f"{part}-labels-idx1-ubyte.gz")
            images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
            if images.shape[1:] != self.image_shape[1:]:
                raise damaged(images_path, f"its images have {images.shape[1]}x{images.shape[2]} pixels, not 28x28")
            if len(images) != len(labels):
                raise damaged(labels_path, f"it holds {len(labels):,} labels for the {len(images):,} images beside it")
            if (labels >= self.num_classes).any():
                raise damaged(labels_path, f"it holds the label {labels.max()}, and the last one is 9")
            found[images_path], official[images_path] = len(images), number
            sets.append(ImageSet.from_numpy(images[:, None], labels))
        self.check_complete(found, official)
        return sets[0], sets[1]


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read unsigned bytes in the IDX format: a magic number, the size of each dimension, the values.

    Args:
        path: A file, compressed by gzip or not.
        dimensions: How many the array must have: 3 for images, 1 for labels.

    Returns:
        uint8, read-only.

    Raises:
        UserError: If the file cannot be read or is not a complete file of this kind.
    """
    content = read_bytes(path)
    if content.startswith(GZIP_MAGIC):  # not the name: it may keep its .gz when a browser unpacks the file
        try:
            content = read_at_most(path, gzip.GzipFile(fileobj=io.BytesIO(content)))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise damaged(path, f"gzip cannot unpack it ({error})") from error

    magic = bytes([0, 0, 8, dimensions])  # two zeros, the code of unsigned bytes, the number of dimensions
    if content[:4] != magic:
        raise damaged(path, f"its magic number is 0x{content[:4].hex()} instead of 0x{magic.hex()}")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise damaged(path, "it is truncated in the header")
    shape = [int.from_bytes(content[i : i + 4]) for i in range(4, start, 4)]
    expected = start + math.prod(shape)
    if len(content) != expected:
        problem = "truncated" if len(content) < expected else "too long"
        raise damaged(path, f"it is {problem}: {len(content):,} bytes instead of {expected:,} after unpacking")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
