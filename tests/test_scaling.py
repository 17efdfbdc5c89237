"""Training by two processes on the CPU: they do together what one process does alone, and end together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_resume import config_of, logged, read

from lit_parallel.cli import run_command, says_when_interrupted
from lit_parallel.config import save_config
from train import train

ROOT = Path(__file__).parent.parent

pytestmark = [
    # Lightning and wandb open files that the interpreter closes at exit; what they deprecate is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TWO = ["trainer.devices=2", "trainer.strategy=ddp"]


def start(name, folder, *overrides):
    """Two processes that train, by the command."""
    folder.mkdir()
    save_config(config_of(name, folder / "runs", *TWO, *overrides), folder / "given.yaml")
    return subprocess.Popen(
        [sys.executable, "train.py", "--config", folder / "given.yaml"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_folder(folder):
    """The only one."""
    (found,) = folder.glob("runs/*/*")
    return found


def ended(process, status=0):
    """What a command printed."""
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, out
    return out


def test_two_processes_train_and_evaluate_as_one_does(tmp_path):
    # A model without noise, whose backward passes are parallel, and which is sampled meanwhile.
    how = ["model.task=next_pixel", "model.layers=1", "model.dropout=0", "callbacks.jacobi_backprop.tolerance=1e-6"]
    how += ["optimizer={name: sgd, lr: 0.1}", "callbacks.sample_grid={every_n_epochs: 1, num_samples: 2}"]
    how += ["wandb.mode=offline", "trainer.limit_val_batches=1.0", "data.validation_fraction=0.0113"]
    process = start("rnn", tmp_path / "two", *how)
    one = train(config_of("rnn", tmp_path / "one", *how, "data.batch_size=20"))
    printed = ended(process)
    two = run_folder(tmp_path / "two")
    alone, together = (read(folder / "checkpoints" / "last.ckpt") for folder in (one.folder, two))
    for name, weight in alone["state_dict"].items():
        torch.testing.assert_close(together["state_dict"][name], weight, rtol=1e-3, atol=1e-5)
    assert "Warning" not in printed
    # One run in W&B, whose numbers are those of all samples; 51 of them were held out.
    (metrics, ids), (expected, _) = (logged(folder, "val/bits_per_dim") for folder in (two, one.folder))
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert len(ids) == 1
    assert logged(two)[0] == pytest.approx(logged(one.folder)[0], rel=1e-4)
    assert len(list(two.glob("sample_grids/*.png"))) == 3


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("made", ["trainer.precision=bf16-mixed"]),
        ("rnn", ["callbacks.jacobi_backprop.probe_every=2"]),
        ("densenet", ["callbacks.jacobi_evaluation={enabled: true, solver: jacobi, probe_every: 1}"]),
        ("pixelcnnpp", ["callbacks.sample_grid={enabled: true, every_n_epochs: 1, num_samples: 2}"]),
    ],
)
def test_every_workload(name, overrides, tmp_path):
    printed = ended(start(name, tmp_path / "two", "wandb.mode=offline", *overrides))
    folder = run_folder(tmp_path / "two")
    assert read(folder / "checkpoints" / "last.ckpt")["epoch"] == 2
    assert len(logged(folder)[0]) == 15
    assert "Warning" not in printed
    if name == "densenet":
        assert "the same class for 100.0% of the images" in printed


@pytest.mark.distributed
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("whom", [os.kill, os.killpg], ids=["the first process", "all"])
def test_processes_end_together_and_go_on_together(number, status, whom, tmp_path):
    endless = ["trainer.max_epochs=100000", "trainer.log_every_n_steps=5"]
    process = start("made", tmp_path / "two", *endless)
    while not list(tmp_path.glob("two/runs/*/*/checkpoints/last.ckpt")):
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]
    whom(process.pid, number)
    printed = ended(process, status)
    folder = run_folder(tmp_path / "two")
    assert "Traceback" not in printed
    if status > 0:
        assert printed.splitlines()[-1].endswith(f"go on with: python train.py --resume {folder}")
    elif whom is os.kill:
        assert "process 1: error: " in printed
    epoch = read(folder / "checkpoints" / "last.ckpt")["epoch"]
    command = [sys.executable, "train.py", "--resume", folder, f"trainer.max_epochs={epoch + 2}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"goes on after epoch {epoch} " in done.stdout


@pytest.mark.distributed
def test_the_first_process_says_so_when_another_one_was_killed(tmp_path):
    process = start("made", tmp_path / "two", "trainer.max_epochs=100000")
    while not list(tmp_path.glob("two/runs/*/*/checkpoints/last.ckpt")):
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]
    (other,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(other), signal.SIGKILL)
    printed = ended(process, 1)
    assert "Traceback" not in printed
    assert "error: another process of the run has ended" in printed
    assert printed.rstrip().endswith(f"go on with: python train.py --resume {run_folder(tmp_path / 'two')}")


# -- how a process ends that is left alone ----------------------------------------------------------------------------

LEFT_ALONE = "error: another process of the run has ended (and said why, unless it was killed) or cannot be reached"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (RuntimeError, "[/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer."),
        (RuntimeError, "[/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv"),
        (torch.distributed.DistNetworkError, "Failed to recv, got 0 bytes. Connection was likely closed."),
        (torch.distributed.DistBackendError, "NCCL error in: ...\nncclRemoteError: A call failed possibly due to ..."),
    ],
    ids=["gloo", "gloo, no answer", "store", "NCCL"],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_process_that_is_left_alone_ends_with_one_line(kind, words, first, monkeypatch, capsys):
    def command(argv):
        with says_when_interrupted(lambda: "go on so"):
            raise kind(words)

    if not first:
        monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_command(command, []) == 1
    line = f"{LEFT_ALONE}; go on so" if first else f"process 1: {LEFT_ALONE}"
    assert capsys.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes"), torch.distributed.DistBackendError("NCCL error in: ...\nncclInvalidUsage")],
)
def test_other_errors_are_defects(error):
    def command(argv):
        raise error

    with pytest.raises(RuntimeError):
        run_command(command, [])


CHILD = """
import time
from lit_parallel import cli
cli._LOOK_SECONDS = cli._GRACE_SECONDS = 0.1
def wait(argv):
    print("waits", flush=True)
    time.sleep(60)
cli.run_command(wait, [])
"""
FIRST = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | {"LOCAL_RANK": "1"})
time.sleep(60)
"""


def test_a_process_ends_after_the_first_one_was_killed():
    first = subprocess.Popen(
        [sys.executable, "-c", FIRST, CHILD], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert first.stdout.readline() == "waits\n"
    finally:
        first.kill()
    start = time.monotonic()
    rest, _ = first.communicate(timeout=50)  # until the other one has ended, which shares the pipe
    assert rest == "process 1: error: the first process has ended\n"
    assert time.monotonic() - start < 30
