"""The main job, end to end on the CPU: train, sample, and everything that is left behind."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lit_parallel
from lit_parallel.checkpoint import saved_config
from lit_parallel.config import SampleConfig, TrainConfig, load_config
from lit_parallel.errors import UserError
from lit_parallel.solution import Status
from lit_parallel.solvers import SolverOptions
from sample import sample
from train import DEFAULT_CONFIG, train

ROOT = Path(__file__).parent.parent

pytestmark = [
    # Lightning and wandb open files that the interpreter closes at exit; what they deprecate is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

QUICK = [
    "model.hidden_sizes=[24,24]",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=2",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "callbacks.sample_grid.every_n_epochs=2",
    "callbacks.sample_grid.num_samples=3",
]
CPU = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.enable_progress_bar=false", "wandb.mode=disabled"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One training run, with an offline W&B run."""
    runs = tmp_path_factory.mktemp("runs")
    return train(load_config(TrainConfig, DEFAULT_CONFIG, [f"runs_folder={runs}", *QUICK]))


@pytest.fixture
def checkpoint(run, tmp_path):
    """A copy of the checkpoint, in a run folder of its own."""
    folder = tmp_path / "made_mnist5k" / "run" / "checkpoints"
    folder.mkdir(parents=True)
    return Path(shutil.copy(run.checkpoint, folder / "last.ckpt"))


def run_sample(*overrides):
    return sample(load_config(SampleConfig, overrides=[*CPU, *overrides]))


def images_in(folder: Path) -> torch.Tensor:
    """All images of a sampling run, as another program would read them."""
    lines = json.loads((folder / "shards" / "index.json").read_text())["shards"]
    return torch.cat([torch.from_numpy(np.load(folder / "shards" / line["file"])["images"]) for line in lines])


def inspect(folder: Path) -> list[dict]:
    """The records of an offline W&B run, read back by its own tool."""
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "leet", "inspect", "--json", log], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def logged(records: list[dict]) -> dict[str, list]:
    """Every logged key with its values, in order."""
    values: dict[str, list] = {}
    for record in records:
        for key, value in record.get("history", {}).get("item", {}).items():
            values.setdefault(key, []).append(value)
    return values


def test_training_leaves_a_complete_run_folder(run):
    assert run.folder.parent.name == "made_mnist5k"
    assert run.checkpoint == run.folder / "checkpoints" / "last.ckpt"
    assert (run.folder / "checkpoints" / "best.ckpt").is_file()
    assert load_config(TrainConfig, run.folder / "config.yaml").model.hidden_sizes == [24, 24]
    assert {"train/bits_per_dim", "val/bits_per_dim"} <= run.metrics.keys()
    assert 0 < run.metrics["val/bits_per_dim"] < 20
    grid = Image.open(run.folder / "sample_grids" / "epoch-0001.png")
    assert min(grid.size) >= 2 * 28


def test_training_is_logged_to_an_offline_wandb_run(run):
    records = inspect(run.folder)
    (header,) = [record["run"] for record in records if record["type"] == "run"]
    assert header["run_group"] == "made_mnist5k"
    assert header["job_type"] == "train"
    assert header["config"]["update"]["model"]["hidden_sizes"] == [24, 24]
    values = logged(records)
    expected = {"train/loss", "train/bits_per_dim", "val/bits_per_dim", "sample_grid/iterations_mean"}
    assert expected <= values.keys()
    assert any(key.startswith("lr-") for key in values)
    assert any(key.startswith("sample_grid/images") for key in values)


