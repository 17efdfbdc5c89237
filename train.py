"""Train a model: ``python train.py [--config PATH] [key=value ...]``."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "made_mnist5k.yaml"


@dataclass
class TrainResult:
    """What :func:`train` returns.

    Attributes:
        folder: The run folder.
        checkpoint: The last checkpoint, or ``None`` if none was written (``fast_dev_run``).
        metrics: The last value of every logged metric.
        model: The trained LightningModule.
    """

    folder: Path
    checkpoint: Path | None
    metrics: dict[str, float]
    model: Any


def train(config: Any) -> TrainResult:
    """Train as a :class:`lit_parallel.config.TrainConfig` says.

    Example:
        >>> from lit_parallel.config import TrainConfig, load_config
        >>> result = train(load_config(TrainConfig, "configs/made_mnist5k.yaml", ["trainer.max_epochs=3"]))
    """
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import rank_zero_only

    from callbacks import build_training_callbacks
    from lit_parallel.checkpoint import build_model
    from lit_parallel.config import save_config, to_container
    from lit_parallel.data.datasets import build_data
    from lit_parallel.modules.autoregressive import AutoregressiveModule
    from lit_parallel.runs import new_run_folder
    from lit_parallel.sampling.sampler import Sampler, What
    from lit_parallel.tracking import build_logger, finish, how_to_look
    from lit_parallel.trainer import build_trainer, check_trainer, lightning_refusals

    # Everything that can be wrong is tried before a run folder exists.
    check_trainer(config.trainer)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config.data, config.seed)
    if getattr(rank_zero_only, "rank", 0) == 0:  # the others wait inside Lightning until the first has fetched files
        data.prepare_data()
        data.setup("fit")
    model = build_model(config, data.sample_shape)
    model.check_data(data)
    model.compile_network = config.compile
    if isinstance(model, AutoregressiveModule) and config.callbacks.sample_grid.enabled:
        Sampler(model, config.solver, 1, What(config.seed, config.sampling))
    build_training_callbacks(config, Path(), model)
    folder = new_run_folder(config.runs_folder, config.experiment)
    logger = build_logger(
        config.wandb, folder, config=to_container(config), experiment=config.experiment, job_type="train"
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
            save_config(config, folder / "config.yaml")
            size = sum(parameter.numel() for parameter in model.parameters())
            print(f"{config.experiment}: {size:,} parameters; run folder {folder}")
        with lightning_refusals():
            trainer.fit(model, datamodule=data)
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            if trainer.state.finished:
                trainer.test(model, datamodule=data, verbose=False)
                metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    finally:
        finish(logger)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    result = TrainResult(folder, checkpoint if checkpoint.is_file() else None, metrics, model)
    rank_zero_only(_report)(result, how_to_look(logger))
    return result


def _report(result: TrainResult, hints: list[str]) -> None:
    from lit_parallel.modules.autoregressive import AutoregressiveModule

    for metric in result.model.metrics:
        for name in (f"train/{metric}", f"val/{metric}", f"test/{metric}"):
            if name in result.metrics:
                print(f"{name}: {result.metrics[name]:.3f}")
    if any(not math.isfinite(value) for value in result.metrics.values()):
        print("training diverged: its values are not finite; train again with a smaller optimizer.lr")
    elif result.checkpoint is not None:
        print(f"checkpoint: {result.checkpoint}")
        if isinstance(result.model, AutoregressiveModule):
            print(f"sample it:  python sample.py --checkpoint {result.checkpoint}")
    for line in hints:
        print(line)


@contextlib.contextmanager
def _messages_shown() -> Iterator[None]:
    """Show what is logged about the run, such as which solver was chosen; by the first process only."""
    from pytorch_lightning.utilities import rank_zero_only

    logger, handler = logging.getLogger("lit_parallel"), logging.StreamHandler()
    level = logger.level
    logger.setLevel(logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.CRITICAL)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def main(argv: Sequence[str]) -> None:
    """The command."""
    from lit_parallel.cli import parse_arguments
    from lit_parallel.config import TrainConfig

    config = parse_arguments(
        TrainConfig,
        argv,
        program="python train.py",
        description="Train a model; everything it leaves is in runs/<experiment>/<time>/.",
        examples=[
            "python train.py",
            "python train.py --config configs/made_cifar10.yaml trainer.max_epochs=3 data.folder=PATH",
            "python train.py optimizer.lr=3e-4 model.hidden_sizes=[1024,1024] wandb.mode=disabled",
        ],
        default_config=DEFAULT_CONFIG,
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    with _messages_shown():
        train(config)


if __name__ == "__main__":
    from lit_parallel.cli import run_command

    sys.exit(run_command(main))
