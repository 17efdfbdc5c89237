"""The commands that make the paper's figures, and the table of its numbers beside ours."""

import argparse
import importlib
import json
import shutil
from pathlib import Path

import pytest

from benchmarks import paper

ROOT = Path(__file__).parent.parent.parent


def options(**chosen) -> argparse.Namespace:
    return argparse.Namespace(**{"size": "cpu", "mnist": None, "cifar10": None, "output": Path("out")} | chosen)


class UnderstoodError(Exception):
    """Arguments were understood."""


@pytest.mark.parametrize("data", [{}, {"mnist": "m", "cifar10": "c"}], ids=["embedded", "folders"])
@pytest.mark.parametrize("size", ["cpu", "gpu"])
@pytest.mark.parametrize("part", paper.PARTS)
def test_benchmarks_understand_their_commands(part, size, data, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, argv=None, namespace=None):
        raise UnderstoodError(parse(self, argv, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    for command in paper.commands(part, options(size=size, **data)):
        if command[0] == "sample.py":
            assert f"runs_folder={Path('out', part, 'runs')}" in command
            continue
        _, module, *argv = command
        monkeypatch.setattr("sys.argv", [module, *argv])
        with pytest.raises(UnderstoodError) as understood:
            importlib.import_module(module).main()
        assert understood.value.args[0].output == Path("out", part, f"{part}.json")


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


def test_the_page_is_what_the_reports_say():
    assert (ROOT / "docs" / "paper.md").read_text() == paper.PAGE.format(table=paper.table()), (
        "python -m benchmarks.paper table --output docs/paper.md"
    )


def test_numbers_are_read_and_what_is_missing_says_what_makes_it(tmp_path):
    for path in paper.RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "densenet_h100.json").unlink()
    file = tmp_path / "made_h100.json"
    report = json.loads(file.read_text())
    for row in report["shapes"]["28x28x1"]["rows"]:
        if row["method"] == "Jacobi, eager":
            row["speedup over sequential, eager"] = 12.34
    file.write_text(json.dumps(report))
    rows = {line.split(" | ")[0]: line for line in paper.table(tmp_path).splitlines()}
    assert "not measured: `python -m benchmarks.densenet`" in rows["| DenseNet-201, evaluation of one image"]
    assert "| 27x | both eager: 12.3x |" in rows["| MADE, MNIST, 100 images, Jacobi over sequential sampling"]
