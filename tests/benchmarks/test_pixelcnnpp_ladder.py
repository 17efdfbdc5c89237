"""The ladder of PixelCNN++ on tiny networks: what is compared, scaled and left out must be what the table says."""

import json
import statistics

import pytest
import torch
from small_models import pixelcnnpp

from benchmarks import pixelcnnpp_ladder, pixelcnnpp_ways
from benchmarks.pixelcnnpp_ladder import exactness, main
from benchmarks.pixelcnnpp_ways import CACHED, EAGER, GRAPH, Rung, Way, rows_of
from lit_parallel.sampling.autoregressive import AutoregressiveSystem
from lit_parallel.solvers import SolverOptions
from lit_parallel.solvers.options import CACHED_SEQUENTIAL

LIMIT = 60.0
JACOBI = Way("Jacobi", SolverOptions(name="jacobi"))
STEPS = Way(EAGER, SolverOptions(name="sequential", cuda_graph=False), 12)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return pixelcnnpp((1, 8, 8))


def climbed(model, *ways, batch=2):
    rungs = [Rung(model, way, batch, 0) for way in ways]
    for rung in rungs:
        rung.set_up(LIMIT, None)
        rung.run()
    return rungs


def test_every_way_is_measured_and_compared(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where auto keeps what it measured
    monkeypatch.setattr(pixelcnnpp_ladder, "trained", lambda *_: (model, {"checkpoint": "some.ckpt"}))
    output = tmp_path / "new" / "report.json"
    command = ["--checkpoint", "some.ckpt", "--batches", "1", "2", "--window-rows", "4", "12", "--repeats", "1"]
    command += ["--ways", *pixelcnnpp_ladder.WAYS, "--sequential-steps", "16", "--device", "cpu"]
    main([*command, "--output", str(output)])
    report = json.loads(output.read_text())
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert [case["batch"] for case in report["cases"]] == [1, 2]
    assert (report["sequential_steps"], report["model"]["trained"]) == (16, True)
    for case in report["cases"]:
        rows = {row["method"]: row for row in case["rows"]}
        assert rows.pop(GRAPH)["left_out"] == "there are no CUDA graphs on a CPU"
        assert list(rows) == [EAGER, CACHED, "GS-Jacobi, 4 rows", "auto", "Jacobi", "Jacobi-GS, blocks of a row"]
        for label, row in rows.items():
            assert row["timed_runs"] == 1
            assert row["repeatable"]
            assert row["images_per_second"] == pytest.approx(case["batch"] / row["seconds"])
            assert row["over_cached"] == pytest.approx(rows[CACHED]["seconds"] / row["seconds"])
            assert row["over_eager"] == pytest.approx(rows[EAGER]["seconds"] / row["seconds"])
            assert row["over_graph"] is None
            assert (row["equal_to_cached"], row["equal_to_certified"]) == (case["batch"], case["batch"]), label
        for label in ("GS-Jacobi, 4 rows", "Jacobi", "Jacobi-GS, blocks of a row"):
            row = rows[label]
            assert row["certified"] == case["batch"]
            assert row["work"] > 1 or label.startswith("Jacobi-GS")
            assert row["iterations_max"] < 64
        eager = rows[EAGER]
        assert eager["seconds"] == pytest.approx(64 / 16 * statistics.median(eager["seconds_of_runs"]))
        assert eager["ms_per_iteration"] == pytest.approx(1e3 * eager["seconds"] / 64)
        assert (eager["iterations_max"], eager["steps_measured"]) == (64, 16)
    printed = capsys.readouterr().out
    assert "sequential, eager (16 of 64 steps, scaled)" in printed
    assert "certified, = cached" in printed
    assert "RANDOM" not in printed


def test_an_image_that_differs_is_seen(model):
    cached, jacobi, steps = rungs = climbed(model, Way(CACHED, CACHED_SEQUENTIAL), JACOBI, STEPS)
    jacobi.images[1, 0, 1, 3] ^= 1  # pixel 11 of 64
    by_label = {row["method"]: row for row in rows_of(rungs, is_trained=True)}
    assert [row["equal_to_cached"] for row in by_label.values()] == [2, 1, 2]
    assert [row["equal_to_certified"] for row in by_label.values()] == [1, 2, 1]
    assert exactness(by_label["Jacobi"], 2) == "certified, 1 of 2 = cached"
    assert exactness(by_label[EAGER], 2) == "= cached, 1 of 2 = certified, in 12 pixels"
    jacobi.images[1, 0, 1, 3] ^= 1
    jacobi.images[1, 0, 1, 4] ^= 1  # pixel 12: behind the sequential steps that were run
    assert (steps.equal_images(jacobi), cached.equal_images(jacobi)) == (2, 1)
    jacobi.run()
    assert exactness(rows_of(rungs, is_trained=True)[1], 2).endswith("NOT THE SAME in every run")


def test_kernels_are_those_of_an_iteration_alone(model, monkeypatch):
    evaluations = []
    plain = AutoregressiveSystem.evaluate
    monkeypatch.setattr(AutoregressiveSystem, "evaluate", lambda *args: evaluations.append(1) or plain(*args))

    def launched(way, images):
        before = len(evaluations)
        way(images)
        return 100 + 7 * (len(evaluations) - before)  # so many for a run, and for an iteration

    monkeypatch.setattr(pixelcnnpp_ways, "kernels_launched", launched)
    jacobi, steps, cached = (Rung(model, way, 2, 0) for way in (JACOBI, STEPS, Way(CACHED, CACHED_SEQUENTIAL)))
    for rung in (jacobi, steps, cached):
        rung.count_kernels()
    assert (jacobi.kernels, steps.kernels, cached.kernels) == (7, 7, 100 / 64)


def test_what_would_take_too_long_is_left_out(model):
    jacobi, cached = (Rung(model, way, 2, 0) for way in (JACOBI, Way(CACHED, CACHED_SEQUENTIAL)))
    for rung in (jacobi, cached):
        rung.set_up(1e-6, None)
        assert not rung.may_run(1e-6)
    assert "iterations of" in jacobi.left_out
    assert jacobi.row() == {"method": "Jacobi", "left_out": jacobi.left_out}
    assert cached.row()["timed_runs"] == 0  # the baseline runs once, whatever it takes
    assert cached.row()["seconds"] == cached.first_seconds


def test_a_way_that_fails_does_not_end_the_others(model):
    refused, jacobi = Rung(model, Way("?", SolverOptions(name="jakobi")), 2, 0), Rung(model, JACOBI, 2, 0)
    for rung in (refused, jacobi):
        rung.set_up(LIMIT, None)
    first, second = rows_of([refused, jacobi], is_trained=True)
    assert "unknown solver 'jakobi'" in first["left_out"]
    assert (second["equal_to_cached"], second["over_cached"], second["timed_runs"]) == (None, None, 0)


def test_of_random_weights_costs_alone_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(pixelcnnpp_ladder.SHAPES, "cifar10", (3, 8, 8))
    command = ["--random", "cifar10", "--filters", "4", "--resnets", "1", "--batches", "2", "--window-rows", "4"]
    command += ["--ways", "cached_sequential", "gs_jacobi", "--repeats", "1", "--device", "cpu"]
    report = main(command)
    assert (report["model"]["filters"], report["model"]["image_shape"]) == (4, [3, 8, 8])
    cached, windowed = report["cases"][0]["rows"]
    assert (cached["over_cached"], windowed["over_cached"]) == (1, None)
    assert windowed["ms_per_iteration"] > 0
    assert windowed["equal_to_cached"] == 2
    printed = capsys.readouterr().out
    assert "RANDOM WEIGHTS" in printed
