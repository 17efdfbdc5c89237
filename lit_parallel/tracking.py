"""Weights & Biases: one run per training or sampling, offline unless asked otherwise."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from wandb.sdk.lib import wbauth

from lit_parallel.config import WandbOptions
from lit_parallel.errors import UserError, one_line
from lit_parallel.plots import image_grid
from lit_parallel.runs import RunState, run_folder_of, short_path
from lit_parallel.sampling.auto import Choice
from lit_parallel.solution import Solution

_messages = logging.getLogger(__name__)

_INIT_SECONDS = 60.0
_FINISH_SECONDS = 300.0  # what is not uploaded by then stays on disk, for wandb sync
_FLUSH_SECONDS = 1.0  # what was logged before then is on disk, whatever ends the process
_SHOWN_SAMPLES = 100
_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")  # the last two are former names
_REFUSED = re.compile(r"\b40[134]\b|permission", re.IGNORECASE)  # by a server that has answered


def build_logger(
    options: WandbOptions,
    folder: Path,
    *,
    config: dict[str, Any],
    experiment: str,
    job_type: str,
    goes_on: str | None = None,
) -> WandbLogger | None:
    """Start a run, or go on with one, or return ``None`` if ``wandb.mode`` is ``disabled``.

    Args:
        options: The config's ``wandb`` group.
        folder: Run folder; the run's files go into its ``wandb`` folder.
        config: The resolved config as plain containers; logged.
        experiment: Groups the runs that belong together.
        job_type: ``train``, ``test``, ``sample`` or ``benchmark``. A run that starts from a checkpoint (``checkpoint``
            in its config) names the training run that has left it, as ``trained_by``.
        goes_on: The id of the run to go on with. Offline that makes another folder of the same id; ``wandb sync`` joins
            them.

    Raises:
        UserError: If an online run has no API key, or the server refuses it, or the environment has a ``WANDB_MODE``
            that wandb does not know. A server that does not answer is done without: the run is an offline one then,
            after a warning.
    """
    if options.mode == "disabled":
        return None
    _check_environment()
    if getattr(rank_zero_only, "rank", 0) != 0:
        # Silent, but there: Lightning's LearningRateMonitor refuses a Trainer without a logger on every process.
        return WandbLogger(project=options.project, save_dir=folder)
    if options.mode == "online":
        _check_api_key()
    folder.mkdir(parents=True, exist_ok=True)
    config = config | _origin(config.get("checkpoint"))
    arguments: dict[str, Any] = {
        "project": options.project,
        "entity": options.entity,
        "id": goes_on,
        "resume": None if goes_on is None else "allow",
        "name": options.name or _name(folder, config, job_type),
        "group": experiment,
        "job_type": job_type,
        "tags": options.tags,
        "dir": folder,
        "config": config,
        "reinit": "create_new",  # a run that the caller has open is the caller's
        # What a user needs to know is printed by how_to_look.
        "settings": wandb.Settings(
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            silent=True,
            console="off",
            x_transaction_log_flush_interval=_FLUSH_SECONDS,
        ),
    }
    try:
        try:
            run = wandb.init(mode="online" if options.mode == "online" else "offline", **arguments)
        except wandb.errors.CommError as error:
            reason = str(error).partition("\n")[0]  # the next lines are advice for programmers
            if isinstance(error, wandb.errors.AuthenticationError) or _REFUSED.search(reason):
                raise
            _messages.warning(
                f"Weights & Biases cannot be reached ({reason}): the run goes on offline, in this folder, and can be "
                "uploaded when it has ended."
            )
            run = wandb.init(mode="offline", **arguments)
    except (wandb.errors.Error, ValueError) as error:  # such as a tag or project that it does not accept
        raise UserError(f"Weights & Biases refuses the options under 'wandb': {one_line(error)}") from error
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    _use_checkpoint(run)
    return WandbLogger(experiment=run, project=options.project, save_dir=folder)


def _name(folder: Path, config: Mapping[str, Any], job_type: str) -> str:
    """Of a run folder; of sampling also how, since there may be many of them in one folder."""
    solver = config.get("solver")
    how = [str(solver["name"]), f"seed-{config.get('seed')}"] if job_type == "sample" and solver else []
    return "-".join([folder.name, *([] if job_type == "train" else [job_type]), *how])


def _origin(checkpoint: str | None) -> dict[str, str]:
    """The id of the run that has trained a checkpoint, if that is known: for the config of a run that uses it."""
    trained_in = None if checkpoint is None else run_folder_of(Path(checkpoint))
    trained_by = None if trained_in is None else RunState.read(trained_in).wandb_id
    return {} if trained_by is None else {"trained_by": trained_by}


def _use_checkpoint(run: Any) -> None:
    """Draw the line from the checkpoint's artifact to this run, if both are online."""
    trained_by = run.config.get("trained_by")
    if trained_by is not None and not run.offline:
        with contextlib.suppress(wandb.errors.Error, ValueError):  # trained offline, or elsewhere
            run.use_artifact(f"{_artifact_name(trained_by)}:latest", type="model")


