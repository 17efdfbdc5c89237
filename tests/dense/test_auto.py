"""What is chosen by measurement, and how plans keep their tolerance.

Kernels' plain functions stand in for the kernels, and a table for the clock.
"""

import copy
import logging

import pytest
import torch
from dense_helpers import TorchvisionLike, images, lived_in
from torch import nn

from lit_parallel.dense import DenseOptions, auto, evaluate_in_parallel, records, ways
from lit_parallel.dense.auto import Evaluator, agreement, in_float64, relative_error, rms_error
from lit_parallel.dense.fused import FusedEvaluation, FusedWeights, Plan
from lit_parallel.dense.structure import structure_of
from lit_parallel.dense.ways import Fused, Ordinary
from lit_parallel.errors import UserError
from lit_parallel.kernels import dense_block
from lit_parallel.networks.densenet import DenseNet
from lit_parallel.tf32 import convolutions_may_use_tf32

SIDE = 8
WITHOUT_KERNELS = "'net' is evaluated by its own layers, without kernels (fused=false):"


def some_images(batch=3, seed=2):
    return images(batch, side=SIDE, seed=seed)


@pytest.fixture
def network():
    """Layers that couple weakly, so that few iterations suffice."""
    torch.manual_seed(5)
    made = lived_in(DenseNet(3, (18, 6), 8, bn_size=2, num_classes=7, small_images=True), side=SIDE)
    with torch.no_grad():
        for block in structure_of(made).blocks:
            for layer in block.layers:
                layer.conv1.weight[:, block.channels :] *= 0.1
    return made


@pytest.fixture
def with_kernels(monkeypatch):
    monkeypatch.setattr(auto, "kernels_run_on", lambda device: True)


@pytest.fixture
def runs(monkeypatch):
    """The plans by which batches were evaluated, one after another."""
    found = []
    run = Fused.run
    monkeypatch.setattr(Fused, "run", lambda self, images: found.append(self.plan) or run(self, images))
    return found


def set_clock(monkeypatch, seconds_of):
    """Let a function of a way and images say how long it takes."""
    for module in (auto, ways):
        monkeypatch.setattr(module, "median_seconds", seconds_of)


def pretend(monkeypatch, seconds):
    """Let a way take as long as a function of its description says."""
    measured = []

    def seconds_of(way, images):
        name = str(way.__self__ if hasattr(way, "__self__") else way)
        measured.append(name)
        return seconds(name)

    set_clock(monkeypatch, seconds_of)
    return measured


def evaluator(network, **chosen):
    return Evaluator(network, "net", DenseOptions(**chosen), lambda x: type(network).forward(network, x))


@torch.no_grad()
def logits_of(network, x):
    return type(network).forward(network, x)


def iterations_of(record):
    return [int(block.iterations.max()) for block in record.blocks]


# -- the choice -------------------------------------------------------------------------------------------------------


def test_without_kernels_the_ordinary_forward_is_taken_and_it_is_said_why(network, caplog):
    evaluate = evaluator(network)
    with caplog.at_level(logging.INFO):
        for x in (some_images(3), some_images(3, seed=4), some_images(2), some_images(2)):
            logits, record = evaluate(x)
            assert torch.equal(logits, logits_of(network, x))
            assert (record.way, record.blocks) == ("ordinary", [])
    lines = [line.getMessage() for line in caplog.records]
    assert len(lines) == 2  # the smaller batch was measured when it came again
    for batch, line in zip((3, 2), lines, strict=True):
        assert line.startswith(f"'net': [{batch}, 3, 8, 8] on cpu, float64: takes the ordinary forward, ")
        assert " ms (the ordinary forward " in line
        assert "; one plain iteration " in line


