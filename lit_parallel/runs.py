"""Run folders: ``<runs_folder>/<experiment>/<time>/`` holds everything that a run leaves."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from lit_parallel.errors import UserError


@dataclass
class RunState:
    """What a training run remembers beside its checkpoints, in ``run.json``.

    Attributes:
        wandb_id: Of its Weights & Biases run, which goes on when training does.
        finished: Whether it has trained to its end and was tested.
    """

    wandb_id: str | None = None
    finished: bool = False

    @classmethod
    def read(cls, folder: Path) -> "RunState":
        """The state in a run folder; a new one if there is none that can be read."""
        try:
            saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            wandb_id, finished = saved["wandb_id"], saved["finished"]
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return cls()
        plain = isinstance(wandb_id, str) and wandb_id.isalnum()  # it becomes the name of a folder
        return cls(wandb_id if plain else None, finished is True)

    @rank_zero_only
    def write(self, folder: Path) -> None:
        """Write it into a run folder.

        Raises:
            UserError: If that cannot be written to.
        """
        with written_whole(folder / "run.json") as path:
            path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a small file so that at any time it is either the old one or the new one, and whole.

    Yields:
        Where to write it; it takes its place at the end.

    Raises:
        UserError: If it cannot be written.
    """
    incomplete = path.with_name(f"{path.name}.incomplete")
    try:
        yield incomplete
        os.replace(incomplete, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            incomplete.unlink()
        raise UserError(f"Cannot write '{path}': {error.strerror}.") from error


_locks: set[int] = set()  # descriptors


def _let_go() -> None:
    for lock in _locks:
        os.close(lock)


os.register_at_fork(after_in_child=_let_go)  # a data worker may live longer than the process that was killed


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other commands from writing into a folder, which is made if need be; the first process does it for all.

    Nothing is left behind, however the process ends. On a file system without locks nobody is kept away.

    Raises:
        UserError: If another command is at work there, or the folder cannot be made.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    make_folder(folder)
    lock = os.open(folder, os.O_RDONLY)
    _locks.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another command is at work in '{folder}': wait until it has ended.") from None
        except OSError:  # no locks here
            pass
        yield
    finally:
        _locks.discard(lock)
        os.close(lock)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal: the same weights have the same one, wherever they lie."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder, unless it is there.

    Raises:
        UserError: If that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot create the folder '{folder}': {error.strerror}.") from error


def new_run_folder(runs_folder: str | Path, experiment: str) -> Path:
    """Name, and on the first process create, the folder of a new run.

    Other processes get a name that they must not use: what they write goes where the first process says.

    Raises:
        UserError: If the folder cannot be created.
    """
    if Path(experiment).name != experiment or experiment == "..":
        raise UserError(f"experiment names a folder and must be a plain name, not '{experiment}'.")
    parent = Path(runs_folder) / experiment
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = parent / stamp
    if getattr(rank_zero_only, "rank", 0) != 0:
        return folder
    for attempt in range(2, 1000):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run started in the same second
            folder = parent / f"{stamp}-{attempt}"
            continue
        except OSError as error:
            raise UserError(
                f"Cannot create the run folder '{folder}': {error.strerror}. Name another folder."
            ) from error
        return folder
    raise UserError(f"Cannot find a free name for a run folder in '{parent}'. Set runs_folder.")


def newest_checkpoint(runs_folder: str | Path, experiment: str | None = None) -> Path:
    """The ``last.ckpt`` that was written last below a runs folder.

    Args:
        runs_folder: Where the runs are.
        experiment: Look at the runs of this experiment only.

    Raises:
        UserError: If there is none.
    """
    folder = Path(runs_folder) if experiment is None else Path(runs_folder) / experiment
    runs = "*/*" if experiment is None else "*"
    found = sorted(folder.glob(f"{runs}/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"There is no checkpoint below '{folder}': run 'python train.py' first, or name one with --checkpoint."
        )
    return found[-1]


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint belongs to, or ``None`` if it was moved out of one."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def short_path(path: Path) -> Path:
    """A path relative to the current folder, if it is below it: what a user would type."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path
