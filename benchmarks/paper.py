"""The figures and tables of the paper (Song, Meng, Liao, Ermon, ICML 2021), from our own runs.

``python -m benchmarks.paper rnn`` (``densenet``, ``made``, ``pixelcnnpp``, or ``all``) runs the benchmarks that make
them, each as a command that is printed before it starts:

* ``rnn``: gradient error against Jacobi iterations, training loss against steps and against time, for each K;
* ``densenet``: error of the logits and top-five agreement against iterations, and measured times;
* ``made``, ``pixelcnnpp``: sampling times of every solver; convergence curves and strips of samples that settle.

By default all are of a size for a CPU (networks trained on embedded data, minutes each). ``--size gpu`` takes the
configs of the paper's data sets (``--mnist`` and ``--cifar10`` name folders with their files) and the numbers of
repeats that our reports from GPUs have. Figures and numbers go into a folder of their own under ``--output``.

``python -m benchmarks.paper table`` prints the published numbers beside ours and beside the honest rival's, from the
reports in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("rnn", "densenet", "made", "pixelcnnpp")
Command = list[str]


def commands(part: str, args: argparse.Namespace) -> list[Command]:
    """What makes the figures of a part, in order, without ``python``."""
    gpu, out = args.size == "gpu", args.output / part
    report = ["--output", str(out / f"{part}.json")]
    runs = ["--runs-folder", str(out / "runs")]
    of_data = {name: getattr(args, name) for name in ("mnist", "cifar10")}
    if part == "rnn":
        data = ["--data", "mnist"] if args.mnist else []
        return [["-m", "benchmarks.rnn_paper", *data, "--repeats", "10" if gpu else "2", *report]]
    if part == "densenet":
        data = ["--override", f"data.folder={json.dumps(args.cifar10)}"] if gpu and args.cifar10 else []
        return [["-m", "benchmarks.densenet", *data, *runs, *report]]
    if part == "made":
        folders = [f"--{name}={folder}" for name, folder in of_data.items() if folder]
        quick = [] if gpu else ["--epochs=2", "--shapes=28x28x1", "--samples=16", "--repeats=3"]
        return [["-m", "benchmarks.made", *folders, *quick, *runs, *report], _samples(out, 100 if gpu else 16)]
    data = ["--override", f"data.folder={json.dumps(args.mnist)}"] if gpu and args.mnist else []
    config = ["--config", "pixelcnnpp_mnist.yaml" if gpu and args.mnist else "pixelcnnpp_mnist5k.yaml"]
    quick = [] if gpu else ["--samples", "4", "--repeats", "1", "--couplings", "gumbel", "paper"]
    timed = ["-m", "benchmarks.pixelcnnpp", *config, *data, *quick, *runs, *report]
    return [timed, _samples(out, 16 if gpu else 4)]


def _samples(out: Path, number: int) -> Command:
    """Curves and strips, of the newest network that was trained for this part."""
    of_runs = [f"runs_folder={out / 'runs'}", f"output={out / 'samples'}"]
    return ["sample.py", *of_runs, f"num_samples={number}", "wandb.mode=disabled"]


def run(command: Command) -> None:
    """Run one of them in a process of its own; ends this one too if it fails."""
    print(f"$ python {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


@dataclass(frozen=True)
class Row:
    """One published number, and what stands beside it.

    Attributes:
        what: It is of.
        published: As the paper has it, or the authors' logs.
        ours: The same ratio, measured here.
        rival: What a user would compare with, and what we reach over that.
        reports: In ``benchmarks/results``, that ours and the rival's are read from.
        makes: The command that makes them.
    """

    what: str
    published: str
    ours: Callable[..., str]
    rival: Callable[..., str]
    reports: tuple[str, ...]
    makes: str


def _paper_rnn(report: dict[str, Any], _: dict[str, Any]) -> str:
    return ", ".join(f"K = {row['iterations']}: {row['speedup']:.2g}x" for row in report["summary"][1:4])


def _whole_step(_: dict[str, Any], report: dict[str, Any]) -> str:
    found = {case["cell"]: case["rows"][-1]["speedup"] for case in report["cases"] if case["shape"] == "1x32768x128"}
    return "cuDNN, whole step, 1 x 32,768: " + ", ".join(f"{cell.upper()} {x:.0f}x" for cell, x in found.items())


def _densenet(column: str, name: str) -> Callable[..., str]:
    def cell(report: dict[str, Any]) -> str:
        found = [
            f"{case['precision']} {row[column]:.3g}x"
            for case in report["cases"]
            if (case["network"], case["batch"]) == ("densenet201", 1)
            for row in case["rows"]
            if row["method"] == "auto"
        ]
        return f"{name}: " + ", ".join(found)

    return cell


def _made(shape: str, method: str, baseline: str, name: str) -> Callable[..., str]:
    def cell(report: dict[str, Any]) -> str:
        rows = {row["method"]: row for row in report["shapes"][shape]["rows"]}
        return f"{name}: {rows[method][f'speedup over {baseline}']:.3g}x"

    return cell


def _full_passes(*reports: dict[str, Any]) -> str:
    rows = [row for row in reports[0]["rows"] if (row["coupling"], row["precision"]) == ("gumbel", "full")]
    best = max(rows, key=lambda row: row["speedup_over_sequential"])
    jacobi = next(row for row in rows if row["method"] == "Jacobi")
    return f"Jacobi {jacobi['speedup_over_sequential']:.2g}x, {best['method']} {best['speedup_over_sequential']:.2g}x"


def _over_cached(*reports: dict[str, Any]) -> str:
    found = []
    for case in reports[1]["cases"]:
        seconds = {row["method"]: row["seconds"] for row in case["rows"] if row.get("seconds")}
        cached = seconds["cached sequential"]
        best = cached / min(x for method, x in seconds.items() if method.startswith(("GS-Jacobi", "auto", "Jacobi")))
        found.append(f"batch {case['batch']}: {best:.2g}x")
    return "cached sequential, fused kernels in CUDA graphs: " + ", ".join(found)


def _rows() -> list[Row]:
    eager, cached = "sequential, eager", "cached sequential, CUDA graph"
    kernel = "GS-Jacobi, kernel, window 64, CUDA graph"
    rows = [
        Row(
            "RNN, training with K Jacobi iterations, time per step over ordinary backpropagation (batch 1, T = 100)",
            "a figure",
            _paper_rnn,
            _whole_step,
            (f"rnn_paper_{device}.json", "rnn_step_h100.json"),
            "`python -m benchmarks.rnn_paper`, `python -m benchmarks.rnn_step`",
        )
        for device in ("cpu", "h200")
    ]
    rows.append(
        Row(
            "DenseNet-201, evaluation of one image",
            "2.1x, an estimate for unlimited hardware",
            _densenet("over_eager", "eager PyTorch"),
            _densenet("over_compiled", "`torch.compile` and CUDA graph"),
            ("densenet_h100.json",),
            "`python -m benchmarks.densenet`",
        )
    )
    for name, shape, published in (("MNIST", "28x28x1", "27x"), ("CIFAR-10", "32x32x3", "25x")):
        rows.append(
            Row(
                f"MADE, {name}, 100 images, Jacobi over sequential sampling",
                published,
                _made(shape, "Jacobi, eager", eager, "both eager"),
                _made(shape, kernel, cached, "cached sequential in a CUDA graph"),
                ("made_h100.json",),
                "`python -m benchmarks.made`",
            )
        )
    for name, file, published in (
        ("MNIST", "mnist", "6.5x, over cached sampling 4.4x"),
        ("CIFAR-10", "cifar10", "2.1x, over cached sampling 1.2x"),
    ):
        rows.append(
            Row(
                f"PixelCNN++, {name}, sampling by full passes over sequential sampling by full passes",
                published,
                _full_passes,
                _over_cached,
                (f"pixelcnnpp_{file}_h100.json", f"pixelcnnpp_ladder_{file}_h100.json"),
                "`python -m benchmarks.pixelcnnpp`, `python -m benchmarks.pixelcnnpp_ladder`",
            )
        )
    return rows


def table(results: Path = RESULTS) -> str:
    """Published numbers beside ours and the rival's, in Markdown; what has no report says what makes it."""
    lines = [
        "| | published | ours, the same ratio | the rival, and ours over it | device, torch |",
        "|---|---|---|---|---|",
    ]
    for row in _rows():
        paths = [results / name for name in row.reports]
        if all(path.exists() for path in paths):
            reports = [json.loads(path.read_text()) for path in paths]
            devices = dict.fromkeys(_device(report) for report in reports)
            links = ", ".join(f"[{path.stem}](../benchmarks/results/{path.name})" for path in paths)
            cells = [row.ours(*reports), row.rival(*reports), "; ".join(devices) + f" ({links})"]
        else:
            cells = [f"not measured: {row.makes}", "", ""]
        lines.append("| " + " | ".join([row.what, row.published, *cells]) + " |")
    return "\n".join(lines)


