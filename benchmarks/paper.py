"""The figures and tables of the paper (Song, Meng, Liao, Ermon, ICML 2021), from our own runs.

``python -m benchmarks.paper rnn`` (``densenet``, ``made``, ``pixelcnnpp``, or ``all``) runs the benchmarks that make
them, each as a command that is printed before it starts:

* ``rnn``: gradient error against Jacobi iterations, training loss against steps and against time, for each K;
* ``densenet``: error of the logits and top-five agreement against iterations, and on a GPU measured times;
* ``made``, ``pixelcnnpp``: sampling times of every solver; convergence curves and strips of samples that settle.

By default all are of a size for a CPU (networks trained on embedded data, minutes each). ``--size gpu`` takes what our
reports from GPUs were made with: more repeats and images, and the data sets of the paper where ``--mnist`` and
``--cifar10`` name folders with their files. Figures and numbers go into a new folder in ``runs/paper``, or
``--output``.

``python -m benchmarks.paper table`` prints the published numbers beside ours and beside the honest rival's, from the
reports in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_parallel.cli import run_command
from lit_parallel.errors import UserError
from lit_parallel.runs import short_path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
PARTS = ("rnn", "densenet", "made", "pixelcnnpp")
_TRAINED_FOR = "trainer.max_time=00:00:10:00"  # what the PixelCNN++ of our reports were
_IN_MINUTES = "trainer.max_time=00:00:03:00"
_SAME_TOP_FIVE = 0.95  # of the test images, for Jacobi to have arrived; rounding alone changes some
Command = list[str]
CACHED = "cached sequential"


def commands(part: str, args: argparse.Namespace) -> list[Command]:
    """What makes the figures of a part, in order, without ``python``."""
    gpu, out = args.size == "gpu", args.output / part
    if part == "rnn":
        data = ["--data=mnist"] if gpu and args.mnist else []
        return [["-m", "benchmarks.rnn_paper", *data, f"--repeats={10 if gpu else 2}", *_kept(part, out)]]
    if part == "densenet":
        return [["-m", "benchmarks.densenet", *_densenet_network(args), *_kept(part, out, runs=not args.checkpoint)]]
    of_part = _made if part == "made" else _pixelcnnpp
    return [command for data in ("mnist", "cifar10") for command in of_part(data, args, out / data)]


def _densenet_network(args: argparse.Namespace) -> list[str]:
    if args.checkpoint:
        return [f"--checkpoint={args.checkpoint}"]
    if args.size == "cpu":
        return ["--config=densenet_mnist5k.yaml"]
    training = ["trainer.max_epochs=45", "data.batch_size=128", "data.validation_fraction=0"]
    training += ["optimizer.warmup_fraction=0.02", *_folder(args.cifar10)]
    return ["--config=densenet_cifar10.yaml", "--override", *training]


def _made(data: str, args: argparse.Namespace, out: Path) -> list[Command]:
    gpu, folder = args.size == "gpu", getattr(args, data)
    if data == "cifar10" and not gpu:
        return []
    images = [f"--shapes={'28x28x1' if data == 'mnist' else '32x32x3'}", *([f"--{data}={folder}"] if folder else [])]
    size = ["--epochs=40"] if gpu else ["--samples=16", "--repeats=3"]
    return [["-m", "benchmarks.made", *images, *size, *_kept("made", out)], _samples(out, 100 if gpu else 16)]


def _pixelcnnpp(data: str, args: argparse.Namespace, out: Path) -> list[Command]:
    gpu, folder = args.size == "gpu", getattr(args, data) if args.size == "gpu" else None
    if data == "cifar10" and (args.checkpoint or not folder):
        return []
    size = ["--repeats=2", "--brief"] if gpu else ["--samples=4", "--repeats=1", "--couplings", "gumbel", "paper"]
    number = 16 if gpu else 4
    if args.checkpoint:
        out = out.parent
        model = [f"--checkpoint={args.checkpoint}"]
        ladder = ["-m", "benchmarks.pixelcnnpp_ladder", *model, "--repeats=3", "--sequential-steps=8"]
        timed = ["-m", "benchmarks.pixelcnnpp", *model, *size, *_kept("pixelcnnpp", out, runs=False)]
        ladders = [[*ladder, *_kept("ladder", out, runs=False)]] if gpu else []
        return [timed, *ladders, _samples(out, number, args.checkpoint)]
    config = [f"--config=pixelcnnpp_{data if folder else 'mnist5k'}.yaml"]
    if folder:
        smaller = ["model.filters=80", "model.resnets=3"] if data == "cifar10" else []
        config += ["--override", _TRAINED_FOR, *smaller, *_folder(folder)]
    elif not gpu:
        config += ["--override", _IN_MINUTES]
    return [["-m", "benchmarks.pixelcnnpp", *config, *size, *_kept("pixelcnnpp", out)], _samples(out, number)]


def _folder(folder: Path | None) -> list[str]:
    return [f"data.folder={json.dumps(str(folder))}", "data.allow_partial=true"] if folder else []


def _kept(name: str, out: Path, *, runs: bool = True) -> list[str]:
    """Where the report goes, and the training runs; last, as reports leave out ``--output`` and what follows."""
    return [f"--output={out / name}.json", *([f"--runs-folder={out / 'runs'}"] if runs and name != "rnn" else [])]


def _samples(out: Path, number: int, checkpoint: Path | None = None) -> Command:
    """Curves and strips, of this network or of the one that was trained for this part."""
    of_model = ["--checkpoint", str(checkpoint)] if checkpoint else [f"runs_folder={out / 'runs'}"]
    return ["sample.py", *of_model, f"output={out / 'samples'}", f"num_samples={number}", "wandb.mode=disabled"]


def run(command: Command) -> None:
    """Run one of them in a process of its own; ends this one too if it fails."""
    print(f"$ python {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def publish(part: str, folder: Path) -> list[Path]:
    """Copy reports and figures of a part to where the repository has its own; returns where they are."""
    copies: dict[Path, Path] = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        if path.parent.name == "samples":  # of one call of sample.py, not a benchmark's
            continue
        names = dict.fromkeys(["paper", part, *path.relative_to(folder).with_suffix("").parts])
        name = "_".join([*names, _short_device(json.loads(path.read_text()))])
        copies[path] = RESULTS / f"{name}.json"
        of_samples = (path.parent / "samples").glob("*.png") if path.stem == part else ()
        for picture in filter(Path.exists, [path.with_suffix(".png"), *of_samples]):
            own = "" if picture.stem == path.stem else f"_{picture.stem}"
            copies[picture] = FIGURES / f"{name}{own}.png"
    for path, copy in copies.items():
        shutil.copyfile(path, copy)
    return list(copies.values())


def _short_device(report: dict[str, Any]) -> str:
    """``cpu``, or the model of the GPU: ``h100`` of ``NVIDIA H100 80GB HBM3``."""
    environment = report["environment"]
    words = environment["device_name"].lower().removeprefix("nvidia ").split()
    return "cpu" if environment["device"] == "cpu" else words[0]


@dataclass(frozen=True)
class Measured:
    """What a cell of the table shows.

    Attributes:
        report: In ``benchmarks/results``, without ``.json``.
        read: From the report to the text; empty where it does not have the number.
        makes: The command that makes the report, after ``python -m benchmarks.``.
    """

    report: str
    read: Callable[[dict[str, Any]], str]
    makes: str


@dataclass(frozen=True)
class Row:
    """A published number (or, where there is none, a figure), and what stands beside it.

    Attributes:
        what: It is of.
        published: As the paper has it.
        ours: The same method over the same baseline, measured here.
        rival: What is gained over the strongest way that we know to compute the same without iterating.
    """

    what: str
    published: str
    ours: Measured
    rival: Measured


def _times(speedup: float) -> str:
    return f"{speedup:.2f}x" if speedup < 10 else f"{speedup:.1f}x"


def _every_k(report: dict[str, Any]) -> str:
    return ", ".join(f"K = {row['iterations']}: {_times(row['speedup'])}" for row in report["summary"][1:])


def _whole_steps(shapes: Sequence[str]) -> Callable[[dict[str, Any]], str]:
    def read(report: dict[str, Any]) -> str:
        told = []
        for shape in shapes:
            batch, length, _ = shape.split("x")
            cases = [case for case in report["cases"] if (case["shape"], case["memory"]) == (shape, "short")]
            found = [f"{case['cell'].upper()} {_times(case['rows'][-1]['speedup'])}" for case in cases]
            told += [f"batch {batch}, T = {int(length):,}: {', '.join(found)}"] if found else []
        return f"PyTorch's own layers, whole steps by `auto`: {'; '.join(told)}" if told else ""

    return read


def _densenet_rows(report: dict[str, Any], network: str) -> list[tuple[str, bool, dict[str, Any]]]:
    """For each precision at batch 1: its name, whether weights are trained, and the rows by method."""
    return [
        (case["precision"], case["is_trained"], {row["method"]: row for row in case["rows"]})
        for case in report["cases"]
        if (case["network"], case["batch"]) == (network, 1) and "rows" in case
    ]


def _arrived(rows: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest Jacobi with the ordinary top five."""
    jacobi = [row for method, row in rows.items() if method.startswith("fused jacobi")]
    return min((row for row in jacobi if row["top5"] >= _SAME_TOP_FIVE), key=lambda row: row["ms"], default=None)


