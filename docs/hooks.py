"""What MkDocs makes of these pages: two more are written, from the schema and from the benchmarks' reports."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_parallel.cli import describe_option, format_default
from lit_parallel.config import SampleConfig, TrainConfig
from lit_parallel.options import Group, fields_of, join_key

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are written here, and the reports that pages link to."""
    from mkdocs.structure.files import File

    for name, text in (("configuration.md", configuration()), ("results.md", results())):
        files.append(File.generated(config, name, content=text))
    for path in sorted((ROOT / RESULTS).iterdir()):
        files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that lead out of ``docs/`` in the repository stay within the site."""
    return markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")


def configuration() -> str:
    """Every option of both commands, from the schema."""
    parts = [
        "# Configuration\n",
        "Options stand in a YAML file (`--config`), or on the command line as `key=value`, which wins. "
        "`python train.py --help all` prints the same. An option that is unknown, or has a value that it cannot "
        "have, is refused with one line.\n",
    ]
    for schema, command in ((TrainConfig, "train.py"), (SampleConfig, "sample.py")):
        parts.append(f"## {command}\n")
        parts += _table("", schema())
    return "\n".join(parts)


def _table(key: str, options: Any) -> list[str]:
    """The options of a group, then those of the groups in it."""
    hints, specs = typing.get_type_hints(type(options)), fields_of(options)
    rows, groups = [], []
    for name, spec in specs.items():
        full, value = join_key(key, name), getattr(options, name)
        if isinstance(spec, Group):
            kinds = spec.kinds or {"": type(value)}
            for kind, cls in kinds.items():
                groups += [f"### `{full}`{f' ({full}.name={kind})' if kind else ''}\n", f"{spec.help}\n"]
                groups += _table(full, cls())
        else:
            described = describe_option(hints[name], spec, value).replace("|", "\\|")
            default = format_default(value).replace("|", "\\|")
            rows.append(f"| `{full}` | `{default or ' '}` | {spec.help.replace('|', chr(92) + '|')} | {described} |")
    head = ["| option | default | explanation | values |", "|---|---|---|---|"] if rows else []
    return [*head, *rows, "", *groups]


def results() -> str:
    """A line for every report in the repository."""
    parts = [
        "# Measurements\n",
        "Every number in these pages comes from one of these reports, which names its command, device and versions. "
        "A command ends with `--help` to see what else it can do.\n",
        "| report | device | torch | command |",
        "|---|---|---|---|",
    ]
    for path in sorted((ROOT / RESULTS).glob("*.json")):
        report = json.loads(path.read_text())
        environment, command = report.get("environment", {}), report.get("command", "")
        commands = command if isinstance(command, list) else [command]
        told = "<br>".join(f"`{each}`".replace("|", "\\|") for each in commands)
        device, version = environment.get("device_name", ""), environment.get("versions", {}).get("torch", "")
        parts.append(f"| [{path.stem}]({RESULTS}/{path.name}) | {device} | {version} | {told} |")
    return "\n".join(parts) + "\n"