@pytest.mark.parametrize("fastest", ["gs_jacobi", "jacobi"])
def test_a_plain_solver_is_taken_where_it_is_faster(network, fastest, monkeypatch):
    times = {"the ordinary forward": 3.0, "plain gs_jacobi": 2.5, "plain jacobi": 2.7, f"plain {fastest}": 1.0}
    measured = pretend(monkeypatch, times.get)
    x = some_images()
    logits, record = evaluator(network)(x)
    assert (record.way, record.solver) == ("plain", fastest)
    assert relative_error(logits, logits_of(network, x)) < 1e-3
    assert measured[0] == "the ordinary forward"


@pytest.mark.usefixtures("with_kernels")
def test_kernels_one_layer_after_another(network, monkeypatch, caplog):
    pretend(monkeypatch, lambda name: {"the ordinary forward": 9.0, "fused sequential": 1.0}.get(name, 1.5))
    x = some_images()
    with caplog.at_level(logging.INFO):
        logits, record = evaluator(network)(x)
    assert (record.way, record.solver, iterations_of(record)) == ("fused", "sequential", [18, 6])
    assert relative_error(logits, logits_of(network, x)) < 1e-12
    (line,) = [line.getMessage() for line in caplog.records]
    assert "takes fused sequential, 1e+03 ms (the ordinary forward 9e+03 ms; fused sequential 1e+03 ms; " in line
    for window in auto.WINDOWS:
        assert f"fused gs_jacobi, windows of {window} layers, 2 + 2 iterations 1.5e+03 ms" in line
    assert "fused jacobi, 2 + 2 iterations 1.5e+03 ms)." in line


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("window", [4, 8, 16, 18])
def test_a_window_gets_as_few_iterations_as_hold_the_tolerance(network, window, monkeypatch):
    name = "fused jacobi, " if window == 18 else f"windows of {window} layers"
    pretend(monkeypatch, lambda way: 9.0 if "ordinary" in way else 1.0 if name in way else 2.0)
    x, tolerance = some_images(), 1e-3
    evaluate = evaluator(network, tolerance=tolerance)
    logits, record = evaluate(x)
    assert (record.way, record.solver) == ("fused", "jacobi" if window == 18 else "gs_jacobi")
    assert relative_error(logits, logits_of(network, x)) <= tolerance
    ((_, way),) = evaluate._ways.items()
    plan = way.plan
    assert {block.window for block in plan.blocks} == {window, min(window, 6)}
    for index, block in enumerate(record.blocks):
        assert block.evaluations.max() == plan.blocks[index].evaluations_of(block.layers)
        assert block.residual.max() <= tolerance
        assert bool(block.solved.all())
        # One iteration less would not have held.
        fewer = plan.blocks[index].iterations - 1
        if fewer >= 2:
            blocks = list(plan.blocks)
            blocks[index] = type(blocks[index])(blocks[index].window, fewer)
            _, residuals = FusedEvaluation(structure_of(network), Plan(tuple(blocks)), x).run(x)
            assert residuals.relative[index].max() > tolerance
    assert max(block.iterations for block in plan.blocks) > 2


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize(("first", "second"), [(8, 1), (1, 4), (18, 1), (16, 6)])
def test_every_block_gets_its_own_window(network, first, second, monkeypatch, caplog):
    """The best is found, wherever it lies, as the times of blocks add up."""

    def seconds_of(way, images):
        if not isinstance(getattr(way, "__self__", None), Fused):
            return 9.0
        windows = [1 if block.iterations is None else block.window for block in way.__self__.plan.blocks]
        return sum(1.0 if window == best else 1.5 for window, best in zip(windows, (first, second), strict=True))

    set_clock(monkeypatch, seconds_of)
    evaluate, x = evaluator(network), some_images()
    with caplog.at_level(logging.INFO):
        logits, _ = evaluate(x)
    ((_, way),) = evaluate._ways.items()
    assert [1 if block.iterations is None else block.window for block in way.plan.blocks] == [first, second]
    assert relative_error(logits, logits_of(network, x)) <= 1e-3
    sizes = "16" if first == 16 else f"{first} + {second}"
    assert f"takes fused gs_jacobi, windows of {sizes} layers, " in caplog.text


