"""Fetch a file from the first mirror that delivers it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pooch
import requests
from pytorch_lightning.utilities import rank_zero_info

from lit_parallel.errors import first_line

CONNECT_SECONDS = 5
READ_SECONDS = 30
ATTEMPTS_PER_MIRROR = 2


class DownloadError(Exception):
    """Why no mirror delivered a file, in one line."""


def download(urls: Sequence[str], md5: str, folder: Path, processor: Callable | None = None) -> None:
    """Put a file into a folder, under the last part of its address, once its checksum is right.

    Args:
        urls: The same file on several mirrors, the best first.
        md5: The published checksum.
        folder: Created if missing.
        processor: What `pooch.retrieve` does with the file afterwards, for example unpacking it.

    Raises:
        DownloadError: If no mirror delivered the file or it could not be stored.
    """
    name = Path(urlsplit(urls[0]).path).name
    rank_zero_info(f"Fetching {name} into {folder}")
    pooch.get_logger().setLevel("WARNING")  # it would repeat the line above for every mirror and attempt
    downloader: Any = pooch.HTTPDownloader(True, chunk_size=1 << 16, timeout=(CONNECT_SECONDS, READ_SECONDS))
    failures = []
    for url in urls:
        failure = ""
        for _ in range(ATTEMPTS_PER_MIRROR):
            try:
                pooch.retrieve(url, f"md5:{md5}", fname=name, path=folder, downloader=downloader, processor=processor)
                return
            except requests.ConnectionError:
                failure = "no connection"
                break  # trying again would only keep a user without a network waiting
            except requests.RequestException as error:
                failure = first_line(error)
            except ValueError:  # pooch's word for a wrong checksum
                failure = f"the checksum of {name} is wrong"
            except OSError as error:
                raise DownloadError(f"cannot store {name}: {first_line(error)}") from error
        failures.append(f"{urlsplit(url).hostname}: {failure}")
    raise DownloadError("; ".join(failures))
