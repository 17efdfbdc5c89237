"""Whatever ends a training, and however good its end is: ``last.ckpt`` is that end."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from callbacks import LastCheckpoint, build_training_callbacks
from lit_parallel.checkpoint import build_model
from lit_parallel.config import TrainConfig, load_config
from lit_parallel.modules.base import TrainableModule
from train import evaluate, train

ROOT = Path(__file__).parents[2]
BATCHES = 4  # of an epoch

pytestmark = [
    # Lightning opens files that the interpreter closes at exit; what it deprecates is its own.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


def config_of(folder, *overrides):
    """A recurrent network, which trains in no time."""
    quiet = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.enable_progress_bar=false"]
    tiny = ["model.hidden_size=8", "data.length=12", "data.size=100", "data.test_size=20", "data.batch_size=8"]
    short = [f"trainer.limit_train_batches={BATCHES}", "trainer.log_every_n_steps=1", "wandb.mode=disabled"]
    options = [*quiet, *tiny, *short, f"runs_folder={folder}", *overrides]
    return load_config(TrainConfig, ROOT / "configs" / "rnn_adding.yaml", options)


def read(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def worse_and_worse(monkeypatch):
    """Validation after which only the first checkpoint is a best one."""
    monkeypatch.setattr(TrainableModule, "monitor", "val/worse")

    def log(self):
        self.log("val/worse", float(self.global_step))

    monkeypatch.setattr(TrainableModule, "on_validation_epoch_end", log)


@pytest.mark.parametrize(
    ("end", "epoch", "step"),
    [
        (["trainer.max_epochs=3"], 2, 3 * BATCHES),
        (["trainer.max_epochs=3", "callbacks.ema.enabled=true"], 2, 3 * BATCHES),
        (["trainer.max_epochs=9", "trainer.max_steps=6"], 1, 6),
        (["trainer.max_epochs=9", "trainer.max_steps=7", "trainer.val_check_interval=2"], 1, 7),
        (["trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2"], 2, 3 * BATCHES),
        (["trainer.max_epochs=9", "callbacks.early_stopping={enabled: true, patience: 2}"], 2, 3 * BATCHES),
    ],
    ids=["epochs", "averaged", "steps", "between validations", "without a last validation", "early"],
)
def test_it_is_the_end_although_validation_gets_worse(end, epoch, step, tmp_path, worse_and_worse):
    result = train(config_of(tmp_path, *end))
    last, best = read(result.checkpoint), read(result.checkpoint.with_name("best.ckpt"))
    assert (last["epoch"], last["global_step"]) == (epoch, step)
    assert best["global_step"] < step
    assert {path.name for path in result.checkpoint.parent.iterdir()} == {"best.ckpt", "last.ckpt"}

    weights = result.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in last["state_dict"].items())
    assert not all(torch.equal(value, weights[name]) for name, value in best["state_dict"].items())
    tested = evaluate(config_of(tmp_path, "stage=test"))
    assert tested.metrics
    assert tested.metrics == {name: value for name, value in result.metrics.items() if name.startswith("test/")}


def test_without_validation_it_is_the_only_one(tmp_path):
    result = train(config_of(tmp_path, "trainer.max_epochs=2", "trainer.limit_val_batches=0"))
    assert [path.name for path in result.checkpoint.parent.iterdir()] == ["last.ckpt"]
    assert read(result.checkpoint)["global_step"] == 2 * BATCHES


def test_training_goes_on_from_it_averages_included(tmp_path):
    inputs = torch.rand(32, 12, 2, generator=torch.Generator().manual_seed(0))
    batches = DataLoader(TensorDataset(inputs, inputs.sum(dim=(1, 2))[:, None]), batch_size=8)

    def fit(folder, epochs, **resumed):
        constant_rate = ["optimizer.warmup_fraction=0", "optimizer.final_lr_fraction=1"]
        config = config_of(folder, f"trainer.max_epochs={epochs}", "callbacks.ema.enabled=true", *constant_rate)
        pl.seed_everything(0, verbose=False)
        model = build_model(config, (12, 2))
        callbacks = build_training_callbacks(config, folder, model)
        trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, logger=False)
        trainer.fit(model, batches, batches, **resumed)
        return read(folder / "checkpoints" / "last.ckpt")

    whole = fit(tmp_path / "whole", 3)
    fit(tmp_path / "parts", 2)
    resumed = fit(tmp_path / "parts", 3, ckpt_path=tmp_path / "parts" / "checkpoints" / "last.ckpt")
    assert (resumed["epoch"], resumed["global_step"]) == (whole["epoch"], whole["global_step"]) == (2, 12)
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
    name = next(iter(whole["state_dict"]))
    assert not torch.equal(whole["state_dict"][name], whole["current_model_state"][name])


def test_half_a_file_does_not_take_its_place(tmp_path, monkeypatch):
    written = tmp_path / "last.ckpt"
    written.write_text("the end of the epoch before")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    def runs_out_of_space(path, **_):
        Path(path).write_text("the end of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "save_checkpoint", runs_out_of_space)
    with pytest.raises(OSError, match="No space left"):
        LastCheckpoint(tmp_path).on_train_epoch_end(trainer, None)
    assert written.read_text() == "the end of the epoch before"
