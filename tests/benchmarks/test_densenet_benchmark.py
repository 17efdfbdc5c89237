"""The benchmark of DenseNets on a tiny network: what it measures must be what it says it measures."""

import json

import pytest
import torch

from benchmarks.densenet import Subject, compare_with_aims, enlarged, main, measure, settle_statistics
from benchmarks.densenet_convergence import AS_ONE, IN_ORDER, arrived, convergence, save_convergence_figure
from benchmarks.densenet_ways import Auto, time_way
from lit_parallel.networks.densenet import DenseNet

CPU = torch.device("cpu")


def small_network(**options):
    return DenseNet(4, (3, 2), 8, num_classes=7, in_channels=3, small_images=True, **options)


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = small_network()
    settle_statistics(made, torch.randn(40, 3, 8, 8), CPU)
    return made


@pytest.fixture
def images():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_an_image_has_arrived_when_it_stays():
    hits = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1]], dtype=torch.bool)
    assert arrived(hits).tolist() == [3, 3, 4, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_many_iterations_as_layers_give_the_same_bits(network, images, dtype):
    found = convergence(network, images, dtype, [2, 8])
    systems = found["systems"]
    assert {name: row["layers"] for name, row in systems.items()} == {
        "block 1 alone": 3, "block 2 alone": 2, IN_ORDER: 3, AS_ONE: 5, "windows of 2": 2,
    }  # fmt: skip
    for row in systems.values():
        assert len(row["largest_error"]) == row["layers"]
        assert row["largest_error"][-1] == 0
        assert row["top5_agreement"][-1] == 1
        counts = row["iterations_until"]
        assert counts["bits"]["max"] <= row["layers"]
        assert counts["1e-4"]["max"] <= counts["1e-5"]["max"] <= counts["bits"]["max"]
    # One iteration of a block whose layers depend on one another is not yet all.
    assert min(systems[name]["largest_error"][0] for name in (IN_ORDER, AS_ONE)) > 1e-6
    assert systems[AS_ONE]["iterations_until"]["bits"]["max"] > 2


def test_the_five_highest_logits_are_compared(network, images):
    with torch.no_grad():  # the lowest two logits of seven change places, the highest five do not
        network.classifier.bias.copy_(torch.tensor([60.0, 50, 40, 30, 20, 0, 0]))
    row = convergence(network, images, torch.float64, [])["systems"][AS_ONE]
    assert row["largest_error"][0] > 0
    assert row["top5_agreement"][0] == 1


def test_a_figure_is_drawn(network, images, tmp_path):
    save_convergence_figure(convergence(network, images, torch.float64, [2]), "title", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_running_statistics_are_those_of_the_images(network, images):
    fresh = small_network()
    batch = torch.randn(40, 3, 8, 8) * 5 + 2
    settle_statistics(fresh, batch, CPU)
    features = fresh.features.conv0(batch)
    norm = fresh.features.denseblock1.denselayer1.norm1
    halves = torch.stack([features[:32].mean((0, 2, 3)), features[32:].mean((0, 2, 3))])
    torch.testing.assert_close(norm.running_mean, halves.mean(0).detach())
    assert not fresh.training


def test_grey_images_are_enlarged_to_three_colours():
    large = enlarged(torch.arange(4.0).reshape(1, 1, 2, 2), 8)
    assert large.shape == (1, 3, 8, 8)
    assert torch.equal(large[:, 0], large[:, 2])


def test_every_way_is_measured(network, images, tmp_path):
    class Arguments:
        device, repeats, way_seconds, checked = "cpu", 3, 0.1, 2
        settings, jacobi = [(2, 1), (2, 2), (8, 2)], [1, 3]

    subject = Subject("small", network, small_network, images, True)
    rows = {row["method"]: row for row in measure(subject, "float32", 2, {}, Arguments)}
    assert next(iter(rows)) == "eager"
    assert list(rows)[-1] == "auto"
    windows = [name for name in rows if "gs_jacobi" in name]
    assert len(windows) == 2  # windows of 8 layers are those of Jacobi
    for name, row in rows.items():
        assert row["ms"] > 0
        assert row["over_eager"] == pytest.approx(rows["eager"]["ms"] / row["ms"])
        assert row["over_compiled"] is None
        if "sequential" in name or "2, 2 iter" in name or "3 iterations" in name:  # exact
            assert (row["top5"], row["top5_set"]) == (1, 1)
            assert row["error"] < 1e-5
    once = rows["fused jacobi, 1 iterations"]
    assert once["error"] > 1e-4
    assert once["error_to_ordinary"] > 100
    assert rows["fused gs_jacobi, windows of 2, 1 iterations"]["iterations"] == [2, 1]


def test_a_call_is_timed_until_the_device_has_finished(images):
    calls = []
    timing = time_way(lambda batch: calls.append(batch) or batch, images, 5, 10)
    assert set(timing) == {"ms", "queued_ms"}
    assert len(calls) == 3 + 5 + 5


def test_what_auto_measured_is_kept(network, images):
    auto = Auto(network, images[:2])
    with torch.no_grad():
        assert torch.allclose(auto(images[:2]), network(images[:2]), rtol=1e-2, atol=1e-3)
    took = auto.took()
    assert took["way"] in ("plain", "fused", "ordinary")
    assert "takes" in took["told"][0]


def test_the_command_counts_and_keeps(tmp_path, capsys, monkeypatch):
    from benchmarks import densenet

    torch.manual_seed(0)
    from lit_parallel.modules.densenet import DenseNetModule
    from lit_parallel.modules.options import DenseNetOptions

    options = DenseNetOptions(architecture="custom", growth_rate=4, block_config=[2, 2], num_classes=10)
    module = DenseNetModule(options, (1, 8, 8)).eval()
    monkeypatch.setattr(densenet, "load", lambda path: module)
    monkeypatch.setattr(densenet, "trained", lambda *_: (module, {"checkpoint": "some.ckpt"}))
    output = tmp_path / "new" / "report.json"
    small = ["--images", "8", "--override", "data.side=8", "--checkpoint", "some.ckpt", "--config"]
    small += ["densenet_mnist5k.yaml", "--device", "cpu", "--threads", "1", "--networks", "trained"]
    small += ["--batches", "1", "--precisions", "float32", "--repeats", "3", "--settings", "--jacobi", "2"]
    main([*small, "--output", str(output)])
    written = json.loads(output.read_text())
    assert [found["dtype"] for found in written["convergence"]] == ["float32", "float64"]
    assert written["trained"]["test_images"] == 8
    assert output.with_suffix(".png").is_file()
    (case,) = written["cases"]
    assert "failed" not in case
    assert [block["layers"] for block in written["iterations"][0]["blocks"]] == [2, 2]
    assert all(block["ms"] > 0 for block in written["iterations"][0]["blocks"])
    printed = capsys.readouterr().out
    assert "same top five" in printed
    assert "10x over eager" in printed


def test_aims_are_for_auto_at_batch_1():
    def case(batch, **row):
        found = {"method": "auto", "over_eager": 12.0, "over_compiled": None, "top5": 1.0, "error_to_ordinary": 2.5}
        return {"network": "densenet201", "precision": "bf16", "batch": batch, "rows": [found | row]}

    costs = {"network": "densenet201", "precision": "bf16", "batch": 1, "blocks": [{"layers": 48, "ms": 0.02}]}
    report = {"cases": [case(1), case(4, over_eager=1.0)], "iterations": [costs]}
    aims = {aim["aim"].partition("auto: ")[2] or aim["aim"]: aim for aim in compare_with_aims(report)}
    assert len(aims) == 5
    assert (aims["10x over eager"]["measured"], aims["10x over eager"]["met"]) == ("12.0x", True)
    assert aims["1.5x over compile"]["met"] is None
    assert aims["the same top 5 for all images"]["met"] is True
    assert aims["at most 2 times the ordinary error"]["met"] is False
    assert aims["densenet201, bf16: an iteration of 48 layers in 0.025 ms"]["met"] is True
