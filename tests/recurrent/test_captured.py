"""Backward passes as captured CUDA graphs: the same gradients as without, whatever happens between two of them."""

import contextlib
import gc
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from recurrent_helpers import build, largest_error
from recurrent_helpers import gradients as gradients_by_name
from torch import nn

from lit_parallel.kernels import interpreted
from lit_parallel.networks.rnn import keep_state
from lit_parallel.recurrent import parallelize, records, restore, tuning

TESTS = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_places_are_known_again_and_what_moves_is_copied():
    pytest.importorskip("triton")
    from lit_parallel.recurrent.captured import _MOVES, _Places

    tensors = [torch.arange(6.0).reshape(2, 3), torch.ones(4)]
    places = _Places(tensors, None)
    assert places.hold([x.detach() for x in tensors])  # another object, the same memory
    for other in (tensors[0].clone(), tensors[0].reshape(3, 2), tensors[0].view(torch.int32), tensors[0][:1]):
        assert not places.hold([other, tensors[1]])
        assert places.moves([other, tensors[1]]) == [1, 0]
    for _ in range(_MOVES):
        assert places.copied == 0
        moved = [tensors[0].clone(), tensors[1]]
        moves = places.moves(moved)
        places, tensors = _Places(moved, moves), moved
    assert places.copied == 1
    moved = [tensors[0].clone(), tensors[1]]
    assert places.hold(moved)
    assert not places.hold([moved[0].double(), tensors[1]])
    own, same = places.instead_of(moved)
    assert own is not moved[0]
    assert same is tensors[1]
    moved[0] += 1
    places.copy_from(moved)
    assert torch.equal(own, moved[0])
    own.mul_(2)
    places.copy_to(moved)
    assert torch.equal(own, moved[0])


class PretendedGraph:
    """Does its work again on the very memory that it was captured with, as a graph does."""

    def capture_begin(self, **_):
        assert not gc.isenabled()  # it might destroy another graph, which must not happen now

    def capture_end(self):
        pass

    def replay(self):
        self.work()


@pytest.fixture
def captures(monkeypatch):
    """Let graphs be captured on a CPU, and count them."""
    from lit_parallel.recurrent import captured

    seen, run, zeros, stream = [], captured.CapturedPass._run, torch.zeros, object()

    def capture(self, task, results):
        seen.append(self)
        read, written = [x.detach() for x in task.tensors()], [x.detach() for x in results]
        self._graph.work = torch.no_grad()(lambda: run(self, task.with_tensors(read), written))
        run(self, task, results)
        for x in written:
            x.fill_(torch.nan)  # nothing has been computed before a replay

    event = types.SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(captured.CapturedPass, "_run", capture)
    monkeypatch.setattr(tuning, "can_be_captured", lambda task: True)
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **options: zeros(*shape, **options))
    for name, replacement in {
        "CUDAGraph": PretendedGraph,
        "Event": lambda external: event,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device: None,
        "mem_get_info": lambda device: (2**40, 2**40),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return seen


@pytest.mark.skipif(not interpreted(), reason="run by the test below")
def test_interpreted_passes(captures):
    torch.manual_seed(0)
    module, twin, kept = build("gru", 3, 4), build("gru", 3, 4).double(), []
    parallelize(module, solver="jacobi_gs", block_size=4, probe_every=0)
    keep_state(module, -4.0)  # forgets within a few steps
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.1)
    for i in range(9):
        frozen = ("input", "weight_hh") if i == 7 else ()
        x = torch.randn(20, 2, 3)
        if i == 8:
            keep_state(module, 4.0)  # longer than the walk looks back
        twin.load_state_dict(module.state_dict())
        found = gradients_by_name(module, x, frozen=frozen)
        assert largest_error(found, gradients_by_name(twin, x.double(), frozen=frozen)) < 2e-6
        assert i < 8 or records(module)["l0"].sweeps > 1
        kept.append((x, found, {name: grad.clone() for name, grad in found.items()}))  # the next lie elsewhere
    assert [graph._passes for graph in captures] == [1, 1, 1, 2, 1, 1]  # three moves, copies, other gradients for once
    for _, found, copies in kept:
        assert all(torch.equal(found[name], copies[name]) for name in copies)


