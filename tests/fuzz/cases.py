"""Cases for fuzzing: what one case may end in, and how long it may take."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lit_parallel.errors import UserError

SECONDS = 20  # far above what any case takes: what is longer hangs
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
MEGABYTES = 256  # the same of memory: every case is small


@contextlib.contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raise a `TimeoutError` if what is inside takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit(megabytes: int = MEGABYTES) -> Iterator[None]:
    """Raise a `MemoryError` if what is inside has used more main memory at any time; looked at on Linux alone."""
    if not _RESET.exists():
        yield
        return
    _RESET.write_text("5")  # forget the highest use so far
    before = _used("VmRSS")
    yield
    if (more := _used("VmHWM") - before) > megabytes:
        raise MemoryError(f"took {more:.0f} MB")


def _used(name: str) -> float:
    return next(int(line.split()[1]) / 1024 for line in _STATUS.read_text().splitlines() if line.startswith(name))


def outcome(act: Callable[[], Any], case: object) -> Any:
    """What an action returns, or the `UserError` that it raises; any other end fails and names the case."""
    try:
        with time_limit(), memory_limit():
            return act()
    except UserError as error:
        message = str(error)
        assert message.strip(), f"{case}: an empty message"
        assert message.isprintable(), f"{case}: not one line: {message!r}"
        assert len(message) < 2100, f"{case}: too long for one line: {message[:300]}..."
        return error
    except BaseException as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
