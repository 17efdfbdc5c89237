"""Sample a trained model by parallel iteration: ``python sample.py [--checkpoint PATH] [key=value ...]``."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def sample(config: Any) -> Any:
    """Sample as a :class:`lit_parallel.config.SampleConfig` says.

    Returns:
        :class:`lit_parallel.report.SamplingResults` on the first process, ``None`` on the others.

    Example:
        >>> from lit_parallel.config import SampleConfig, load_config
        >>> result = sample(load_config(SampleConfig, overrides=["num_samples=16", "solver.name=jacobi"]))
    """
    from pytorch_lightning.callbacks import RichProgressBar
    from pytorch_lightning.utilities import rank_zero_only

    from lit_parallel.checkpoint import load, saved_config
    from lit_parallel.cli import says_when_interrupted
    from lit_parallel.config import to_container
    from lit_parallel.cublas import keep_sums_whole
    from lit_parallel.data.datasets import build_data
    from lit_parallel.errors import UserError
    from lit_parallel.modules.autoregressive import AutoregressiveModule
    from lit_parallel.report import print_table, write_results
    from lit_parallel.runs import alone_in, file_sha256, new_run_folder, newest_checkpoint, run_folder_of, short_path
    from lit_parallel.sampling.given import load_given
    from lit_parallel.sampling.predict import SampleIndices, SamplingModule, ShardWriter, fitting_into_memory
    from lit_parallel.sampling.sampler import What, check_sampler
    from lit_parallel.sampling.shards import Shards, settings_of
    from lit_parallel.tracking import build_logger, finish, how_to_look, log_choice, log_sampling
    from lit_parallel.trainer import build_trainer, check_sampling, check_trainer, ending_together, lightning_refusals

    keep_sums_whole()
    # Everything that can be wrong is tried before anything is written.
    check_sampling(config.trainer)
    check_trainer(config.trainer)
    checkpoint = Path(config.checkpoint) if config.checkpoint else newest_checkpoint(config.runs_folder)
    model = load(checkpoint)
    # Which one the newest was, and what it held: a training that goes on writes last.ckpt anew.
    drawn_from = {"checkpoint": str(checkpoint), "checkpoint_sha256": file_sha256(checkpoint)}
    if not isinstance(model, AutoregressiveModule):
        raise UserError(
            f"'{checkpoint}' holds a {type(model).__name__}, which draws no samples: name the checkpoint of a model of "
            "images with --checkpoint."
        )
    trained = saved_config(model)
    test_images = None
    if config.inpaint.images == "test":
        trained.data.folder = config.inpaint.folder or trained.data.folder
        data = build_data(trained.data, trained.seed)
        if getattr(rank_zero_only, "rank", 0) == 0:
            data.prepare_data()
        test_images = data.test_images()
    what = What(config.seed, config.sampling, load_given(config.inpaint, model.image_shape, test_images))
    check_sampler(model, config.solver, what)
    experiment = trained.experiment
    if config.output:
        folder = kept = Path(config.output)  # what an earlier run has left there is completed
    else:
        folder = run_folder_of(checkpoint) or new_run_folder(config.runs_folder, experiment)
        kept = new_run_folder(folder, "sampling")

    writer = ShardWriter(kept / "shards")
    progress = [RichProgressBar(leave=False)] if config.trainer.enable_progress_bar is not False else []
    trainer = build_trainer(
        config.trainer,
        callbacks=[writer, *progress],
        logger=False,
        use_distributed_sampler=False,  # it would deal out single samples, not whole batches
        enable_checkpointing=False,
    )
    batch_size = min(config.batch_size, config.num_samples)
    shards, missing = Shards(writer.shards.folder), []
    with alone_in(kept):
        if trainer.is_global_zero:
            shards.open(
                settings_of(
                    drawn_from["checkpoint_sha256"],
                    what,
                    config.solver,
                    batch_size,
                    precision=str(trainer.precision),
                    device=trainer.strategy.root_device.type,
                )
            )
            missing = shards.missing(config.num_samples, batch_size)
        container = to_container(config) | drawn_from
        logger = build_logger(config.wandb, folder, config=container, experiment=experiment, job_type="sample")
        try:
            module = SamplingModule(model, config.solver, batch_size, what)
            with (
                lightning_refusals(),
                says_when_interrupted(lambda: f"go on with: the same command and output={short_path(kept)}"),
                ending_together(trainer),
            ):
                with fitting_into_memory(f"batch_size={batch_size}", "set a smaller batch_size"):
                    trainer.predict(module, SampleIndices(missing), return_predictions=False)
                device = trainer.strategy.root_device
                trainer.strategy.barrier("all shards are written")
                if not trainer.is_global_zero:
                    return None
                shards.close()
                advice = "the images are kept; add compare.baselines=[] and compare.curves=false"
                with fitting_into_memory("the comparison of solvers", advice):
                    results = write_results(config, model.to(device), what, shards, folder, drawn_from, module.choice)
            rows = [measurement.row() for measurement in results.measurements]
            log_sampling(
                logger, results.solution, results.images, rows, results.wall_clock_speedup, pictures=results.pictures
            )
            log_choice(logger, module.choice)
        finally:
            finish(logger)
    print_table(results.measurements, title=results.title)
    again = f"compare with other runs:  python -m lit_parallel.compare {shlex.quote(str(short_path(kept)))}"
    for line in [*results.notes, again, *how_to_look(logger)]:
        print(line)
    return results


def main(argv: Sequence[str]) -> None:
    """The command."""
    from lit_parallel.cli import messages_shown, parse_arguments
    from lit_parallel.config import SampleConfig

    config = parse_arguments(
        SampleConfig,
        argv,
        program="python sample.py",
        description="Sample a trained model by parallel iteration, with the same result as sequentially.",
        examples=[
            "python sample.py",
            "python sample.py --checkpoint PATH solver.name=jacobi_gs solver.block_size=28",
            "python sample.py num_samples=1000 trainer.devices=2 compare.baselines=[]",
        ],
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    with messages_shown():
        sample(config)


if __name__ == "__main__":
    from lit_parallel.cli import run_command

    sys.exit(run_command(main))
