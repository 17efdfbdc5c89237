"""The kernel of recurrent forward passes against the plain functions: in Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lit_parallel.kernels import interpreted
from lit_parallel.recurrent import parallelize, records
from lit_parallel.recurrent.cells import Layer, cell_of
from lit_parallel.recurrent.chain import blocks_of
from lit_parallel.recurrent.forward_pass import CellStateChain

TESTS = Path(__file__).parent.parent
CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
MODULES = {"rnn_tanh": torch.nn.RNN, "rnn_relu": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
ON_A_GPU = torch.cuda.is_available() and not interpreted()
DEVICE = "cuda" if ON_A_GPU else "cpu"

#: (steps, batch, hidden units, block, halo, whether blocks have starts of their own)
SIZES = (
    [(64, 4, 128, 16, 32, False), (513, 3, 100, 16, 0, True), (300, 2, 33, 7, 40, False), (90, 2, 256, 9, 20, False)]
    if ON_A_GPU
    else [(11, 2, 5, 4, 3, False), (9, 1, 20, 3, 0, True), (7, 3, 33, 2, 9, False), (1, 1, 5, 2, 1, False)]
)

needs_kernels = pytest.mark.skipif(not (ON_A_GPU or interpreted()), reason="run by the test above, or on a GPU")


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_the_kernel_interpreted():
    # TRITON_INTERPRET counts only before triton is imported, hence another process.
    command = [sys.executable, "-m", "pytest", "-x", "-W", "ignore::RuntimeWarning", "-k", "plain", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


def built(kind: str, hidden: int, **options):
    options |= {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}
    return MODULES[kind](3, hidden, **options).to(DEVICE)


def chains(kind: str, steps: int, batch: int, hidden: int, bias: bool):
    """The plain chain in float64, and the kernel's in float32."""
    from lit_parallel.kernels.recurrent_states import KernelStateChain

    weights = [weight.detach().double() for weight in built(kind, hidden, bias=bias).parameters()]
    x, h_0, c_0 = (
        torch.randn(s, device=DEVICE).double() for s in ((steps, batch, 3), (batch, hidden), (batch, hidden))
    )
    layer = Layer(
        x, x.new_empty(steps, batch, hidden), h_0, c_0 if kind == "lstm" else None, *(*weights, None, None)[:4]
    )
    first = torch.cat([h_0, c_0], dim=-1) if kind == "lstm" else h_0
    plain = CellStateChain(cell_of(kind), layer.from_input(), layer.weight_hh, layer.bias_hh, first)
    plain.x, plain.initial, plain.weights = x, (h_0, layer.c_0), (*weights, None, None)[:4]
    return plain, KernelStateChain(kind, layer.to(torch.float32))


def error(ours, exact) -> float:
    ours, exact = ours.detach().double(), exact.detach()
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-30))


@needs_kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_walks_like_the_plain_function(kind, size, bias):
    steps, batch, hidden, block, halo, given = size
    plain, kernel = chains(kind, steps, batch, hidden, bias)
    start = torch.randn(blocks_of(steps, block), batch, 1, plain.state_size, device=DEVICE) if given else None
    into = torch.full((steps, batch, hidden), torch.nan, device=DEVICE)
    exact = torch.empty_like(into).double()
    ours = kernel.walk(block, halo, start, into=into)
    theirs = plain.walk(block, halo, None if start is None else start.double(), into=exact)
    assert ours.left.shape == theirs.left.shape
    assert error(ours.arrived, theirs.arrived) < 1e-6
    assert error(ours.left, theirs.left) < 1e-6
    assert error(ours.energy, theirs.energy) < 2e-6
    assert error(kernel.in_time(into), plain.in_time(exact)) < 1e-6
    without = kernel.walk(block, halo, start)
    assert torch.equal(without.left, ours.left)
    if len(ours.left) > 1:
        found, expected = kernel.disagreement(ours)(), plain.disagreement(theirs)()
        assert found.of_solution == pytest.approx(expected.of_solution, rel=1e-3, abs=1e-6)


@needs_kernels
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("walks", [1, 2, 3])
def test_walks_until_right_without_the_host_like_the_plain_function(kind, walks):
    steps, batch, block, halo = 41, 3, 4, 2
    plain, kernel = chains(kind, steps, batch, 5, True)
    found = [plain.disagreement(plain.walk(block, h))().of_solution for h in (halo, 2 * halo + block)]
    assert found[1] < 0.9 * found[0]
    limit = {1: 1.01 * found[0], 2: (found[0] * found[1]) ** 0.5, 3: 0.0}[walks]
    into = torch.full((steps, batch, 5), torch.nan, device=DEVICE)
    exact, worst = torch.empty_like(into).double(), torch.zeros(2, device=DEVICE)
    at = torch.tensor([halo], dtype=torch.int32, device=DEVICE)
    ours = kernel.walk_until_right(block, at, torch.tensor([limit**2], device=DEVICE), into, worst)
    taken = {1: (block, halo), 2: (block, 2 * halo + block), 3: (steps, 0)}[walks]
    theirs = plain.walk(*taken, into=exact)
    assert error(kernel.in_time(into), plain.in_time(exact)) < 1e-6
    assert error(ours.left[0], theirs.left[0]) < 1e-6
    assert worst[: min(walks, 2)].sqrt().tolist() == pytest.approx(found[: min(walks, 2)], rel=1e-3)


@needs_kernels
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_linearises_on_its_way_like_the_plain_function(kind):
    steps, batch, hidden = 23, 2, 5
    plain, kernel = chains(kind, steps, batch, hidden, True)
    kernel.factors = torch.full((steps, batch, cell_of(kind).factors, hidden), torch.nan, device=DEVICE)
    output = torch.empty(steps, batch, hidden, device=DEVICE)
    kernel.walk(4, 23, into=output)
    layer = Layer(plain.x, output.double(), *plain.initial, *plain.weights)
    assert error(kernel.factors, cell_of(kind).linearise(layer)) < 1e-6