@pytest.mark.usefixtures("with_kernels")
def test_large_batches_go_the_ordinary_way_and_windows_are_not_tried(network, monkeypatch):
    measured = pretend(monkeypatch, lambda name: 1.0 if "ordinary" in name else 2.0)
    evaluate = evaluator(network)
    assert evaluate(some_images())[1].way == "ordinary"
    assert measured == ["the ordinary forward", "fused sequential"]
    evaluate(some_images(2))  # nor is a smaller last batch measured
    assert len(measured) == 2


@pytest.mark.usefixtures("with_kernels")
def test_what_is_hardly_faster_is_not_worth_it(network, monkeypatch, caplog):
    pretend(monkeypatch, lambda name: 1.0 if "ordinary" in name else 0.97)
    with caplog.at_level(logging.INFO):
        assert evaluator(network)(some_images())[1].way == "ordinary"
    assert caplog.messages[0].endswith("; less than 1.05 times as fast is not worth it).")


@pytest.mark.usefixtures("with_kernels")
def test_iterations_that_hold_the_tolerance_of_changes_but_not_of_logits(network, monkeypatch):
    pretend(monkeypatch, lambda name: 9.0 if "ordinary" in name else 1.0 if "fused jacobi" in name else 2.0)
    seen = []

    def objection(self, logits):
        seen.append(relative_error(logits, self.expected))
        return "" if seen[-1] < 1e-9 else "too far off"

    monkeypatch.setattr(auto._Choice, "_objection", objection)
    x = some_images()
    logits, _ = evaluator(network)(x)
    assert relative_error(logits, logits_of(network, x)) < 1e-9
    assert max(seen) > 1e-9


@pytest.mark.usefixtures("with_kernels")
def test_what_is_faster_but_refused_is_told_with_the_reason(network, monkeypatch, caplog):
    pretend(monkeypatch, lambda name: 9.0 if "ordinary" in name else 1.0)
    made_up = lambda self, images: (1.5 * logits_of(network, images), torch.zeros(2, len(images)))  # noqa: E731
    monkeypatch.setattr(Fused, "run", made_up)
    with caplog.at_level(logging.INFO):
        assert evaluator(network.float())(some_images().float())[1].way == "ordinary"
    (line,) = caplog.messages
    off = "ms, refused: its logits are 0.5 off float64's in root mean square, more than 2 times the ordinary forward's "
    assert f"; fused sequential 1e+03 {off}" in line
    assert f"; fused jacobi, 18 + 6 iterations 1e+03 {off}" in line
    assert line.count("refused") == 2 + len(auto.WINDOWS)


@pytest.mark.parametrize("solver", ["gs_jacobi", "jacobi"])
def test_a_plain_solver_is_refused_for_its_logits_too(network, solver, monkeypatch, caplog):
    pretend(monkeypatch, lambda name: 9.0 if "ordinary" in name else 1.0 if solver in name else 8.0)
    monkeypatch.setattr(auto._Choice, "_objection", lambda *_: "too far off")
    with caplog.at_level(logging.INFO):
        assert evaluator(network)(some_images())[1].way == "ordinary"
    assert f"plain {solver} 1e+03 ms, refused: too far off" in caplog.text


def choice(network, x):
    return auto._Choice(evaluator(network), x)


@torch.no_grad()
def test_logits_within_the_tolerance_are_accepted(network):
    made = choice(network, some_images())
    for error, accepted in ((1e-4, True), (0.9e-3, True), (1.2e-3, False), (0.1, False)):
        assert (made._objection(made.expected * (1 + error)) == "") is accepted


