"""Forward passes that are parallel in time: PyTorch's own results, whatever the layer, or PyTorch's own way."""

import itertools
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_helpers import CELLS, build, covering, gradients, largest_error, outputs_of, relative_error, states_of
from torch import nn

from lit_parallel.errors import UserError
from lit_parallel.networks.rnn import Recurrence, SoftplusCell, keep_state
from lit_parallel.recurrent import forward_controller, parallelize, records, restore
from lit_parallel.recurrent.forward_pass import ForwardPass, StateChain, build_state_chain, measure_state_gain
from lit_parallel.recurrent.solve import Plan, solve_chain


def task_of(module, x, states) -> ForwardPass:
    first = [state[0] for state in states]
    return ForwardPass(
        f"rnn_{module.nonlinearity}" if isinstance(module, nn.RNN) else module.mode.lower(),
        x,
        first[0],
        first[1] if len(first) > 1 else None,
        [weight.detach() for weight in module.parameters()],
    )


def solved(task, block, halo=0, tolerance=1e-10, sweeps=None):
    """What a forward pass gives by name, and how it was solved."""
    seen = []

    def solve(chain, into, meanwhile):
        chain.leaves_the_rest = False  # for once in one block as well
        plan = Plan(block, halo, 0, tolerance, sweeps)
        seen.append(solve_chain(chain, plan, measure_state_gain(chain, plan), into))
        return seen[0].initial

    output, h, c, _ = task.solved(solve)
    found = {"output": output, "h_n": h[None]} | ({} if c is None else {"c_n": c[None]})
    return found, seen[0]