def _log_checkpoint(run: Any, folder: Path) -> None:
    """Register the checkpoint of an online training run as an artifact, which runs that use it are linked to.

    The artifact is a reference: the file stays where it is, and is not uploaded.
    """
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if run.job_type == "train" and not run.offline and checkpoint.is_file():
        artifact = wandb.Artifact(_artifact_name(run.id), type="model")
        artifact.add_reference(checkpoint.resolve().as_uri())
        run.log_artifact(artifact)


def _artifact_name(run_id: str) -> str:
    return f"checkpoint-{run_id}"


def has_account() -> bool:
    """Whether an API key is there; asks neither the user nor the server.

    Raises:
        UserError: If the environment has a ``WANDB_MODE`` that wandb does not know.
    """
    _check_environment()
    try:
        _check_api_key()
    except UserError:
        return False
    return True


def _check_environment() -> None:
    """Raise a `UserError` about a ``WANDB_MODE`` with which wandb does not start, though the option is what decides."""
    mode = os.environ.get("WANDB_MODE", "offline")
    if mode not in _MODES:
        raise UserError(
            f"The environment variable WANDB_MODE is '{mode}', and wandb knows only {', '.join(_MODES[:4])}: run "
            "'unset WANDB_MODE'; the option wandb.mode says what becomes of a run."
        )


def _check_api_key() -> None:
    """Raise a `UserError` unless there is an API key; asks neither the user nor the server.

    Not ``wandb.login``, which waits for the server, and finds no key while ``WANDB_MODE=offline`` is set.
    """
    try:
        host = wandb.setup().settings.base_url
        key = wbauth.authenticate_session(host=host, source="wandb", prompt=False, update_session=False)
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb.mode=online needs a valid API key ({one_line(error)}): run 'wandb login', or set "
            "wandb.mode=offline."
        ) from error
    if key is None:
        raise UserError("wandb.mode=online needs an API key: run 'wandb login' once, or set wandb.mode=offline.")


def log_images(logger: Any, name: str, images: Tensor, caption: str = "") -> None:
    """Log images ``[n, channels, height, width]`` uint8 as one grid."""
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [image_grid(images, scale=None)], caption=[caption])


def log_curve(logger: Any, name: str, values: list[float]) -> None:
    """Log one value for each parallel iteration, drawn against ``solver/iteration``; what is not finite is left out."""
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        run.define_metric("solver/iteration", hidden=True)
        run.define_metric(name, step_metric="solver/iteration")  # by its full name: of two patterns, "*" would win
        for iteration, value in enumerate(values, start=1):
            if np.isfinite(value):
                run.log({"solver/iteration": iteration, name: value})


