"""The benchmark of backpropagation on tiny layers: what it measures must be what it says it measures."""

import json

import pytest
import torch

from benchmarks import rnn_memory
from benchmarks.rnn_backprop import Shape, cases_of, compare_with_aims, judge, main, shown_speedup
from benchmarks.rnn_memory import long_memory, short_memory, train_on_adding
from lit_parallel.recurrent.comparison import relative_error
from lit_parallel.recurrent.swap import ParallelForward

CPU = torch.device("cpu")


@pytest.fixture(params=["rnn", "lstm", "gru"])
def problems(request):
    network, _ = train_on_adding(request.param, 6, 12, 0.0, CPU)
    return [short_memory(request.param, 2, 9, 6, CPU), long_memory(network, 3, 14)]


def test_the_backward_pass_is_held_to_what_autograd_gives_in_float64(problems):
    for problem in problems:
        double = problem.copy(torch.float64)
        assert relative_error(double.exact_backward(), double.step()) < 1e-14


def test_all_gradients_are_wanted(problems):
    for problem in problems:
        states = 2 if isinstance(problem.layer, torch.nn.LSTM) else 1
        assert [grad.shape for grad in problem.step()] == [leaf.shape for leaf in problem.leaves]
        assert len(problem.leaves) == 1 + states + 4


def test_the_reach_of_a_layer_without_gates_is_known():
    network, _ = train_on_adding("rnn", 4, 10, 0.0, CPU)
    with torch.no_grad():
        network.recurrence.weight_hh_l0.mul_(0.9)  # of the identity
        network.recurrence.weight_ih_l0.abs_()  # nothing is cut off
    reach = long_memory(network, 2, 40).reach()
    assert reach == {"20 steps": pytest.approx(0.9**19, rel=1e-4), "40 steps": pytest.approx(0.9**39, rel=1e-4)}


def test_training_ends_when_the_task_is_solved(monkeypatch):
    monkeypatch.setattr(rnn_memory, "_SOLVED", 0.6)
    _, untrained = train_on_adding("lstm", 8, 6, 0.0, CPU)
    _, trained = train_on_adding("lstm", 8, 6, 60.0, CPU)
    assert (untrained["steps"], untrained["solved"]) == (0, False)
    assert trained["solved"]
    assert trained["test_relative_error"] < 0.7 < untrained["test_relative_error"]


def test_the_relative_error_is_of_all_gradients_together():
    exact = [torch.tensor([3.0]), torch.tensor([4.0, 0.0])]
    assert relative_error([torch.tensor([3.0]), torch.tensor([4.0, 0.5])], exact) == pytest.approx(0.1)


def test_every_way_is_measured_and_kept(tmp_path, capsys):
    output = tmp_path / "new" / "report.json"
    small = ["--shapes", "2x40x8", "1x30x8", "--repeats", "2", "--train-seconds", "0", "--threads", "1"]
    report = main([*small, "--device", "cpu", "--cells", "rnn", "--output", str(output)])
    written = json.loads(output.read_text())
    assert len(written["cases"]) == len(report["cases"]) == 4
    assert written["environment"]["threads"] == 1
    for case in written["cases"]:
        assert "failed" not in case
        ordinary, *others = case["rows"]
        assert [row["method"] for row in others] == ["auto", "jacobi_gs", "two_level"]
        assert (ordinary["solved_by"], ordinary["backward_speedup"]) == ("ordinary", 1.0)
        for row in others:
            assert row["backward_speedup"] == pytest.approx(ordinary["backward_ms"] / row["backward_ms"])
            assert row["error"] < 1e-5
            assert len(row["step_ms_of_runs"]) == 2
        assert {row["solved_by"] for row in others[1:]} <= {"jacobi_gs", "two_level", "sequential"}
    assert [case["memory"] for case in written["cases"]] == ["short", "short", "long", "long"]
    assert written["cases"][0]["input_size"] == 8
    assert written["cases"][2]["input_size"] == 2
    assert "gradient_reaches" in written["cases"][2]
    printed = capsys.readouterr().out
    assert "TF32 off" in printed
    assert "slowest case" in printed


def test_a_layer_that_went_the_ordinary_way_is_told_apart(monkeypatch):
    def has_a_record(self, _):
        return any(controller.record for controller in self.controllers.values())

    monkeypatch.setattr(ParallelForward, "_is_slower", has_a_record)  # from the second pass on
    small = ["--shapes", "1x30x8", "--cells", "gru", "--memory", "short", "--repeats", "1", "--threads", "1"]
    report = main([*small, "--solvers", "auto", "--device", "cpu"])
    assert report["cases"][0]["rows"][1]["solved_by"] == "ordinary"


def test_networks_are_trained_once_and_what_matters_comes_first():
    shapes = [Shape(1, 10, 4), Shape(1, 10, 8), Shape(2, 20, 4)]
    order = [(str(shape), memory) for shape, memory, _ in cases_of(shapes, ["short", "long"], ["rnn"])]
    assert order == [
        *[("1x10x4", "short"), ("2x20x4", "short"), ("1x10x4", "long"), ("2x20x4", "long")],
        *[("1x10x8", "short"), ("1x10x8", "long")],
    ]


def row(method="auto", **numbers):
    exact = {"error": 1e-7, "backward_error": 1e-7, "solved_by": "jacobi_gs"}
    numbers = exact | {"backward_speedup": 2.0, "step_speedup": 2.0} | numbers
    return {"method": method, **numbers, **judge(numbers)}


def test_a_speedup_counts_only_if_the_gradient_is_right():
    assert shown_speedup(row(), "backward") == "2.00x"
    assert shown_speedup(row(error=1e-5), "backward") == "2.00x*"
    assert shown_speedup(row(error=1e-5, backward_error=2e-6), "backward") == "too inexact"
    assert shown_speedup(row(error=1e-5, backward_error=2e-6, solved_by="ordinary"), "step") == "2.00x"
    assert shown_speedup(row(error=float("nan"), backward_error=float("nan")), "backward") == "too inexact"


def test_aims_are_compared_with_the_case_that_they_name():
    baseline = row(solved_by="ordinary", backward_speedup=2.5)
    cases = [
        {"cell": "rnn", "shape": "64x784x128", "memory": "short", "rows": [baseline]},
        {"cell": "gru", "shape": "32x4096x128", "memory": "long", "rows": [row(), row("two_level")]},
        {
            "cell": "rnn",
            "shape": "32x4096x128",
            "memory": "long",
            "rows": [row(step_speedup=0.9), row("two_level", backward_speedup=9.0, error=1.0, backward_error=1.0)],
        },
    ]
    aims = {aim["aim"]: aim for aim in compare_with_aims("cuda", cases)}
    assert aims["gru, 32x4096x128, long memory, two_level: backward 2x"]["met"] is True
    inexact = aims["rnn, 32x4096x128, long memory, two_level: backward 2x"]
    assert (inexact["measured"], inexact["met"]) == ("too inexact", False)
    assert aims["lstm, 64x784x128, short memory, auto: backward 3x"]["met"] is None
    fallen_back = aims["rnn, 64x784x128, short memory, auto: backward 2x"]
    assert (fallen_back["measured"], fallen_back["met"]) == ("2.50x (the ordinary way)", False)
    assert aims["auto, backward, slowest case: 0.95x"]["met"] is True
    slow = aims["auto, step, slowest case: 0.95x"]
    assert (slow["measured"], slow["met"]) == ("0.90x (rnn, 32x4096x128, long)", False)
    assert len(aims) == 9 + 6 + 2