@torch.no_grad()
def test_in_bfloat16_logits_are_measured_by_what_the_ordinary_forward_loses(network):
    network = network.bfloat16()
    exact = logits_of(copy.deepcopy(network).double(), some_images().bfloat16().double())
    made = choice(network, some_images().bfloat16())
    lost = rms_error(made.expected, exact)
    assert 1e-3 < lost < 0.2
    for factor, accepted in ((0.0, True), (1.5, True), (1.95, True), (2.05, False), (float("nan"), False)):
        assert (made._objection(exact * (1 + factor * lost)) == "") is accepted


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_few_images_of_many_classes_suffice_to_tell_noise_from_error(network, batch):
    """Noise of the ordinary forward's size is accepted, three times as much is not, whatever chance makes of them."""
    assert acceptance(network, batch, classes=100, size=1) == 1
    assert acceptance(network, batch, classes=100, size=3) == 0


@pytest.mark.parametrize(("batch", "least", "most"), [(1, 0.95, 0.2), (2, 0.98, 0.1), (4, 1.0, 0.03), (16, 1.0, 0.0)])
def test_of_ten_classes_it_takes_some_images(network, batch, least, most):
    """Ten logits alone leave more to chance: ``F(10, 10)`` exceeds 4 in 2 % of cases, and 9 / 4 in 11 %."""
    assert acceptance(network, batch, classes=10, size=1) >= least
    assert acceptance(network, batch, classes=10, size=3) <= most


def acceptance(network, batch, classes, size, trials=300):
    """Part of the made-up logits that are accepted, whose noise is so many times the ordinary forward's."""
    made, generator, accepted = choice(network, some_images(batch)), torch.Generator().manual_seed(6), 0
    for _ in range(trials):
        exact, ordinary, other = torch.randn(3, batch, classes, dtype=torch.float64, generator=generator)
        made._exact, made.expected = exact, exact + 0.01 * ordinary
        accepted += made._objection(exact + 0.01 * size * other) == ""
    return accepted / trials


@torch.no_grad()
def test_what_float64_gives(network):
    x = some_images()
    expected = logits_of(network, x)
    single = network.float()
    before = {name: id(value) for name, value in single.state_dict(keep_vars=True).items()}
    exact = in_float64(structure_of(single), x.float())
    assert {name: id(value) for name, value in single.state_dict(keep_vars=True).items()} == before
    assert exact.dtype == torch.float64
    assert 0 < relative_error(exact, expected) < 1e-5
    double = copy.deepcopy(single).double()
    assert torch.equal(exact, logits_of(double, x.float().double()))


def test_errors_and_agreement():
    exact = torch.tensor([[4.0, 2.0, -1.0], [1.0, 2.0, 3.0], [1.0, float("nan"), 0.0]])
    found = exact + torch.tensor([[0.0, 0.4, 0.1], [0.0, 0.0, -1.5], [1.0, 1.0, 1.0]])
    assert relative_error(found, exact) == pytest.approx(0.5)
    assert relative_error(found[:1], exact[:1]) == pytest.approx(0.1)
    assert relative_error(found[2:], exact[2:]) == 0
    assert rms_error(found, exact) == pytest.approx((0.16 + 0.01 + 2.25) ** 0.5 / 35**0.5)
    assert rms_error(found[2:], exact[2:]) == 0
    assert agreement(found[:2], exact[:2], 1) == 0.5
    assert agreement(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 1) == 1
    assert agreement(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 3) == 0


# -- named solvers ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("chosen", [{"solver": "jacobi"}, {"solver": "gs_jacobi", "window": 6}])
def test_a_plan_grows_until_the_tolerance_holds_and_stays(network, chosen, runs):
    evaluate = evaluator(network, tolerance=1e-4, **chosen)
    x = some_images()
    logits, record = evaluate(x)
    assert relative_error(logits, logits_of(network, x)) < 1e-3
    assert (record.way, record.solver) == ("fused", chosen["solver"])
    planned = [[block.iterations for block in plan.blocks] for plan in runs]
    assert planned[0] == [2, 2]
    assert len(planned) > 2
    assert planned == sorted(planned)
    assert max(float(block.residual.max()) for block in record.blocks) <= 1e-4
    expected = FusedEvaluation(structure_of(network), runs[-1], x).run(x)[0]
    assert torch.equal(logits, expected)
    before = len(runs)
    evaluate(x)
    assert len(runs) == before + 1  # the same plan at once, and one look at its residuals


