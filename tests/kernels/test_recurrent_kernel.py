"""The kernels of the recurrent adjoint against the plain functions: in Triton's interpreter, and on a GPU."""

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
from lit_parallel.recurrent.chain import CellChain, blocks_of
from lit_parallel.recurrent.coarse import doubling
from lit_parallel.recurrent.layers import kernels_support

TESTS = Path(__file__).parent.parent
CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
MODULES = {"rnn_tanh": torch.nn.RNN, "rnn_relu": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
ON_A_GPU = torch.cuda.is_available() and not interpreted()
DEVICE = "cuda" if ON_A_GPU else "cpu"

#: (steps, batch, hidden units, block, halo, columns with a start of their own; 0: from the end of the chain)
SIZES = (
    [(64, 4, 128, 16, 32, 0), (513, 3, 100, 16, 0, 5), (300, 2, 33, 7, 40, 0), (1, 1, 128, 4, 0, 0)]
    if ON_A_GPU
    else [(11, 2, 5, 4, 3, 0), (9, 1, 20, 3, 0, 2), (7, 3, 33, 2, 9, 0), (5, 1, 5, 8, 0, 1), (1, 1, 5, 2, 1, 0)]
)

needs_kernels = pytest.mark.skipif(not (ON_A_GPU or interpreted()), reason="run by the test above, or on a GPU")


def test_the_kernels_interpreted():
    # TRITON_INTERPRET counts only before triton is imported, hence another process.
    command = [sys.executable, "-m", "pytest", "-x", "-W", "ignore::RuntimeWarning", "-k", "plain", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


def layer_after_forward(kind: str, steps: int, batch: int, hidden: int) -> Layer:
    """A layer that has run forward in float64."""
    options = {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}
    module = MODULES[kind](3, hidden, **options).double()
    x, h_0, c_0 = (torch.randn(*shape).double() for shape in ((steps, batch, 3), (batch, hidden), (batch, hidden)))
    with torch.no_grad():
        output, _ = module(x, (h_0[None], c_0[None]) if kind == "lstm" else h_0[None])
    weights = [weight.detach() for weight in module.parameters()]
    layer = Layer(x, output, h_0, c_0 if kind == "lstm" else None, *weights)
    values = {name: value if value is None else value.to(DEVICE) for name, value in vars(layer).items()}
    return Layer(**values)


def chains(kind: str, steps: int, batch: int, hidden: int):
    """The plain chain in float64, and the kernels' in float32."""
    from lit_parallel.kernels import recurrent as kernels

    layer, cell = layer_after_forward(kind, steps, batch, hidden), cell_of(kind)
    source = torch.randn(steps, batch, hidden, device=DEVICE)
    last = torch.randn(batch, cell.states * hidden, device=DEVICE)
    plain = CellChain(cell, cell.linearise(layer), layer.weight_hh, source.double(), last.double())
    single = layer.to(torch.float32)
    assert kernels_support(kind, single)
    factors = kernels.linearise(kind, single)
    return plain, kernels.KernelChain(kind, factors, single.weight_hh, source, last)


def error(ours, exact) -> float:
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@needs_kernels
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_walks_like_the_plain_function(kind, size):
    steps, batch, hidden, block, halo, columns = size
    plain, kernel = chains(kind, steps, batch, hidden)
    start = None
    if columns:
        start = torch.randn(blocks_of(steps, block), batch, columns, plain.state_size, device=DEVICE)
    for source in (True, False):
        into = torch.full((steps, batch, plain.gradient_size), torch.nan, device=DEVICE)
        exact = torch.empty_like(into).double()
        ours = kernel.walk(block, halo, start, source=source, into=into if columns < 2 else None)
        theirs = plain.walk(block, halo, None if start is None else start.double(), source=source, into=exact)
        allowed = 2e-3 if columns > 1 else 1e-6  # columns of a coarse space are multiplied in less precision
        assert ours.left.shape == theirs.left.shape
        assert error(ours.arrived, theirs.arrived) < allowed
        assert error(ours.left, theirs.left) < allowed
        assert error(ours.energy, theirs.energy) < 2 * allowed
        if columns < 2:
            assert error(into, exact) < allowed
        if columns < 2 and source and len(ours.left) > 1:
            found, expected = kernel.disagreement(ours)(), plain.disagreement(theirs)()
            assert found.of_solution == pytest.approx(expected.of_solution, rel=1e-3, abs=1e-6)
            assert found.of_border == pytest.approx(expected.of_border, rel=1e-3, abs=1e-6)


@needs_kernels
@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("launch", [(16, 8, 16, 2, 0), (16, 4, 64, 2, 0), (16, 8, 128, 2, 1)], ids=str)
def test_parts_that_are_summed_side_by_side_like_the_plain_function(kind, launch, monkeypatch):
    from lit_parallel.kernels import recurrent as kernels

    plain, kernel = chains(kind, 9, 2, 33)
    launch = kernels.Launch(*launch[:4], launch[4] or kernel.gates)
    monkeypatch.setattr(kernels, "_LAUNCHES", {kind: ((launch, 1.0), (launch, 1.0))})
    into = torch.full((9, 2, plain.gradient_size), torch.nan, device=DEVICE)
    exact = torch.empty_like(into).double()
    ours, theirs = kernel.walk(4, 3, into=into), plain.walk(4, 3, into=exact)
    assert error(into, exact) < 1e-6
    assert error(ours.left, theirs.left) < 1e-6


@needs_kernels
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("walks", [1, 2, 3])
def test_walks_until_right_without_the_host_like_the_plain_function(kind, walks):
    steps, batch, block, halo = 41, 3, 4, 2
    plain, kernel = chains(kind, steps, batch, 5)
    found = [plain.disagreement(plain.walk(block, h))().of_solution for h in (halo, 2 * halo + block)]
    assert found[1] < 0.5 * found[0]
    limit = {1: 1.01 * found[0], 2: (found[0] * found[1]) ** 0.5, 3: 0.0}[walks]
    into = torch.full((steps, batch, plain.gradient_size), torch.nan, device=DEVICE)
    exact, worst = torch.empty_like(into).double(), torch.zeros(2, device=DEVICE)
    at = torch.tensor([halo], dtype=torch.int32, device=DEVICE)
    ours = kernel.walk_until_right(block, at, torch.tensor([limit**2], device=DEVICE), into, worst)
    taken = {1: (block, halo), 2: (block, 2 * halo + block), 3: (steps, 0)}[walks]
    theirs = plain.walk(*taken, into=exact)
    assert error(into, exact) < 1e-6
    assert error(ours.left[0], theirs.left[0]) < 1e-6
    assert worst[0].sqrt().item() == pytest.approx(found[0], rel=1e-3)
    if walks > 1:
        assert worst[1].sqrt().item() == pytest.approx(found[1], rel=1e-3)


@needs_kernels
@pytest.mark.parametrize("kind", CELLS)
def test_what_squares_do_not_tell_is_walked_as_one_block(kind):
    for change in (lambda x: x.mul_(1e-25), lambda x: x.fill_(torch.nan), lambda x: x.zero_()):
        plain, kernel = chains(kind, 30, 2, 5)
        for chain in (plain, kernel):
            for x in (chain.source[:, 1], chain.last[1]):
                change(x)
        into = torch.full((30, 2, plain.gradient_size), 7.0, device=DEVICE)
        exact, worst = torch.empty_like(into).double(), torch.zeros(2, device=DEVICE)
        at = torch.tensor([1], dtype=torch.int32, device=DEVICE)
        kernel.walk_until_right(4, at, torch.tensor([1e10], device=DEVICE), into, worst)
        one_block = bool(worst.isinf().all())
        assert one_block == bool((plain.source[:, 1] != 0).any())
        plain.walk(30 if one_block else 4, 0 if one_block else 1, into=exact)
        assert torch.equal(into.isnan(), exact.isnan())
        assert error(into[:, 0], exact[:, 0]) < 1e-6
        if not exact.isnan().any():
            assert error(into[:, 1], exact[:, 1]) < 1e-6


@needs_kernels
@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linearises_like_the_plain_function(kind, size):
    from lit_parallel.kernels import recurrent as kernels

    steps, batch, hidden, *_ = size
    layer = layer_after_forward(kind, steps, batch, hidden)
    exact = cell_of(kind).linearise(layer)
    ours = kernels.linearise(kind, layer.to(torch.float32))
    assert ours.shape == exact.shape
    assert float((ours - exact).abs().max()) < 3e-6 * float(exact.abs().max())


@needs_kernels
def test_an_lstms_scan_in_pieces_is_that_of_the_plain_function():
    from lit_parallel.kernels import recurrent as kernels

    layer = layer_after_forward("lstm", 150, 1, 5)  # more steps than one piece
    layer.bias_ih[5:10] = 4.0  # remembers across them
    exact = cell_of("lstm").linearise(layer)
    assert error(kernels.linearise("lstm", layer.to(torch.float32)), exact) < 1e-6


@needs_kernels
@pytest.mark.parametrize(("number", "batch", "rank"), [(1, 1, 3), (2, 2, 5), (9, 1, 16), (13, 3, 20)])
def test_suffix_sums_like_the_plain_function(number, batch, rank):
    from lit_parallel.kernels.suffix_sums import suffix_sums

    maps = 0.5 * torch.randn(number, batch, rank, rank, device=DEVICE) / rank**0.5
    terms = torch.randn(number, batch, rank, device=DEVICE)
    assert error(suffix_sums(maps, terms), doubling(maps.double(), terms.double())) < 1e-6


@needs_kernels
@pytest.mark.parametrize("kind", CELLS)
def test_values_that_are_not_finite_like_the_plain_function(kind):
    plain, kernel = chains(kind, 9, 2, 5)
    for chain in (plain, kernel):
        chain.source[4, 1, 2] = torch.inf
    into = torch.empty(9, 2, plain.gradient_size, device=DEVICE)
    exact = torch.empty_like(into).double()
    ours, theirs = kernel.walk(9, into=into), plain.walk(9, into=exact)
    assert torch.equal(into.isfinite(), exact.isfinite())
    assert torch.equal(ours.left.isfinite(), theirs.left.isfinite())


# -- on a GPU, the whole way ------------------------------------------------------------------------------------------


def gradients(module, x):
    leaf = x.clone().requires_grad_()
    output, _ = module(leaf)
    weigh = torch.linspace(-1, 2, output.numel(), device=x.device).view_as(output).to(output)
    return torch.autograd.grad((output * weigh).sum(), [leaf, *module.parameters()])


def built(kind: str, input_size: int, hidden: int, **options):
    options |= {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}
    return MODULES[kind](input_size, hidden, **options).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["jacobi", "jacobi_gs", "two_level"])
@pytest.mark.parametrize(("hidden", "steps"), [(128, 300), (33, 517), (160, 100)])
@pytest.mark.parametrize("kind", CELLS)
def test_gradients_on_a_gpu(kind, hidden, steps, solver):
    module = built(kind, 3, hidden)
    x = torch.randn(steps, 4, 3, device="cuda")
    torch.backends.cudnn.allow_tf32 = False
    exact = [grad.double() for grad in gradients(module.double(), x.double())]
    parallelize(module.float(), solver=solver, probe_every=0)
    for _ in range(5):
        ours = gradients(module, x)
        assert max(error(a, b) for a, b in zip(ours, exact, strict=True)) < 3e-6
    assert records(module)["l0"].error <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CELLS)
