"""Recurrent models through the commands: every config trains, and what cannot be is told in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lit_parallel
from lit_parallel.checkpoint import build_model
from lit_parallel.config import SampleConfig, TrainConfig, load_config
from lit_parallel.data.datasets import build_data
from lit_parallel.errors import UserError
from sample import sample
from train import train

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("rnn_*.yaml"))

pytestmark = [
    # Lightning and wandb open files that the interpreter closes at exit; what they deprecate is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

QUIET = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.enable_progress_bar=false", "wandb.mode=disabled"]
SHORT = ["trainer.max_epochs=1", "trainer.limit_train_batches=3", "trainer.log_every_n_steps=1"]
TINY = {
    "rnn_mnist": ["data.name=mnist5k"],
    "rnn_mnist5k": [],
    "rnn_pixels_lstm": ["data.name=mnist5k", "data.side=5", *SHORT],
    "rnn_pixels_gru": ["data.name=mnist5k", "data.side=5", *SHORT],
    "rnn_characters": ["data.length=12", "data.batch_size=8", *SHORT],
    "rnn_adding": ["data.length=12", "data.size=100", "data.test_size=20", "data.batch_size=8", *SHORT],
}
ADDING = ["model.hidden_size=8", *TINY["rnn_adding"]]


def config_of(path: Path | str, *overrides: str):
    return load_config(TrainConfig, ROOT / "configs" / path, [*QUIET, *overrides])


@pytest.fixture(scope="module")
def adding_run(tmp_path_factory):
    """A model that is not sampled, trained for five steps, with an offline W&B run."""
    runs = tmp_path_factory.mktemp("runs")
    # Five epochs, so that a grid would be due.
    few = ["trainer.max_epochs=5", "trainer.limit_train_batches=1", f"runs_folder={runs}", "wandb.mode=offline"]
    return train(config_of("rnn_adding.yaml", *ADDING, *few))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains(path, tmp_path, capsys):
    few = [
        "model.hidden_size=8",
        "trainer.limit_val_batches=1",
        "trainer.limit_test_batches=1",
        f"runs_folder={tmp_path}",
    ]
    result = train(config_of(path.name, *few, *TINY[path.stem]))
    assert result.folder.parent.name == path.stem
    printed = capsys.readouterr().out
    for metric in result.model.metrics:
        for part in ("train", "val", "test"):
            assert f"{part}/{metric}: {result.metrics[f'{part}/{metric}']:.3f}" in printed
    assert ("sample it:" in printed) == (config_of(path.name).model.task == "next_pixel")
    assert ("test it:" in printed) == (config_of(path.name).model.task != "next_pixel")
    model = lit_parallel.load(result.checkpoint)
    assert type(model) is type(result.model)


def test_the_papers_setting_is_exact():
    for name in ("rnn_mnist.yaml", "rnn_mnist5k.yaml"):
        config = config_of(name)
        data = build_data(config.data, config.seed)
        model = build_model(config, data.sample_shape)
        assert model.length == 100
        assert {name: [*p.shape] for name, p in model.network.recurrence.cell.named_parameters()} == {
            "weight_ih": [128, 1],
            "weight_hh": [128, 128],
            "bias": [128],
        }
        assert (config.data.batch_size, config.trainer.max_steps, config.callbacks.ema.enabled) == (1, 200, False)
        assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("sgd", 1e-4, 0)
        assert (config.optimizer.warmup_fraction, config.optimizer.final_lr_fraction) == (0, 1)
        assert config.trainer.gradient_clip_val is None


def test_training_leaves_a_complete_run_folder(adding_run):
    checkpoints = adding_run.folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert load_config(TrainConfig, adding_run.folder / "config.yaml").data.length == 12
    assert not (adding_run.folder / "sample_grids").exists()
    best = torch.load(checkpoints / "best.ckpt", weights_only=True)
    assert best["hyper_parameters"]["sample_shape"] == [12, 2]
    assert {"train/loss", "val/relative_error", "test/relative_error"} <= adding_run.metrics.keys()
    (log,) = adding_run.folder.glob("wandb/offline-run-*/run-*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "leet", "inspect", "--json", log], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    keys = {key for record in records for key in record.get("history", {}).get("item", {})}
    assert {"val/loss", "val/relative_error", "test/loss"} <= keys


def test_a_model_without_samples_is_refused_in_one_line(adding_run):
    with pytest.raises(UserError, match=r"holds a RegressionModule, which draws no samples") as caught:
        sample(load_config(SampleConfig, overrides=[*QUIET, f"checkpoint={adding_run.checkpoint}"]))
    assert "\n" not in str(caught.value)


def test_a_next_pixel_model_is_sampled(tmp_path):
    result = train(
        config_of(
            "rnn_mnist5k.yaml",
            "data.side=4",
            "trainer.max_steps=2",
            "trainer.limit_val_batches=0",
            f"runs_folder={tmp_path}",
        )
    )
    common = ["num_samples=2", "compare.repeats=1", "compare.curves=false", f"checkpoint={result.checkpoint}"]
    sampled = sample(load_config(SampleConfig, overrides=[*QUIET, *common]))
    assert sampled.images.shape == (2, 1, 4, 4)
    assert sampled.solution.certified.all()


@pytest.mark.parametrize("path", ["rnn_mnist5k.yaml", "rnn_adding.yaml"])
def test_a_trial_run(path, tmp_path):
    result = train(
        config_of(path, *(ADDING if "adding" in path else []), "trainer.fast_dev_run=true", f"runs_folder={tmp_path}")
    )
    assert result.checkpoint is None
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["solver.name=jacobi"],
            "Option 'solver.name' says how samples are drawn, and a model with model.task=regression",
        ),
        (["sampling.temperature=0.5"], "Option 'sampling.temperature' says how samples are drawn"),
        (["callbacks.sample_grid.num_samples=4"], "Option 'callbacks.sample_grid.num_samples' says how"),
        (["model.task=classification"], "model.task=classification needs images"),
        (["model.task=next_character"], "data.name=adding is not for model.task=next_character: set model.task=regres"),
        (["callbacks.early_stopping.enabled=true", "data.validation_fraction=0"], "needs validation data"),
    ],
)
def test_a_mistake_is_told_before_a_run_folder_exists(overrides, message, tmp_path):
    with pytest.raises(UserError) as caught:
        train(config_of("rnn_adding.yaml", *ADDING, *overrides, f"runs_folder={tmp_path}"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_sample_grid_that_is_switched_off_may_have_any_options(tmp_path):
    grid = ["callbacks.sample_grid.enabled=false", "callbacks.sample_grid.num_samples=4", "trainer.fast_dev_run=true"]
    train(config_of("rnn_adding.yaml", *ADDING, *grid, f"runs_folder={tmp_path}"))


def test_an_option_of_images_does_not_belong_to_numbers():
    with pytest.raises(UserError, match=r"'data\.folder' does not belong to data\.name=adding: leave it out"):
        config_of("rnn_adding.yaml", "data.folder=x")
