"""The benchmark of several devices, on tiny models: what is timed, and that other images are noticed."""

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from sample import main as sample

pytestmark = [
    # Lightning opens files that the interpreter closes at exit; what it deprecates is its own.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

TINY = [
    *("--workload", "made", "--accelerator", "cpu", "--steps", "3", "--warm-up", "2", "--batch-size", "10"),
    *("--sampling-batch-size", "2", "data.side=8", "model.hidden_sizes=[16]"),
]


def in_this_process(command, args):
    """What a command of the benchmark does, by one process whatever it says; two processes draw other images."""
    command = [str(argument) for argument in command]
    if command[0] == "-m":
        config = Path(command[-1], "config.yaml")
        config.write_text(config.read_text().replace("devices: 2", "devices: 1"))
        scaling.main(command[2:])
    else:
        others = "trainer.devices=2" in command
        sample([*command[1:], "trainer.devices=1", f"seed={int(others)}"])
    return 1.0


def test_what_is_timed_and_that_other_images_are_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "_seconds_of", in_this_process)
    report = scaling.main([*TINY, "--images", "10", "--output", str(tmp_path / "new" / "numbers.json")])
    written = json.loads((tmp_path / "new" / "numbers.json").read_text())["workloads"]["made"]
    assert written == report["workloads"]["made"]
    for row in written["training"]:
        assert row["batches"] == 3
        assert row["images_per_second"] == pytest.approx(10 * row["devices"] / row["batch_seconds"])
    one, two = written["sampling"]
    assert (one["batches"], two["batches"]) == (4, 3)  # between five shards; between three and between two
    assert (one["same_images"], two["same_images"]) == (True, False)
    assert two["ratio"] == pytest.approx(two["images_per_second"] / one["images_per_second"])
    assert two["efficiency"] == pytest.approx(two["ratio"] / 2)
    assert one["iterations_mean"] > 1
    table = capsys.readouterr().out.splitlines()[-6:]
    assert table[0].split()[-1] == "images"
    assert [line.split()[-1] for line in table[-2:]] == ["yes", "NO"]
    assert max(map(len, table)) <= 80


def test_a_step_lasts_from_the_end_of_one_to_that_of_the_next(monkeypatch):
    ends = iter([1.0, 3.0, 7.0])
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: next(ends))
    trainer = type("Trainer", (), {"strategy": type("Strategy", (), {"root_device": torch.device("cpu")})})
    stopwatch = scaling.Stopwatch()
    for _ in range(3):
        stopwatch.on_train_batch_end(trainer)
    assert stopwatch.seconds() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accelerator", "cpu", "--images", "40"], "whole batches of 16, at least 2 for each of 2 devices"),
        (["--accelerator", "cpu", "--images", "32"], "whole batches of 16, at least 2 for each of 2 devices"),
        (["--accelerator", "gpu", "--devices", "1", "99"], "name fewer, or --accelerator cpu"),
    ],
)
def test_arguments_that_measure_nothing(arguments, message, capsys):
    with pytest.raises(SystemExit):
        scaling.main(arguments)
    assert message in capsys.readouterr().err


def test_a_command_that_fails_is_shown():
    args = scaling._arguments(["--accelerator", "cpu"])
    with pytest.raises(
        SystemExit, match=r"error: There is no checkpoint 'nowhere'(.|\n)*this failed: python sample.py"
    ):
        scaling._seconds_of(["sample.py", "checkpoint=nowhere"], args)


@pytest.mark.distributed
def test_two_processes_draw_the_images_of_one(monkeypatch):
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    (one, two) = scaling.main([*TINY, "--images", "10"])["workloads"]["made"]["sampling"]
    assert (one["same_images"], two["same_images"]) == (True, True)
    assert (one["batches"], two["batches"]) == (4, 3)