@given(
    cell=st.sampled_from(CELLS),
    length=st.integers(1, 60),
    batch=st.integers(1, 3),
    hidden=st.integers(1, 7),
    block=st.integers(1, 65),
    halo=st.integers(0, 30),
    scale=st.sampled_from([0.3, 1.0, 3.0]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_states_of_any_shape_are_pytorchs(cell, length, batch, hidden, block, halo, scale):
    torch.manual_seed(length)
    module = build(cell, 2, hidden).double()
    module.weight_hh_l0.data *= scale
    x, states = torch.randn(length, batch, 2).double(), states_of(module, batch)
    with torch.no_grad():
        expected = outputs_of(module, x, states)
    found, outcome = solved(task_of(module, x, states), min(block, length), halo)
    assert outcome.sweeps <= -(-length // min(block, length)) + 1
    assert largest_error(found, expected) < 1e-9


@pytest.mark.parametrize("cell", CELLS)
def test_the_estimate_is_above_the_error(cell):
    module = build(cell, 3, 8).double()
    x, states = torch.randn(200, 2, 3).double(), states_of(module, 2)
    with torch.no_grad():
        expected = outputs_of(module, x, states)
    for halo in (0, 3, 10, 30):
        found, outcome = solved(task_of(module, x, states), 10, halo, tolerance=math.inf)
        error = relative_error(found["output"], expected["output"])
        assert outcome.sweeps == 1
        assert error < outcome.error < 100 * error + 1e-15
        found, outcome = solved(task_of(module, x, states), 10, halo, tolerance=1e-5)
        assert relative_error(found["output"], expected["output"]) < outcome.error <= 1e-5


def test_chaotic_states_are_exact_after_as_many_sweeps_as_blocks():
    """Each sweep makes one block more exact, and nothing before."""
    module = build("rnn_tanh", 3, 24).double()
    module.weight_hh_l0.data *= 5
    x, states = torch.randn(200, 1, 3).double(), states_of(module, 1)
    with torch.no_grad():
        expected = outputs_of(module, x, states)
    found, outcome = solved(task_of(module, x, states), 20)
    assert 9 <= outcome.sweeps <= 11
    assert largest_error(found, expected) < 1e-10
    _, outcome = solved(task_of(module, x, states), 20, sweeps=3)
    assert outcome.sequential


CASES = list(
    covering(
        {
            "cell": CELLS,
            "solver": ("jacobi", "jacobi_gs", "two_level"),
            "layers": (1, 2),
            "bidirectional": (False, True),
            "batch_first": (False, True),
            "bias": (False, True),
            "length": (1, 2, 23, 260),
            "batch": (None, 1, 3),
            "given": (False, True),
        }
    )
)


def build_case(cell, solver, layers, bidirectional, batch_first, bias, length, batch, given):
    module = build(cell, 3, 6, layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias).double()
    shape = [length, 3] if batch is None else [batch, length, 3] if batch_first else [length, batch, 3]
    return module, torch.randn(shape).double(), states_of(module, batch) if given else ()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_all_variants(case):
    module, x, states = build_case(**case)
    expected, of_expected = outputs_of(module, x, states), gradients(module, x, states)
    parallelize(module, solver=case["solver"], forward=True, probe_every=0)
    for _ in range(3):
        found = outputs_of(module, x, states)
        assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
        assert largest_error(found, expected) < 1e-9
        assert largest_error(gradients(module, x, states), of_expected) < 1e-8
    with torch.no_grad():
        assert largest_error(outputs_of(module.eval(), x, states), expected) < 1e-9
    if case["length"] == 260:
        assert any(record.forward is not None for record in records(module).values())


@pytest.mark.parametrize("cell", CELLS)
def test_float32_is_as_good_as_pytorchs(cell):
    module = build(cell, 3, 24)
    x, states = torch.randn(700, 2, 3), states_of(module, 2)
    autograds = outputs_of(module, x, states) | gradients(module, x, states)
    module, x, states = module.double(), x.double(), tuple(state.double() for state in states)
    exact = outputs_of(module, x, states) | gradients(module, x, states)
    module, x, states = module.float(), x.float(), tuple(state.float() for state in states)
    parallelize(module, solver="jacobi_gs", forward=True)
    for _ in range(5):
        ours = outputs_of(module, x, states) | gradients(module, x, states)
        assert largest_error(ours, exact) < 1e-6 + 3 * largest_error(autograds, exact)
    record = records(module)["l0"].forward
    assert record.sweeps == 1
    assert record.error <= 1e-6
    assert record.iterations == record.block + record.halo < 150


def test_a_halo_follows_what_the_network_remembers():
    module, x = build("gru", 3, 8).double(), torch.randn(400, 2, 3).double()
    keep_state(module, -2.0)
    twin = nn.GRU(3, 8).double()
    parallelize(module, solver="jacobi_gs", forward=True, block_size=8)
    halos = []
    for bias in (-2.0, 1.0):
        keep_state(module, bias)
        twin.load_state_dict(module.state_dict())
        for _ in range(25):
            assert largest_error(outputs_of(module, x), outputs_of(twin, x)) < 1e-9
        gradients(module, x)
        halos.append(records(module)["l0"].forward.halo)
    assert halos[1] > 2 * halos[0]


def test_long_memory_takes_the_ordinary_way_and_says_so(caplog):
    module, x = build("gru", 3, 8).double(), torch.randn(300, 2, 3).double()
    keep_state(module, 6.0)
    expected = outputs_of(module, x)
    parallelize(module, solver="jacobi_gs", forward=True)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert largest_error(outputs_of(module, x), expected) == 0
    assert [entry.message.partition(": ")[2][:40] for entry in caplog.records] == [
        "ordinary forward pass: after a step 0.99"
    ]
    gradients(module, x)
    assert records(module)["l0"].forward is None


def test_memory_that_has_become_long_is_given_up(caplog):
    module, x = build("gru", 3, 8).double(), torch.randn(300, 2, 3).double()
    keep_state(module, -2.0)
    parallelize(module, forward=True, probe_every=0)
    controller = module.forward.controllers["l0"].ahead
    with pytest.MonkeyPatch.context() as patch:
        timed(patch, ordinary=1.0, parallel=0.1)
        outputs_of(module, x)
        with torch.no_grad():
            outputs_of(module, x)
        assert controller.newest is not None
        keep_state(module, 6.0)
        twin = nn.GRU(3, 8).double()
        twin.load_state_dict(module.state_dict())
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                assert largest_error(outputs_of(module, x), outputs_of(twin, x)) < 1e-9
    assert controller.newest is None
    assert sum("ordinary forward pass" in entry.message for entry in caplog.records) == 1


def timed(monkeypatch, ordinary: float, parallel: float) -> dict[str, float]:
    """Let forward passes take given times."""
    times = {"ordinary": ordinary, "parallel": parallel}

    def pretended(run, device):
        run()
        return times["ordinary" if getattr(run, "__name__", "") == "ordinary" else "parallel"]

    for name in ("median_seconds_of", "seconds_of"):
        monkeypatch.setattr(forward_controller, name, pretended)
    return times


def test_auto_takes_what_is_faster_and_looks_again(monkeypatch, caplog):
    times = timed(monkeypatch, ordinary=1.0, parallel=2.0)
    module, x = build("lstm", 3, 8), torch.randn(200, 2, 3)
    parallelize(module, forward=True, probe_every=10)
    controller = module.forward.controllers["l0"].ahead
    seen = []
    with caplog.at_level(logging.INFO, "lit_parallel.recurrent.forward_controller"), torch.no_grad():
        for i in range(24):
            module(x)
            seen.append(controller.newest is not None)
            if i == 14:
                times["parallel"] = 0.5
    assert seen == [False] * 20 + [True] * 4
    assert [entry.message for entry in caplog.records] == [
        "l0: ordinary forward pass: it is as fast or faster (2000.00 ms against 1000.00 ms).",
        "l0: parallel forward pass: 500.00 ms against 1000.00 ms.",
    ]


def test_the_whole_step_decides(monkeypatch):
    """A forward pass that is parallel counts with its time."""
    timed(monkeypatch, ordinary=10.0, parallel=1.0)
    module, x = build("rnn_tanh", 3, 8), torch.randn(200, 2, 3)
    parallelize(module, forward=True)
    gradients(module, x)
    controller = module.forward.controllers["l0"]
    assert 1.0 < next(iter(controller._tuned.values())).parallel_seconds < 2.0


def test_values_that_are_not_finite_are_where_pytorch_has_them():
    module, x = build("lstm", 3, 6), torch.randn(100, 2, 3)
    parallelize(module, solver="jacobi_gs", forward=True)
    twin = nn.LSTM(3, 6)
    twin.load_state_dict(module.state_dict())
    for bad in (None, 40, None):
        given = x.clone()
        if bad is not None:
            given[bad, 1] = math.nan
        for ours, theirs in zip(outputs_of(module, given).values(), outputs_of(twin, given).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
    gradients(module, x)
    assert records(module)["l0"].forward is not None  # one bad batch is no reason to give up


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell):
    module, x = build(cell, 3, 8, 2), torch.randn(200, 2, 3)

    def found():
        with torch.autocast("cpu", torch.bfloat16):
            return outputs_of(module, x)

    expected = found()
    parallelize(module, solver="jacobi_gs", forward=True)
    ours = found()
    assert [value.dtype for value in ours.values()] == [value.dtype for value in expected.values()]
    assert largest_error(ours, expected) < 2e-2
    ours["output"].float().sum().backward()
    assert records(module)["l1"].forward is not None


def test_a_compiled_module():
    torch._dynamo.reset()
    module, x = build("gru", 3, 5, 2).double(), torch.randn(260, 2, 3).double()
    expected = gradients(module, x)
    parallelize(module, solver="jacobi_gs", forward=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        restore(module)
        parallelize(module, solver="jacobi_gs", forward=True)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        output, last = compiled(x)
        generator = torch.Generator().manual_seed(5)
        loss = sum((y * torch.randn(y.shape, generator=generator).double()).sum() for y in (output, last))
        assert loss.isfinite()
        loss.backward()
    torch._dynamo.reset()
    assert records(module)["l1"].forward.sweeps >= 1
    assert module.weight_hh_l0.grad.shape == expected["weight_hh_l0"].shape


def test_gradients_accumulate_and_initial_states_learn():
    module = build("lstm", 3, 6).double()
    h, c = (torch.zeros(1, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    twin_states = tuple(state.detach().clone().requires_grad_() for state in (h, c))
    x = torch.randn(120, 2, 3).double()
    (module(x, twin_states)[0].square().sum()).backward()
    expected = [state.grad for state in twin_states]
    parallelize(module, solver="jacobi_gs", forward=True)
    for _ in range(2):
        (module(x, (h, c))[0].square().sum()).backward()
    for state, theirs in zip((h, c), expected, strict=True):
        assert relative_error(state.grad, 2 * theirs) < 1e-9


def test_without_the_option_forward_passes_are_pytorchs_own(monkeypatch):
    monkeypatch.setattr(forward_controller.ForwardController, "_in_parallel", lambda *_: pytest.fail("parallel"))
    module, x = build("gru", 3, 6), torch.randn(50, 2, 3)
    parallelize(module, solver="jacobi_gs")
    gradients(module, x)
    assert records(module)["l0"].forward is None


def test_what_cannot_be():
    with pytest.raises(UserError, match="solver=sequential is the ordinary way: leave forward=true out") as caught:
        parallelize(nn.GRU(2, 3), solver="sequential", forward=True)
    assert "\n" not in str(caught.value)
    module = nn.ModuleDict({"own": Recurrence(SoftplusCell(3, 4), 4)})
    with pytest.warns(UserWarning, match="'own' has a cell of its own and keeps its forward pass"):
        assert parallelize(module, forward=True) == ["own"]


def test_results_that_were_returned_stay_as_they_are():
    module = build("gru", 3, 6)
    parallelize(module, solver="jacobi_gs", forward=True)
    with torch.no_grad():
        results = [module(torch.randn(90, 2, 3)) for _ in range(6)]
        copies = [(output.clone(), last.clone()) for output, last in results]
        module(torch.randn(90, 2, 3))
    for found, copy in zip(itertools.chain(*results), itertools.chain(*copies), strict=True):
        assert torch.equal(found, copy)


def test_a_chain_of_states_is_numbered_from_the_end():
    module, x = build("gru", 3, 4), torch.randn(9, 2, 3)
    task = task_of(module, x, states_of(module, 2))
    chain = build_state_chain(task.kind, task.layer)
    assert isinstance(chain, StateChain)
    into = torch.empty(9, 2, 4)
    walk = chain.walk(3, 2, into=into)
    assert walk.left.shape == (3, 2, 1, 4)
    assert torch.equal(chain.in_time(into)[-1], walk.left[0, :, 0])


def test_what_the_kernel_cannot_hold_is_not_left_to_it(monkeypatch):
    pytest.importorskip("triton")
    from lit_parallel.recurrent import forward_pass, layers

    for module in (layers, forward_pass):
        monkeypatch.setattr(module, "triton_runs_on", lambda device: True)
    for hidden, holds in ((200, True), (300, False)):  # 1,200 rows of four gates are too many
        weights = [parameter.detach() for parameter in nn.LSTM(3, hidden).parameters()]
        states = torch.zeros(2, hidden), torch.zeros(2, hidden)
        task = forward_pass.ForwardPass("lstm", torch.zeros(5, 2, 3), *states, weights, linearised=True)
        assert task.by_kernels() is holds
        assert (task.factors is not None) == holds
