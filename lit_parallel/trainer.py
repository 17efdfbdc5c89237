"""Lightning's Trainer from a config."""

import contextlib
import dataclasses
import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lit_parallel.config import TrainerOptions
from lit_parallel.errors import UserError, one_line


def build_trainer(options: TrainerOptions, *, callbacks: Sequence[pl.Callback], **arguments: Any) -> pl.Trainer:
    """Make a Trainer: everything under ``trainer`` in the config goes to it.

    Args:
        options: The config's ``trainer`` group.
        callbacks: What is plugged in.
        arguments: Further arguments that a config cannot express, such as the logger.

    Raises:
        UserError: If Lightning refuses an option, in its own words.
    """
    _quieten()
    try:
        trainer = pl.Trainer(**dataclasses.asdict(options), callbacks=list(callbacks), **arguments)
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise UserError(f"Lightning's Trainer refuses the options under 'trainer': {one_line(error)}") from error
    if signal.getsignal(signal.SIGTERM) not in (None, signal.SIG_DFL):
        # The process has an answer of its own to SIGTERM. Lightning's would come first, and lets the processes of a run
        # meet within their answers, where they may wait for one another for ever (2.6).
        trainer._signal_connector._sigterm_notifier_fn = lambda *_: None  # type: ignore[method-assign]
    return trainer


@contextlib.contextmanager
def lightning_refusals() -> Iterator[None]:
    """Turn what Lightning finds wrong with the options only when it starts into one line."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"Lightning refuses the options under 'trainer': {one_line(error)}") from error
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise UserError(f"Lightning refuses trainer.val_check_interval: {one_line(error)}") from error


@contextlib.contextmanager
def restoring(trainer: pl.Trainer, checkpoint: Path | None) -> Iterator[None]:
    """Turn whatever goes wrong while Lightning reads a checkpoint to go on from into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if checkpoint is None or not trainer._checkpoint_connector._loaded_checkpoint:  # it has been read, or never was
            raise
        raise UserError(
            f"Training cannot go on from '{checkpoint}', which is damaged or of another version ({one_line(error)})."
        ) from error


@contextlib.contextmanager
def ending_together(trainer: pl.Trainer) -> Iterator[None]:
    """End the processes that Lightning has started when the first one ends by an exception.

    At the next step they would wait for it, on GPUs for many minutes, and keep the devices. Nothing is lost: the first
    process writes everything.
    """
    try:
        yield
    except BaseException:
        started = getattr(trainer.strategy.launcher, "procs", [])
        processes = list(started)
        started.clear()  # Lightning watches it, and would kill the first process while that is still closing files
        for process in processes:
            process.kill()
        raise


def check_trainer(options: TrainerOptions) -> None:
    """Let Lightning check the options before anything is written; raises what :func:`build_trainer` raises."""
    build_trainer(options, callbacks=[], logger=False, enable_checkpointing=False)


def check_sampling(options: TrainerOptions) -> None:
    """Refuse options that samples cannot be trusted with.

    Raises:
        UserError: If ``trainer.precision`` is neither 32 nor 64 bits, or batches would be left out.
    """
    if options.limit_predict_batches is not None or options.fast_dev_run:
        raise UserError(
            "sampling draws all images: set num_samples, not trainer.limit_predict_batches or fast_dev_run."
        )
    if options.precision not in (None, "32", "32-true", "64", "64-true"):
        raise UserError(
            f"trainer.precision={options.precision} is too coarse for sampling: leave it out, use 64-true, or for a "
            "model of 8-bit levels set sampling.precision=bf16, which keeps the levels exact."
        )


def _quieten() -> None:
    """Leave out what is no news to a user: advertisements, and hints that do not apply here."""

    def wanted(record: logging.LogRecord) -> bool:
        return not any(
            text in record.getMessage() for text in ("litlogger", "litmodels", "available:", "to estimate number")
        )

    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    if not any(getattr(existing, "_lit_parallel", False) for existing in logger.filters):
        wanted._lit_parallel = True  # type: ignore[attr-defined]
        logger.addFilter(wanted)
    # Sampling deals out whole batches by itself, so Lightning knows no indices and needs none.
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
    # No news when training goes on there.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # A run that ends before its first validation has no best state; what it has is last.ckpt.
    warnings.filterwarnings("ignore", message=".*could not find the monitored key in the returned metrics")
    # Of the gradients of 1x1 convolutions, and of no consequence.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Lightning 2.6 with torch 2.13.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
