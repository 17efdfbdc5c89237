"""CIFAR-10, read from its official binary version."""

import math
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lit_parallel.data.download import download
from lit_parallel.data.image_data import ImageSet
from lit_parallel.data.official import OfficialData, damaged, read_at_most, read_bytes
from lit_parallel.errors import one_line

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
ARCHIVE_FOLDER = "cifar-10-batches-bin"
IMAGES_PER_FILE = 10_000


class Cifar10Data(OfficialData):
    """60,000 colour images of ten classes; the folder holds the batches or ``cifar-10-batches-bin``.

    The official archive, put into the folder by hand, is unpacked without a network.
    """

    name = "cifar10"
    image_shape = (3, 32, 32)
    num_classes = 10
    file_names = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")

    def candidates(self, name: str) -> tuple[Path, ...]:
        """See `OfficialData`."""
        return self.folder / name, self.folder / ARCHIVE_FOLDER / name

    def fetch(self, names: list[str]) -> None:
        """See `OfficialData`."""

        def unpack(archive: str, *_: Any) -> None:
            _unpack(Path(archive), names)

        download([URL], MD5, self.folder, unpack)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """See `ImageData`."""
        paths = [self.path(name) for name in self.file_names]
        batches = [self._read(path) for path in paths]
        found = {path: len(labels) for path, (_, labels) in zip(paths, batches, strict=True)}
        self.check_complete(found, dict.fromkeys(paths, IMAGES_PER_FILE))
        *training, test = batches
        images, labels = (np.concatenate(parts) for parts in zip(*training, strict=True))
        return ImageSet.from_numpy(images, labels), ImageSet.from_numpy(*test)

    def _read(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Read the images and labels of one file, whose records are a label and the red, green and blue planes."""
        record = 1 + math.prod(self.image_shape)
        content = np.frombuffer(read_bytes(path), dtype=np.uint8)
        if len(content) % record:
            raise damaged(path, f"it is truncated: {len(content):,} bytes are no multiple of {record:,}")
        records = content.reshape(-1, record)
        images, labels = records[:, 1:].reshape(-1, *self.image_shape), records[:, 0]
        if (labels >= self.num_classes).any():
            raise damaged(path, f"it holds the label {labels.max()}, and the last one is 9")
        return images, labels


def _unpack(archive: Path, names: list[str]) -> None:
    """Copy the named files out of the archive, beside it; whatever else it holds, and wherever that points, stays."""
    folder = archive.parent / ARCHIVE_FOLDER
    folder.mkdir(exist_ok=True)
    for name in names:
        try:
            with tarfile.open(archive) as tar:
                member = tar.getmember(f"{ARCHIVE_FOLDER}/{name}")
                file = tar.extractfile(member) if member.isfile() else None
                if file is None:
                    raise KeyError(f"'{member.name}' is no file")
                content = read_at_most(archive, file)
        except (KeyError, tarfile.TarError, EOFError, zlib.error) as error:
            raise damaged(archive, f"it cannot be unpacked ({one_line(error)})") from error
        incomplete = folder / f"{name}.incomplete"
        try:
            incomplete.write_bytes(content)
            incomplete.replace(folder / name)  # so that a file by this name is always whole
        except OSError:
            incomplete.unlink(missing_ok=True)
            raise
