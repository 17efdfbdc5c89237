"""The callbacks of a training run, from its config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor, WeightAveraging
from torch import Tensor

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.jacobi_backprop import JacobiBackprop
from callbacks.jacobi_evaluation import JacobiEvaluation
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.progress_bar import ProgressBar
from callbacks.sample_grid import SampleGrid
from callbacks.seeded_steps import SeededSteps
from callbacks.stop_at_non_finite import StopAtNonFinite
from callbacks.stop_early import StopEarly
from lit_parallel.config import TrainConfig
from lit_parallel.errors import UserError
from lit_parallel.modules.autoregressive import AutoregressiveModule
from lit_parallel.modules.base import TrainableModule
from lit_parallel.options import fields_of, join_key


def build_training_callbacks(config: TrainConfig, folder: Path, model: TrainableModule) -> list[pl.Callback]:
    """All that a config asks for, from checkpoints to the progress bar, in the order in which they are to be called.

    Args:
        config: The resolved config.
        folder: The run folder.
        model: What is trained; a sample grid is drawn only of what can be sampled.

    Raises:
        UserError: If there are options for what cannot be done with this model or these data.
    """
    options = config.callbacks
    validates = config.data.validation_fraction > 0 and config.trainer.limit_val_batches != 0
    monitor = model.monitor if validates else None
    checkpoints = folder / "checkpoints"
    callbacks: list[pl.Callback] = [SeededSteps(config.seed), StopAtNonFinite(checkpoints / "last.ckpt")]
    if not config.trainer.fast_dev_run:  # the weights of a trial are not to be sampled by mistake
        if monitor is not None:
            callbacks.append(BestCheckpoint(checkpoints, monitor))
        callbacks.append(LastCheckpoint(checkpoints))
    is_sampled = isinstance(model, AutoregressiveModule)
    if not is_sampled:
        _refuse_sampling_options(config)
    _refuse_options_of_disabled(config, "jacobi_backprop")
    if is_sampled and options.sample_grid.enabled:
        callbacks.append(
            SampleGrid(
                config.solver,
                every_n_epochs=options.sample_grid.every_n_epochs,
                num_samples=options.sample_grid.num_samples,
                seed=config.seed,
                folder=folder / "sample_grids",
                options=config.sampling,
            )
        )
    if options.ema.enabled:  # after the sample grid, which is to see the averaged weights
        callbacks.append(WeightAveraging(avg_fn=_moving_average(options.ema.decay), use_buffers=False))
    if options.jacobi_backprop.enabled:
        jacobi_backprop = JacobiBackprop(options.jacobi_backprop)
        jacobi_backprop.check(model)
        callbacks.append(jacobi_backprop)
    callbacks += _jacobi_evaluation(config, model)
    if options.early_stopping.enabled:
        if monitor is None:
            raise UserError("callbacks.early_stopping needs validation data: set data.validation_fraction=0.1.")
        callbacks.append(StopEarly(monitor=monitor, patience=options.early_stopping.patience))
    if config.wandb.mode != "disabled":
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    return [*callbacks, *_progress_bar(config)]


def build_testing_callbacks(config: TrainConfig, model: TrainableModule) -> list[pl.Callback]:
    """What a test of a checkpoint plugs in: parallel evaluation, progress bar.

    Args:
        config: The resolved config.
        model: What is tested.
    """
    return [*_jacobi_evaluation(config, model), *_progress_bar(config)]


def _jacobi_evaluation(config: TrainConfig, model: TrainableModule) -> list[pl.Callback]:
    _refuse_options_of_disabled(config, "jacobi_evaluation")
    if not config.callbacks.jacobi_evaluation.enabled:
        return []
    jacobi_evaluation = JacobiEvaluation(config.callbacks.jacobi_evaluation)
    jacobi_evaluation.check(model)
    return [jacobi_evaluation]


def _progress_bar(config: TrainConfig) -> list[pl.Callback]:
    return [ProgressBar()] if config.trainer.enable_progress_bar is not False else []


def _refuse_sampling_options(config: TrainConfig) -> None:
    """Raise a `UserError` about the first option that would be without effect on a model that is not sampled."""
    groups: dict[str, Any] = {"solver": config.solver, "sampling": config.sampling}
    kind = f"model.task={config.model.task}" if hasattr(config.model, "task") else f"model.name={config.model.name}"
    if config.callbacks.sample_grid.enabled:
        groups["callbacks.sample_grid"] = config.callbacks.sample_grid
    for key, options in groups.items():
        if (name := _changed(options)) is not None:
            raise UserError(
                f"Option '{join_key(key, name)}' says how samples are drawn, and a model with {kind} draws none: "
                "leave it out."
            )


def _refuse_options_of_disabled(config: TrainConfig, callback: str) -> None:
    """Raise a `UserError` about the first option that says how a callback works which is not enabled."""
    options, key = getattr(config.callbacks, callback), join_key("callbacks", callback)
    if not options.enabled and (name := _changed(options)) is not None:
        raise UserError(
            f"Option '{join_key(key, name)}' is without effect while '{key}' is not enabled: set {key}.enabled=true, "
            "or leave it out."
        )


def _changed(options: Any) -> str | None:
    """The first option that is not at its default, if there is one."""
    default = type(options)()
    return next((name for name in fields_of(options) if getattr(options, name) != getattr(default, name)), None)


def _moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """An exponential moving average whose decay rises to ``decay``, so that short trainings are not ruled by the start.

    The decay of update n is ``min(decay, (1 + n) / (10 + n))``.
    """

    def average(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        n = float(updates)
        return averaged.lerp(current.to(averaged.dtype), 1 - min(decay, (1 + n) / (10 + n)))

    return average
