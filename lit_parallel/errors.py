"""What a user did that cannot work, told in one line."""

import difflib
from collections.abc import Iterable

_MOST_LETTERS = 2000


class UserError(Exception):
    """A mistake in a config, a file, a checkpoint or an argument.

    The message is one line that says what is wrong and what would be right. The command line prints it alone, without
    a traceback, and exits with status 2.

    Args:
        message: What it says. It may quote a file that is not to be trusted: line breaks and other characters that
            cannot be printed become spaces, so that nothing reaches the terminal but text, and not pages of it.
    """

    def __init__(self, message: str) -> None:
        line = "".join(letter if letter.isprintable() else " " for letter in message)
        super().__init__(line if len(line) <= _MOST_LETTERS else f"{line[:_MOST_LETTERS]}...")


def one_line(error: Exception) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())


def first_line(error: Exception) -> str:
    """The first line of an error's message, without its full stop."""
    return str(error).partition("\n")[0].rstrip(".")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'lr'?"`` for the nearest known word, or the list of known words if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""
