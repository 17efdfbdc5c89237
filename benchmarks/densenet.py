"""Evaluating DenseNets: the ordinary ways, and the kernels' sequential and Jacobi evaluation, in the same run.

``python -m benchmarks.densenet`` trains a DenseNet (``--config``, or takes ``--checkpoint``), counts on its test images
how many Jacobi iterations lead how near, and times it, and DenseNet-201 at 224 x 224 pixels beside it: as PyTorch runs
it (eager), in one CUDA graph, under ``torch.compile`` (default mode) in one CUDA graph, and by the kernels here,
sequentially, by GS-Jacobi and Jacobi iteration, and as ``auto`` chooses. Without a GPU nothing is timed.

DenseNet-201 has the weights of ``--weights``, or random ones, whose running statistics are those of some batches: then
its times count and its agreement says little. Its images are the same test images, enlarged.

*ms* is wall-clock, from the call until the device has finished, images and logits being on the device: the median of
many calls. *Top 5* is the part of the test images with the five highest logits in the same order as by the ordinary
forward in the same precision; the *error* is the distance of the logits from float64's at the same weights (the
largest of an image's, relative to its largest logit; the largest of all images), compared with the ordinary forward's
own. In float32 convolutions may round to TF32, PyTorch's default, in all ways.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import trained
from benchmarks.densenet_convergence import convergence, print_convergence, save_convergence_figure
from benchmarks.densenet_ways import (
    Auto,
    CompiledRival,
    Fused,
    Way,
    captured,
    compile_kernels,
    iteration_costs,
    kernels_launched,
    laid_out,
    plans,
    time_way,
)
from benchmarks.rnn_common import new_report, save_report
from lit_parallel.checkpoint import load
from lit_parallel.config import TrainConfig, load_config
from lit_parallel.data.datasets import build_data
from lit_parallel.dense.auto import agreement, in_float64, relative_error
from lit_parallel.dense.fused import FusedWeights
from lit_parallel.dense.structure import structure_of
from lit_parallel.modules.densenet import DenseNetModule, build_densenet
from lit_parallel.networks import densenet as networks
from lit_parallel.networks.densenet_weights import load_published

CONFIGS = Path(__file__).parent.parent / "configs"
PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
SETTINGS = [(4, 2), (8, 2), (8, 3), (16, 2), (16, 4)]
JACOBI = [2, 4, 8]

OVER_EAGER, OVER_COMPILED, LOSS, ITERATION_MS = 10, 1.5, 2, 0.025  # aims, at batch 1
_EXACT_AT_A_TIME = 16  # images in float64


@dataclass
class Subject:
    """A network that is timed.

    Attributes:
        name: In the report.
        network: In float32, in evaluation mode, on the CPU.
        build: Makes another one, of any weights.
        images: ``[n, channels, height, width]`` as it reads them, on the CPU.
        is_trained: Whether its agreement says something.
    """

    name: str
    network: nn.Module
    build: Callable[[], nn.Module]
    images: Tensor
    is_trained: bool

    def typed(self, precision: str, device: torch.device, layout: str = "contiguous") -> nn.Module:
        """A copy for a precision on a device."""
        network = copy.deepcopy(self.network).to(device, PRECISIONS[precision])
        return laid_out(network, LAYOUTS[layout]).eval()

    def batches(self, precision: str, batch: int, device: torch.device, layout: str = "contiguous") -> list[Tensor]:
        """Its images in batches of one size; those left over are left out."""
        images = self.images.to(device, PRECISIONS[precision])
        whole = images[: len(images) // batch * batch].split(batch)
        return [part.contiguous(memory_format=LAYOUTS[layout]) for part in whole]


@torch.no_grad()
def measure(
    subject: Subject, precision: str, batch: int, rivals: dict[str, CompiledRival], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time every way in one case, and compare its logits with the ordinary ones and with float64's."""
    device = torch.device(args.device)
    rows: list[dict[str, Any]] = []
    logits: dict[str, Tensor] = {}

    def add(method: str, way: Way, batches: list[Tensor], **facts: Any) -> None:
        logits[method] = torch.cat([way(images).double() for images in batches])
        timing = time_way(way, batches[0], args.repeats, args.way_seconds)
        if batch == 1 and device.type == "cuda":
            facts["launched"] = kernels_launched(way, batches[0])
        rows.append({"method": method, **timing, **facts})

    for layout in LAYOUTS:
        network, batches = (
            subject.typed(precision, device, layout),
            subject.batches(precision, batch, device, layout),
        )
        rows.append(
            {"method": "eager", "layout": layout} | time_way(network, batches[0], args.repeats, args.way_seconds)
        )
        if device.type == "cuda":
            add(f"CUDA graph, {layout}", captured(network, batches[0]), batches, layout=layout)
        else:
            add(f"eager, {layout}", network, batches, layout=layout)
    rows = _faster_layout(rows)
    ordinary = logits[next(name for name in logits if name.endswith(rows[-1]["layout"]))]
    exact = _exactly(subject, precision, ordinary, device)
    for layout, rival in rivals.items():
        row: dict[str, Any] = {"method": f"torch.compile, CUDA graph, {layout}"} | rival.ready(0)
        if "failed" not in row:
            found = rival.measure(
                subject.typed(precision, device, layout),
                torch.stack(subject.batches(precision, batch, device)),
                args.repeats,
                args.way_seconds,
            )
            logits[row["method"]] = found.pop("logits").flatten(0, 1).to(device)
            row |= found | {"layout": layout}
        rows.append(row)

    network, batches = subject.typed(precision, device), subject.batches(precision, batch, device)
    structure = structure_of(network)
    weights = FusedWeights(structure, PRECISIONS[precision])
    for name, plan in plans(structure, args.settings, args.jacobi).items():
        fused = Fused(structure, plan, batches[0], weights)
        add(name, fused, batches)
        for images in batches[: args.checked]:
            fused.check(images)
        sizes = [len(block.layers) for block in structure.blocks]
        rows[-1] |= {
            "largest_change": fused.largest_change,
            "iterations": [block.iterations_of(layers) for block, layers in zip(plan.blocks, sizes, strict=True)],
            "evaluations": [block.evaluations_of(layers) for block, layers in zip(plan.blocks, sizes, strict=True)],
        }
    auto = Auto(subject.typed(precision, device, "channels-last"), batches[0])
    add("auto", auto, batches)
    rows[-1] |= auto.took()

    own = relative_error(ordinary[: len(exact)], exact)
    for row in rows:
        if (found_logits := logits.get(row["method"])) is not None:
            row |= {
                "top1": agreement(found_logits, ordinary, 1),
                "top5": agreement(found_logits, ordinary, 5),
                "top5_set": _same_five(found_logits, ordinary),
                "top5_of_float64": agreement(found_logits[: len(exact)], exact, 5),
                "difference": relative_error(found_logits, ordinary),
                "error": relative_error(found_logits[: len(exact)], exact),
                "error_to_ordinary": relative_error(found_logits[: len(exact)], exact) / own if own else None,
            }
    compiled = [row["ms"] for row in rows if row["method"].startswith("torch.compile") and "ms" in row]
    for row in rows:
        if "ms" in row:
            row["over_eager"] = rows[0]["ms"] / row["ms"]
            row["over_compiled"] = min(compiled) / row["ms"] if compiled else None
    return rows


