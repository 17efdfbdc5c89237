"""Swapping in parallel evaluation leaves the network as it was in everything but the way to its logits."""

import copy
import io
import logging
import pickle

import pytest
import torch
from dense_helpers import NETWORKS, TorchvisionLike, images, lived_in, side_of
from torch import nn

from lit_parallel.dense import DenseOptions, auto, evaluate_in_parallel, records, refresh, restore
from lit_parallel.errors import UserError
from lit_parallel.networks.densenet import DenseNet

EXACT = DenseOptions(solver="gs_jacobi", stop="exact", probe_every=0)


def small(seed=1):
    return lived_in(DenseNet(3, (4, 3), 4, bn_size=2, num_classes=6, small_images=True), side=8, seed=seed)


def small_images(batch=3):
    return images(batch, side=8)


class Wrapper(nn.Module):
    """A network within a network."""

    def __init__(self, network=None):
        super().__init__()
        self.backbone = nn.ModuleDict({"net": network or small()})
        self.other = nn.Conv2d(3, 3, 1).double()

    def forward(self, x):
        return self.backbone["net"](self.other(x))


def swapped(module):
    return [name for name, part in module.named_modules() if "forward" in part.__dict__]


@torch.no_grad()
def both(module, x, options=EXACT, **chosen):
    """Logits before, meanwhile and afterwards; they are the same before and afterwards."""
    expected = module(x)
    evaluate_in_parallel(module, options, **chosen)
    found = module(x)
    restore(module)
    assert torch.equal(module(x), expected)
    return expected, found


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sequential", "jacobi", "jacobi_gs", "gs_jacobi"])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_the_ordinary_bits(name, solver):
    expected, found = both(NETWORKS[name](), images(side=side_of(name)), solver=solver)
    assert torch.equal(found, expected)


def test_few_iterations_are_seen():
    expected, found = both(small(), small_images(), DenseOptions(solver="jacobi", iterations=1, probe_every=0))
    assert not torch.allclose(found, expected, rtol=1e-3)


def test_networks_are_found_at_any_depth_and_once():
    wrapper = Wrapper()
    wrapper.again = wrapper.backbone["net"]
    wrapper.second = small(seed=3)
    assert evaluate_in_parallel(wrapper, EXACT) == ["backbone.net", "second"] == swapped(wrapper)
    with torch.inference_mode():
        wrapper.again(small_images(2))
    assert list(records(wrapper)) == ["backbone.net"]
    restore(wrapper)
    assert swapped(wrapper) == []
    assert evaluate_in_parallel(small(), EXACT) == [""]
    assert evaluate_in_parallel(nn.Linear(2, 2)) == []


def test_a_network_within_a_network():
    outer = small()
    outer.teacher = small(seed=3)
    expected = outer(small_images())
    assert evaluate_in_parallel(outer, EXACT) == ["", "teacher"]
    with torch.no_grad():
        assert torch.equal(outer(small_images()), expected)
    assert list(records(outer)) == [""]


def test_a_record_says_what_an_evaluation_took():
    network = small()
    evaluate_in_parallel(network, solver="jacobi", tolerance=1e-12, probe_every=0)
    assert records(network) == {}
    with torch.no_grad():
        network(small_images(3))
    (record,) = records(network).values()
    assert (record.solver, record.way, record.speedup) == ("jacobi", "plain", None)
    assert [block.name for block in record.blocks] == ["features.denseblock1", "features.denseblock2"]
    assert [block.layers for block in record.blocks] == [4, 3]
    for block in record.blocks:
        assert block.iterations.shape == (3,)
        assert 1 < int(block.iterations.max()) <= block.layers + 1
        assert bool(block.solved.all())


def test_every_so_many_batches_are_compared():
    network = small()
    evaluate_in_parallel(network, solver="jacobi", iterations=1, probe_every=3)
    compared = []
    with torch.no_grad():
        for _ in range(7):
            network(small_images())
            record = records(network)[""]
            compared.append(record.speedup is not None)
            assert (record.relative_logit_error is not None) == compared[-1]
    assert compared == [True, False, False, True, False, False, True]
    assert record.relative_logit_error > 1e-3
    assert 0 <= record.top5_agreement <= record.top1_agreement <= 1
    assert record.speedup > 0


# -- where the ordinary way is taken ----------------------------------------------------------------------------------