def _jacobi_over_eager(network: str) -> Callable[[dict[str, Any]], str]:
    def read(report: dict[str, Any]) -> str:
        told = []
        for precision, is_trained, rows in _densenet_rows(report, network):
            if is_trained and (row := _arrived(rows)):
                same = f"{row['iterations'][0]} iterations, {100 * row['top5']:.0f} % of the images"
                told.append(f"{precision} {_times(row['over_eager'])} ({same})")
        return ", ".join(told)

    return read


def _jacobi_over_kernels(network: str) -> Callable[[dict[str, Any]], str]:
    def read(report: dict[str, Any]) -> str:
        over = {"the same kernels, layer by layer": "fused sequential", "`torch.compile` in a CUDA graph": "torch"}
        told = []
        for name, rival in over.items():
            found = []
            for precision, _, rows in _densenet_rows(report, network):
                best = min(row["ms"] for method, row in rows.items() if method.startswith(rival))
                if row := _arrived(rows):
                    found.append(f"{precision} {_times(best / row['ms'])}")
            told += [f"{name}: {', '.join(found)}"] if found else []
        return "; ".join(told)

    return read


def _kernels_over_compiled(network: str) -> Callable[[dict[str, Any]], str]:
    def read(report: dict[str, Any]) -> str:
        found = [
            f"{name} {_times(rows['fused sequential']['over_compiled'])}"
            for name, _, rows in _densenet_rows(report, network)
        ]
        return (
            f"`torch.compile` in a CUDA graph, by our kernels *without* iteration: {', '.join(found)}" if found else ""
        )

    return read


