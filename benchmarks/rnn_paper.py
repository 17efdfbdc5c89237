"""The paper's experiment with a recurrent network (Song et al. 2021, section 4.1): Jacobi backpropagation in training.

``python -m benchmarks.rnn_paper`` trains the softplus RNN of ``configs/rnn_mnist5k.yaml`` (128 hidden units; predicts
the 100 pixels of a 10x10 digit one after another; one image per step; 200 steps of SGD at 1e-4) by ordinary
backpropagation and by K Jacobi iterations per backward pass, K in 10, 20, 30, 50, 80, ten times from other weights and
in another order of the images. A fixed K is truncated backpropagation with K steps. Drawn are

* the gradient's error against the number of Jacobi iterations, before and after training: norm over all parameters
  relative to that of full backpropagation's gradient, in float64, mean over images and repeats;
* the training loss against steps, and against wall-clock time: mean over repeats, and over 10 steps. A step's time
  includes its forward pass, which is the same for all, and the optimiser.

Chosen here, and not taken from the paper: the loss is the mean cross-entropy per pixel, in nats, over all 256
levels; pixels enter as numbers from 0 to 1; images are reduced by area; weights begin as PyTorch's own; there is no
momentum. Ordinary backpropagation is PyTorch's autograd through the 100 steps.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common import CONFIGS
from benchmarks.rnn_common import look, new_report, save_report, tidy
from lit_parallel.checkpoint import build_model
from lit_parallel.config import TrainConfig, load_config
from lit_parallel.data.datasets import build_data
from lit_parallel.modules.sequence import NextPixelModule
from lit_parallel.plots import new_figure, save_figure
from lit_parallel.recurrent import parallelize, restore
from lit_parallel.recurrent.comparison import relative_error
from lit_parallel.recurrent.stopwatch import synchronize

_FULL = "full"
_SMOOTHED = 10  # steps


def loss_of(model: NextPixelModule, images: Tensor) -> Tensor:
    """Mean cross-entropy per pixel, in nats."""
    return -model.log_likelihood(images, torch.zeros(images.shape, device=images.device)).mean() / model.length


def train(model: NextPixelModule, batches: list[Tensor], lr: float, iterations: int | None) -> dict[str, list[float]]:
    """Train in place.

    Args:
        model: With the weights to begin from.
        batches: One for each step, ``[batch, channels, height, width]``.
        lr: Of SGD without momentum.
        iterations: Of Jacobi per backward pass; None: ordinary backpropagation.

    Returns:
        The loss before each step, and the seconds until its end.
    """
    device = batches[0].device
    if iterations is not None:
        parallelize(model, solver="jacobi", iterations=iterations, probe_every=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss_of(model, batches[0]).backward()  # not timed: the first pass loads libraries
    losses, seconds = [], []
    synchronize(device)
    began = time.perf_counter()
    for images in batches:
        optimizer.zero_grad()
        loss = loss_of(model, images)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    restore(model)
    return {"loss": torch.stack(losses).tolist(), "seconds": seconds}


def gradient_errors(model: NextPixelModule, batches: list[Tensor], iterations: Sequence[int]) -> list[float]:
    """Mean relative error of the gradient after each number of Jacobi iterations, in float64."""
    exact_model = copy.deepcopy(model).double()
    weights = list(exact_model.parameters())
    exact = [torch.autograd.grad(loss_of(exact_model, images), weights) for images in batches]
    errors = []
    for k in iterations:
        parallelize(exact_model, solver="jacobi", iterations=k, probe_every=0)
        found = [torch.autograd.grad(loss_of(exact_model, images), weights) for images in batches]
        restore(exact_model)
        errors.append(statistics.mean(relative_error(a, b) for a, b in zip(found, exact, strict=True)))
    return errors


def repeat(args: argparse.Namespace, seed: int, iterations: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Train by every method from the same weights on the same images."""
    config = load_config(TrainConfig, CONFIGS / f"rnn_{args.data}.yaml", [f"seed={seed}"])
    torch.manual_seed(seed)
    data = build_data(config.data, seed)
    data.prepare_data()
    model = build_model(config, data.sample_shape).to(device)
    assert isinstance(model, NextPixelModule)
    batches = [batch[0].to(device) for batch in itertools.islice(data.train_dataloader(), args.steps)]
    some = batches[: args.error_images]
    result: dict[str, Any] = {"seed": seed, "errors_before": gradient_errors(model, some, iterations), "curves": {}}
    for name in (_FULL, *args.iterations):
        trained = copy.deepcopy(model)
        result["curves"][str(name)] = train(trained, batches, config.optimizer.lr, None if name == _FULL else name)
        if name == _FULL:
            result["errors_after"] = gradient_errors(trained, some, iterations)
    return result


