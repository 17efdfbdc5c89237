"""Run folders: ``<runs_folder>/<experiment>/<time>/`` holds everything that a run leaves."""

from datetime import datetime
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from lit_parallel.errors import UserError


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
