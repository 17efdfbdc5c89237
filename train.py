"""Train a model, go on training, or test a checkpoint: ``python train.py [--config|--resume PATH] [key=value ...]``."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "made_mnist5k.yaml"


@dataclass
class TrainResult:
    """What :func:`train` and :func:`evaluate` return.

    Attributes:
        folder: The run folder.
        checkpoint: The last checkpoint, or ``None`` if none was written (``fast_dev_run``); of a test, what was tested,
            or ``None`` if it was the weights that the model starts from.
        metrics: The last value of every logged metric.
        model: The LightningModule.
    """

    folder: Path
    checkpoint: Path | None
    metrics: dict[str, float]
    model: Any


def train(config: Any) -> TrainResult:
    """Train as a :class:`lit_parallel.config.TrainConfig` says; with ``stage=test``, the same as :func:`evaluate`.

    Example:
        >>> from lit_parallel.config import TrainConfig, load_config
        >>> result = train(load_config(TrainConfig, "configs/made_mnist5k.yaml", ["trainer.max_epochs=3"]))
    """
    return evaluate(config) if config.stage == "test" else _train(config)


def resume(path: str | Path, overrides: Sequence[str] = ()) -> TrainResult:
    """Go on with a training that was interrupted, at its last finished epoch and in its folder.

    What was done after that epoch is done again, in the same way: the result is that of a training without
    interruption, on the CPU bit for bit.

    Args:
        path: The run folder, or its ``checkpoints/last.ckpt``.
        overrides: Assignments of the options in :data:`lit_parallel.resume.MAY_CHANGE`.

    Example:
        >>> result = resume("runs/made_mnist5k/2026-01-01_12-00-00", ["trainer.max_epochs=100"])
    """
    from lit_parallel.resume import InterruptedRun

    run = InterruptedRun(path)
    return _train(run.config(overrides), run)


def _train(config: Any, run: Any = None) -> TrainResult:
    """Train, anew or from where an :class:`~lit_parallel.resume.InterruptedRun` stopped."""
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import rank_zero_only

    from callbacks import build_training_callbacks
    from lit_parallel.checkpoint import build_model
    from lit_parallel.cli import says_when_interrupted
    from lit_parallel.config import save_config, to_container
    from lit_parallel.data.datasets import build_data
    from lit_parallel.errors import UserError
    from lit_parallel.modules.autoregressive import AutoregressiveModule
    from lit_parallel.resume import how_to_resume
    from lit_parallel.runs import RunState, alone_in, new_run_folder, written_whole
    from lit_parallel.sampling.sampler import What, check_sampler
    from lit_parallel.tracking import build_logger, finish, how_to_look, run_id
    from lit_parallel.trainer import build_trainer, check_trainer, ending_together, lightning_refusals, restoring

    # Everything that can be wrong is tried before a run folder exists.
    if config.checkpoint is not None:
        raise UserError("checkpoint names what is tested: set stage=test, or leave it out.")
    check_trainer(config.trainer)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config.data, config.seed)
    first = getattr(rank_zero_only, "rank", 0) == 0
    if first:  # the others wait inside Lightning until it has fetched files
        data.prepare_data()
        data.setup("fit")
    model = build_model(config, data.sample_shape)
    model.check_data(data)
    saved = None if run is None else run.check(config, data.sample_shape)
    if saved is None:
        model.load_initial_weights()
    model.compile_network = config.compile
    if isinstance(model, AutoregressiveModule) and config.callbacks.sample_grid.enabled:
        check_sampler(model, config.solver, What(config.seed, config.sampling))
    build_training_callbacks(config, Path(), model)
    folder = new_run_folder(config.runs_folder, config.experiment) if run is None else run.folder
    state = RunState() if run is None else run.state
    state.finished = False
    with (
        alone_in(folder),
        # The other processes do not know the folder.
        says_when_interrupted(lambda: how_to_resume(folder) if first else "the first process says how to go on"),
    ):
        state.write(folder)  # which must be possible
        logger = build_logger(
            config.wandb,
            folder,
            config=to_container(config),
            experiment=config.experiment,
            job_type="train",
            goes_on=state.wandb_id,
        )
        try:
            trainer = build_trainer(
                config.trainer,
                callbacks=build_training_callbacks(config, folder, model),
                logger=logger if logger is not None else False,
                default_root_dir=folder,
                enable_checkpointing=not config.trainer.fast_dev_run,
            )
            if trainer.is_global_zero:
                state.wandb_id = run_id(logger) or state.wandb_id
                state.write(folder)
                with written_whole(folder / "config.yaml") as path:
                    save_config(config, path)
                size = sum(parameter.numel() for parameter in model.parameters())
                print(f"{config.experiment}: {size:,} parameters; run folder {folder}")
                if saved is not None:
                    print(f"goes on after epoch {saved['epoch']} (step {saved['global_step']})")
            checkpoint = None if run is None else run.checkpoint
            with lightning_refusals(), restoring(trainer, checkpoint), ending_together(trainer):
                trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
                metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
                if trainer.state.finished:
                    trainer.test(model, datamodule=data, verbose=False)
                    metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
            state.finished = True
            state.write(folder)
        finally:
            finish(logger)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    result = TrainResult(folder, checkpoint if checkpoint.is_file() else None, metrics, model)
    rank_zero_only(_report)(result, how_to_look(logger))
    return result


def evaluate(config: Any) -> TrainResult:
    """Test a checkpoint on the test set, as a :class:`lit_parallel.config.TrainConfig` with ``stage=test`` says.

    The model is what the checkpoint holds; data, trainer and callbacks are the config's. Without ``checkpoint`` it is
    the model with the weights that it would start training from, if the config names any (``model.pretrained``,
    ``model.weights``), otherwise the newest checkpoint of the experiment. The run folder gets a ``report.json``.

    Example:
        >>> from lit_parallel.config import TrainConfig, load_config
        >>> result = evaluate(load_config(TrainConfig, "configs/made_mnist5k.yaml", ["stage=test"]))
    """
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import rank_zero_only

    from callbacks import build_testing_callbacks
    from lit_parallel.config import save_config, to_container
    from lit_parallel.data.datasets import build_data
    from lit_parallel.report import environment, write_json
    from lit_parallel.runs import file_sha256, new_run_folder, short_path
    from lit_parallel.tracking import build_logger, finish, how_to_look
    from lit_parallel.trainer import build_trainer, check_trainer, ending_together, lightning_refusals

    # Everything that can be wrong is tried before a run folder exists.
    check_trainer(config.trainer)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config.data, config.seed)
    model, config, notes = _what_to_test(config, data)
    if getattr(rank_zero_only, "rank", 0) == 0:
        data.prepare_data()
        data.setup("test")
    model.check_data(data)
    if config.checkpoint is None:
        _start_from_weights(model, data)
    callbacks = build_testing_callbacks(config, model)
    folder = new_run_folder(config.runs_folder, config.experiment)
    container = to_container(config)
    sha256 = None if config.checkpoint is None else file_sha256(Path(config.checkpoint))
    logger = build_logger(
        config.wandb,
        folder,
        config=container | {"checkpoint_sha256": sha256},
        experiment=config.experiment,
        job_type="test",
    )
    try:
        trainer = build_trainer(
            config.trainer,
            callbacks=callbacks,
            logger=logger if logger is not None else False,
            default_root_dir=folder,
            enable_checkpointing=False,
        )
        with lightning_refusals(), ending_together(trainer):
            trainer.test(model, datamodule=data, verbose=False)
    finally:
        finish(logger)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    result = TrainResult(folder, None if config.checkpoint is None else Path(config.checkpoint), metrics, model)
    if trainer.is_global_zero:
        save_config(config, folder / "config.yaml")
        report = {
            "checkpoint": config.checkpoint,
            "checkpoint_sha256": sha256,
            "weights": model.initial_weights if config.checkpoint is None else None,
            "config": container,
            "environment": environment(trainer.strategy.root_device),
            "metrics": metrics,
        }
        write_json(report, folder / "report.json")
        print(f"tested: {config.checkpoint or model.initial_weights}")
        _print_metrics(result)
        for line in (*notes, f"report: {short_path(folder / 'report.json')}", *how_to_look(logger)):
            print(line)
    return result


def _what_to_test(config: Any, data: Any) -> tuple[Any, Any, list[str]]:
    """The model, the config with what is known of it, and lines for the user."""
    from lit_parallel.checkpoint import build_model, load, saved_config
    from lit_parallel.errors import UserError
    from lit_parallel.runs import newest_checkpoint

    if config.checkpoint is None:
        model = build_model(config, data.sample_shape)
        if model.initial_weights is not None:
            return model, config, []
    checkpoint = Path(config.checkpoint or newest_checkpoint(config.runs_folder, config.experiment))
    model = load(checkpoint)
    saved = saved_config(model).model
    if saved.name != config.model.name:
        raise UserError(
            f"'{checkpoint}' holds a model of model.name={saved.name}, and the config says {config.model.name}: name "
            "the config that it was trained with (--config; its run folder has a config.yaml)."
        )
    shapes = ["x".join(map(str, shape)) for shape in (model.hparams["sample_shape"], data.sample_shape)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"'{checkpoint}' was trained on samples of {shapes[0]}, and the data have {shapes[1]}: test it on its own."
        )
    other = [f"model.{name}={value}" for name, value in vars(saved).items() if value != getattr(config.model, name)]
    notes = [f"as the checkpoint says, not the config: {', '.join(other)}"] if other else []
    return model, dataclasses.replace(config, model=saved, checkpoint=str(checkpoint)), notes


def _start_from_weights(model: Any, data: Any) -> None:
    from lit_parallel.errors import UserError

    model.load_initial_weights()
    if data.num_classes != model.num_classes:
        raise UserError(
            f"the weights know {model.num_classes} classes and the data have {data.num_classes}, so that labels mean "
            "different things: test them on the data that they were trained on."
        )


def _print_metrics(result: TrainResult) -> None:
    for metric in result.model.metrics:
        for name in (f"train/{metric}", f"val/{metric}", f"test/{metric}"):
            if name in result.metrics:
                print(f"{name}: {result.metrics[name]:.3f}")


def _report(result: TrainResult, hints: list[str]) -> None:
    from lit_parallel.modules.autoregressive import AutoregressiveModule

    _print_metrics(result)
    if any(not math.isfinite(value) for value in result.metrics.values()):
        print("training diverged: its values are not finite; train again with a smaller optimizer.lr")
    elif result.checkpoint is not None:
        print(f"checkpoint: {result.checkpoint}")
        if isinstance(result.model, AutoregressiveModule):
            print(f"sample it:  python sample.py --checkpoint {shlex.quote(str(result.checkpoint))}")
        else:
            config, checkpoint = (shlex.quote(str(path)) for path in (result.folder / "config.yaml", result.checkpoint))
            print(f"test it:    python train.py --config {config} --checkpoint {checkpoint} stage=test")
    for line in hints:
        print(line)


def main(argv: Sequence[str]) -> None:
    """The command."""
    from lit_parallel.cli import messages_shown, parse_arguments
    from lit_parallel.config import TrainConfig

    run = None

    def resumed(path: str, overrides: Sequence[str]) -> TrainConfig:
        from lit_parallel.resume import InterruptedRun

        nonlocal run
        run = InterruptedRun(path)
        return run.config(overrides)

    config = parse_arguments(
        TrainConfig,
        argv,
        program="python train.py",
        description="Train a model, or test a checkpoint; everything it leaves is in runs/<experiment>/<time>/.",
        examples=[
            "python train.py --config configs/made_cifar10.yaml data.folder=PATH",
            "python train.py --resume runs/made_cifar10/2026-01-01_12-00-00",
            "python train.py --config configs/densenet_mnist5k.yaml stage=test",
        ],
        default_config=DEFAULT_CONFIG,
        resume=resumed,
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    with messages_shown():
        train(config) if run is None else _train(config, run)


if __name__ == "__main__":
    from lit_parallel.cli import run_command

    sys.exit(run_command(main))
