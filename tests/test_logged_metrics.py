"""Every panel of the workspace has something to show: tiny runs of each workload log what it draws."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_parallel.config import SampleConfig, TrainConfig, load_config
from lit_parallel.dashboard import SECTIONS, Panel
from sample import sample
from train import train

CONFIGS = Path(__file__).parent.parent / "configs"

pytestmark = [
    # Lightning and wandb open files that the interpreter closes at exit; what they deprecate is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

CPU = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.enable_progress_bar=false", "wandb.mode=offline"]
SHORT = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.log_every_n_steps=1",
]
GRID = ["callbacks.sample_grid.every_n_epochs=1", "callbacks.sample_grid.num_samples=2", "data.side=8"]
TRAINED = {
    "made_mnist5k": ["model.hidden_sizes=[8]", *GRID],
    "pixelcnnpp_mnist5k": ["model.filters=4", "model.mixtures=2", "model.initial_images=16", *GRID],
    "densenet_mnist5k": [
        *("model.growth_rate=4", "model.block_config=[2,2]", "data.side=7", "data.evaluation_batch_size=10"),
        *("callbacks.jacobi_evaluation.enabled=true", "callbacks.jacobi_evaluation.solver=jacobi"),
    ],
    "rnn_adding": [
        *("model.hidden_size=8", "data.length=64", "data.size=100", "data.test_size=20", "data.batch_size=8"),
        *("callbacks.jacobi_backprop.enabled=true", "callbacks.jacobi_backprop.solver=jacobi_gs"),
        *("callbacks.jacobi_backprop.forward=true", "callbacks.jacobi_backprop.probe_every=1"),
    ],
    "rnn_characters": ["model.hidden_size=8", "data.length=12", "data.batch_size=8"],
}
SAMPLED = [
    *("num_samples=2", "batch_size=2", "solver.name=auto", "compare.baselines=[sequential]", "compare.repeats=1"),
    "compare.curves_of=[jacobi]",
]

# Not "Loss": that of images is the bits per dimension in other units, and only training logs it.
OF_IMAGES = ["Bits per dimension", "Sample grids: parallel iterations", "Sample grids"]
OF_SAMPLING = [
    *(panel.title for panel in SECTIONS["Sampling: iterations, work, wall-clock"]),
    "Largest change in an iteration",
    *(panel.title for panel in SECTIONS["Samples and iteration maps"]),
]
SHOWN = {
    "made_mnist5k": OF_IMAGES + OF_SAMPLING,
    "pixelcnnpp_mnist5k": OF_IMAGES + OF_SAMPLING,
    "densenet_mnist5k": ["Loss", "Accuracy", "By block", *(panel.title for panel in SECTIONS["DenseNets"])],
    "rnn_characters": ["Loss", "Bits per character"],
    "rnn_adding": ["Loss", "Relative error", *(panel.title for panel in SECTIONS["Recurrent networks"])],
}
PANELS = {panel.title: panel for panels in SECTIONS.values() for panel in panels}


def logged(folder: Path) -> list[set[str]]:
    """The names in each record of the offline W&B runs of a run folder; a picture or table has the name it is under."""
    wandb = Path(sys.executable).with_name("wandb")
    found = []
    for log in folder.glob("wandb/offline-run-*/run-*.wandb"):
        done = subprocess.run([wandb, "leet", "inspect", "--json", log], capture_output=True, text=True, check=True)
        records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        items = [record["history"]["item"] for record in records if "history" in record]
        found += [{re.sub(r"\._type.*", "", name) for name in item} for item in items]
    return found


def missing(panel: Panel, records: list[set[str]]) -> list[str]:
    """What a panel would draw and cannot: a metric of a line counts only beside what the line is drawn against."""
    drawable = [names for names in records if panel.kind != "line" or panel.x in names]
    names = set().union(*drawable)
    if panel.regex is not None:
        return [] if any(re.fullmatch(panel.regex, name) for name in names) else [panel.regex]
    return [name for name in panel.metrics if name not in names]


@pytest.mark.parametrize("experiment", TRAINED)
def test_a_run_logs_what_its_panels_show(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / project)  # what auto measures is not kept
    options = [f"runs_folder={tmp_path}", *CPU, *SHORT, *TRAINED[experiment]]
    run = train(load_config(TrainConfig, CONFIGS / f"{experiment}.yaml", options))
    if "Samples" in SHOWN[experiment]:
        sample(load_config(SampleConfig, overrides=[f"checkpoint={run.checkpoint}", *CPU, *SAMPLED]))
    records = logged(run.folder)
    lacking = {title: missing(PANELS[title], records) for title in SHOWN[experiment]}
    assert {title: names for title, names in lacking.items() if names} == {}


def test_every_panel_stands_under_a_workload():
    of_benchmarks = {panel.title for panel in SECTIONS["Benchmark ladder"]}  # which test_dashboard.py logs
    assert {title for titles in SHOWN.values() for title in titles} | of_benchmarks == PANELS.keys()
