import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from lit_parallel import tracking
from lit_parallel.config import WandbOptions
from lit_parallel.errors import UserError
from lit_parallel.plots import image_grid
from lit_parallel.solution import Solution, Status
from lit_parallel.tracking import build_logger, finish, how_to_look, log_images, log_sampling

WANDB = Path(sys.executable).with_name("wandb")
INFINITY = float("inf")


@pytest.fixture(autouse=True)
def _no_account(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    # Refuses connections at once, should anything try.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # wandb reads the environment once
    yield
    wandb.teardown()


def build(folder: Path, mode: str = "offline", job_type: str = "train", **options) -> WandbLogger | None:
    config = {"model": {"name": "made"}, "seed": 7}
    return build_logger(
        WandbOptions(mode=mode, **options), folder, config=config, experiment="digits", job_type=job_type
    )


def solved(residual: torch.Tensor | None = None) -> Solution:
    """Three samples of ten equations, solved after 2, 4 and 6 iterations and certified by one evaluation each."""
    return Solution(
        value=torch.zeros(3, 10),
        status=[Status.CONVERGED] * 3,
        iterations=torch.tensor([2, 4, 6]),
        evaluations=torch.tensor([20, 40, 60]),
        frontier=torch.full((3,), 10),
        certified=torch.ones(3, dtype=torch.bool),
        certificate_iterations=torch.ones(3, dtype=torch.long),
        seconds=0.5,
        certificate_seconds=0.1,
        setup_seconds=0.0,
        length=10,
        solver="jacobi",
        residual=residual,
    )


def records(path: str) -> list[dict]:
    """What the terminal viewer finds in a run."""
    command = [WANDB, "leet", "inspect", "--json", path]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return [json.loads(line) for line in output.splitlines()]


def test_offline_run_is_read_back_by_the_terminal_viewer(tmp_path, capfd):
    logger = build(tmp_path / "run", job_type="sample", tags=["small"])
    logger.log_metrics({"train/loss": 0.25}, step=3)
    residual = torch.tensor([[INFINITY, 1.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    rows = [{"solver": "jacobi", "seconds": 0.5, "equal": True}, {"solver": "sequential", "wall_clock_speedup": None}]
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    log_sampling(logger, solved(residual), images, rows, wall_clock_speedup=2.5)
    look, _ = how_to_look(logger)
    finish(logger)
    assert capfd.readouterr() == ("", ""), "wandb says nothing of its own"

    path = shlex.split(look)[-1]
    found = records(path)
    (run,) = (record["run"] for record in found if record["type"] == "run")
    config = run["config"]["update"]
    assert (config["model"], config["seed"]) == ({"name": "made"}, 7)
    assert (run["project"], run["run_group"], run["job_type"]) == ("lit-parallel", "digits", "sample")
    assert (run["display_name"], run["tags"]) == ("run-sample", ["small"])

    history = [record["history"]["item"] for record in found if record["type"] == "history"]
    logged = {key: value for item in history for key, value in item.items()}
    assert logged["train/loss"] == 0.25
    assert {"train/loss", "trainer/global_step"} <= history[0].keys()
    scalars = {
        "solver/iterations_mean": 4,
        "solver/iterations_max": 6,
        "solver/iteration_speedup": 2,
        "solver/wall_clock_speedup": 2.5,
        "solver/evaluations": 40,
        "solver/work": 5,
        "solver/certified": 1,
        "solver/seconds": 0.5,
    }
    assert {key: history[1].get(key) for key in scalars} == scalars, "all at once, before pictures and tables"

    curve = [(item["solver/iteration"], item["solver/residual"]) for item in history if "solver/residual" in item]
    assert curve == [(2, 3.0), (3, 0.5), (4, 0.0)], "the largest of the samples; an infinite one is left out"
    steps = {record["metric"].get("name"): record["metric"] for record in found if record["type"] == "metric"}
    assert steps["solver/residual"]["step_metric"] == "solver/iteration"

    assert logged["solver/iterations._type"] == "histogram"
    counts = dict(zip(logged["solver/iterations.bins"], logged["solver/iterations.values"], strict=False))
    assert {left: count for left, count in counts.items() if count} == {2: 1, 4: 1, 6: 1}

    files = Path(path) / "files"
    assert logged["samples._type"] == "images/separated"
    (picture,) = logged["samples.filenames"]
    with Image.open(files / picture) as image:
        assert (np.asarray(image) == image_grid(images, scale=None)).all()

    assert logged["solvers._type"] == "table-file"
    content = json.loads((files / logged["solvers.path"]).read_text())
    assert content["columns"] == ["solver", "seconds", "equal", "wall_clock_speedup"]
    assert content["data"] == [["jacobi", 0.5, True, None], ["sequential", None, None, None]]


def test_nothing_unknown_is_logged(tmp_path):
    logger = build(tmp_path / "run")
    log_sampling(logger, solved(), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [], wall_clock_speedup=None)
    log_images(logger, "grid", torch.zeros(1, 1, 4, 4, dtype=torch.uint8), caption="epoch 3")
    look, _ = how_to_look(logger)
    finish(logger)
    keys = {
        key.partition(".")[0]
        for record in records(shlex.split(look)[-1])
        if record["type"] == "history"
        for key in record["history"]["item"]
    }
    assert {"solver/iterations_mean", "samples", "grid"} <= keys
    assert not keys & {"solver/residual", "solver/wall_clock_speedup", "solvers"}


def test_run_lies_in_its_folder_and_has_its_name(tmp_path):
    logger = build(tmp_path / "12-30-00")
    assert logger.experiment.name == "12-30-00"
    assert logger.experiment.offline
    assert Path(logger.experiment.dir).is_relative_to(tmp_path / "12-30-00" / "wandb")
    finish(logger)
    logger = build(tmp_path / "12-30-00", name="mine", job_type="sample")
    assert logger.experiment.name == "mine"
    finish(logger)


def test_how_to_look_gives_commands_with_short_paths_that_a_shell_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = build(Path("my runs"))
    finish(logger)
    look, upload = how_to_look(logger)
    *_, wandb_command, leet, folder = shlex.split(look)
    assert (wandb_command, leet) == ("wandb", "leet")
    assert folder.startswith("my runs/wandb/offline-run-")
    assert list(Path(folder).glob("run-*.wandb"))
    assert shlex.split(upload)[-3:] == ["wandb", "sync", folder]


def test_disabled_is_nothing_at_all(tmp_path):
    logger = build(tmp_path / "run", mode="disabled")
    assert logger is None
    log_images(logger, "samples", torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    log_sampling(logger, solved(), torch.zeros(1, 1, 4, 4, dtype=torch.uint8), [], wall_clock_speedup=None)
    finish(logger)
    assert how_to_look(logger) == []
    assert not (tmp_path / "run").exists()


def test_other_processes_have_a_silent_logger(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = build(tmp_path / "run", mode="online")
    assert isinstance(logger, WandbLogger), "Lightning's LearningRateMonitor needs one in every process"
    logger.log_metrics({"train/loss": 0.25}, step=3)
    log_sampling(logger, solved(), torch.zeros(1, 1, 4, 4, dtype=torch.uint8), [], wall_clock_speedup=None)
    log_images(logger, "samples", torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    assert how_to_look(logger) == []
    finish(logger)
    assert not (tmp_path / "run").exists()


def test_finish_may_be_repeated_and_never_fails(tmp_path, monkeypatch):
    logger = build(tmp_path / "run")
    finish(logger)
    finish(logger)

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(logger.experiment, "finish", fail)
    finish(logger)


def test_a_run_that_the_caller_has_open_stays_the_callers(tmp_path):
    (tmp_path / "theirs").mkdir()
    with wandb.init(mode="offline", dir=tmp_path / "theirs", settings=wandb.Settings(silent=True)) as theirs:
        logger = build(tmp_path / "ours")
        assert logger.experiment.id != theirs.id
        finish(logger)
        theirs.log({"still": "open"})


def refusal(folder: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        build(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not folder.exists() or options["mode"] == "offline"
    return message


@pytest.mark.parametrize("mode", ["", "on-line"])
def test_a_wandb_mode_that_wandb_does_not_know_is_told(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    message = refusal(tmp_path / "run", mode="online")
    assert message.startswith(f"The environment variable WANDB_MODE is '{mode}', and wandb knows only online, offline,")
    assert "'unset WANDB_MODE'" in message
    with pytest.raises(UserError, match="unset WANDB_MODE"):
        tracking.has_account()
    assert build(tmp_path / "run", mode="disabled") is None


@pytest.mark.parametrize("mode", tracking._MODES)
def test_any_other_wandb_mode_changes_nothing(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    logger = build(tmp_path / "run")
    assert logger.experiment.offline
    finish(logger)


@pytest.mark.parametrize("environment", ["online", "offline"])
def test_online_without_a_key_is_refused_at_once(tmp_path, monkeypatch, environment):
    monkeypatch.setenv("WANDB_MODE", environment)
    message = refusal(tmp_path / "run", mode="online")
    assert "needs an API key" in message
    assert "wandb login" in message
    assert "wandb.mode=offline" in message


def test_online_with_a_malformed_key_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    assert "WANDB_API_KEY invalid" in refusal(tmp_path / "run", mode="online")


@pytest.mark.parametrize("source", ["environment", "netrc"])
def test_online_run_starts_with_a_key_whatever_wandb_mode_says(tmp_path, monkeypatch, source):
    if source == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    else:
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9 login user password {'a' * 40}\n")
    monkeypatch.setenv("WANDB_MODE", "offline")
    asked = {}

    def refused(**arguments):
        asked.update(arguments)
        raise wandb.errors.CommError("no such entity (Error 404: Not Found)\nConsider this")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(UserError, match=r"^Weights & Biases refuses .* no such entity"):
        build(tmp_path / "run", mode="online")
    assert asked["mode"] == "online"
    assert 0 < asked["settings"].init_timeout <= 60
    assert asked["settings"].finish_timeout > 0


def test_online_without_a_network_goes_on_offline_after_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(tracking, "_INIT_SECONDS", 1.0)
    logger = build(tmp_path / "run", mode="online")
    (warning,) = (record.getMessage() for record in caplog.records if record.name == tracking.__name__)
    assert "cannot be reached" in warning
    assert "goes on offline" in warning
    assert "\n" not in warning
    logger.log_metrics({"train/loss": 0.25}, step=3)
    _, upload = how_to_look(logger)
    finish(logger)
    folder = Path(shlex.split(upload)[-1])
    assert folder.parent == tmp_path / "run" / "wandb"
    (log,) = folder.glob("run-*.wandb")
    assert any(record.get("history", {}).get("item", {}).get("train/loss") == 0.25 for record in records(log))


def test_options_that_wandb_refuses_are_told_in_one_line(tmp_path):
    assert "1 and 64 characters" in refusal(tmp_path / "run", mode="offline", tags=["a" * 65])
