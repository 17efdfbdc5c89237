"""The workspace is what the runs log, and needs no account to be looked at. Nothing here reaches for the network."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import wandb
from test_tracking import _no_account, records  # noqa: F401  (no key and no server, for every test here)

from callbacks import jacobi_backprop
from lit_parallel import dashboard, tracking
from lit_parallel.cli import run_command
from lit_parallel.config import WandbOptions
from lit_parallel.dashboard import SECTIONS, build_workspace, describe, main
from lit_parallel.runs import RunState

PANELS = [panel for panels in SECTIONS.values() for panel in panels]


def run(capsys, *argv, status=0):
    assert run_command(main, [str(argument) for argument in argv]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_without_an_account_it_says_what_it_would_create_and_where_to_look(capsys):
    printed = run(capsys)
    for section, panels in SECTIONS.items():
        assert section in printed
        for panel in panels:
            assert panel.title in printed
    assert "wandb login" in printed
    assert printed.splitlines()[-1].endswith("wandb leet runs/EXPERIMENT/TIME/wandb")
    assert max(map(len, describe())) <= 120


def test_the_workspace_holds_every_panel_in_its_section():
    workspace = build_workspace("somebody", "lit-parallel")
    assert [section.name for section in workspace.sections] == list(SECTIONS)
    sections = workspace._to_model().spec.section.panel_bank_config.sections  # what would be sent
    for section, panels in zip(sections, SECTIONS.values(), strict=True):
        sent = section.model_dump_json()
        for panel in panels:
            for name in (*panel.metrics, *([panel.regex] if panel.regex else [])):
                assert json.dumps(name)[1:-1] in sent or name in sent, (panel.title, name)
    grouping = workspace._to_model().spec.section.run_sets[0].grouping
    assert [key.name for key in grouping] == ["group", "jobType"]


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(dashboard.UserError, match=r"pip install -e '\.\[dashboard\]'"):
        build_workspace("somebody", "lit-parallel")


def test_what_the_callback_logs_for_recurrent_layers_is_shown():
    shown = [re.compile(panel.regex) for panel in SECTIONS["Recurrent networks"]]
    source = Path(jacobi_backprop.__file__).read_text()
    for name in ("iterations", "forward_iterations", "estimated_error", "probe_error", "backward_speedup"):
        assert f'"{name}"' in source
        assert any(pattern.fullmatch(f"jacobi_backprop/lstm.l0/{name}") for pattern in shown), name


def test_a_ladder_becomes_a_run_of_job_type_benchmark(tmp_path, capsys):
    rows = [
        {"method": "cached sequential", "seconds": 2.0, "iterations_mean": 784, "status": {}},
        {"method": "GS-Jacobi, 4 rows", "seconds": 0.5, "iterations_mean": 99.5, "status": {}},
    ]
    report = {"command": "c", "cases": [{"batch": 1, "rows": rows}, {"batch": 4, "rows": rows[:1]}]}
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps(report))
    run(capsys, "--ladder", path, "--runs-folder", tmp_path)
    (folder,) = (tmp_path / "benchmarks" / "ladder" / "wandb").glob("offline-run-*")
    found = records(str(folder))
    (started,) = (record["run"] for record in found if record["type"] == "run")
    assert (started["run_group"], started["job_type"]) == ("benchmarks", "benchmark")
    history = [record["history"]["item"] for record in found if record["type"] == "history"]
    points = [{name: value for name, value in item.items() if name.startswith("ladder/")} for item in history]
    assert points[0] == {
        "ladder/batch": 1,
        "ladder/seconds/cached sequential": 2.0,
        "ladder/iterations/cached sequential": 784,
        "ladder/seconds/GS-Jacobi, 4 rows": 0.5,
        "ladder/iterations/GS-Jacobi, 4 rows": 99.5,
    }
    (table,) = (folder / "files").glob("media/table/ladder_*.json")
    assert [row[0] for row in json.loads(table.read_text())["data"]] == [1, 1, 4]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"cases": [{"batch": 1, "rows": [{}]}]}'])
def test_other_reports_are_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "report.json"
    path.write_text(content)
    line = run(capsys, "--ladder", path, status=2)
    assert line.startswith(f"error: '{path}' is no report of benchmarks.pixelcnnpp_ladder")
    assert line.count("\n") == 1


@pytest.fixture
def trained(tmp_path):
    """A run folder with a checkpoint, as a training run of the id abc123 leaves it."""
    checkpoint = tmp_path / "12-30-00" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"weights")
    RunState(wandb_id="abc123", finished=True).write(tmp_path / "12-30-00")
    return checkpoint


def online_run(**attributes):
    return create_autospec(wandb.Run, instance=True, offline=False, **attributes)


def test_a_sampling_run_names_what_it_comes_from_and_how_it_was_drawn(trained):
    folder = trained.parent.parent
    config = {"checkpoint": str(trained), "seed": 7, "solver": {"name": "gs_jacobi"}}
    logger = tracking.build_logger(WandbOptions(), folder, config=config, experiment="digits", job_type="sample")
    assert logger.experiment.config["trained_by"] == "abc123"
    assert logger.experiment.config["checkpoint"] == str(trained)
    assert logger.experiment.name == "12-30-00-sample-gs_jacobi-seed-7"
    tracking.finish(logger)


def test_a_checkpoint_from_elsewhere_has_no_origin(tmp_path):
    assert tracking._origin(str(tmp_path / "model.ckpt")) == {}
    assert tracking._origin(None) == {}


def test_online_the_checkpoint_is_an_artifact_that_is_not_uploaded(trained, monkeypatch):
    run = online_run(id="abc123", job_type="train")
    tracking.finish(SimpleNamespace(experiment=run, save_dir=str(trained.parent.parent)))
    (artifact,) = run.log_artifact.call_args.args
    assert (artifact.name, artifact.type) == ("checkpoint-abc123", "model")
    (entry,) = artifact.manifest.entries.values()
    assert entry.ref == trained.resolve().as_uri()
    run.finish.assert_called_once_with(exit_code=0)


@pytest.mark.parametrize("others", [{"job_type": "sample"}, {"job_type": "train", "offline": True}])
def test_other_runs_leave_no_artifact(trained, others):
    run = create_autospec(wandb.Run, instance=True, **({"id": "abc123", "offline": False} | others))
    tracking.finish(SimpleNamespace(experiment=run, save_dir=str(trained.parent.parent)))
    run.log_artifact.assert_not_called()
    run.finish.assert_called_once()


def test_online_a_sampling_run_is_linked_and_goes_on_if_it_cannot_be():
    run = online_run(config={"trained_by": "abc123"})
    run.use_artifact.side_effect = wandb.errors.CommError("trained offline")
    tracking._use_checkpoint(run)
    run.use_artifact.assert_called_once_with("checkpoint-abc123:latest", type="model")
