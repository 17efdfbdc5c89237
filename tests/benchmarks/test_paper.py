"""The commands that make the paper's figures, and the table of its numbers beside ours."""

import argparse
import importlib
import json
import shutil
from pathlib import Path

import pytest

from benchmarks import paper
from lit_parallel.config import SampleConfig, TrainConfig, load_config
from lit_parallel.errors import UserError

FOLDERS = {"mnist": Path("m"), "cifar10": Path("c")}


def options(**chosen) -> argparse.Namespace:
    given = {"size": "cpu", "mnist": None, "cifar10": None, "checkpoint": None, "output": Path("out")}
    return argparse.Namespace(**given | chosen)


class UnderstoodError(Exception):
    """Arguments were understood."""


@pytest.fixture
def understood(monkeypatch):
    """What a benchmark makes of its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, argv=None, namespace=None):
        raise UnderstoodError(parse(self, argv, namespace))

    def of(command: list[str]) -> argparse.Namespace:
        assert command[0] == "-m"
        with pytest.raises(UnderstoodError) as told:
            importlib.import_module(command[1]).main(command[2:])
        return told.value.args[0]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    return of


@pytest.mark.parametrize("data", [{}, FOLDERS], ids=["embedded", "folders"])
@pytest.mark.parametrize("size", ["cpu", "gpu"])
@pytest.mark.parametrize("part", paper.PARTS)
def test_benchmarks_understand_their_commands(part, size, data, understood):
    trained = []
    for command in paper.commands(part, options(size=size, **data)):
        if command[0] == "sample.py":
            overrides = [word for word in command[1:] if "=" in word]
            config = load_config(SampleConfig, None, overrides)
            assert Path(config.runs_folder) == trained[-1]  # the network that was trained just before
            assert Path(config.output).parent == trained[-1].parent
            continue
        args = understood(command)
        assert args.output.is_relative_to(Path("out", part))
        assert args.output.stem in (part, "ladder")
        if part != "rnn":
            trained.append(args.runs_folder)
        if hasattr(args, "config"):
            load_config(TrainConfig, paper.ROOT / "configs" / args.config, args.override)
    assert len(set(trained)) == len(trained)  # no command takes another one's network


def test_data_sets_of_the_paper_are_for_gpus(understood):
    def made_of(part, **chosen):
        commands = paper.commands(part, options(**chosen))
        return [understood(command) for command in commands if command[0] == "-m"]

    assert [args.shapes for args in made_of("made")] == [["28x28x1"]]
    both = made_of("made", size="gpu", **FOLDERS)
    assert [(args.shapes, args.mnist, args.cifar10) for args in both] == [
        (["28x28x1"], "m", None),
        (["32x32x3"], None, "c"),
    ]
    assert [args.config for args in made_of("pixelcnnpp")] == ["pixelcnnpp_mnist5k.yaml"]
    configs = [args.config for args in made_of("pixelcnnpp", size="gpu", **FOLDERS)]
    assert configs == ["pixelcnnpp_mnist.yaml", "pixelcnnpp_cifar10.yaml"]
    assert made_of("rnn")[0].repeats < made_of("rnn", size="gpu")[0].repeats == 10


def test_a_checkpoint_is_not_trained_again(understood):
    (densenet,) = paper.commands("densenet", options(checkpoint=Path("d.ckpt")))
    assert understood(densenet).checkpoint == Path("d.ckpt")
    timed, ladder, samples = paper.commands("pixelcnnpp", options(size="gpu", checkpoint=Path("p.ckpt"), **FOLDERS))
    assert [understood(command).checkpoint for command in (timed, ladder)] == [Path("p.ckpt")] * 2
    assert samples[:3] == ["sample.py", "--checkpoint", "p.ckpt"]


def test_a_checkpoint_belongs_to_one_network():
    with pytest.raises(UserError, match="--checkpoint belongs to densenet or pixelcnnpp, not to made"):
        paper.main(["made", "--checkpoint", "p.ckpt"])


def test_all_parts_run_in_order_and_a_failure_ends_it(monkeypatch, tmp_path, capsys):
    seen = []

    def run(command, **_):
        seen.append(command[1:])
        return argparse.Namespace(returncode=3 if "benchmarks.made" in command else 0)

    monkeypatch.setattr(paper.subprocess, "run", run)
    with pytest.raises(SystemExit, match="3"):
        paper.main(["all", "--output", str(tmp_path)])
    assert [command[1] for command in seen] == ["benchmarks.rnn_paper", "benchmarks.densenet", "benchmarks.made"]
    assert "$ python -m benchmarks.rnn_paper" in capsys.readouterr().out


def test_paths_are_those_of_the_user_and_the_end_says_where(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "run", seen.append)
    paper.main(["made", "--mnist", "digits", "--output", "here"])
    assert f"--mnist={tmp_path / 'digits'}" in seen[0]
    assert f"--output={tmp_path / 'here' / 'made' / 'mnist' / 'made.json'}" in seen[0]
    assert "Figures and numbers: here/made" in capsys.readouterr().out
    (tmp_path / "here" / "made").mkdir(parents=True)
    with pytest.raises(UserError, match="'here/made' holds an earlier run: name another --output"):
        paper.main(["all", "--output", "here"])
    assert len(seen) == 2
    paper.main(["rnn"])
    assert capsys.readouterr().out.startswith("Figures and numbers: runs/paper/2")


def test_figures_and_numbers_are_published_on_request_only(monkeypatch, tmp_path, capsys):
    on_cpu = {"environment": {"device": "cpu", "device_name": "AMD EPYC"}}
    on_gpu = {"environment": {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3"}}

    def run(command):
        output = next(Path(word.partition("=")[2]) for word in command if word.lstrip("-").startswith("output="))
        if command[0] == "sample.py":
            output.mkdir(parents=True)
            (output / "report.json").write_text("{}")
            (output / "strips.png").write_text("strips")
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(on_gpu if "gpu" in str(output) else on_cpu))
            output.with_suffix(".png").write_text("figure")

    for name, folder in (("RESULTS", tmp_path / "results"), ("FIGURES", tmp_path / "figures")):
        folder.mkdir()
        monkeypatch.setattr(paper, name, folder)
    monkeypatch.setattr(paper, "run", run)
    paper.main(["made", "--output", str(tmp_path / "one")])
    assert not [*(tmp_path / "results").iterdir(), *(tmp_path / "figures").iterdir()]
    paper.main(["all", "--output", str(tmp_path / "two"), "--publish"])
    paper.main(["pixelcnnpp", "--size", "gpu", "--checkpoint", "p", "--output", str(tmp_path / "gpu"), "--publish"])
    assert "published: " in capsys.readouterr().out
    numbers = [f"paper_{name}_cpu" for name in ("rnn", "densenet", "made_mnist", "pixelcnnpp_mnist")]
    numbers += ["paper_pixelcnnpp_h100", "paper_pixelcnnpp_ladder_h100"]
    assert sorted(path.stem for path in (tmp_path / "results").iterdir()) == sorted(numbers)
    strips = [f"paper_{name}_strips" for name in ("made_mnist_cpu", "pixelcnnpp_mnist_cpu", "pixelcnnpp_h100")]
    assert sorted(path.stem for path in (tmp_path / "figures").iterdir()) == sorted([*numbers, *strips])
    assert (tmp_path / "figures" / "paper_made_mnist_cpu_strips.png").read_text() == "strips"


def test_the_page_is_what_the_reports_say(tmp_path):
    paper.main(["table", "--output", str(tmp_path / "paper.md")])
    assert (paper.ROOT / "docs" / "paper.md").read_text() == (tmp_path / "paper.md").read_text(), (
        "python -m benchmarks.paper table --output docs/paper.md"
    )


@pytest.fixture
def results(tmp_path):
    """A copy of the reports."""
    for path in paper.RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def cells(results: Path, beginning: str) -> list[str]:
    (line,) = [line for line in paper.table(results).splitlines() if line.startswith(f"| {beginning}")]
    return line.strip("| ").split(" | ")


def test_numbers_are_read_from_the_reports(results):
    file = results / "made_h100_split_sums.json"
    report = json.loads(file.read_text())
    for row in report["shapes"]["28x28x1"]["rows"]:
        if row["method"] == "Jacobi, eager":
            row["speedup over sequential, eager"] = 12.34
    file.write_text(json.dumps(report))
    made = cells(results, "MADE, MNIST")
    assert made[1] == "27x"
    assert made[2].startswith("sequential, eager: Jacobi 12.3x, ")
    assert cells(results, "MADE, CIFAR-10")[1:3] == [
        "25x",
        "sequential, eager: Jacobi 33.7x, Jacobi in a CUDA graph 89.3x",
    ]
    assert "NVIDIA H100 80GB HBM3, 2.11.0 ([made_h100_split_sums]" in made[4]


def test_what_is_missing_says_what_makes_it_and_nothing_else_is_lost(results):
    (results / "pixelcnnpp_ladder_mnist_h100.json").unlink()
    (results / "pixelcnnpp_cifar10_h100.json").unlink()
    mnist, cifar10 = cells(results, "PixelCNN++, MNIST"), cells(results, "PixelCNN++, CIFAR-10")
    assert mnist[2].startswith("batch 16: Jacobi 7.03x")
    assert mnist[3] == "not measured: `python -m benchmarks.pixelcnnpp_ladder --checkpoint PATH`"
    assert "ladder" not in mnist[4]
    assert cifar10[2] == "not measured: `python -m benchmarks.pixelcnnpp --checkpoint PATH`"
    assert cifar10[3].startswith("cached sequential, fused kernels: GS-Jacobi, batch 1 1.18x")


def test_what_auto_took_without_iterating_is_no_gain_of_the_method(results):
    file = results / "pixelcnnpp_ladder_cifar10_h100.json"
    report = json.loads(file.read_text())
    for case in report["cases"]:
        for row in case["rows"]:
            if row["method"] == "auto":
                row["over_cached"] = 99.0
    file.write_text(json.dumps(report))
    assert "99" not in cells(results, "PixelCNN++, CIFAR-10")[3]


@pytest.mark.parametrize("change", ["random weights", "other classes"])
def test_a_densenet_counts_only_with_the_same_top_five(results, change):
    file = results / "densenet_h100.json"
    report = json.loads(file.read_text())
    for case in report["cases"]:
        case["is_trained"] &= change != "random weights"
        for row in case.get("rows", []):
            if "top5" in row and change == "other classes":
                row["top5"] = 0.5
    file.write_text(json.dumps(report))
    assert cells(results, "DenseNet-BC")[2] == "not measured: `python -m benchmarks.densenet --weights FILE`"
    assert cells(paper.RESULTS, "DenseNet-BC")[2].startswith("bf16 34.5x (8 iterations, 97 % of the images)")
    assert cells(paper.RESULTS, "DenseNet-201")[2].startswith("not measured")