def _made_speedups(shape: str, baseline: str, methods: dict[str, str]) -> Callable[[dict[str, Any]], str]:
    """Of methods over a baseline, each by the name that the table gives it."""

    def read(report: dict[str, Any]) -> str:
        rows = {row["method"]: row for row in report["shapes"][shape]["rows"]}
        column = f"speedup over {baseline}"
        found = [f"{name} {_times(rows[method][column])}" for method, name in methods.items() if method in rows]
        return f"{baseline}: {', '.join(found)}" if found else ""

    return read


def _full_passes(report: dict[str, Any]) -> str:
    rows = [row for row in report["rows"] if (row["coupling"], row["precision"]) == ("gumbel", "full")]
    jacobi = next(row for row in rows if row["method"] == "Jacobi")
    told = f"batch {report['samples']}: Jacobi {_times(jacobi['speedup_over_sequential'])}"
    if any(row["method"] == CACHED for row in rows):  # then windows come from caches too, and are no full passes
        return told
    return f"{told}, GS-Jacobi {_best(rows, 'speedup_over_sequential')}"


def _over_cached(report: dict[str, Any]) -> str:
    rows = [row for row in report["rows"] if (row["coupling"], row["precision"]) == ("gumbel", "full")]
    return f"{CACHED}: GS-Jacobi {_best(rows, 'speedup_over_cached_sequential')}"


def _over_cached_by_batch(report: dict[str, Any]) -> str:
    found = [f"batch {case['batch']} {_best(case['rows'], 'over_cached')}" for case in report["cases"]]
    return f"{CACHED}, fused kernels: GS-Jacobi, {', '.join(found)}"


def _best(rows: list[dict[str, Any]], column: str) -> str:
    return _times(max(row[column] for row in rows if row["method"].startswith("GS-Jacobi")))