@pytest.mark.skipif(not interpreted(), reason="run by the test below")
def test_interpreted_forward_passes(captures):
    torch.manual_seed(0)
    module, twin, kept = build("lstm", 3, 4), build("lstm", 3, 4).double(), []
    parallelize(module, solver="jacobi_gs", block_size=4, forward=True, probe_every=0)
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.1)
        module.bias_ih_l0[4:8] = -2.0  # forgets within a few steps
    twin.load_state_dict(module.state_dict())
    for _ in range(9):
        x = torch.randn(60, 2, 3)
        with torch.no_grad():
            output, (h, c) = module(x)
            expected = twin(x.double())
        found = {"output": output, "h_n": h, "c_n": c}
        assert largest_error(found, {"output": expected[0], "h_n": expected[1][0], "c_n": expected[1][1]}) < 2e-6
        kept.append((found, {name: value.clone() for name, value in found.items()}))  # the next lie elsewhere
    assert len(captures) >= 3
    assert captures[-1]._written.copied > 0
    for i in range(8):  # training with an evaluation after each step: of the forward passes, training's are captured
        x = torch.randn(60, 2, 3)
        expected = gradients_by_name(twin, x.double())
        assert largest_error(gradients_by_name(module, x), expected) < 1e-5
        before = len(captures)
        with torch.no_grad():
            assert largest_error({"output": module(x)[0]}, {"output": twin(x.double())[0]}) < 2e-6
        assert i == 0 or len(captures) == before
    (tuned,) = module.forward.controllers["l0"].ahead._tuned.values()
    assert tuned.captured.linearises
    for found, copies in kept:
        assert all(torch.equal(found[name], copies[name]) for name in copies)


@pytest.mark.skipif(not interpreted(), reason="run by the test below")
def test_interpreted_passes_of_a_layer_that_is_used_twice(captures):
    """Each pass is judged by its own verdict, also where the next one is launched before anybody has asked."""
    torch.manual_seed(0)
    module, twin = build("gru", 3, 3), build("gru", 3, 3).double()
    parallelize(module, solver="jacobi_gs", block_size=4, forward=True, probe_every=0)
    keep_state(module, -4.0)
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.1)
    twin.load_state_dict(module.state_dict())

    def found(module, x, evaluates=False):
        leaf = x.clone().requires_grad_()
        output, _ = module(module(leaf)[0])
        if evaluates:
            with torch.no_grad():
                module(2 * x)
        grads = torch.autograd.grad(output.square().sum(), [leaf, *module.parameters()])
        return {str(n): grad for n, grad in enumerate(grads)}

    for i in range(6):
        x = torch.randn(40, 2, 3)
        if i == 5:
            keep_state(module, 1.0)  # the first of two passes finds its halo too short, and so does the second
            twin.load_state_dict(module.state_dict())
        assert largest_error(found(module, x, evaluates=i == 4), found(twin, x.double())) < 1e-5
    assert captures
    restore(module)  # with a verdict that nobody has asked for
    assert largest_error(found(module, x), found(twin, x.double())) < 1e-5


def test_passes_in_the_interpreter():
    pytest.importorskip("triton")
    # TRITON_INTERPRET counts only before triton is imported, hence another process.
    command = [sys.executable, "-m", "pytest", "-x", "-W", "ignore::RuntimeWarning", "-k", "interpreted", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


def parallel(cell, layers=1, **options):
    torch.manual_seed(0)
    module = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cell](3, 32, layers, **options).cuda()
    parallelize(module, solver="jacobi_gs", probe_every=0)
    return module


def random(seed, *shape):
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def gradients(module, x, g, **options):
    leaf = x.clone().requires_grad_()
    output, _ = module(leaf)
    return torch.autograd.grad(output, [leaf, *module.parameters()], g, **options)


def exact(module, x, g):
    options = {name: getattr(module, name) for name in ("num_layers", "bidirectional", "batch_first")}
    other = type(module)(3, 32, **options).cuda().double()
    other.load_state_dict(module.state_dict())
    return gradients(other, x.double(), g.double())


def assert_near(found, expected):
    distance = sum(float((a.double() - b).square().sum()) for a, b in zip(found, expected, strict=True))
    assert (distance / sum(float(b.square().sum()) for b in expected)) ** 0.5 < 1e-5


def graphs(module):
    found = [
        tuned.captured for controller in module.forward.controllers.values() for tuned in controller._tuned.values()
    ]
    return [graph for graph in found if graph is not None]


def is_captured(module):
    return len(graphs(module)) == len(module.forward.controllers)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_many_passes_with_other_inputs_weights_and_gradients(cell):
    module = parallel(cell)
    for seed in range(8):
        x, g = random(seed, 500, 2, 3), random(seed + 10, 500, 2, 32)
        if seed % 3 == 1:
            g = g[:1, :, :1].expand(500, 2, 32)  # as a sum's gradient is
        assert_near(gradients(module, x, g), exact(module, x, g))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.98)
    assert is_captured(module)
    module.weight_hh_l0 = nn.Parameter(0.5 * module.weight_hh_l0.detach())
    assert_near(gradients(module, x, g), exact(module, x, g))
    assert records(module)["l0"].sweeps >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_tensors_are_read_where_they_lie_until_they_move(cell):
    gc.collect()  # what earlier tests have left would be given back in the midst of this one,
    module = parallel(cell)
    x, g = random(0, 500, 2, 3), random(1, 500, 2, 32)
    with torch.autograd.set_multithreading_enabled(False):  # and gradients a moment late, by autograd's own thread
        for _ in range(6):
            gradients(module, x, g)
        (graph,) = graphs(module)
        found = gradients(module, x, g)
    assert graphs(module) == [graph]
    assert graph._read.copied == graph._written.copied == 0
    assert_near(found, exact(module, x, g))
    kept, captures = [], 0
    for seed in range(80):
        kept.append((random(seed, 500, 2, 3), random(seed + 100, 500, 2, 32)))  # each at a place of its own
        assert_near(gradients(module, *kept[-1]), exact(module, *kept[-1]))
        captures += graphs(module) != [graph]
        (graph,) = graphs(module)
    tensors = len(graph._read._moves) + len(graph._written._moves)
    assert captures <= 3 * tensors < 80  # it is not captured anew for ever
    assert graph._read.copied > 0


