"""Training with and without parallel backpropagation: the same loss curve, and how long each takes.

``python -m benchmarks.rnn_training`` trains a config by Lightning's Trainer from the same seed, so from the same
weights on the same batches in the same order: with the ordinary backward pass, and with the ``JacobiBackprop``
callback as the config's ``callbacks.jacobi_backprop`` options say (``enabled`` is not needed). Any ``rnn_*.yaml`` can
be named, with overrides; without, it is the adding problem of ``configs/rnn_adding.yaml`` at 500 steps of time.

Two float32 trainings drift apart by rounding alone, faster the longer they last; how fast is measured as well, by a
third training with the ordinary backward pass whose first weights are wrong in the last bit. Times are wall-clock per
training step, with the device synchronised after each, the first steps (compilation, tuning) apart. The iterations that
each layer takes, backward and with ``forward=true`` forward, tell how its memory grows while it learns. Each training
ends with one validation, the ordinary way.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure

from benchmarks.common import CONFIGS
from benchmarks.rnn_common import look, new_report, save_report, tidy
from callbacks import JacobiBackprop
from lit_parallel.checkpoint import build_model
from lit_parallel.config import TrainConfig, load_config
from lit_parallel.data.datasets import build_data
from lit_parallel.plots import new_figure, save_figure
from lit_parallel.recurrent import BackwardRecord, records
from lit_parallel.recurrent.stopwatch import synchronize
from lit_parallel.trainer import build_trainer

_SHORTER = ["data.length=500", "data.size=5000", "model.forget_bias=5.0"]
_SETTLING = 10  # steps that are not among the times
_ORDINARY, _PARALLEL, _NUDGED = "ordinary", "parallel", "ordinary, last bit changed"


class Recorder(pl.Callback):
    """Keeps the loss of every step, when it was done, what solved each layer, and in how many iterations."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.times: list[float] = []
        self.solved_by: dict[str, dict[str, int]] = {}
        self.iterations: dict[str, dict[str, list[int | None]]] = {}
        self._newest: dict[str, BackwardRecord] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize(pl_module.device)
        self.times.append(time.perf_counter())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())
        synchronize(pl_module.device)
        self.times.append(time.perf_counter())
        before, self._newest = self._newest, records(pl_module)
        for name, record in self._newest.items():
            # A record that is not new: the layer went the ordinary way.
            solver = _ORDINARY if record is before.get(name) else record.solver
            steps = self.solved_by.setdefault(name, {})
            steps[solver] = steps.get(solver, 0) + 1
            taken = self.iterations.setdefault(name, {"backward": [], "forward": []})
            taken["backward"].append(None if solver == _ORDINARY else record.iterations)
            forward = None if solver == _ORDINARY else record.forward
            taken["forward"].append(None if forward is None else forward.iterations)


def run(config: TrainConfig, how: str) -> dict[str, Any]:
    """Train once; the losses and the seconds of every step."""
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config.data, config.seed)
    model = build_model(config, data.sample_shape)
    if how == _NUDGED:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.finfo(parameter.dtype).eps)
    recorder = Recorder()
    callbacks: list[pl.Callback] = [recorder]
    if how == _PARALLEL:
        callbacks.append(JacobiBackprop(config.callbacks.jacobi_backprop))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            config.trainer, callbacks=callbacks, logger=False, enable_checkpointing=False, default_root_dir=folder
        )
        trainer.fit(model, datamodule=data)
        validated = _validate(config, model, data)
    seconds = [after - before for before, after in zip(recorder.times, recorder.times[1:], strict=False)]
    settled = seconds[_SETTLING:] or seconds
    return {
        "how": how,
        "device": trainer.strategy.root_device.type,
        "loss": torch.stack(recorder.losses).tolist(),
        "validation": validated,
        "ms_per_step": 1e3 * statistics.median(settled),
        "seconds": sum(seconds),
        "seconds_of_first_steps": sum(seconds[:_SETTLING]),
        "solved_by": recorder.solved_by,
        "iterations": recorder.iterations,
    }


def _validate(config: TrainConfig, model: pl.LightningModule, data: pl.LightningDataModule) -> dict[str, float]:
    """What validation logs, of a model as it is; nothing if nothing was held out."""
    options = dataclasses.replace(config.trainer, limit_val_batches=None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            options, callbacks=[], logger=False, enable_checkpointing=False, default_root_dir=folder
        )
        (metrics,) = trainer.validate(model, datamodule=data, verbose=False) or ({},)
    return dict(metrics)


