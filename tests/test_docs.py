"""The pages: their Python runs, the generated ones are whole. A block with a title says what it needs, and is not run.

The pages about recurrent networks and about models of one's own have tests of their own.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from lit_parallel.config import SampleConfig, TrainConfig, load_config
from lit_parallel.options import option_keys

ROOT = Path(__file__).parent.parent
ELSEWHERE = ("bring_your_own", "recurrent")
PAGES = [path.stem for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in ELSEWHERE]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / project)  # what is measured is not kept
    names: dict = {"print": lambda *_: None}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"block {number} of docs/{page}.md", "exec"), names)


def test_the_commands_of_the_pages_have_options_that_exist():
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    commands = [
        line.partition("#")[0].split() for line in lines if re.match(r"(python|torchrun .*) (train|sample)\.py", line)
    ]
    assert commands
    for words in commands:
        schema = TrainConfig if "train.py" in words else SampleConfig
        path = ROOT / words[words.index("--config") + 1] if "--config" in words else None
        load_config(
            schema, path, [word for word in words[words.index(f"{schema.__name__[:-6].lower()}.py") :] if "=" in word]
        )


def test_every_page_is_in_the_navigation_and_no_other():
    named = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().partition("nav:")[2])
    generated = ["configuration.md", "results.md"]
    assert sorted(named) == sorted([*(path.name for path in (ROOT / "docs").glob("*.md")), *generated])


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_names_every_option(hooks):
    page = hooks.configuration()
    for schema in (TrainConfig, SampleConfig):
        for key in option_keys(schema()):
            assert f"`{key}`" in page
    for line in page.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line


def test_the_measurements_page_names_every_report(hooks):
    page = hooks.results()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"(benchmarks/results/{path.name})" in page
        assert json.loads(path.read_text())["environment"]["device_name"] in page


def test_a_link_out_of_the_pages_stays_in_the_site(hooks):
    assert hooks.on_page_markdown("[x](../benchmarks/results/a.json)") == "[x](benchmarks/results/a.json)"
