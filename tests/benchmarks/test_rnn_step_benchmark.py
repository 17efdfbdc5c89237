"""The benchmark of whole training steps on tiny layers: what it measures must be what it says it measures."""

import json

import pytest

from benchmarks.rnn_step import compare_with_aims, main
from lit_parallel.recurrent.forward_controller import ForwardController


def test_every_way_is_measured_and_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ForwardController, "expected_seconds", lambda self, shape: 0.0)  # never the slower way
    monkeypatch.setattr("lit_parallel.recurrent.forward_controller._is_ordinary", lambda tuned, length: False)
    monkeypatch.setattr("lit_parallel.recurrent.swap._ParallelForward._is_slower", lambda self, input: False)
    output = tmp_path / "new" / "report.json"
    small = ["--shapes", "2x90x8", "--repeats", "2", "--train-seconds", "0", "--threads", "1", "--cells", "rnn"]
    report = main([*small, "--device", "cpu", "--output", str(output)])
    written = json.loads(output.read_text())
    assert [case["memory"] for case in written["cases"]] == ["short", "long"]
    assert len(report["cases"]) == 2
    for case in written["cases"]:
        assert "failed" not in case
        ordinary, backward, both = case["rows"]
        assert [row["way"] for row in case["rows"]] == ["ordinary", "backward", "both"]
        assert (ordinary["forward"], ordinary["backward"], ordinary["speedup"]) == ("ordinary", "ordinary", 1.0)
        assert backward["forward"] == "ordinary"
        for row in (backward, both):
            assert row["backward"] != "ordinary"
            assert row["speedup"] == pytest.approx(ordinary["step_ms"] / row["step_ms"])
            assert max(row["output_error"], row["gradient_error"]) < 1e-5
            assert row["counts"]
    both = written["cases"][0]["rows"][2]
    assert both["forward"] == "jacobi_gs"
    assert both["forward_error"] <= 1e-6
    assert both["forward_iterations"] < 90
    printed = capsys.readouterr().out
    assert "slowest case" in printed
    assert "outputs' error" in printed


def row(**numbers):
    return {"way": "both", "backward": "jacobi_gs", "counts": True, "speedup": 60.0} | numbers


@pytest.mark.parametrize(
    ("measured", "met"),
    [(row(), True), (row(speedup=49.0), False), (row(counts=False), False), (row(backward="ordinary"), False)],
)
def test_aims_need_a_gain_that_counts(measured, met):
    case = {"cell": "gru", "shape": "1x32768x128", "memory": "short", "rows": [row(way="ordinary"), measured]}
    aim, slowest = compare_with_aims([case])
    assert aim["aim"] == "gru, 1x32768x128, short memory: 50x"
    assert aim["met"] == met
    assert slowest["met"]
