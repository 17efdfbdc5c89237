"""The page about recurrent layers is a program: it runs, and does what it says."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_parallel.config import TrainConfig, load_config
from lit_parallel.options import fields_of
from lit_parallel.recurrent import RecurrentOptions, records

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recurrent.md").read_text()

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|`val_dataloader`|the logging interval)")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's names after all of its blocks have run, in order, and what they printed and said."""
    folder = tmp_path_factory.mktemp("page")
    names: dict = {}
    printed: list[str] = []
    said: list[str] = []
    names["print"] = lambda *words: printed.append(" ".join(map(str, words)))
    handler = logging.Handler()
    handler.emit = lambda line: said.append(line.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(folder)
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)):
            exec(compile(block, f"block {number} of the page", "exec"), names)
    logger.removeHandler(handler)
    assert not list(folder.iterdir())
    return SimpleNamespace(names=names, printed=printed, said=said)


def test_the_trainer_says_what_was_used(page):
    lines = [line for line in page.said if line.startswith("JacobiBackprop: lstm.l0: ")]
    assert len(lines) == 1
    assert "parallel iterations for 500 steps" in lines[0]


def test_everything_is_restored(page):
    for name in ("reader", "gru", "leaky"):
        module = page.names[name]
        assert not records(module)
        assert not any("forward" in part.__dict__ for part in module.modules())


def test_the_records_are_shown(page):
    (line,) = [line for line in page.printed if line.startswith("l0: ")]
    iterations, error = re.fullmatch(r"l0: (\d+) iterations for 300 steps, estimated error (.*)", line).groups()
    assert 0 < int(iterations) < 300
    assert float(error) <= 1e-6


def test_truncation_is_an_error_that_falls_with_the_horizon(page):
    errors = list(page.names["errors"].values())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01
    assert errors[-1] < 1e-3


def test_all_options_are_in_the_table():
    table = PAGE[PAGE.index("## Options") : PAGE.index("## What is logged")]
    options = fields_of(RecurrentOptions)
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(options)
    for solver in options["solver"].choices:
        assert f"| `{solver}` |" in PAGE


def test_the_readmes_lines_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "JacobiBackprop" in block]
    with_callback: list = []
    trainers = SimpleNamespace(Trainer=lambda callbacks: with_callback.extend(callbacks))
    exec(block, {"pl": trainers, "module": page.names["gru"]})
    assert isinstance(with_callback[0], page.names["JacobiBackprop"])


@pytest.mark.parametrize(
    "path", ["README.md", "docs/recurrent.md", *(f"configs/{p.name}" for p in ROOT.glob("configs/rnn_*.yaml"))]
)
def test_commands_have_the_options_that_they_name(path):
    text = re.sub(r"\n#  +(?=callbacks)", " ", (ROOT / path).read_text())  # a command may go on in the next line
    commands = re.findall(r"python train\.py --config (\S+) (\S*callbacks.*)", text)
    assert commands
    for config, overrides in commands:
        loaded = load_config(TrainConfig, ROOT / config, overrides.split())
        assert loaded.callbacks.jacobi_backprop.enabled
        assert path in (f"configs/{loaded.experiment}.yaml", "README.md", "docs/recurrent.md")