@needs_kernels
@pytest.mark.parametrize("kind", CELLS)
def test_values_that_are_not_finite_like_the_plain_function(kind):
    plain, kernel = chains(kind, 9, 2, 5, True)
    plain.from_input[4, 1, 2] = kernel.from_input.view(9, 2, -1)[4, 1, 2] = torch.nan
    into = torch.empty(9, 2, 5, device=DEVICE)
    exact = torch.empty_like(into).double()
    kernel.walk(9, into=into)
    plain.walk(9, into=exact)
    assert torch.equal(into.isfinite(), plain.in_time(exact).isfinite())


@needs_kernels
@pytest.mark.parametrize("kind", CELLS)
def test_a_layer_by_kernels_like_the_plain_one(kind):
    module = built(kind, 6)
    x = torch.randn(80, 2, 3, device=DEVICE)
    twin = built(kind, 6).double()
    twin.load_state_dict(module.state_dict())
    parallelize(module, solver="jacobi_gs", forward=True, block_size=4, tolerance=1e-5)
    module.weight_hh_l0.data *= 0.2
    twin.weight_hh_l0.data *= 0.2
    for _ in range(3):
        output, _ = module(x)
        assert error(output, twin(x.double())[0]) < 1e-5
    output.square().sum().backward()
    twin(x.double())[0].square().sum().backward()
    for ours, exact in zip(module.parameters(), twin.parameters(), strict=True):
        assert error(ours.grad, exact.grad) < 2e-5
    assert records(module)["l0"].forward is not None


@needs_kernels
def test_blocks_fill_whole_rounds_as_the_plain_count_has_it():
    for steps, batch, halo in [(40, 2, 5), (97, 3, 20), (500, 1, 7), (60, 50, 3), (9, 200, 2), (3, 1, 1)]:
        _, chain = chains("rnn_tanh", steps, batch, 4, True)

        def walked(block, chain=chain, halo=halo):  # steps one after another, 24 rows at once
            rounds = -(-blocks_of(chain.length, block) * chain.batch // 24)
            return rounds * (block + halo) if block < chain.length else rounds * block

        fewest, block = chain.fewest_steps(halo, 24)
        assert min(4, steps) <= block <= steps
        assert fewest == walked(block)
        assert walked(block) == min(walked(other) for other in range(min(4, steps), steps + 1))


# -- on a GPU, the whole way ------------------------------------------------------------------------------------------


def everything(module, x):
    leaf = x.clone().requires_grad_()
    output, last = module(leaf)
    last = last if isinstance(last, tuple) else (last,)
    weigh = torch.linspace(-1, 2, output.numel(), device=x.device).view_as(output).to(output)
    loss = (output * weigh).sum() + sum(state.sum() for state in last)
    grads = torch.autograd.grad(loss, [leaf, *module.parameters()])
    return [output.detach(), *(state.detach() for state in last), *grads]


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "steps"), [(128, 600), (33, 517), (256, 400)])
@pytest.mark.parametrize("kind", CELLS)
def test_steps_on_a_gpu(kind, hidden, steps):
    """Again and again, with other inputs, until both passes are captured graphs; results that are kept stay."""
    module = built(kind, hidden)
    parallelize(module, solver="jacobi_gs", forward=True, probe_every=0)
    exact, kept = built(kind, hidden).double(), []
    for seed in range(8):
        x = torch.randn(steps, 4, 3, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        exact.load_state_dict(module.state_dict())
        ours, theirs = everything(module, x), everything(exact, x.double())
        assert max(error(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-5
        kept.append((ours[0], ours[0].clone()))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.98)
    assert all(torch.equal(output, copy) for output, copy in kept)
    record = records(module)["l0"]
    assert record.forward.error <= 1e-6
    controller = module.forward.controllers["l0"]
    assert any(tuned.captured is not None for tuned in controller.ahead._tuned.values())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CELLS)
def test_layers_directions_and_autocast_on_a_gpu(kind):
    module, x = built(kind, 64, num_layers=2, bidirectional=True), torch.randn(400, 4, 3, device="cuda")
    exact = everything(module.double(), x.double())
    parallelize(module.float(), solver="jacobi_gs", forward=True)
    for _ in range(5):
        assert max(error(a, b) for a, b in zip(everything(module, x), exact, strict=True)) < 1e-4
    with torch.autocast("cuda", torch.bfloat16):
        for _ in range(4):
            found = everything(module, x)
    assert found[0].dtype == torch.bfloat16
    assert error(found[0], exact[0]) < 2e-2
    assert all(record.forward is not None for record in records(module).values())
    with torch.no_grad():
        assert error(module.eval()(x)[0], exact[0]) < 1e-5


@pytest.mark.gpu
def test_a_device_that_is_far_behind_is_waited_for():
    """The verdict is that of this pass: what an earlier one left on the host is not taken for it."""
    module, x = built("gru", 64), torch.randn(600, 2, 3, device="cuda")
    parallelize(module, solver="jacobi_gs", forward=True, probe_every=0)
    for _ in range(6):
        everything(module, x)
    with torch.no_grad():
        module.bias_ih_l0[64:128] = 3.0  # remembers
    exact = built("gru", 64).double()
    exact.load_state_dict(module.state_dict())
    expected = everything(exact, x.double())
    torch.cuda._sleep(200_000_000)
    assert max(error(a, b) for a, b in zip(everything(module, x), expected, strict=True)) < 1e-5