@pytest.mark.usefixtures("with_kernels")
def test_at_most_as_many_iterations_as_a_window_has_layers(network, runs):
    evaluate = evaluator(network, solver="gs_jacobi", window=4, tolerance=1e-15)
    x = some_images()
    logits, record = evaluate(x)
    assert [block.iterations for block in runs[-1].blocks] == [4, 4]
    assert iterations_of(record) == [18, 6]
    assert relative_error(logits, logits_of(network, x)) < 1e-12
    assert [block.solved for block in record.blocks] == [None, None]  # exact: there is nothing left to check


@pytest.mark.usefixtures("with_kernels")
def test_a_number_of_iterations_is_not_checked(network, runs):
    evaluate = evaluator(network, solver="gs_jacobi", window=6, iterations=1)
    logits, record = evaluate(some_images())
    assert iterations_of(record) == [3, 1]
    assert relative_error(logits, logits_of(network, some_images())) > 1e-3
    assert len(runs) == 1


@pytest.mark.usefixtures("with_kernels")
def test_a_limit_is_kept(network, runs):
    evaluate = evaluator(network, solver="jacobi", tolerance=1e-13, max_iterations=3)
    _, record = evaluate(some_images())
    assert iterations_of(record) == [3, 3]
    assert not any(bool(block.solved.any()) for block in record.blocks)


@pytest.mark.usefixtures("with_kernels")
def test_an_image_that_is_not_finite_costs_the_others_nothing(network):
    x = some_images()
    expected = logits_of(network, x)
    plain, spoilt = (evaluator(network, solver="jacobi") for _ in range(2))
    plan = iterations_of(plain(x)[1])
    x[1, 0, 2, 3] = float("nan")
    logits, record = spoilt(x)
    assert iterations_of(record) == plan
    assert relative_error(logits[[0, 2]], expected[[0, 2]]) < 1e-3
    assert bool(logits[1].isnan().any())
    assert [block.solved.tolist() for block in record.blocks] == [[True, False, True]] * 2


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize(
    "chosen",
    [
        {"solver": "jacobi_gs"},
        {"solver": "jacobi", "stop": "exact"},
        {"solver": "jacobi", "scope": "network"},
        {"solver": "jacobi", "fused": False},
    ],
)
def test_what_kernels_cannot_do_is_done_plainly(network, chosen):
    _, record = evaluator(network, **chosen)(some_images())
    assert (record.way, record.solver) == ("plain", chosen["solver"])


@pytest.mark.usefixtures("with_kernels")
def test_a_network_that_kernels_do_not_know_is_evaluated_plainly(network, caplog):
    network.classifier = nn.Sequential(network.classifier)
    _, record = evaluator(network, solver="jacobi")(some_images())
    assert record.way == "plain"
    (line,) = [line.getMessage() for line in caplog.records]
    assert line.startswith(f"{WITHOUT_KERNELS} The kernels need ")
    assert evaluator(network)(some_images())[1].way == "ordinary"


class Standardised(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight / self.weight.std((1, 2, 3), keepdim=True), None, padding=1)


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.3 * x[:, : self.out_features]


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(type(TorchvisionLike().features.denseblock1.denselayer1)):
    def forward(self, features):
        return 0.5 * super().forward(features)


class Fixed(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.float(), self.bias.float())


def of_class(name, kind):
    return lambda network: setattr(network.get_submodule(name), "__class__", kind)


def with_part(name, part):
    return lambda network: network.set_submodule(name, part)


def with_one_more(network):
    children = dict(network.features.named_children())
    network.features = nn.Sequential()
    for name, child in children.items():
        network.features.add_module(name, child)
        if name == "transition1":
            network.features.add_module("tanh1", nn.Tanh())


