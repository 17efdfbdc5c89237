"""The count of iterations with a queue: of a tiny model, and what must hold of any."""

import json

import torch
from small_models import pixelcnnpp

from benchmarks import pixelcnnpp_queue


def test_a_queue_takes_the_mean_and_batches_take_the_slowest(monkeypatch, tmp_path, capsys):
    torch.manual_seed(0)
    monkeypatch.setattr(pixelcnnpp_queue, "trained", lambda *_: (pixelcnnpp((1, 8, 8)), {"name": "tiny"}))
    arguments = ["--images", "7", "--slots", "2", "--output", str(tmp_path / "numbers.json")]
    report = pixelcnnpp_queue.main(arguments)
    assert report["same_images"] is True
    mean, largest = report["iterations_mean"], report["iterations_max"]
    assert 4 * largest >= report["parallel_iterations_in_batches"] >= report["parallel_iterations_with_a_queue"]
    assert 7 * mean / 2 <= report["parallel_iterations_with_a_queue"] <= 7 * mean / 2 + largest
    assert json.loads((tmp_path / "numbers.json").read_text())["gain"] == report["gain"] > 1
    assert "same images: yes" in capsys.readouterr().out
