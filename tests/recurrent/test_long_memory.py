"""Networks that remember: every solver meets its tolerance, and what that costs."""

import copy
import math

import pytest
import torch
from recurrent_helpers import build, gradients, largest_error, relative_error
from torch import nn

from lit_parallel.networks.rnn import keep_state
from lit_parallel.recurrent import parallelize, records, restore

SOLVERS = ("jacobi", "jacobi_gs", "two_level", "auto")
LENGTH, HIDDEN = 200, 12


def orthogonal(kind):
    """A recurrence that neither shrinks nor grows: the identity (Le et al., 2015), or tanh in its linear range."""
    module = build(f"rnn_{kind}", 2, HIDDEN)
    if kind == "relu":
        nn.init.eye_(module.weight_hh_l0)
    else:
        nn.init.orthogonal_(module.weight_hh_l0)
    nn.init.normal_(module.weight_ih_l0, std=1e-3)
    nn.init.zeros_(module.bias_ih_l0)
    nn.init.zeros_(module.bias_hh_l0)
    return module


def exploding(cell):
    """Recurrent weights of a spectral radius well above 1."""
    module = build(cell, 2, HIDDEN)
    radius = torch.linalg.eigvals(module.weight_hh_l0[:HIDDEN]).abs().max()
    module.weight_hh_l0.data *= 2 / radius.item()
    return module


def keeping(cell, bias=8.0):
    module = build(cell, 2, HIDDEN)
    keep_state(module, bias)
    return module


def growing_relu():
    """A gradient that grows tenfold in 25 steps."""
    module = orthogonal("relu")
    module.weight_hh_l0.data *= 1.1
    return module


def forgetful_of_nothing_but_gates():
    """An LSTM whose forget gate has a bias of 8 and whose other gates are as they were."""
    module = build("lstm", 2, HIDDEN)
    module.bias_ih_l0.data[HIDDEN : 2 * HIDDEN] = 8.0
    return module


NETWORKS = {
    "identity": lambda: orthogonal("relu"),
    "orthogonal": lambda: orthogonal("tanh"),
    "growing": growing_relu,
    "exploding tanh": lambda: exploding("rnn_tanh"),
    "exploding gru": lambda: exploding("gru"),
    "exploding lstm": lambda: exploding("lstm"),
    "keeping lstm": lambda: keeping("lstm"),
    "keeping gru": lambda: keeping("gru"),
    "forget gate 8": forgetful_of_nothing_but_gates,
}


def first_of_many(batch: int, length: int = 50):
    """Inputs of which the first one counts, and is marked."""
    x = torch.rand(length, batch, 2) - 0.5
    x[:, :, 1] = 0
    x[0, :, 1] = 1
    return x


@pytest.fixture(scope="module", params=["gru", "lstm"])
def trained(request):
    """A network that has learnt to answer with the first of 50 inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, read = build(request.param, 2, HIDDEN), nn.Linear(HIDDEN, 1)
        keep_state(module, 4.0)
        optimizer = torch.optim.Adam([*module.parameters(), *read.parameters()], lr=3e-2)
        for _ in range(150):
            x = first_of_many(32)
            loss = (read(module(x)[0][-1])[:, 0] - x[0, :, 0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    assert loss.item() < 0.01  # knowing nothing: 0.083
    return module


def check(module, solver, x, of=("output", "h_n", "c_n"), **options):
    """Gradients in float64 to 1e-10, in float32 as good as autograd's to 1e-6, twice."""
    exact_module, exact_x = copy.deepcopy(module).double(), x.double()
    exact = gradients(exact_module, exact_x, of=of)
    autograds = gradients(module, x, of=of)
    for model, given, allowed in (
        (exact_module, exact_x, 1e-10),
        (copy.deepcopy(module), x, 1e-6 + 3 * largest_error(autograds, exact)),
    ):
        parallelize(model, solver=solver, probe_every=0, **options)
        for _ in range(2):
            ours = gradients(model, given, of=of)
            assert largest_error(ours, exact) <= allowed, records(model)
    return records(exact_module).get("l0")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_solver_meets_its_tolerance(name, solver):
    check(NETWORKS[name](), solver, torch.randn(LENGTH, 2, 2))