LAYER = "features.denseblock1.denselayer2"
UNUSUAL = {
    "convolution": of_class(f"{LAYER}.conv2", Standardised),
    "classifier": of_class("classifier", Adapted),
    "transition": of_class("features.transition1", Doubled),
    "layer": of_class(LAYER, Halved),
    "divisor": with_part("features.transition1.pool", nn.AvgPool2d(2, 2, divisor_override=1)),
    "edge": with_part("features.transition1.pool", nn.AvgPool2d(2, 2, ceil_mode=True)),
    "one more": with_one_more,
}


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("solver", ["sequential", "jacobi", "auto"])
@pytest.mark.parametrize("part", UNUSUAL)
def test_what_kernels_would_not_compute_is_found_out(part, solver, caplog):
    network = lived_in(TorchvisionLike())
    UNUSUAL[part](network)
    evaluate = evaluator(network.float(), solver=solver, tolerance=1e-6)
    for batch in (3, 3, 4):
        x = images(batch, side=36).float()  # of 9 pixels before the transition
        with torch.inference_mode():
            logits, record = evaluate(x)
        assert record.way == ("ordinary" if solver == "auto" else "plain")
        assert relative_error(logits, logits_of(network, x)) < 1e-4
    (line,) = caplog.messages
    assert line.startswith(f"{WITHOUT_KERNELS} their logits would be ")


@pytest.mark.usefixtures("with_kernels")
def test_what_cannot_be_compared_is_not_trusted(caplog):
    network = lived_in(TorchvisionLike()).float()
    network.classifier.__class__ = Fixed
    assert evaluator(network, solver="jacobi")(images().float())[1].way == "plain"
    assert WITHOUT_KERNELS in caplog.text


class Softmax(TorchvisionLike):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Scaled(TorchvisionLike):
    def forward(self, x):
        return super().forward(x) * 1.003


class Centred(TorchvisionLike):
    def forward(self, x):
        logits = super().forward(x)
        return logits if len(x) == 1 else logits - logits.mean(0)


@pytest.mark.parametrize("kind", [Softmax, Scaled, Centred])
def test_a_forward_of_another_kind_is_kept(kind, caplog):
    evaluate, x = evaluator(lived_in(kind()).float(), solver="jacobi"), images().float()
    for _ in range(2):
        logits, record = evaluate(x)
        assert record.way == "ordinary"
        assert torch.equal(logits, logits_of(evaluate.structure.network, x))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("kind", "way"), [(Softmax, "ordinary"), (TorchvisionLike, "plain")])
@pytest.mark.parametrize("spoilt", [2, 3])
def test_what_is_not_finite_does_not_tell_what_a_forward_is(kind, way, spoilt):
    evaluate, x = evaluator(lived_in(kind()), solver="jacobi"), images()
    y = x.clone()
    y[:spoilt] = float("nan")
    assert evaluate(y)[1].way == (way if spoilt < 3 else "ordinary")  # until it is known
    logits, record = evaluate(x)
    assert record.way == way
    assert relative_error(logits, logits_of(evaluate.structure.network, x)) < 1e-2


@pytest.mark.usefixtures("with_kernels")
def test_a_network_of_weights_that_are_not_finite_is_looked_at_again(network):
    evaluate, x = evaluator(network, solver="sequential"), some_images()
    with torch.no_grad():
        bias = network.classifier.bias.clone()
        network.classifier.bias.fill_(float("nan"))
        assert evaluate(x)[1].way == "ordinary"
        network.classifier.bias.copy_(bias)
    evaluate.refresh()
    assert evaluate(x)[1].way == "fused"