def _faster_layout(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The faster row of each ordinary way; eager first."""
    eager = [row for row in rows if row["method"] == "eager"]
    others = [row for row in rows if row["method"] != "eager"]
    return [min(kind, key=lambda row: row["ms"]) for kind in (eager, others)]


def _exactly(subject: Subject, precision: str, like: Tensor, device: torch.device) -> Tensor:
    structure = structure_of(subject.typed(precision, device))
    images = subject.images[: len(like)].to(device, PRECISIONS[precision])
    return torch.cat([in_float64(structure, part) for part in images.split(_EXACT_AT_A_TIME)])


def _same_five(found: Tensor, expected: Tensor) -> float:
    """Part of the images with the same five classes of the highest logits, in any order."""
    best, expected_best = (x.topk(min(5, x.shape[1]), dim=1).indices.sort(dim=1).values for x in (found, expected))
    return float((best == expected_best).all(dim=1).double().mean())


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the short table of one case."""
    table = Table(title=title, title_justify="left", title_style="")
    for column in (
        "method", "ms", "queued", "over eager", "over compile", "launched", "top 1", "top 5", "error", "/ ordinary",
        "change",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        name = row["method"]
        if name == "auto":
            iterations = " + ".join(str(number) for number in row["iterations"])
            name += f": {row['way']}" + (f" {row['solver']}, {iterations}" if row["way"] != "ordinary" else "")
        elif name == "eager":
            name += f", {row['layout']}"
        if "failed" in row:
            table.add_row(name, row["failed"])
            continue
        table.add_row(
            name,
            f"{row['ms']:.3f}",
            f"{row['queued_ms']:.3f}",
            f"{row['over_eager']:.2f}x",
            f"{row['over_compiled']:.2f}x" if row["over_compiled"] else "",
            str(row.get("launched", "")),
            *((f"{100 * row['top1']:.1f} %", f"{100 * row['top5']:.1f} %") if "top1" in row else ("", "")),
            f"{row['error']:.1e}" if "error" in row else "",
            f"{row['error_to_ordinary']:.2f}" if row.get("error_to_ordinary") is not None else "",
            f"{row['largest_change']:.0e}" if row.get("largest_change") else "",
        )
    Console(width=170).print(table)


def compare_with_aims(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every aim, for the setting that ``auto`` picks at batch 1, with what was measured of it."""
    found = []
    for case in report["cases"]:
        row = next((row for row in case.get("rows", []) if row["method"] == "auto"), None)
        if case["batch"] != 1 or row is None:
            continue
        where = f"{case['network']}, {case['precision']}, auto"
        ratio = row["error_to_ordinary"]
        for aim, value, shown, met in (
            (f"{OVER_EAGER}x over eager", row["over_eager"], "{:.1f}x", lambda value: value >= OVER_EAGER),
            (f"{OVER_COMPILED}x over compile", row["over_compiled"], "{:.2f}x", lambda value: value >= OVER_COMPILED),
            ("the same top 5 for all images", row["top5"], "{:.1%}", lambda value: value == 1),
            (f"at most {LOSS} times the ordinary error", ratio, "{:.2f}", lambda value: value <= LOSS),
        ):
            known = value is not None
            measured = shown.format(value) if known else "not measured"
            found.append({"aim": f"{where}: {aim}", "measured": measured, "met": met(value) if known else None})
    for case in report["iterations"]:
        if (case["network"], case["precision"], case["batch"]) == ("densenet201", "bf16", 1):
            largest = max(case["blocks"], key=lambda block: block["layers"])
            found.append(
                {
                    "aim": f"{case['network']}, bf16: an iteration of {largest['layers']} layers in {ITERATION_MS} ms",
                    "measured": f"{largest['ms']:.4f} ms",
                    "met": largest["ms"] <= ITERATION_MS,
                }
            )
    return found


def print_aims(report: dict[str, Any]) -> None:
    """Print the last table."""
    table = Table(
        title=f"aims and measurements, {report['seconds']:.0f} s in all", title_justify="left", title_style=""
    )
    for column in ("aim", "measured", "met"):
        table.add_column(column)
    for aim in report["aims"]:
        table.add_row(aim["aim"], aim["measured"], {True: "yes", False: "no", None: ""}[aim["met"]])
    Console(width=140).print(table)


def settle_statistics(network: nn.Module, images: Tensor, device: torch.device) -> None:
    """Let batch norm take its running statistics from images, in training mode."""
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    network.to(device).train()
    with torch.no_grad():
        for part in images.split(32):
            network(part.to(device))
    network.to("cpu").eval()


def enlarged(images: Tensor, side: int) -> Tensor:
    """Images of a side, three colours if they were grey."""
    wide = nn.functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return wide if wide.shape[1] == 3 else wide.expand(-1, 3, -1, -1).contiguous()


@dataclass
class Preparations:
    """What is compiled in other processes while nothing is timed.

    Attributes:
        rivals: For every network, precision and batch, by layout.
        kernels: Processes that compile ours.
        seconds: Until they are given up.
    """

    rivals: dict[tuple[str, str, int], dict[str, CompiledRival]] = field(default_factory=dict)
    kernels: list[Any] = field(default_factory=list)
    seconds: float = 0
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def start(cls, builders: dict[str, Any], args: argparse.Namespace) -> Preparations:
        """Begin for all cases; at batch 1 in both layouts, otherwise channels-last alone."""
        made = cls(seconds=args.compile_seconds)
        for batch in args.batches:
            for name, (build, shape) in builders.items():
                for precision in args.precisions:
                    made.rivals[name, precision, batch] = {
                        layout: CompiledRival(build, (batch, *shape), PRECISIONS[precision], LAYOUTS[layout])
                        for layout in (LAYOUTS if batch == 1 else list(LAYOUTS)[:1])
                    }
        for build, shape in builders.values():
            for precision in args.precisions:
                shapes = [(batch, *shape) for batch in args.batches]
                made.kernels.append(compile_kernels(build, shapes, PRECISIONS[precision], args.settings, args.jacobi))
        return made

    def wait(self) -> float:
        """Until all is ready or given up; returns the seconds since the start."""
        for process in self.kernels:
            process.join(self._left())
        for of_case in self.rivals.values():
            for rival in of_case.values():
                rival.ready(self._left())
        self._end(self.kernels)
        return time.perf_counter() - self.began

    def close(self) -> None:
        """End all processes."""
        self._end(self.kernels)
        for of_case in self.rivals.values():
            for rival in of_case.values():
                rival.close()

    def _left(self) -> float:
        return max(self.seconds - (time.perf_counter() - self.began), 0)

    @staticmethod
    def _end(processes: list[Any]) -> None:
        for process in processes:
            process.terminate()
            process.join()


def run(args: argparse.Namespace, device: torch.device, report: dict[str, Any]) -> None:
    """Train, count iterations, measure every case, and keep the report after each."""
    builders: dict[str, Any] = {}
    if "published" in args.networks:
        build = functools.partial(getattr(networks, args.published), num_classes=args.classes)
        builders[args.published] = build, (3, args.side, args.side)
    if args.checkpoint is None:
        config = load_config(TrainConfig, CONFIGS / args.config, args.override)
        name, options, sample_shape = config.experiment, config.model, build_data(config.data, config.seed).sample_shape
    else:
        name, model = args.checkpoint.stem, load(args.checkpoint)
        options, sample_shape = model.options, model.hparams["sample_shape"]
    if "trained" in args.networks:
        builders[name] = functools.partial(build_densenet, options, tuple(sample_shape)), tuple(sample_shape)
    compiles = args.compile_seconds > 0 and device.type == "cuda"
    preparations = Preparations.start(builders, args) if compiles else Preparations()
    try:
        subjects = _train_and_count(args, device, report, builders, name)
        report["compiled_after_seconds"] = preparations.wait()  # nothing is timed before
        for batch in args.batches:
            for subject in subjects:
                for precision in args.precisions:
                    rivals = preparations.rivals.get((subject.name, precision, batch), {})
                    _measure_case(subject, precision, batch, rivals, args, report)
    finally:
        preparations.close()
    report["aims"] = compare_with_aims(report)
    save_report(report, args.output)


def _train_and_count(
    args: argparse.Namespace, device: torch.device, report: dict[str, Any], builders: dict[str, Any], name: str
) -> list[Subject]:
    """Train one network and count its iterations; returns what is to be timed."""
    model: Any
    model, facts = trained(args.config, args.override, args.checkpoint, args.runs_folder)
    assert isinstance(model, DenseNetModule)
    model = model.to("cpu").eval()
    images = model.normalized(_test_images(args)[: args.images]).contiguous()
    blocks = [len(block.layers) for block in structure_of(model.network).blocks]
    report["trained"] = facts | {"network": name, "blocks": blocks, "test_images": len(images)}

    on_device = copy.deepcopy(model.network).to(device)
    for dtype, number in ((torch.float32, args.images), (torch.float64, args.double_images)):
        found = convergence(on_device, images[:number].to(device), dtype, args.windows)
        report["convergence"].append(found)
        print_convergence(f"{name}, {found['images']} test images, {found['dtype']}: iterations, mean / largest", found)
        save_report(report, args.output)
    if args.output is not None:
        title = f"Jacobi iteration of a DenseNet with {sum(blocks)} dense layers, {len(images)} test images, float32"
        save_convergence_figure(report["convergence"][0], title, args.output.with_suffix(".png"))

    subjects = []
    for which, (build, shape) in builders.items():
        if which == name:
            subjects.append(Subject(name, model.network, build, images, True))
            continue
        network = build()
        if args.weights is not None:
            load_published(network, str(args.weights))
        else:
            settle_statistics(network, enlarged(images[-64:], shape[1]), device)
        large = enlarged(images[: args.large_images], shape[1])
        subjects.append(Subject(which, network.eval(), build, large, args.weights is not None))
    return subjects


def _measure_case(
    subject: Subject,
    precision: str,
    batch: int,
    rivals: dict[str, CompiledRival],
    args: argparse.Namespace,
    report: dict[str, Any],
) -> None:
    device = torch.device(args.device)
    case: dict[str, Any] = {"network": subject.name, "precision": precision, "batch": batch}
    title = f"{subject.name}, {precision}, batch {batch}, {report['environment']['device_name']}"
    if not subject.is_trained:
        title += ", RANDOM WEIGHTS: times only"
    try:
        case["rows"] = measure(subject, precision, batch, rivals, args)
        network = subject.typed(precision, device)
        structure, images = structure_of(network), subject.batches(precision, batch, device)[0]
        costs = iteration_costs(structure, images, FusedWeights(structure, PRECISIONS[precision]), args.repeats)
        report["iterations"].append(case | {"rows": None, "blocks": costs})
    except Exception as error:  # out of memory, a kernel that does not compile: the other cases are still wanted
        case["failed"] = f"{type(error).__name__}: {str(error)[:500]}"
        print(f"{title}: {case['failed']}")
    else:
        print_rows(title, case["rows"])
        each = ", ".join(f"{cost['layers']} layers {cost['ms']:.4f} ms" for cost in costs)
        print(f"one Jacobi iteration: {each}", flush=True)
    report["cases"].append({**case, "is_trained": subject.is_trained})
    save_report(report, args.output)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _test_images(args: argparse.Namespace) -> Tensor:
    """The test images of the config's data."""
    config = load_config(TrainConfig, CONFIGS / args.config, args.override)
    data = build_data(config.data, config.seed)
    data.prepare_data()
    data.setup("test")
    images: Tensor = data.test_images()
    return images


def _settings(text: str) -> tuple[int, int]:
    window, iterations = (int(number) for number in text.split("x"))
    return window, iterations


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns the report."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.densenet", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--checkpoint", type=Path, help="take this one (of --config) instead of training")
    config = "densenet_cifar10.yaml" if on_gpu else "densenet_mnist5k.yaml"
    parser.add_argument("--config", default=config, help="a file in configs/ (here: %(default)s)")
    parser.add_argument("--override", nargs="*", default=[], help="key=value for the training and its data")
    parser.add_argument("--runs-folder", type=Path, help="keep the training run here")
    parser.add_argument("--published", default="densenet201", help="the large network")
    parser.add_argument("--weights", type=Path, help="of the large network (by default random)")
    parser.add_argument("--classes", type=int, default=1000, help="of the large network")
    parser.add_argument("--side", type=int, default=224, help="pixels of its images")
    parser.add_argument("--images", type=int, default=1024, help="test images, at most")
    parser.add_argument("--double-images", type=int, default=256, help="of which so many are followed in float64")
    parser.add_argument("--large-images", type=int, default=64, help="of which so many are enlarged")
    parser.add_argument(
        "--networks",
        nargs="*",
        choices=["published", "trained"],
        metavar="NETWORK",
        help="to time: %(choices)s (default: on a GPU)",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16], help="images evaluated at once")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        metavar="PRECISION",
        help="%(choices)s (default: all)",
    )
    parser.add_argument("--settings", nargs="*", type=_settings, default=SETTINGS, metavar="WxI", help="of GS-Jacobi")
    parser.add_argument("--jacobi", nargs="*", type=int, default=JACOBI, help="iterations of Jacobi")
    parser.add_argument("--windows", nargs="*", type=int, default=[4, 8], help="of which iterations are counted")
    parser.add_argument("--checked", type=int, default=16, help="batches whose last change is looked at")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of every way")
    parser.add_argument("--way-seconds", type=float, default=1.0, help="fewer calls (3 at least) of slower ways")
    parser.add_argument("--compile-seconds", type=float, default=600, help="to wait for torch.compile; 0: without it")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="where to run (here: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the results; a figure goes beside it")
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    if args.networks is None:
        args.networks = ["published", "trained"] if device.type == "cuda" else []
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    report = new_report("densenet", device)
    report |= {"cudnn_allow_tf32": torch.backends.cudnn.allow_tf32, "convergence": [], "cases": [], "iterations": []}
    began = time.perf_counter()
    report["aims"] = []
    run(args, device, report)
    report["seconds"] = time.perf_counter() - began
    save_report(report, args.output)
    if report["aims"]:
        print_aims(report)
    return report


if __name__ == "__main__":
    main()
