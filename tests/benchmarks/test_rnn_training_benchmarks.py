"""The paper's figure and the comparison of trainings, on tiny models."""

import json

import pytest
import torch

from benchmarks import rnn_paper, rnn_training
from lit_parallel.modules.options import RnnOptions
from lit_parallel.modules.sequence import NextPixelModule
from lit_parallel.recurrent.comparison import relative_error
from lit_parallel.recurrent.swap import ParallelForward

pytestmark = [
    # Lightning opens files that the interpreter closes at exit; what it deprecates is its own.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


SHORT = ["--steps", "12", "--threads", "1", "--config", "rnn_adding.yaml"]
TINY = ["data.length=60", "data.size=80", "data.batch_size=8", "model.hidden_size=8", "trainer.accelerator=cpu"]


def test_the_papers_figure(tmp_path, capsys):
    output = tmp_path / "paper.json"
    few = ["--repeats", "2", "--steps", "3", "--error-images", "1", "--iterations", "3", "100", "--device", "cpu"]
    rnn_paper.main([*few, "--output", str(output)])
    report = json.loads(output.read_text())
    first, second = report["repeats"]
    assert first["curves"].keys() == {"full", "3", "100"}
    losses = {name: torch.tensor(curve["loss"]) for name, curve in first["curves"].items()}
    assert losses["full"].shape == (3,)
    torch.testing.assert_close(losses["100"], losses["full"])
    assert losses["3"][0] == losses["full"][0]  # the same weights and images
    assert (losses["3"] - losses["full"]).abs().max() > (losses["100"] - losses["full"]).abs().max()
    assert losses["full"].tolist() != second["curves"]["full"]["loss"]
    for when in ("errors_before", "errors_after"):
        errors = first[when]
        assert errors[0] > 1e-3
        assert errors[-1] < 1e-12  # as many iterations as steps
        assert errors[:4] == sorted(errors[:4], reverse=True)
    assert first["errors_before"] != first["errors_after"]
    seconds = first["curves"]["full"]["seconds"]
    assert seconds == sorted(seconds)
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert "100 iterations" in capsys.readouterr().out


def test_the_error_after_one_iteration_is_that_of_a_gradient_cut_at_every_step():
    torch.manual_seed(0)
    model = NextPixelModule(RnnOptions(cell="softplus", hidden_size=6), (1, 3, 3)).double()
    images = torch.randint(0, 256, (1, 1, 3, 3), dtype=torch.uint8)
    weights = list(model.parameters())
    exact = torch.autograd.grad(rnn_paper.loss_of(model, images), weights)
    cell = model.network.recurrence.cell
    whole = type(cell).forward
    cell.forward = lambda x, h: whole(cell, x, h.detach())
    cut = torch.autograd.grad(rnn_paper.loss_of(model, images), weights)
    del cell.forward
    found = rnn_paper.gradient_errors(model, [images], [1, 8, 9])
    assert found[0] == pytest.approx(relative_error(cut, exact), rel=1e-9)
    assert found[1] > 1e-12 > found[2]


def test_trainings_are_compared(tmp_path, capsys):
    output = tmp_path / "training.json"
    solver = ["callbacks.jacobi_backprop.solver=two_level", "callbacks.jacobi_backprop.probe_every=0"]
    report = rnn_training.main([*SHORT, "--output", str(output), "--override", *TINY, *solver])
    ordinary, parallel, nudged = report["runs"]
    assert [len(each["loss"]) for each in report["runs"]] == [12] * 3
    assert ordinary["loss"][0] == parallel["loss"][0]
    assert report["largest_relative_deviation"] < 1e-5
    assert ordinary["loss"][0] != pytest.approx(nudged["loss"][0], rel=1e-9, abs=0)
    assert ordinary["validation"]["val/loss"] == pytest.approx(parallel["validation"]["val/loss"], rel=1e-5)
    assert ordinary["solved_by"] == {}
    assert parallel["solved_by"] == {"network.recurrence.l0": {"two_level": 12}}
    assert parallel["iterations"]["network.recurrence.l0"]["forward"] == [None] * 12
    assert all(taken > 0 for taken in parallel["iterations"]["network.recurrence.l0"]["backward"])
    assert report["step_speedup"] == pytest.approx(ordinary["ms_per_step"] / parallel["ms_per_step"])
    assert json.loads(output.read_text())["largest_relative_deviation"] == report["largest_relative_deviation"]
    assert output.with_suffix(".png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "largest relative deviation" in printed
    assert f"val/loss {ordinary['validation']['val/loss']:.4f}" in printed


def test_nothing_is_validated_where_nothing_was_held_out():
    report = rnn_training.main([*SHORT, "--override", *TINY, "data.validation_fraction=0"])
    assert [each["validation"] for each in report["runs"]] == [{}] * 3


def test_steps_that_went_the_ordinary_way_are_counted_as_such(monkeypatch):
    def has_a_record(self, _):
        return any(controller.record() is not None for controller in self.controllers.values())

    monkeypatch.setattr(ParallelForward, "_is_slower", has_a_record)  # from the second step on
    parallel = rnn_training.main([*SHORT, "--override", *TINY, "callbacks.jacobi_backprop.probe_every=0"])["runs"][1]
    assert parallel["solved_by"]["network.recurrence.l0"]["ordinary"] == 11


def test_a_wrong_gradient_is_seen():
    truncated = ["callbacks.jacobi_backprop.solver=jacobi", "callbacks.jacobi_backprop.iterations=2"]
    report = rnn_training.main([*SHORT, "--override", *TINY, *truncated])
    assert report["largest_relative_deviation"] > 100 * report["largest_relative_deviation_by_the_last_bit"]


def test_iterations_are_shown_from_beginning_to_end():
    assert rnn_training.shown_iterations([5, 6, None, 8], 3) == "5 (step 1), - (step 3), 8 (step 4)"


def test_a_deviation_is_relative():
    assert rnn_training.deviation([1.0, 2.2], [1.0, 2.0]) == [0.0, pytest.approx(0.1)]