def shown_iterations(taken: list[int | None], parts: int = 6) -> str:
    """Iterations at the beginning, in between and at the end; a dash for the ordinary way."""
    last = len(taken) - 1
    at = sorted({round(part * last / (parts - 1)) for part in range(parts)})
    return ", ".join(f"{'-' if taken[i] is None else taken[i]} (step {i + 1})" for i in at)


def shown_metrics(metrics: dict[str, float]) -> str:
    """Metrics by name."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def deviation(losses: list[float], reference: list[float]) -> list[float]:
    """Relative deviation of every loss."""
    return [abs(a - b) / abs(b) if b else abs(a) for a, b in zip(losses, reference, strict=True)]


def figure(report: dict[str, Any]) -> Figure:
    """Both loss curves, and how far they are apart."""
    reference = report["runs"][0]["loss"]
    steps = range(1, len(reference) + 1)
    drawn = new_figure(f"Training {report['experiment']} with and without parallel backpropagation", 10, 4)
    of_loss, of_deviation = drawn.subplots(1, 2)
    for number, each in enumerate(report["runs"]):
        if each["how"] != _NUDGED:
            label = f"{each['how']} ({each['ms_per_step']:.1f} ms per step)"
            of_loss.plot(steps, each["loss"], label=label, **look(number))
        if number:
            of_deviation.plot(steps, deviation(each["loss"], reference), label=each["how"], **look(number))
    of_deviation.set_yscale("log", nonpositive="clip")
    tidy(of_loss, "step", "training loss", "Loss")
    tidy(of_deviation, "step", "relative deviation from ordinary training", "Deviation")
    return drawn


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rnn_training", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", help=f"a file in configs/ (default: rnn_adding.yaml with {' '.join(_SHORTER)})")
    parser.add_argument("--override", nargs="*", default=[], help="key=value, as for train.py")
    parser.add_argument("--steps", type=int, default=200, help="of each training (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--output", type=Path, help="JSON file for the results; the figure goes beside it")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    own = [
        f"trainer.max_steps={args.steps}",
        "trainer.max_epochs=-1",
        "trainer.limit_val_batches=0",
        "trainer.num_sanity_val_steps=0",
        "trainer.enable_progress_bar=false",
        "trainer.enable_model_summary=false",
    ]
    overrides = [*([] if args.config else _SHORTER), *args.override, *own]
    path = CONFIGS / (args.config or "rnn_adding.yaml")
    config = load_config(TrainConfig, path, overrides)
    # Not counted: whoever trains first loads libraries for all.
    run(load_config(TrainConfig, path, [*overrides, "trainer.max_steps=2"]), _ORDINARY)
    runs = [run(config, how) for how in (_ORDINARY, _PARALLEL, _NUDGED)]
    ordinary, parallel, nudged = runs
    report = new_report("rnn_training", torch.device(ordinary["device"])) | {
        "experiment": config.experiment,
        "overrides": overrides,
        "largest_relative_deviation": max(deviation(parallel["loss"], ordinary["loss"])),
        "largest_relative_deviation_by_the_last_bit": max(deviation(nudged["loss"], ordinary["loss"])),
        "step_speedup": ordinary["ms_per_step"] / parallel["ms_per_step"],
        "speedup_of_all": ordinary["seconds"] / parallel["seconds"],
        "runs": runs,
    }
    save_report(report, args.output)
    print(f"{config.experiment}, {args.steps} steps, {report['environment']['device_name']}")
    for each in runs:
        print(
            f"{each['how']}: {each['ms_per_step']:.2f} ms per step, {each['seconds']:.2f} s in all, last loss "
            f"{each['loss'][-1]:.6f}, {shown_metrics(each['validation'])} {each['solved_by'] or ''}"
        )
    for name, taken in parallel["iterations"].items():
        for phase in ("forward", "backward"):
            print(f"{name}, {phase} iterations: {shown_iterations(taken[phase])}")
    print(
        f"step {report['step_speedup']:.2f}x, in all {report['speedup_of_all']:.2f}x; largest relative deviation of "
        f"the loss {report['largest_relative_deviation']:.1e} (by a change of the last bit: "
        f"{report['largest_relative_deviation_by_the_last_bit']:.1e})"
    )
    if args.output:
        save_figure(figure(report), args.output.with_suffix(".png"))
    return report


if __name__ == "__main__":
    main()