@rank_zero_only
def log_sampling(
    logger: WandbLogger | None,
    solution: Solution,
    images: Tensor,
    rows: list[dict[str, Any]],
    wall_clock_speedup: float | None,
    pictures: Mapping[str, Path] | None = None,
) -> None:
    """Log what a sampling run found: scalars first, since the terminal viewer draws scalars and images, not tables.

    Args:
        logger: Of :func:`build_logger`; nothing is logged without one.
        solution: Of all samples.
        images: 8-bit images ``[n, channels, height, width]``.
        rows: The table of solvers, flat and plain.
        wall_clock_speedup: Over the first baseline, if it was measured.
        pictures: Files of figures, by the names to log them under.
    """
    if logger is None:
        return
    run = logger.experiment
    summary = solution.summary()
    names = ["iterations_mean", "iterations_max", "work", "seconds"]
    if np.isfinite(summary["iteration_speedup"]):  # what was not solved has none
        names.append("iteration_speedup")
    scalars: dict[str, Any] = {f"solver/{name}": summary[name] for name in names}
    scalars["solver/evaluations"] = float(solution.evaluations.double().mean())
    scalars["solver/certified"] = float(solution.certified.float().mean())
    if wall_clock_speedup is not None and np.isfinite(wall_clock_speedup):
        scalars["solver/wall_clock_speedup"] = wall_clock_speedup
    run.log(scalars)
    if solution.residual is not None:
        log_curve(logger, "solver/residual", solution.residual.amax(dim=1).tolist())
    iterations = solution.iterations.cpu().numpy()
    run.log({"solver/iterations": wandb.Histogram(np_histogram=np.histogram(iterations, bins=_bins(iterations)))})
    shown = images[:_SHOWN_SAMPLES]
    log_images(logger, "samples", shown, caption=f"{len(shown)} of {len(solution.status)} samples, {solution.solver}")
    for name, path in (pictures or {}).items():
        run.log({name: wandb.Image(str(path))})
    if rows:
        run.log({"solvers": _table(rows)})


@rank_zero_only
def log_choice(logger: WandbLogger | None, choice: Choice | None) -> None:
    """Log what ``solver.name=auto`` chose, as ``solver_chosen`` in the run's config, and all that was measured."""
    if logger is None or choice is None:
        return
    report = choice.report()
    logger.experiment.config.update({"solver_chosen": report["chosen"]})
    logger.experiment.log({"solver_candidates": _table(report["candidates"])})


def log_table(logger: WandbLogger | None, name: str, rows: list[dict[str, Any]]) -> None:
    """Log rows of plain values, one column for each key."""
    if logger is not None and rows:
        logger.experiment.log({name: _table(rows)})


def _table(rows: list[dict[str, Any]]) -> wandb.Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    data = [[row.get(column) for column in columns] for row in rows]
    return wandb.Table(columns=[*columns], data=data, allow_mixed_types=True)


def _bins(iterations: np.ndarray) -> np.ndarray:
    """Whole numbers where there are few, 64 equal parts otherwise."""
    low, high = int(iterations.min()), int(iterations.max()) + 1
    return np.linspace(low, high, min(high - low, 64) + 1)


def how_to_look(logger: WandbLogger | None) -> list[str]:
    """Lines that say how to look at a run and how to upload it; none if there is no run in this process."""
    run = None if logger is None else logger.experiment
    if not isinstance(run, wandb.Run):
        return []
    if not run.offline:
        return [f"Weights & Biases: {run.url}"]
    newest = Path(run.dir).parent
    parts = sorted(newest.parent.glob(f"offline-run-*-{run.id}")) or [newest]  # several if the run was interrupted
    shown = " ".join(shlex.quote(str(short_path(part))) for part in parts)
    return [
        f"look at the run in this terminal:  wandb leet {shlex.quote(str(short_path(newest)))}",
        f"upload it (needs an account):      wandb sync {shown}",
    ]


def run_id(logger: WandbLogger | None) -> str | None:
    """The id by which a run can go on, or ``None`` if there is no run in this process."""
    run = None if logger is None else logger.experiment
    return run.id if isinstance(run, wandb.Run) else None


def finish(logger: WandbLogger | None) -> None:
    """Close the run, if there is one, as failed during an exception; never fails: what was logged is written."""
    if logger is not None:
        exit_code = 0 if sys.exception() is None else 1
        with contextlib.suppress(Exception):
            if exit_code == 0 and isinstance(logger.experiment, wandb.Run):
                _log_checkpoint(logger.experiment, Path(str(logger.save_dir)))
        with contextlib.suppress(Exception):
            logger.experiment.finish(exit_code=exit_code)
