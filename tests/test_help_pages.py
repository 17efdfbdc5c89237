"""Help pages read well in a terminal of 80 columns: no line is longer, and every option says what it is for."""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

import pytest

import sample
import train

ROOT = Path(__file__).parent.parent
COLUMNS = 80
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("benchmarks", "lit_parallel")
    for path in sorted((ROOT / package).glob("*.py"))
    if "ArgumentParser(" in path.read_text()
]


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))


def too_long(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > COLUMNS]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_explained(command, monkeypatch):
    parsers = []

    def parse(self, *_, **__):
        parsers.append(self)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    monkeypatch.setattr(sys, "argv", [command])
    main = importlib.import_module(command).main
    with pytest.raises(SystemExit):
        main(*[[] for _ in inspect.signature(main).parameters])
    (parser,) = parsers
    assert parser.prog == f"python -m {command}"
    assert too_long(parser.format_help()) == []
    assert [action.dest for action in parser._actions if not action.help] == []


@pytest.mark.parametrize("topic", [[], ["all"]])
@pytest.mark.parametrize("module", [train, sample])
def test_the_pages_of_train_and_sample(module, topic, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help", *topic])
    assert too_long(capsys.readouterr().out) == []