def test_two_layers_in_two_directions_on_a_gpu(kind):
    """Also: cuDNN does not warn of weights that do not lie in one piece (warnings are errors)."""
    module = built(kind, 3, 64, num_layers=2, bidirectional=True)
    x = torch.randn(100, 4, 3, device="cuda")
    exact = [grad.double() for grad in gradients(module.double(), x.double())]
    parallelize(module.float(), solver="jacobi_gs")
    for _ in range(5):
        ours = gradients(module, x)
        assert max(error(a, b) for a, b in zip(ours, exact, strict=True)) < 1e-4
    assert len(records(module)) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CELLS)
def test_float64_on_a_gpu(kind):
    module = built(kind, 3, 20).double()
    x = torch.randn(100, 4, 3, device="cuda", dtype=torch.float64)
    exact = gradients(module, x)
    parallelize(module, solver="jacobi_gs")
    assert max(error(a, b) for a, b in zip(gradients(module, x), exact, strict=True)) < 1e-10


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CELLS)
def test_autocast_on_a_gpu(kind):
    module, x = built(kind, 3, 64), torch.randn(100, 4, 3, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        expected_output, _ = module(x)
        exact = gradients(module, x)
    parallelize(module, solver="jacobi_gs")
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16):
            output, _ = module(x)
            ours = gradients(module, x)
        assert output.dtype == expected_output.dtype
        assert max(error(a, b) for a, b in zip(ours, exact, strict=True)) < 3e-2