@pytest.fixture
def switches():
    """PyTorch's for TF32, put back at the end."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    yield cudnn
    cudnn.conv.fp32_precision = before


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("solver", ["auto", "jacobi"])
def test_either_switch_of_tf32_makes_another_kind(network, solver, switches, monkeypatch):
    monkeypatch.setattr(dense_block, "product_of", lambda *_: str(convolutions_may_use_tf32()))
    evaluate, x = evaluator(network, solver=solver), some_images()
    for precision in ("tf32", "ieee"):
        switches.conv.fp32_precision = precision
        assert convolutions_may_use_tf32() is (precision == "tf32")
        evaluate(x)
    assert len(evaluate._ways) == 2
    assert {product for _, _, product in evaluate._weights} == {"True", "False"}
    evaluate(x)
    assert len(evaluate._ways) == 2
    switches.conv.fp32_precision = "tf32"
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert not convolutions_may_use_tf32()
    assert convolutions_may_use_tf32()


@pytest.mark.usefixtures("with_kernels")
def test_shared_weights_are_folded_once(network, monkeypatch):
    evaluate, calls = evaluator(network, solver="sequential"), []
    for batch in (1, 2, 3):
        evaluate(some_images(batch))
    monkeypatch.setattr(FusedWeights, "refresh", lambda self: calls.append(self))
    evaluate.refresh()
    assert len(evaluate._ways) == 3
    assert len(calls) == 1


@pytest.mark.usefixtures("with_kernels")
def test_a_mixture_in_which_nothing_iterates(network):
    evaluate, x = evaluator(network), some_images()
    evaluate._is_usual = True
    sequential = Plan.sequential(evaluate.structure)
    evaluate._ways[auto._kind_of(x, evaluate.structure)] = evaluate.fused("gs_jacobi", sequential, x)
    assert evaluate.probe(x)[1].relative_logit_error < 1e-12


@pytest.mark.usefixtures("with_kernels")
def test_a_plan_that_has_become_too_slow_is_given_up(network, monkeypatch):
    def seconds(name):
        if "ordinary" in name or "sequential" in name:
            return 9.0 if "ordinary" in name else 2.0
        return 1.0 if "jacobi, " in name and "gs" not in name and "18" not in name else 3.0

    pretend(monkeypatch, seconds)
    evaluate, x = evaluator(network), some_images()
    assert evaluate(x)[1].solver == "jacobi"
    with torch.no_grad():
        for block in structure_of(network).blocks:
            for layer in block.layers:
                layer.conv1.weight[:, block.channels :] *= 30  # now they couple strongly
    evaluate.refresh()
    for _ in range(2):
        logits, record = evaluate(x)
        assert (record.way, record.solver) == ("fused", "sequential")
        assert relative_error(logits, logits_of(network, x)) < 1e-12


# -- from batch to batch ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("with_kernels")
def test_a_smaller_last_batch_is_padded_and_one_that_comes_again_gets_its_own(network, runs):
    evaluate = evaluator(network, solver="gs_jacobi", window=6)
    for batch, captured in ((4, [4]), (4, [4]), (3, [4]), (4, [4]), (1, [4]), (1, [4, 1]), (1, [4, 1]), (4, [4, 1])):
        x = some_images(batch)
        logits, record = evaluate(x)
        assert [kind[0] for kind in evaluate._ways] == captured
        assert logits.shape == (batch, 7)
        assert relative_error(logits, logits_of(network, x)) < 1e-3
        for block in record.blocks:
            assert block.iterations.shape == block.evaluations.shape == block.solved.shape == (batch,)
            assert block.residual.shape == (1, batch)


@pytest.mark.usefixtures("with_kernels")
def test_kinds_do_not_mix(network):
    evaluate = evaluator(network.float(), solver="sequential")
    x = some_images().float()
    single = evaluate(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = evaluate(x)[0]
    assert (single.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(evaluate(x)[0], single)
    assert relative_error(half, single) < 0.1
    assert len(evaluate._ways) == 2


@pytest.mark.usefixtures("with_kernels")
def test_not_more_kinds_are_kept_than_memory_can_hold(network):
    evaluate = evaluator(network, solver="sequential")
    for batch in range(1, 12):
        evaluate(some_images(batch))
    assert [kind[0] for kind in evaluate._ways] == list(range(4, 12))


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("change", ["a training step", "a checkpoint", "data", "dtype"])
def test_new_weights_are_seen(network, change):
    evaluate_in_parallel(network, solver="jacobi", probe_every=0)
    x = some_images()
    with torch.inference_mode():
        before = network(x)
    if change == "a training step":
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        network(some_images(seed=7)).square().sum().backward()
        optimizer.step()
        network.eval()
    elif change == "a checkpoint":
        network.load_state_dict({name: 1.1 * value for name, value in network.state_dict().items()})
    elif change == "dtype":
        network.float()
        x = x.float()
    else:
        network.classifier.weight.data = 1.1 * network.classifier.weight.data
    with torch.no_grad():
        found = network(x)
    expected = logits_of(network, x)
    assert list(records(network)) == [""]
    assert relative_error(found, expected) < 1e-3
    assert change == "dtype" or relative_error(found, before) > 1e-3


@pytest.mark.usefixtures("with_kernels")
def test_a_single_weight_that_changes_in_training_is_seen(network):
    evaluate_in_parallel(network, solver="sequential", probe_every=0)
    layer = network.features.denseblock1.denselayer3
    with torch.no_grad():
        network(some_images())
        network.train()(some_images())
        layer.conv1.weight *= 3
        found = network.eval()(some_images())
    assert relative_error(found, logits_of(network, some_images())) < 1e-12


def test_the_first_call_of_a_kind_is_not_timed(network):
    evaluate, calls = evaluator(network, solver="jacobi"), []
    ordinary = evaluate.ordinary.forward
    evaluate.ordinary.forward = lambda x: calls.append(len(x)) or ordinary(x)
    for _ in range(3):
        evaluate.probe(some_images())
    assert calls == [2, 3, 3, 3, 3]  # is it the usual forward; one that does not count; three that do


@pytest.mark.usefixtures("with_kernels")
def test_a_probe_compares_and_follows_the_changes_once(network):
    evaluate = evaluator(network, solver="gs_jacobi", window=6, tolerance=1e-4)
    for call in range(3):
        if call == 2:
            evaluate.refresh()
        logits, record = evaluate.probe(some_images())
        assert record.relative_logit_error == relative_error(logits, logits_of(network, some_images()))
        assert (record.top1_agreement, record.top5_agreement) == (1, 1)
        assert record.speedup > 0
        lengths = {len(block.residual) for block in record.blocks}
        assert (lengths == {1}) == (call == 1)
    assert min(lengths) > 3


def test_what_is_faster_is_never_mistaken_for_the_ordinary(network):
    assert isinstance(evaluator(network).ordinary, Ordinary)
    with pytest.raises(UserError, match="is no DenseNet"):
        evaluator(nn.Linear(2, 2))


@pytest.mark.usefixtures("with_kernels")
def test_torchvisions_own_networks():
    network = lived_in(TorchvisionLike())
    x = images()
    logits, record = evaluator(network, solver="gs_jacobi", window=2)(x)
    assert (record.way, [block.layers for block in record.blocks]) == ("fused", [4, 5])
    assert relative_error(logits, logits_of(network, x)) < 1e-12


@pytest.mark.gpu
@torch.inference_mode()
def test_on_a_gpu(network, caplog):
    network, x = network.cuda().float(), some_images().cuda().float()
    exact = in_float64(structure_of(network), x)
    for chosen in ({}, {"solver": "sequential"}, {"solver": "jacobi"}, {"solver": "gs_jacobi"}):
        with caplog.at_level(logging.INFO):
            logits, record = evaluator(network, **chosen).probe(x)
        assert record.way == "fused"
        assert relative_error(logits, exact) < 5e-3
        assert record.speedup > 0