@pytest.mark.parametrize("of", [("output",), ("h_n", "c_n")])
@pytest.mark.parametrize("solver", SOLVERS)
def test_trained_weights(trained, solver, of):
    check(trained, solver, first_of_many(2, LENGTH), of)


@pytest.mark.parametrize("solver", ["jacobi_gs", "two_level"])
def test_five_hundred_steps(solver):
    check(forgetful_of_nothing_but_gates(), solver, torch.randn(503, 1, 2))


def test_the_trained_network_remembers(trained):
    x = first_of_many(4).requires_grad_()
    (grad,) = torch.autograd.grad(trained(x)[0][-1].sum(), x)
    sizes = grad.norm(dim=(1, 2))
    assert sizes[0] == sizes.max()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_two_levels_need_fewer_sweeps_than_there_are_blocks(cell):
    block = 10
    record = check(keeping(cell), "two_level", torch.randn(LENGTH, 2, 2), block_size=block, rank=HIDDEN)
    assert record.solver == "two_level"
    assert record.sweeps < LENGTH / block / 2
    assert record.error <= 1e-10


def test_two_levels_need_few_sweeps_for_trained_weights(trained):
    record = check(trained, "two_level", first_of_many(2, LENGTH), block_size=10, rank=HIDDEN)
    assert record.solver == "two_level"
    assert record.sweeps <= 5  # of 20 blocks


def test_a_halo_alone_truncates_what_the_network_remembers():
    """What the checks are for: unchecked, the same halo is off by a large part of the gradient."""
    module, x = orthogonal("tanh"), torch.randn(LENGTH, 2, 2)
    exact = gradients(module, x)
    parallelize(module, solver="jacobi_gs", block_size=8, iterations=40, probe_every=0)
    truncated = gradients(module, x)
    assert relative_error(truncated["weight_hh_l0"], exact["weight_hh_l0"]) > 0.3
    assert math.isnan(records(module)["l0"].residual)
    restore(module)
    parallelize(module, solver="jacobi_gs", block_size=8, probe_every=0)
    assert relative_error(gradients(module, x)["weight_hh_l0"], exact["weight_hh_l0"]) < 1e-5
    assert records(module)["l0"].iterations >= LENGTH


@pytest.mark.parametrize("passes", [1, 5])
def test_one_unit_that_remembers_among_many_that_forget_is_not_overlooked(passes):
    # What is forgotten at once makes vectors shrink, and hides in their norm that one direction stays.
    torch.manual_seed(0)
    module, hidden, length = nn.RNN(4, 16), 16, 4000
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_hh_l0[1:, 1:] = 0.3 * torch.linalg.qr(torch.randn(hidden - 1, hidden - 1))[0]
        module.weight_hh_l0[0, 0] = 1.0
        module.weight_ih_l0[0] = module.bias_ih_l0[0] = module.bias_hh_l0[0] = 0.0
    module.double()
    x, g = torch.randn(length, 1, 4).double(), torch.randn(length, 1, hidden).double()
    g[:, :, 0] = 1e-11  # far below the rest: it is by remembering that it comes to matter
    leaf = x.requires_grad_()

    def found():
        output, _ = module(leaf)
        return torch.autograd.grad(output, [leaf, *module.parameters()], g)

    expected = found()
    parallelize(module, solver="jacobi_gs", probe_every=0)
    for _ in range(passes):
        ours = found()
    distance = sum(float((a - b).square().sum()) for a, b in zip(ours, expected, strict=True))
    assert (distance / sum(float(b.square().sum()) for b in expected)) ** 0.5 < 1e-10