def test_the_checkpoint_is_enough_to_sample_from_python(run):
    model = lit_parallel.load(run.checkpoint)
    assert saved_config(model).data.name == "mnist5k"
    images, solution = lit_parallel.sample(model, 5, solver="jacobi", seed=7)
    assert images.shape == (5, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert solution.status == [Status.CONVERGED] * 5
    again, _ = lit_parallel.sample(model, 5, solver=SolverOptions(name="gs_jacobi"), seed=7)
    assert torch.equal(images, again)


def test_sampling_leaves_report_pictures_and_images(checkpoint):
    results = run_sample(f"checkpoint={checkpoint}", "num_samples=10", "batch_size=4", "compare.repeats=2")
    folder = checkpoint.parent.parent
    assert results.folder == folder
    assert results.images.shape == (10, 1, 28, 28)
    assert Image.open(folder / "samples.png").size[0] > 28 * 4
    assert Image.open(folder / "convergence.png").size[0] > 1000
    report = json.loads((folder / "report.json").read_text())
    assert report["certified"] is True
    assert report["solution"]["status"] == {"converged": 10}
    assert report["not_solved"] == {}
    assert report["environment"]["device"] == "cpu"
    assert report["environment"]["versions"]["torch"] == torch.__version__
    rows = {row["solver"]: row for row in report["comparison"]["rows"]}
    assert list(rows) == ["gs_jacobi", "sequential", "cached_sequential"]
    assert rows["gs_jacobi"]["bitwise_equal_to_sequential"] is True
    assert rows["gs_jacobi"]["iterations_max"] < 784
    assert rows["sequential"]["iterations_mean"] == 784
    assert rows["gs_jacobi"]["speedup_over_sequential"] == pytest.approx(
        rows["sequential"]["seconds"] / rows["gs_jacobi"]["seconds"]
    )
    assert rows["sequential"]["iteration_speedup"] == 1
    assert all(row["repeatable"] for row in rows.values())
    (kept,) = (folder / "sampling").iterdir()
    assert results.shards.folder == kept / "shards"
    assert torch.equal(images_in(kept), results.images)
    assert sorted(path.name for path in kept.iterdir()) == [
        "convergence.png",
        "iterations.png",
        "report.json",
        "samples.png",
        "shards",
        "strips.png",
    ]


def test_a_second_sampling_keeps_the_first(checkpoint, monkeypatch):
    common = [f"checkpoint={checkpoint}", "compare.baselines=[]", "compare.curves=false"]
    first = run_sample(*common, "num_samples=2")
    second = run_sample(*common, "num_samples=3", "solver.name=jacobi")
    assert json.loads((second.folder / "report.json").read_text())["solution"]["solver"] == "jacobi"
    assert len(list((first.folder / "sampling").glob("*/report.json"))) == 2


@pytest.mark.parametrize("solver", ["solver.name=jacobi", "solver.name=jacobi_gs solver.block_size=28"])
def test_every_solver_gives_the_same_images(checkpoint, solver):
    common = [f"checkpoint={checkpoint}", "num_samples=4", "seed=7", "compare.baselines=[]", "compare.curves=false"]
    reference = run_sample(*common, "solver.name=sequential").images
    assert torch.equal(run_sample(*common, *solver.split()).images, reference)


def test_sampling_is_logged_to_wandb(checkpoint):
    results = run_sample(
        f"checkpoint={checkpoint}", "num_samples=6", "compare.repeats=1", "compare.curves=false", "wandb.mode=offline"
    )
    records = inspect(results.folder)
    (header,) = [record["run"] for record in records if record["type"] == "run"]
    assert (header["run_group"], header["job_type"]) == ("made_mnist5k", "sample")
    assert header["config"]["update"]["solver"]["name"] == "gs_jacobi"
    assert header["config"]["update"]["checkpoint"] == str(checkpoint)
    weights = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert header["config"]["update"]["checkpoint_sha256"] == weights
    assert json.loads((results.folder / "report.json").read_text())["checkpoint_sha256"] == weights
    values = logged(records)
    summary = results.solution.summary()
    assert values["solver/iterations_mean"] == [pytest.approx(summary["iterations_mean"])]
    assert values["solver/iterations_max"] == [summary["iterations_max"]]
    assert values["solver/iteration_speedup"] == [pytest.approx(summary["iteration_speedup"])]
    assert values["solver/wall_clock_speedup"] == [pytest.approx(results.wall_clock_speedup)]
    assert values["solver/evaluations"] == [pytest.approx(float(results.solution.evaluations.double().mean()))]
    assert sum(values["solver/iterations.values"][0]) == 6
    assert values["solver/iteration"] == list(range(1, summary["iterations_max"] + 1))
    largest = results.solution.residual.amax(dim=1).tolist()
    assert values["solver/residual"] == pytest.approx(largest)
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert {"solver/residual": "solver/iteration"} in [{m.get("name"): m.get("step_metric")} for m in metrics]
    assert any(key.startswith("samples.") for key in values)
    assert any(key.startswith("solvers.") for key in values)
    scalars = next(i for i, r in enumerate(records) if "solver/work" in r.get("history", {}).get("item", {}))
    pictures = next(i for i, r in enumerate(records) if "samples._type" in r.get("history", {}).get("item", {}))
    assert scalars < pictures


@pytest.mark.parametrize("number", [10, 2])  # the second: one batch for two processes
def test_two_processes_write_the_images_of_one(checkpoint, tmp_path, number):
    common = [f"num_samples={number}", "batch_size=3", "seed=3", "compare.baselines=[]", "compare.curves=false"]
    alone = run_sample(f"checkpoint={checkpoint}", *common, f"output={tmp_path / 'one'}").images
    command = [sys.executable, "sample.py", "--checkpoint", str(checkpoint), *common, *CPU]
    command += ["trainer.devices=2", "trainer.strategy=ddp", f"output={tmp_path / 'two'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(images_in(tmp_path / "two"), alone)
    assert {path.name for path in (tmp_path / "two" / "shards").iterdir()} == {
        "index.json",
        *(f"part-{first:08d}.npz" for first in range(0, number, 3)),
    }
    assert done.stdout.count(f"{len(alone)} images sampled") == 1  # only the first process speaks


def test_two_processes_train_into_one_run_folder(tmp_path):
    command = [sys.executable, "train.py", *QUICK, f"runs_folder={tmp_path}", "trainer.devices=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "made_mnist5k").iterdir()
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert done.stdout.count("run folder") == 1


def test_a_trial_run_leaves_no_checkpoint_to_sample(tmp_path):
    quiet = [option for option in QUICK if "limit" not in option and "epochs" not in option]
    result = train(
        load_config(
            TrainConfig,
            DEFAULT_CONFIG,
            [f"runs_folder={tmp_path}", *quiet, "trainer.fast_dev_run=true", "wandb.mode=disabled"],
        )
    )
    assert result.checkpoint is None
    assert not list(tmp_path.rglob("*.ckpt"))


def test_training_in_double_precision(tmp_path):
    overrides = [f"runs_folder={tmp_path}", *QUICK, "trainer.precision=64-true", "wandb.mode=disabled"]
    result = train(load_config(TrainConfig, DEFAULT_CONFIG, overrides))
    assert {"val/bits_per_dim", "test/bits_per_dim"} <= result.metrics.keys()


def test_an_older_figure_is_not_left_beside_a_new_report(checkpoint):
    common = [f"checkpoint={checkpoint}", "num_samples=2", "compare.baselines=[]"]
    folder = run_sample(*common).folder
    assert (folder / "convergence.png").is_file()
    run_sample(*common, "compare.curves=false")
    assert not (folder / "convergence.png").exists()


def test_what_is_not_solved_has_no_speedup(checkpoint, capsys):
    results = run_sample(
        f"checkpoint={checkpoint}",
        "num_samples=2",
        "solver.max_iterations=2",
        "compare.repeats=1",
        "compare.curves=false",
    )
    assert results.report["comparison"]["rows"][0]["status"] == {"iteration_limit": 2}
    assert results.wall_clock_speedup != results.wall_clock_speedup
    printed = capsys.readouterr().out
    assert "unsolved" in printed
    assert "NOT all were solved" in printed
    report = json.loads((results.folder / "report.json").read_text())
    assert report["certified"] is False
    for numbers in (report["solution"], report["comparison"]["rows"][0]):
        assert numbers["iteration_speedup"] is None


def test_a_solver_that_is_a_baseline_stands_in_the_table_once(checkpoint):
    results = run_sample(f"checkpoint={checkpoint}", "num_samples=2", "solver.name=sequential", "compare.repeats=1")
    assert [measurement.solver for measurement in results.measurements] == ["sequential", "cached_sequential"]


# -- what can go wrong ------------------------------------------------------------------------------------------


def test_no_checkpoint_yet(tmp_path):
    with pytest.raises(UserError, match=r"run 'python train.py' first"):
        run_sample(f"runs_folder={tmp_path}")


def test_a_missing_checkpoint_names_its_neighbours(checkpoint):
    with pytest.raises(UserError, match=r"There is no checkpoint .*In that folder: last.ckpt"):
        run_sample(f"checkpoint={checkpoint.with_name('lost.ckpt')}")


def test_a_damaged_checkpoint(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"damaged|not a checkpoint"):
        lit_parallel.load(checkpoint)


class Evil:
    """Something that a checkpoint must not be able to run."""

    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_a_checkpoint_that_would_run_code_is_refused_and_not_run(checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, checkpoint)
    with pytest.raises(UserError, match="Nothing in it was executed"):
        lit_parallel.load(checkpoint)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_program(checkpoint):
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 1}}, checkpoint)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        lit_parallel.load(checkpoint)