def test_training_is_as_before():
    network = small().train()
    other = copy.deepcopy(network)
    evaluate_in_parallel(network, EXACT)
    for each in (network, other):
        each(small_images()).sum().backward()
    for (name, parameter), expected in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad), name
    for buffer, expected in zip(network.buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, expected)
    assert records(network) == {}


def test_where_gradients_are_recorded_the_forward_is_the_ordinary_one():
    network = small()
    evaluate_in_parallel(network, EXACT)
    network(small_images()).sum().backward()
    assert network.features.conv0.weight.grad is not None
    network.requires_grad_(False)
    x = small_images().requires_grad_()
    network(x).sum().backward()
    assert x.grad is not None
    assert records(network) == {}
    network(small_images())  # now nobody wants any
    assert list(records(network)) == [""]


def test_a_network_of_which_a_part_trains_is_not_parallel():
    network = small()
    network.features.denseblock1.denselayer2.norm1.train()
    other = copy.deepcopy(network)
    evaluate_in_parallel(network, EXACT)
    with torch.no_grad():
        assert torch.equal(network(small_images()), other(small_images()))
    assert records(network) == {}


@pytest.fixture
def on_kernels(monkeypatch):
    """What kernels compute, which keep copies of the weights."""
    monkeypatch.setattr(auto, "kernels_run_on", lambda device: True)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"solver": "jacobi", "stop": "exact"}, {"solver": "sequential"}])
