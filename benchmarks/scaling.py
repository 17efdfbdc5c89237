"""Images per second on one and on several devices of one host, training and sampling: ``python -m benchmarks.scaling``.

Training is Lightning's DDP on MNIST digits, with a batch of the same size on every device; what counts is the median
step after the first ones. Sampling is ``sample.py`` itself: the same images are drawn from the checkpoint that the
training left, batches dealt to the devices; when a batch was done is read off its shard, and what counts is the median
time between two shards of a process. Every measurement runs in processes of its own, and the images of several devices
must be those of the first measurement bit for bit.

On a GPU the models are those of ``configs/*_mnist.yaml``; on a CPU, where a device is a process with one thread, those
of ``configs/*_mnist5k.yaml``. Options of the config may follow: ``python -m benchmarks.scaling model.filters=8``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common import CONFIGS
from benchmarks.rnn_common import new_report, save_report
from callbacks import build_training_callbacks
from lit_parallel.checkpoint import build_model
from lit_parallel.config import TrainConfig, load_config, save_config
from lit_parallel.data.datasets import build_data
from lit_parallel.trainer import build_trainer

ROOT = CONFIGS.parent
SAMPLING_BATCH = {"gpu": 64, "cpu": 16}
BATCHES = 12
"""Of sampling, by default, for each of the most devices."""


class Stopwatch(pl.Callback):
    """Notes when each training step has ended: on a GPU on the device itself, which so need not be waited for."""

    def __init__(self) -> None:
        self._ends: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            self._ends.append(torch.cuda.Event(enable_timing=True))
            self._ends[-1].record()
        else:
            self._ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From the end of each step to that of the next."""
        pairs = list(itertools.pairwise(self._ends))
        if pairs and isinstance(self._ends[0], torch.cuda.Event):
            torch.cuda.synchronize()
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def train_in(folder: Path) -> None:
    """One process of a training, with its config in a folder, where checkpoints and the times of the steps go."""
    config = load_config(TrainConfig, folder / "config.yaml")
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config.data, config.seed)
    model = build_model(config, data.sample_shape)
    stopwatch = Stopwatch()
    callbacks = [*build_training_callbacks(config, folder, model), stopwatch]
    trainer = build_trainer(config.trainer, callbacks=callbacks, logger=False, default_root_dir=folder)
    trainer.fit(model, datamodule=data)
    if trainer.is_global_zero:
        (folder / "steps.json").write_text(json.dumps(stopwatch.seconds()))


