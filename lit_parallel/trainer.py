"""Lightning's Trainer from a config."""

import dataclasses
import inspect
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lit_parallel.config import TrainerOptions
from lit_parallel.errors import UserError


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
    given = dataclasses.asdict(options)
    known = inspect.signature(pl.Trainer.__init__).parameters
    given = {name: value for name, value in given.items() if name in known}
    try:
        return pl.Trainer(**given, callbacks=list(callbacks), **arguments)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"Lightning's Trainer refuses the options under 'trainer': {_one_line(error)}") from error


def check_trainer(options: TrainerOptions) -> None:
    """Let Lightning check the options before anything is written; raises what :func:`build_trainer` raises."""
    build_trainer(options, callbacks=[], logger=False, enable_checkpointing=False)


def check_precision(options: TrainerOptions) -> None:
    """Refuse to sample in an arithmetic that the samples cannot be trusted in.

    Raises:
        UserError: If ``trainer.precision`` is neither 32 nor 64 bits.
    """
    if options.precision not in (None, "32", "32-true", "64", "64-true"):
        raise UserError(
            f"trainer.precision={options.precision} is too coarse for exact samples: leave it out, or use 64-true."
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
    # Lightning 2.6 with torch 2.13.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