def test_a_checkpoint_that_does_not_fit_its_config(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["config"]["model"]["hidden_sizes"] = [8]
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match="does not fit its own config"):
        lit_parallel.load(checkpoint)


def test_a_checkpoint_with_values_that_are_not_finite(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["network.output.bias"][3] = float("nan")
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match=r"not finite \(first in 'network.output.bias'\)"):
        lit_parallel.load(checkpoint)


def test_an_arithmetic_that_is_too_coarse(checkpoint):
    with pytest.raises(UserError, match="too coarse"):
        run_sample(f"checkpoint={checkpoint}", "trainer.precision=bf16-mixed")


def test_an_option_of_another_solver(checkpoint):
    with pytest.raises(UserError, match=r"solver\.window belongs to gs_jacobi"):
        run_sample(f"checkpoint={checkpoint}", "solver.name=jacobi", "solver.window=3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer.lrr=1"], "Did you mean 'lr'?"),
        (["experiment=../elsewhere"], "plain name"),
        (["callbacks.early_stopping.enabled=true", "data.validation_fraction=0"], "needs validation data"),
        (["trainer.limit_train_batches=1.5"], "Lightning's Trainer refuses"),
        (["--config", "configs/made_mnist5.yaml"], "Did you mean"),
        (["data.name=mnist", "data.download=false", "data.folder=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(arguments, message, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *arguments, f"runs_folder={tmp_path}", "wandb.mode=disabled"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())  # nothing is left behind by a run that could not start