def test_a_part_that_trains_later_is_noticed(options, on_kernels):
    """Once, and not per iteration, it takes the statistics of its batch; and what it has changed is seen."""
    network = small()
    other = copy.deepcopy(network)
    evaluate_in_parallel(network, probe_every=0, **options)
    for mode in (False, True, False):
        network.features.denseblock1.denselayer2.norm1.train(mode)
        other.features.denseblock1.denselayer2.norm1.train(mode)
        assert torch.allclose(network(small_images()), other(small_images()), rtol=1e-9)
    for (name, buffer), expected in zip(network.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


@torch.no_grad()
def test_dropout_that_is_switched_on_later_drops(on_kernels):
    network = small()
    layer = network.features.denseblock2.denselayer1
    layer.drop_rate = 0.9
    evaluate_in_parallel(network, solver="sequential", probe_every=0)
    before = network(small_images())
    layer.train()
    assert not torch.allclose(network(small_images()), before, rtol=1e-3)


@torch.no_grad()
def test_a_network_that_trains_again_takes_the_statistics_of_its_batch():
    network = small()
    other = copy.deepcopy(network)
    evaluate_in_parallel(network, EXACT)
    for mode in (False, True, False):
        network.train(mode)
        other.train(mode)
        assert torch.equal(network(small_images()), other(small_images()))


def test_wrong_arguments_get_the_networks_own_messages():
    network = small()
    mistakes = [(torch.zeros(2, 3),), (torch.zeros(2, 4, 8, 8).double(),), (torch.zeros(2, 3, 8, 8),), (), ("images",)]

    def message(arguments):
        with torch.no_grad(), pytest.raises(Exception) as caught:  # noqa: PT011
            network(*arguments)
        return caught.type, str(caught.value)

    expected = [message(arguments) for arguments in mistakes]
    evaluate_in_parallel(network, EXACT)
    found = [message(arguments) for arguments in mistakes]
    assert [kind for kind, _ in found] == [kind for kind, _ in expected]
    with torch.no_grad():
        assert network(small_images()).shape == (3, 6)  # and it works afterwards


def test_one_image_and_none_and_named_arguments():
    network = small()
    with torch.no_grad():
        expected = network(small_images(1))
        evaluate_in_parallel(network, EXACT)
        assert torch.equal(network(small_images(1)), expected)
        assert torch.equal(network(images=small_images(1)), expected)
        assert network(small_images()[:0]).shape == (0, 6)


# -- weights that change ----------------------------------------------------------------------------------------------


def _a_weight(network):
    network.features.denseblock1.denselayer3.conv2.weight.mul_(1.5)


def _statistics(network):  # as a calibration of batch norm does
    network.features.norm5.running_mean.add_(0.5)


def _a_layers_statistics(network):
    network.features.denseblock2.denselayer2.norm1.running_var.mul_(2)


def _new_tensors(network):
    norm = network.features.denseblock1.denselayer2.norm2
    norm.weight = nn.Parameter(norm.weight * 2)
    norm.running_mean = norm.running_mean + 1


def _data(network):
    weight = network.features.transition1.conv.weight
    weight.data = weight.data * 2


def _a_checkpoint(network):
    network.load_state_dict(small(seed=5).state_dict())


def _assigned(network):
    network.load_state_dict(small(seed=5).state_dict(), assign=True)


def _through_data(network):
    network.features.denseblock1.denselayer3.conv1.weight.data.mul_(2)
    other = small()
    evaluate_in_parallel(other)
    refresh(nn.ModuleList([network, other]))  # both go by the same name


CHANGES = [
    *(_a_weight, _statistics, _a_layers_statistics, _new_tensors, _data, _a_checkpoint, _assigned, _through_data),
]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_changed_weights_are_noticed(change, on_kernels):
    network = small()
    evaluate_in_parallel(network, solver="sequential", probe_every=0)
    before = network(small_images())
    assert records(network)[""].way == "fused"
    change(network)
    expected = type(network).forward(network, small_images())
    assert not torch.allclose(expected, before, rtol=1e-3)
    assert torch.allclose(network(small_images()), expected, rtol=1e-9)


@torch.no_grad()
def test_a_part_that_is_exchanged_is_noticed(on_kernels):
    network = small()
    evaluate_in_parallel(network, solver="sequential", probe_every=0)
    network(small_images())
    layers, others = (each.features.denseblock1 for each in (network, small(seed=5)))
    layers.denselayer2 = others.denselayer2
    assert torch.allclose(network(small_images()), type(network).forward(network, small_images()), rtol=1e-9)
    network.classifier = nn.Linear(network.classifier.in_features, 4).double()
    assert torch.allclose(network(small_images()), type(network).forward(network, small_images()), rtol=1e-9)


@torch.no_grad()
def test_weights_that_stay_are_read_once(on_kernels, monkeypatch):
    read = []
    again = auto.Evaluator.refresh
    monkeypatch.setattr(auto.Evaluator, "refresh", lambda self: read.append(self) or again(self))
    network = small()
    evaluate_in_parallel(network, solver="sequential", probe_every=0)
    for _ in range(3):
        network(small_images())
    assert len(read) == 1


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        network = small()
        expected = network(small_images())
    evaluate_in_parallel(network, EXACT)
    with torch.inference_mode():
        assert torch.equal(network(small_images()), expected)


# -- the module stays what it was -------------------------------------------------------------------------------------


def test_nothing_but_the_forward_changes():
    wrapper = Wrapper()

    def outline():
        names = {name: (type(part), set(part.__dict__) - {"forward"}) for name, part in wrapper.named_modules()}
        return names, {name: id(x) for name, x in wrapper.state_dict(keep_vars=True).items()}

    before = outline()
    evaluate_in_parallel(wrapper, EXACT)
    with torch.no_grad():
        wrapper(small_images())
    assert outline() == before
    restore(wrapper)
    restore(wrapper)
    assert outline() == before
    assert swapped(wrapper) == []


def test_hooks_of_the_network_still_run():
    network, seen = small(), []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    evaluate_in_parallel(network, EXACT)
    with torch.no_grad():
        network(small_images())
    assert seen == [(3, 6)]
    assert list(records(network)) == [""]


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_parallel_too_and_has_its_own_weights(through):
    wrapper, x = Wrapper(), small_images()
    evaluate_in_parallel(wrapper, EXACT)
    with torch.no_grad():
        expected = wrapper(x)
    if through == "deepcopy":
        other = copy.deepcopy(wrapper)
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(wrapper))
    else:
        torch.save(wrapper, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert swapped(other) == ["backbone.net"]
    assert records(other) == {}
    with torch.no_grad():
        assert torch.equal(other(x), expected)
        other.backbone["net"].classifier.bias.add_(1)
        assert torch.allclose(other(x), expected + 1)
        assert torch.equal(wrapper(x), expected)
    restore(other)
    assert swapped(wrapper) == ["backbone.net"]


def test_an_exception_leaves_it_swapped_and_working():
    network = small()
    evaluate_in_parallel(network, EXACT)
    network.classifier.register_forward_hook(lambda *_: 1 / 0)  # a hook within, later
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            network(small_images())
        network.classifier._forward_hooks.clear()
        assert network(small_images()).shape == (3, 6)
    restore(network)
    assert swapped(network) == []


# -- what is left alone -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda: nn.ModuleDict({"net": torch.compile(small())}), "net._orig_mod", "is compiled"),
        (lambda: nn.ModuleDict({"all": torch.compile(Wrapper())}), "all._orig_mod.backbone.net", "is compiled"),
        (lambda: nn.ModuleDict({"net": _compiled_in_place()}), "net", "is compiled"),
        (lambda: nn.ModuleDict({"net": torch.jit.script(small())}), "net", "is scripted"),
        (lambda: nn.ModuleDict({"net": _with_own_forward()}), "net", "has a forward of its own"),
        (lambda: nn.ModuleDict({"net": _hooked()}), "net", "has hooks within"),
        (lambda: nn.ModuleDict({"net": _squeezed()}), "net", "is not the usual one .*'squeeze'"),
    ],
    ids=["compiled", "within compiled", "compiled in place", "scripted", "own forward", "hooks", "other parts"],
)
def test_what_cannot_be_parallel_is_left_alone(make, name, reason):
    module = make()
    module["fine"] = small()
    before = swapped(module)
    with pytest.warns(UserWarning, match=f"'{name}' {reason}.* and is evaluated as before") as caught:
        assert evaluate_in_parallel(module, EXACT) == ["fine"]
    assert len([w for w in caught if "evaluated as before" in str(w.message)]) == 1
    assert set(swapped(module)) == {*before, "fine"}
    restore(module)
    assert swapped(module) == before


