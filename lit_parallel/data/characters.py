"""The characters of a text, to be predicted one after another."""

from pathlib import Path

import numpy as np
import torch

from lit_parallel.data.in_memory import InMemoryData, Samples
from lit_parallel.data.options import CharactersOptions
from lit_parallel.errors import UserError
from lit_parallel.memory import check_memory

ALPHABET = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
"""The characters that are told apart; all others are one more, the last one."""

_TEST_EVERY = 10  # of the text, a tenth is to test with: its end
_BYTES_PER_BYTE = 16  # of a file, while it is read: the text, its code points and their numbers


class CharactersData(InMemoryData):
    """Pieces of a text, one after another; the target of a character is the next one.

    Every loader yields ``(characters, next characters)``, both uint8 ``[batch, time]``, places in `ALPHABET`. The end
    of the text is to test with; of what comes before, whole pieces are held out for validation.

    Attributes:
        task: What a model of it has to be told (``model.task``).
    """

    name = "characters"
    task = "next_character"
    options: CharactersOptions

    @property
    def sample_shape(self) -> tuple[int, int]:
        """Time, and how many characters there are."""
        return self.options.length, len(ALPHABET) + 1

    def all_samples(self) -> tuple[Samples, Samples]:
        """See `InMemoryData`.

        Raises:
            UserError: If the text cannot be read or is too short.
        """
        length = self.options.length
        text = manual() if self.options.file is None else read_text(Path(self.options.file).expanduser())
        pieces = (len(text) - 1) // length  # the last character is nothing but a target
        test = max(pieces // _TEST_EVERY, 1)
        if pieces <= test:
            raise UserError(
                f"The text has {len(text):,} characters, and data.length={length} needs {2 * length + 1:,} to train "
                "and test with: set a smaller data.length, or data.file to a longer text."
            )
        codes = encode(text)
        samples = Samples(*(codes[start : start + pieces * length].view(pieces, length) for start in (0, 1)))
        return Samples(*samples[:-test]), Samples(*samples[-test:])


def encode(text: str) -> torch.Tensor:
    """The places of a text's characters in `ALPHABET`, uint8 ``[length]``; of others, the place behind its end."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    places = np.full(0x110000, len(ALPHABET), dtype=np.uint8)
    places[[ord(character) for character in ALPHABET]] = range(len(ALPHABET))
    return torch.from_numpy(places[points])


def manual() -> str:
    """The reference manual's pages that come with Python, those of its ``help()``, in the order of their names.

    Pages quote each other, so a paragraph that stood before is left out. The text differs from one version of Python
    to the next.

    Raises:
        UserError: If this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "This Python comes without its manual (pydoc_data), which data.name=characters reads: set data.file=PATH, "
            "a text file."
        ) from error
    paragraphs = (part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs))


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; what is not UTF-8 in it becomes U+FFFD.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        check_memory(_BYTES_PER_BYTE * path.stat().st_size, f"data.file='{path}' is too long, use a part of it")
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot read data.file='{path}' ({reason}): set it to a text file.") from error