def summary(repeats: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method: time of a step and loss at the end, beside full backpropagation's."""
    rows: list[dict[str, Any]] = []
    for name in repeats[0]["curves"]:
        curves = [each["curves"][name] for each in repeats]
        full = [each["curves"][_FULL] for each in repeats]
        ms = 1e3 * statistics.median(curve["seconds"][-1] / len(curve["seconds"]) for curve in curves)
        rows.append(
            {
                "iterations": name,
                "ms_per_step": ms,
                "speedup": (rows[0]["ms_per_step"] if rows else ms) / ms,
                "last_loss": statistics.mean(_last(curve) for curve in curves),
                "last_loss_minus_full": statistics.mean(
                    _last(curve) - _last(reference) for curve, reference in zip(curves, full, strict=True)
                ),
            }
        )
    return rows


def _last(curve: dict[str, list[float]]) -> float:
    return statistics.mean(curve["loss"][-_SMOOTHED:])


def figure(report: dict[str, Any]) -> Figure:
    """Gradient error against iterations; loss against steps and against time."""
    repeats, iterations = report["repeats"], report["error_iterations"]
    drawn = new_figure("Jacobi backpropagation of a softplus RNN, H = 128, batch 1 (Song et al. 2021)", 13, 4.2)
    of_error, of_steps, of_time = drawn.subplots(1, 3)
    for number, when in enumerate(("before", "after")):
        errors = torch.tensor([each[f"errors_{when}"] for each in repeats], dtype=torch.float64)
        of_error.plot(iterations, errors.mean(dim=0), label=f"{when} training", **look(number))
    of_error.set_yscale("log")
    tidy(of_error, "Jacobi iterations", "relative error of the gradient (float64)", "Gradient error")
    for number, name in enumerate(repeats[0]["curves"]):
        curves = [each["curves"][name] for each in repeats]
        loss = torch.tensor([curve["loss"] for curve in curves], dtype=torch.float64).mean(dim=0)
        width = min(_SMOOTHED, len(loss))
        smooth = loss.unfold(0, width, 1).mean(dim=1)
        seconds = torch.tensor([curve["seconds"] for curve in curves]).mean(dim=0)[width - 1 :]
        label = "full backpropagation" if name == _FULL else f"K = {name}"
        wide = {"linewidth": 4, "alpha": 0.4} if name == _FULL else {}  # to be seen below those that coincide with it
        of_steps.plot(range(width, len(loss) + 1), smooth, label=label, **look(number) | wide)
        of_time.plot(seconds, smooth, label=label, **look(number) | wide)
    tidy(of_steps, "step", "training loss (nats per pixel)", "Loss against steps")
    tidy(of_time, "wall-clock time (s)", "training loss (nats per pixel)", "Loss against time", legend=False)
    return drawn


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rnn_paper", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--data", default="mnist5k", choices=["mnist5k", "mnist"], help="mnist5k needs no download")
    parser.add_argument("--iterations", type=int, nargs="+", default=[10, 20, 30, 50, 80], help="Jacobi iterations K")
    parser.add_argument("--repeats", type=int, default=10, help="trainings, each of another seed (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of training, for each K (%(default)s)")
    parser.add_argument("--error-images", type=int, default=5, help="images that gradient errors are a mean over")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; the products are small")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (here: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results; the figure goes beside it")
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    report = new_report("rnn_paper", device) | {
        "data": args.data,
        "steps": args.steps,
        "repeats_of_the_paper": 10,
        "error_iterations": [1, 2, *range(5, 101, 5)],
        "repeats": [],
    }
    for seed in range(args.repeats):
        report["repeats"].append(repeat(args, seed, report["error_iterations"], device))
        report["summary"] = summary(report["repeats"])
        save_report(report, args.output)
    print(f"{args.repeats} repeats of {args.steps} steps on {args.data}, {report['environment']['device_name']}")
    for row in report["summary"]:
        print(
            f"{row['iterations']:>5} iterations: {row['ms_per_step']:.2f} ms per step ({row['speedup']:.2f}x), loss at "
            f"the end {row['last_loss']:.4f} ({row['last_loss_minus_full']:+.4f} from full backpropagation's)"
        )
    if args.output:
        save_figure(figure(report), args.output.with_suffix(".png"))
    return report


if __name__ == "__main__":
    main()