def _device(report: dict[str, Any]) -> str:
    environment = report["environment"]
    return f"{environment['device_name']}, {environment['versions']['torch'].partition('+')[0]}"


PAGE = """# The paper's numbers, and ours

Song, Meng, Liao, Ermon: *Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving*, ICML 2021
([arXiv:2002.03629](https://arxiv.org/abs/2002.03629)). Every published number stands beside the same ratio measured
here and beside what we reach over the strongest rival that we know, each from one run. Ratios over uncached or eager
baselines are large because those are slow: the column of the rival is the one that counts.

{table}

This table is written by `python -m benchmarks.paper table --output docs/paper.md` from the reports that it links to,
each of which names its command, device, versions and how equality was checked. Networks differ from the authors' where
the tutorials say so: the PixelCNN++ of CIFAR-10 here is 80 x 3, not 160 x 5, DenseNet-201 has random weights.

## The figures

```text
python -m benchmarks.paper rnn           gradient error against iterations; loss against steps and time
python -m benchmarks.paper densenet      error of the logits and top-five agreement against iterations; times
python -m benchmarks.paper made          times of all solvers; convergence curves; strips of samples that settle
python -m benchmarks.paper pixelcnnpp    the same
python -m benchmarks.paper all --size gpu --mnist FOLDER --cifar10 FOLDER
```

Without options they are of a size for a CPU, minutes each, with embedded data. Each prints the commands that it runs.
Ours of the RNN, ten repeats on one CPU thread:

![Gradient error against iterations, training loss against steps and time](../benchmarks/results/rnn_paper_cpu.png)
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "all", "table"])
    parser.add_argument("--size", choices=["cpu", "gpu"], default="cpu", help="of networks, data and repeats")
    parser.add_argument("--mnist", metavar="FOLDER", help="with MNIST's files (default: 5,000 embedded digits)")
    parser.add_argument("--cifar10", metavar="FOLDER", help="with CIFAR-10's files (default: embedded data)")
    parser.add_argument("--output", type=Path, help="folder (default: runs/paper); of the table: a Markdown file")
    args = parser.parse_args(argv)
    if args.part == "table":
        if args.output:
            args.output.write_text(PAGE.format(table=table()))
        print(table())
        return
    args.output = (args.output or Path("runs/paper")).resolve()
    parts = PARTS if args.part == "all" else (args.part,)
    for part in parts:
        for command in commands(part, args):
            run(command)
    print("Figures and numbers: " + ", ".join(str(args.output / part) for part in parts))
    print("Beside the published numbers: python -m benchmarks.paper table")


if __name__ == "__main__":
    main()
