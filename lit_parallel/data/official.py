"""Datasets that are read from their official files."""

import io
import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import pooch
from pytorch_lightning.utilities import rank_zero_info

from lit_parallel.data.download import DownloadError
from lit_parallel.data.image_data import ImageData
from lit_parallel.data.options import DataOptions
from lit_parallel.errors import UserError

MOST_BYTES = 1 << 26
"""No official file is larger when it is unpacked; what claims to be is not read further."""


class OfficialData(ImageData):
    """A dataset whose official files are found in a folder or fetched into it.

    The folder is ``options.folder`` or, without one, a folder of the dataset's own in the user's cache.

    Attributes:
        file_names: The official files.
    """

    file_names: tuple[str, ...]

    def __init__(self, options: DataOptions, seed: int):
        """See `ImageData`."""
        super().__init__(options, seed)
        self.folder = Path(options.folder or pooch.os_cache("lit-parallel") / self.name).expanduser()

    @abstractmethod
    def candidates(self, name: str) -> tuple[Path, ...]:
        """Where an official file may be, the likeliest place first."""

    @abstractmethod
    def fetch(self, names: list[str]) -> None:
        """Download the named files into the folder.

        Raises:
            DownloadError: If one of them cannot be had.
        """

    def prepare_data(self) -> None:
        """Fetch what is missing; files that are there are never replaced."""
        missing = [name for name in self.file_names if self._find(name) is None]
        if missing and self.options.download:
            try:
                self.fetch(missing)
            except DownloadError as error:
                raise self._missing(missing[0], f"cannot be downloaded ({error})") from error
        elif missing:
            raise self._missing(missing[0], "data.download is false")

    def path(self, name: str) -> Path:
        """Return the path of an official file.

        Raises:
            UserError: If it is nowhere.
        """
        path = self._find(name)
        if path is None:
            raise self._missing(name, "has not been downloaded (prepare_data does it)")
        return path

    def check_complete(self, found: Mapping[Path, int], official: Mapping[Path, int]) -> None:
        """Compare numbers of images with the official ones.

        Args:
            found: The number of images in each file.
            official: The number that there should be.

        Raises:
            UserError: If images are missing (unless a part was asked for), or if there are too many.
        """
        for path, number in found.items():
            if number > official[path]:
                raise UserError(
                    f"'{path}' holds {number:,} images, the official file only {official[path]:,}: "
                    f"set data.folder to the folder of the official {self.name} files."
                )
            if number == 0:
                raise damaged(path, "it holds no images")
        partial = [path for path, number in found.items() if number < official[path]]
        if not partial:
            return
        files = f"'{partial[0]}'" + (f" and {len(partial) - 1} more hold" if len(partial) > 1 else " holds")
        numbers = f"{sum(found[path] for path in partial):,} of {sum(official[path] for path in partial):,}"
        if not self.options.allow_partial:
            raise UserError(
                f"{files} only {numbers} images: set data.allow_partial=true to go on with these, "
                f"or data.folder to the folder of the complete {self.name} files."
            )
        rank_zero_info(f"{files} only {numbers} images; going on with these, as data.allow_partial=true asks for.")

    def _find(self, name: str) -> Path | None:
        # Unlike Path.is_file, this does not raise for a folder that one may not enter.
        return next((path for path in self.candidates(name) if os.path.isfile(path)), None)

    def _missing(self, name: str, why: str) -> UserError:
        return UserError(
            f"'{name}' is not in '{self.folder}' and {why}: set data.folder to the folder of the official {self.name} "
            f"files, or data.download=true, with a network connection, to fetch them."
        )


def read_bytes(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        UserError: If the file may not or cannot be read, or is larger than any official one.
    """
    try:
        with path.open("rb") as file:
            return read_at_most(path, file)
    except OSError as error:
        raise UserError(f"Cannot read '{path}' ({error.strerror}): check its permissions and the disk.") from error


def read_at_most(path: Path, file: IO[bytes] | io.BufferedIOBase) -> bytes:
    """Return what an open file holds, which may be unpacked as it is read.

    Args:
        path: Its name, for the message.
        file: Read up to `MOST_BYTES`.

    Raises:
        UserError: If it holds more than any official file.
    """
    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise damaged(path, f"it holds more than {MOST_BYTES:,} bytes")
    return content


def damaged(path: Path, problem: str) -> UserError:
    """Return the error of a file that is not what it should be."""
    return UserError(
        f"'{path}' is damaged or not the official file, {problem}: delete it, "
        f"and data.download=true fetches it anew, or put the official file in its place."
    )