@pytest.mark.gpu
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_several_layers_in_both_directions_with_the_batch_first(cell):
    module = parallel(cell, 2, bidirectional=True, batch_first=True)
    for seed in range(7):
        x, g = random(seed, 2, 400, 3), random(seed + 10, 2, 400, 64)
        assert_near(gradients(module, x, g), exact(module, x, g))
    assert is_captured(module)


@pytest.mark.gpu
def test_a_device_that_is_far_behind_is_not_waited_for():
    """It finds out itself that one walk is not enough; the verdict is that of this pass, not of an earlier one."""
    module = parallel("rnn")
    x, g = random(0, 500, 2, 3), random(1, 500, 2, 32)
    with torch.no_grad():
        forgets, remembers = module.weight_hh_l0.clone(), 0.95 * torch.linalg.qr(module.weight_hh_l0)[0]
        module.weight_hh_l0.copy_(remembers)
    expected = exact(module, 0.01 * x, g)
    with torch.no_grad():
        module.weight_hh_l0.copy_(forgets)
    for _ in range(12):  # until what is allocated lies where it did before
        gradients(module, x, g)
    assert is_captured(module)
    with torch.no_grad():
        module.weight_hh_l0.copy_(remembers)
        x *= 0.01
    gone = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)
    found = gradients(module, x, g)
    gone.record()
    assert not gone.query()
    assert math.isnan(records(module, wait=False)["l0"].residual)
    assert_near(found, expected)
    assert records(module)["l0"].sweeps > 1


@pytest.mark.gpu
def test_passes_on_several_streams():
    module = parallel("gru")
    x, g = random(0, 500, 2, 3), random(1, 500, 2, 32)
    expected = exact(module, x, g)
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for i in range(10):
        stream = streams[i % 2]
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            found.append(gradients(module, x, g))
    torch.cuda.synchronize()
    assert is_captured(module)
    for grads in found:
        assert_near(grads, expected)


@pytest.mark.gpu
def test_gradients_of_initial_states_and_through_last_states():
    module = parallel("lstm")
    twin = nn.LSTM(3, 32).cuda()
    twin.load_state_dict(module.state_dict())
    states = [random(seed, 1, 2, 32).requires_grad_() for seed in (2, 3)]
    for seed in range(6):
        x = random(seed, 400, 2, 3)

        def found(module):
            output, (h, c) = module(x, tuple(states))  # noqa: B023
            return torch.autograd.grad(output.square().mean() + (h * c).sum(), [*states, *module.parameters()])

        assert_near(found(module), [grad.double() for grad in found(twin)])
    assert is_captured(module)


@pytest.mark.gpu
def test_gradients_that_were_returned_stay_as_they_are():
    module = parallel("gru")
    x, g = torch.randn(400, 2, 3, device="cuda"), torch.randn(400, 2, 32, device="cuda")
    for _ in range(6):
        kept = gradients(module, x, g)
    copies = [grad.clone() for grad in kept]
    gradients(module, 2 * x, -g)
    assert is_captured(module)
    for grad, copy in zip(kept, copies, strict=True):
        assert torch.equal(grad, copy)


@pytest.mark.gpu
def test_a_graph_that_is_kept_and_accumulation():
    module = parallel("lstm")
    x, g = torch.randn(400, 2, 3, device="cuda"), torch.randn(400, 2, 32, device="cuda")
    for _ in range(6):
        gradients(module, x, g)
    output, _ = module(x)
    output.backward(g, retain_graph=True)
    once = [parameter.grad.clone() for parameter in module.parameters()]
    output.backward(g)
    for parameter, first in zip(module.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * first)


@pytest.mark.gpu
@pytest.mark.parametrize(("scale", "kept"), [(0.0, True), (1e-25, False)])
def test_a_sequence_with_hardly_a_gradient(scale, kept):
    """Without any, nothing arrives anywhere, which is right; where squares vanish, the graph is given up."""
    module = parallel("gru")
    x, g = torch.randn(400, 2, 3, device="cuda"), torch.randn(400, 2, 32, device="cuda")
    g[:, 1] *= scale
    for _ in range(24):
        found = gradients(module, x, g)
    assert is_captured(module) == kept
    assert_near(found, exact(module, x, g))