def training(config: TrainConfig, devices: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time the steps of a training in fresh processes; its checkpoint stays in the folder."""
    folder.mkdir()
    config.trainer.devices = devices
    save_config(config, folder / "config.yaml")
    whole = _seconds_of(["-m", "benchmarks.scaling", "--train-in", folder], args)
    seconds = json.loads((folder / "steps.json").read_text())[args.warm_up :]
    return _row(devices, config.data.batch_size, seconds, whole)


def sampling(checkpoint: Path, devices: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time the batches of ``sample.py`` in fresh processes; its shards stay in the folder."""
    size = args.sampling_batch_size
    command = [
        *("sample.py", f"checkpoint={checkpoint}", f"output={folder}", f"num_samples={args.images}"),
        *(f"batch_size={size}", f"trainer.accelerator={args.accelerator}", f"trainer.devices={devices}"),
        *("compare.baselines=[]", "compare.curves=false", "compare.repeats=1", "png=false"),
        *("trainer.enable_progress_bar=false", "wandb.mode=disabled"),
    ]
    whole = _seconds_of(command, args)
    written = [path.stat().st_mtime for path in sorted((folder / "shards").glob("part-*.npz"))]
    of_process = [written[process::devices] for process in range(devices)]  # batches are dealt in strides
    seconds = [after - before for times in of_process for before, after in itertools.pairwise(times)]
    report = json.loads((folder / "report.json").read_text())
    return _row(devices, size, seconds, whole) | {"iterations_mean": report["solution"]["iterations_mean"]}


def images_in(folder: Path) -> np.ndarray:
    """All sampled images ``[n, channels, height, width]``, in order."""
    return np.concatenate([np.load(path)["images"] for path in sorted((folder / "shards").glob("part-*.npz"))])


def measure(
    workload: str, args: argparse.Namespace, folder: Path, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Train and sample on each number of devices.

    Args:
        workload: ``made`` or ``pixelcnnpp``.
        args: Of the command.
        folder: For what is trained and sampled.
        keep: Called with what there is after each measurement, so that an end in the midst loses nothing.

    Returns:
        The config, and rows of ``training`` and ``sampling``, which tell what :func:`_row` says and, compared with the
        first of them, ``ratio`` of images per second, ``efficiency`` (that over the ratio of devices) and, of
        sampling, ``same_images``.
    """
    overrides = [
        *("callbacks.early_stopping.enabled=false", "callbacks.sample_grid.enabled=false", "wandb.mode=disabled"),
        *("trainer.max_epochs=-1", f"trainer.max_steps={args.warm_up + args.steps + 1}", "trainer.limit_val_batches=0"),
        *(f"trainer.accelerator={args.accelerator}", "trainer.enable_progress_bar=false"),
        f"data.name={'mnist' if args.data_folder else 'mnist5k'}",
        *([f"data.folder={json.dumps(args.data_folder)}"] if args.data_folder else []),
        *([f"data.batch_size={args.batch_size}"] if args.batch_size else []),
        *args.overrides,
    ]
    file = f"{workload}_mnist.yaml" if args.accelerator == "gpu" else f"{workload}_mnist5k.yaml"
    config = load_config(TrainConfig, CONFIGS / file, overrides)
    result: dict[str, Any] = {"config": file, "overrides": args.overrides, "batch_size": config.data.batch_size}
    result |= {"training": [], "sampling": []}
    checkpoint = args.checkpoint or folder / f"training-{args.devices[0]}" / "checkpoints" / "last.ckpt"

    def add(what: str, row: dict[str, Any]) -> None:
        rows = result[what]
        rows.append(row)
        row["ratio"] = row["images_per_second"] / rows[0]["images_per_second"]
        row["efficiency"] = row["ratio"] * rows[0]["devices"] / row["devices"]
        took = f"{row['images_per_second']:.4g} images/s, {row['command_seconds']:.0f} s in all"
        print(f"{workload}, {what}, devices: {row['devices']}: {took}", flush=True)
        keep(result)

    for n in args.devices:
        add("training", training(config, n, args, folder / f"training-{n}"))
    for n in args.devices:
        row = sampling(checkpoint, n, args, folder / f"sampling-{n}")
        first = images_in(folder / f"sampling-{args.devices[0]}")
        row["same_images"] = np.array_equal(images_in(folder / f"sampling-{n}"), first)
        add("sampling", row)
    return result


def _row(devices: int, batch_size: int, seconds: list[float], whole: float) -> dict[str, Any]:
    """What was measured on so many devices, of batches of so many images on each."""
    median = statistics.median(seconds)
    return {
        "devices": devices,
        "images_per_second": devices * batch_size / median,
        "batch_seconds": median,
        "batch_seconds_quartiles": [float(value) for value in np.quantile(seconds, [0.25, 0.75])],
        "batches": len(seconds),
        "command_seconds": whole,
    }


def _seconds_of(command: Sequence[str | Path], args: argparse.Namespace) -> float:
    """Run a Python command in a process of its own, which starts the others; ends this one too if it fails."""
    threads = {"OMP_NUM_THREADS": str(args.threads)} if args.accelerator == "cpu" else {}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-3000:]}\nthis failed: python {' '.join(map(str, command))}")
    return time.perf_counter() - start


def print_rows(report: dict[str, Any]) -> None:
    """Print a line for each number of devices."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for column in ("devices", "images/s", "ratio", "efficiency", "same images"):
        table.add_column(column, justify="right")
    for workload, result in report["workloads"].items():
        for what in ("training", "sampling"):
            for row in result[what]:
                table.add_row(
                    f"{workload}, {what}" if row is result[what][0] else "",
                    str(row["devices"]),
                    f"{row['images_per_second']:.{1 if row['images_per_second'] < 100 else 0}f}",
                    f"{row['ratio']:.2f}",
                    f"{row['efficiency']:.0%}",
                    {None: "", True: "yes", False: "NO"}[row.get("same_images")],
                )
    console = Console(width=80)
    console.print(report["environment"]["device_name"], highlight=False)
    console.print(table)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], help="the first one is compared with")
    parser.add_argument(
        "--accelerator", choices=["auto", "cpu", "gpu"], default="auto", help="auto: GPUs where there are some"
    )
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=["made", "pixelcnnpp"],
        default=["pixelcnnpp"],
        metavar="MODEL",
        help="%(choices)s (default: pixelcnnpp)",
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps that are timed")
    parser.add_argument("--warm-up", type=int, default=10, help="training steps before these")
    parser.add_argument("--batch-size", type=int, help="of training, on each device (default: the config's)")
    parser.add_argument("--images", type=int, help=f"images that are sampled (default: {BATCHES} batches a device)")
    parser.add_argument("--sampling-batch-size", type=int, help="default: 64 on a GPU, 16 on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="of each process on a CPU")
    parser.add_argument("--checkpoint", type=Path, help="sample this one, not what was trained here")
    parser.add_argument("--data-folder", help="with MNIST's files (default: the 5,000 embedded digits)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--train-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of the training's config")
    args = parser.parse_args(argv)
    if args.accelerator == "auto":
        args.accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    most = max(args.devices)
    if args.accelerator == "gpu" and most > torch.cuda.device_count():
        parser.error(f"--devices {most}: there are {torch.cuda.device_count()} GPUs; name fewer, or --accelerator cpu")
    args.sampling_batch_size = args.sampling_batch_size or SAMPLING_BATCH[args.accelerator]
    args.images = args.images or BATCHES * most * args.sampling_batch_size
    if args.images < 2 * most * args.sampling_batch_size or args.images % args.sampling_batch_size:
        parser.error(f"--images: whole batches of {args.sampling_batch_size}, at least 2 for each of {most} devices")
    if args.checkpoint is not None:
        args.checkpoint = args.checkpoint.resolve()
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    args = _arguments(argv)
    if args.train_in is not None:
        train_in(args.train_in)
        return {}
    device = torch.device("cuda" if args.accelerator == "gpu" else "cpu")
    report = new_report("scaling", device) | {
        "devices_of_the_host": torch.cuda.device_count() if args.accelerator == "gpu" else os.cpu_count(),
        "steps": args.steps,
        "images": args.images,
        "sampling_batch_size": args.sampling_batch_size,
        "workloads": {},
    }
    if args.accelerator == "cpu":
        report["environment"]["threads"] = args.threads  # of each process
    for workload in args.workload:
        with tempfile.TemporaryDirectory() as folder:

            def keep(result: dict[str, Any], workload: str = workload) -> None:
                report["workloads"][workload] = result
                save_report(report, args.output)

            measure(workload, args, Path(folder), keep)
    print_rows(report)
    return report


if __name__ == "__main__":
    main()
