"""What the README says is true: its commands, its snippets, its links."""

import re
from pathlib import Path

import pytest
import torch

from lit_parallel.config import SampleConfig, TrainConfig, load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_snippet_with_a_system_of_ones_own_runs(capsys):
    (snippet,) = [block for block in blocks("python") if "TensorSystem" in block]
    names: dict = {}
    exec(snippet, names)
    solution = names["solution"]
    assert solution.certified.all()
    assert (solution.iterations < 100).all()
    x = torch.zeros(8, 100)
    for t in range(100):
        x[:, t] = torch.tanh(x[:, t - 1]) + 1 if t else 1.0
    torch.testing.assert_close(solution.value, x)
    assert "converged" in capsys.readouterr().out


def test_the_commands_options_are_known():
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python ")]
    assert len(commands) >= 3
    for command in commands:
        words = command.partition("#")[0].split()
        overrides = [word for word in words if "=" in word]
        schema = TrainConfig if "train.py" in words[1] else SampleConfig
        path = ROOT / words[words.index("--config") + 1] if "--config" in words else None
        load_config(schema, path, overrides)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_to_files_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


def test_places_named_in_the_readme_exist():
    tree = README[README.index("## Where things are") :].split("```")[1]
    # A name ends at two spaces or more, its explanation follows after many.
    lines = [re.split(r" {3,}", line.strip())[0] for line in tree.splitlines()]
    places = [place for line in lines for place in line.split()]
    assert len(places) > 15
    for place in places:
        assert (ROOT / place).exists() or (ROOT / "lit_parallel" / place).exists(), place