def _rows() -> list[Row]:
    """The table, from top to bottom."""
    rnn = "RNN, training with K Jacobi iterations, a step over one of autograd (batch 1, T = 100)"
    rows = [
        Row(
            rnn,
            "a figure",
            Measured("rnn_paper_cpu", _every_k, "rnn_paper"),
            Measured("rnn_step_cpu", _whole_steps(["1x784x128"]), "rnn_step"),
        ),
        Row(
            rnn,
            "a figure",
            Measured("rnn_paper_h200", _every_k, "rnn_paper"),
            Measured("rnn_step_h100", _whole_steps(["1x100x128", "64x784x128", "1x32768x128"]), "rnn_step"),
        ),
    ]
    top_five = "until the five highest logits are those of the ordinary forward, one image, over eager PyTorch"
    for name, network, published, rival in (
        ("DenseNet-201", "densenet201", "2.13x, an estimate for unlimited hardware", _kernels_over_compiled),
        ("DenseNet-BC (100, 12), CIFAR-10", "densenet_cifar10", "", _jacobi_over_kernels),
    ):
        rows.append(
            Row(
                f"{name}, Jacobi {top_five}",
                published,
                Measured("densenet_h100", _jacobi_over_eager(network), "densenet --weights FILE"),
                Measured("densenet_h100", rival(network), "densenet"),
            )
        )
    eager, on_gpu, on_cpu = "sequential, eager", f"{CACHED}, CUDA graph", f"{CACHED}, eager"
    jacobi = {"Jacobi, eager": "Jacobi", "Jacobi, CUDA graph": "Jacobi in a CUDA graph"}
    kernel = {"Jacobi, CUDA graph": "Jacobi", "GS-Jacobi, kernel, window 64, CUDA graph": "GS-Jacobi in one kernel"}
    windows = {"GS-Jacobi, PyTorch, eager": "GS-Jacobi"}
    for name, shape, published in (("MNIST", "28x28x1", "27x"), ("CIFAR-10", "32x32x3", "25x")):
        rows += [
            Row(
                f"MADE, {name}, 100 images, Jacobi over eager sequential sampling",
                published,
                Measured("made_h100_split_sums", _made_speedups(shape, eager, jacobi), "made --split-sums"),
                Measured("made_h100", _made_speedups(shape, on_gpu, kernel), "made"),
            ),
            Row(
                f"MADE, embedded images of the size of {name}'s, 64 images",
                "",
                Measured("made_cpu", _made_speedups(shape, eager, jacobi), "made"),
                Measured("made_cpu", _made_speedups(shape, on_cpu, windows), "made"),
            ),
        ]
    for name, data, published in (
        ("MNIST", "mnist", "6.5x; over cached sequential sampling 4.4x"),
        ("CIFAR-10", "cifar10", "2.1x; over cached sequential sampling 1.20x"),
    ):
        checkpoint = "--checkpoint PATH"
        rows.append(
            Row(
                f"PixelCNN++, {name}, full passes over sequential full passes, all in CUDA graphs",
                published,
                Measured(f"pixelcnnpp_{data}_h100", _full_passes, f"pixelcnnpp {checkpoint}"),
                Measured(f"pixelcnnpp_ladder_{data}_h100", _over_cached_by_batch, f"pixelcnnpp_ladder {checkpoint}"),
            )
        )
    rows.append(
        Row(
            "PixelCNN++, a small network for embedded digits, full passes over sequential full passes",
            "",
            Measured("pixelcnnpp_cpu", _full_passes, "pixelcnnpp"),
            Measured("pixelcnnpp_cpu", _over_cached, "pixelcnnpp"),
        )
    )
    return rows


def table(results: Path = RESULTS) -> str:
    """Published numbers beside ours and the rival's, in Markdown; what has no report says what makes it."""
    lines = [
        "| | published | ours, the same comparison | ours over the honest rival | device, torch |",
        "|---|---|---|---|---|",
    ]
    for row in _rows():
        cells, reports = [], {}
        for measured in (row.ours, row.rival):
            path = results / f"{measured.report}.json"
            report = json.loads(path.read_text()) if path.exists() else None
            told = measured.read(report) if report else ""
            cells.append(told or f"not measured: `python -m benchmarks.{measured.makes}`")
            if report and told:
                reports[measured.report] = _device(report)
        devices = [
            f"{device} ({', '.join(_link(name) for name in reports if reports[name] == device)})"
            for device in dict.fromkeys(reports.values())
        ]
        lines.append("| " + " | ".join([row.what, row.published, *cells, "; ".join(devices)]) + " |")
    return "\n".join(lines)


def _link(report: str) -> str:
    return f"[{report}](../benchmarks/results/{report}.json)"


def _device(report: dict[str, Any]) -> str:
    environment = report["environment"]
    return f"{environment['device_name']}, {environment['versions']['torch'].partition('+')[0]}"