def _compiled_in_place():
    network = small()
    network.compile()
    return network


def _with_own_forward():
    network = small()
    network.forward = lambda x: x
    return network


def _hooked():
    network = small()
    network.features.denseblock1.register_forward_hook(lambda *_: None)
    return network


def _squeezed():
    network = small()
    network.features.denseblock1.denselayer1.add_module("squeeze", nn.Linear(2, 2))
    return network


def test_warnings_as_errors_leave_nothing_half_done():
    module = nn.ModuleList([small(), _squeezed()])
    with pytest.raises(UserWarning, match="squeeze"):
        evaluate_in_parallel(module)
    assert swapped(module) == []


class Probabilities(TorchvisionLike):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Pair(TorchvisionLike):
    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.argmax(1)


@pytest.mark.parametrize("kind", [Probabilities, Pair])
def test_a_class_that_ends_otherwise_is_evaluated_by_its_own_forward(kind, caplog):
    network, x = lived_in(TorchvisionLike()), images()
    network.__class__ = kind
    with torch.no_grad():
        expected = network(x)
        evaluate_in_parallel(network, EXACT)
        for _ in range(2):
            found = network(x)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert [line.message for line in caplog.records] == [
        "The network has a forward that is not the usual DenseNet's, and is evaluated by it."
    ]
    assert records(network)[""].way == "ordinary"


def test_what_is_parallel_already_is_refused():
    wrapper = Wrapper()
    evaluate_in_parallel(wrapper, EXACT)
    with pytest.raises(UserError, match=r"'backbone.net' is parallel already: call lit_parallel.dense.restore first"):
        evaluate_in_parallel(wrapper)
    assert swapped(wrapper) == ["backbone.net"]


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        ({"solver": "jacoby"}, "Option 'solver' cannot be 'jacoby'. Did you mean 'jacobi'?"),
        ({"tolerance": 0.0}, "Option 'tolerance' must be > 0, not 0.0."),
        ({"windows": 3}, "There is no option 'windows' of parallel evaluation. Did you mean 'window'?"),
        ({"solver": "jacobi", "window": 3}, "window belongs to solver=gs_jacobi, not jacobi: leave it out."),
    ],
)
def test_mistaken_options_get_one_clear_line(chosen, line):
    network = small()
    with pytest.raises(UserError) as caught:
        evaluate_in_parallel(network, **chosen)
    assert str(caught.value) == line
    assert swapped(network) == []


def test_options_are_copied():
    network, options = small(), DenseOptions(solver="jacobi", probe_every=0)
    evaluate_in_parallel(network, options, iterations=2)
    assert options == DenseOptions(solver="jacobi", probe_every=0)
    options.solver = "sequential"
    with torch.no_grad():
        network(small_images())
    assert [int(block.iterations.max()) for block in records(network)[""].blocks] == [2, 2]


def test_nobody_is_told_anything_where_all_is_well(caplog):
    with caplog.at_level(logging.INFO):
        both(small(), small_images())
    assert caplog.records == []


def test_a_compiled_caller_goes_around_it():
    wrapper, x = Wrapper(), small_images()
    with torch.no_grad():
        expected = wrapper(x)
        evaluate_in_parallel(wrapper, EXACT)
        assert torch.equal(torch.compile(lambda y: wrapper(y), backend="eager")(x), expected)
    assert list(records(wrapper)) == ["backbone.net"]