PAGE = """# The paper's numbers, and ours

Song, Meng, Liao, Ermon: *Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving*, ICML 2021
([arXiv:2002.03629](https://arxiv.org/abs/2002.03629)). Beside every published speedup stands the same comparison,
measured here, and what is gained over the strongest way that we know to compute the same without iterating. Ratios over
uncached or eager baselines are large because those are slow: the column of the rival is the one that counts, and below
1x the rival wins. Numbers in one cell come from one run on one device; nothing is extrapolated.

{table}

Networks and data differ from the authors'. Of DenseNet-201 no published weights were at hand, and with random ones the
agreement of Jacobi iterates says nothing, so only a DenseNet that was trained here has a number. MADE and PixelCNN++
were trained on a part of the images; the PixelCNN++ of CIFAR-10 is 80 x 3, not 160 x 5 ([MADE](made.md),
[PixelCNN++](pixelcnnpp.md), [DenseNet](densenet.md), [RNN](recurrent.md)). Eager MADE is taken from the run with
cuBLAS's default workspace, where eager calls are fastest. RNN: the rival is another network (tanh) with the same
number of units, as PyTorch's fused layers have no softplus.

`python -m benchmarks.paper table --output docs/paper.md` writes this page from the reports that it links to; each names
its command, device and versions.

## The figures

```text
python -m benchmarks.paper rnn           gradient error against iterations; loss against steps and time
python -m benchmarks.paper densenet      error of the logits and top-five agreement against iterations; times on a GPU
python -m benchmarks.paper made          times of all solvers; convergence curves; strips of samples that settle
python -m benchmarks.paper pixelcnnpp    the same
python -m benchmarks.paper all --size gpu --mnist FOLDER --cifar10 FOLDER
```

Without options they are of a size for a CPU, minutes each, with embedded data. Each prints the commands that it runs,
and at the end where figures and numbers are: a new folder in `runs/paper`. `--publish` copies them to where the
repository has its own (`docs/figures`, `benchmarks/results`).

An RNN, ten repeats on one CPU thread ([how](recurrent.md)):

![Gradient error against iterations, training loss against steps and time](../benchmarks/results/rnn_paper_cpu.png)

A DenseNet-BC (100, 12) on CIFAR-10, H100 ([how](densenet.md)):

![Error of the logits and top-five agreement against iterations](../benchmarks/results/densenet_h100.png)

A MADE on digits ([how](made.md)), and samples of a PixelCNN++ on their way ([how](pixelcnnpp.md)):

![Error and forward difference against iterations](figures/made_mnist5k_convergence.png)

![Iterates of digits by each solver](figures/pixelcnnpp_mnist5k_strips.png)
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "part",
        choices=[*PARTS, "all", "table"],
        metavar="PART",
        help="figures and numbers of %(choices)s; the last: published numbers beside ours and the rival's",
    )
    parser.add_argument(
        "--size", choices=["cpu", "gpu"], default="cpu", help="of networks, data and repeats (%(default)s)"
    )
    parser.add_argument("--mnist", metavar="FOLDER", type=Path, help="with MNIST's files (default: embedded digits)")
    parser.add_argument("--cifar10", metavar="FOLDER", type=Path, help="with CIFAR-10's files, for --size gpu")
    parser.add_argument(
        "--checkpoint", metavar="PATH", type=Path, help="of densenet or pixelcnnpp, instead of training a network"
    )
    parser.add_argument(
        "--publish", action="store_true", help="copy figures into docs/figures, numbers into benchmarks/results"
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        help="folder (default: a new one in runs/paper); of the table: a Markdown file",
    )
    args = parser.parse_args(argv)
    if args.part == "table":
        if args.output:
            args.output.write_text(PAGE.format(table=table()))
            print(f"written: {args.output}")
        else:
            print(table())
        return
    parts = PARTS if args.part == "all" else (args.part,)
    if args.checkpoint and args.part not in ("densenet", "pixelcnnpp"):
        raise UserError(f"--checkpoint belongs to densenet or pixelcnnpp, not to {args.part}: leave it out.")
    args.output = args.output or Path("runs/paper", time.strftime("%Y-%m-%d_%H-%M-%S"))
    for name in ("mnist", "cifar10", "checkpoint", "output"):  # the benchmarks run in the repository's folder
        path = getattr(args, name)
        setattr(args, name, path and path.resolve())
    for part in parts:
        if (folder := args.output / part).exists():
            raise UserError(f"'{short_path(folder)}' holds an earlier run: name another --output.")
    for part in parts:
        for command in commands(part, args):
            run(command)
        for path in publish(part, args.output / part) if args.publish else []:
            print(f"published: {short_path(path)}")
    print("Figures and numbers: " + ", ".join(str(short_path(args.output / part)) for part in parts))
    print("Beside the published numbers: python -m benchmarks.paper table")


if __name__ == "__main__":
    sys.exit(run_command(main))
