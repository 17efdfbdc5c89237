"""What a layer learns from step to step, what it says, and what its record holds."""

import itertools
import logging
import math

import pytest
import torch
from recurrent_helpers import build, gradients, largest_error
from torch import nn

from lit_parallel.errors import UserError
from lit_parallel.networks.rnn import Recurrence, SoftplusCell, keep_state
from lit_parallel.recurrent import BackwardRecord, controller, parallelize, records, swap
from lit_parallel.recurrent.tuning import forgetting_steps

LENGTH = 150


def prepared(cell="gru", hidden=8, **options):
    module = build(cell, 3, hidden).double()
    parallelize(module, **{"probe_every": 0} | options)
    return module, torch.randn(LENGTH, 2, 3, dtype=torch.float64)


def run(module, x, times=1) -> BackwardRecord:
    for _ in range(times):
        gradients(module, x)
    return records(module)["l0"]


def forget(module, scale=0.05):
    """Make a network that forgets fast."""
    with torch.no_grad():
        module.weight_hh_l0.mul_(scale)
        module.bias_ih_l0.fill_(-2.0)


def test_a_halo_follows_what_the_network_remembers():
    module, x = prepared(solver="jacobi_gs", block_size=8)
    forget(module)
    first = run(module, x)
    short = run(module, x, 30)
    assert short.sweeps == 1
    assert 0 < short.halo <= first.halo
    assert short.halo < 30
    assert short.error <= 1e-10
    with torch.no_grad():
        module.bias_ih_l0[8:16] = 1.0  # the update gate
    at_once = run(module, x)
    assert at_once.error <= 1e-10
    assert at_once.sweeps > 1  # the halo was too short, and was not trusted
    long = run(module, x, 10)
    assert long.halo > 2 * short.halo
    assert long.sweeps <= 2
    forget(module, scale=1)
    assert run(module, x, 60).halo < long.halo / 2


def test_what_a_network_remembers_may_change_between_two_steps():
    """Gradients are right also while what was learnt is out of date."""
    module, x = prepared(solver="jacobi_gs", block_size=8)
    forget(module)
    run(module, x, 3)
    for bias in (1.0, 3.0, 6.0):
        with torch.no_grad():
            module.bias_ih_l0[8:16] = bias
        twin = nn.GRU(3, 8).double()
        twin.load_state_dict(module.state_dict())
        assert largest_error(gradients(module, x), gradients(twin, x)) < 1e-10


@pytest.mark.parametrize("solver", ["jacobi", "jacobi_gs"])
def test_a_fixed_number_of_iterations_is_not_checked(solver):
    module, x = prepared(solver=solver, iterations=12)
    for _ in range(3):
        record = run(module, x)
        assert record.solver == solver
        assert (record.iterations, record.sweeps, record.length) == (12, 1, LENGTH)
        assert record.block + record.halo == 12
        assert math.isnan(record.residual)
        assert math.isnan(record.error)


@pytest.mark.parametrize("solver", ["jacobi", "jacobi_gs", "two_level"])
def test_a_record_has_the_numbers_of_a_pass(solver):
    module, x = prepared(solver=solver, probe_every=1)
    record = run(module, x, 2)
    assert record.solver == solver
    assert record.length == LENGTH
    assert record.sweeps >= 1
    assert record.iterations >= record.block + record.halo
    assert (record.block == 1) == (solver == "jacobi")
    assert (record.rank > 0) == (solver == "two_level")
    assert 0 <= record.residual < 1
    assert 0 <= record.error <= 1e-10
    assert record.forward_ms > 0
    assert record.backward_ms > 0
    assert record.probe_error < 1e-10
    assert record.probe_speedup > 0
    assert record.step_speedup > 0


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_a_tolerance_is_the_users(tolerance):
    module, x = prepared(solver="jacobi_gs", tolerance=tolerance)
    forget(module)
    exact = nn.GRU(3, 8).double()
    exact.load_state_dict(module.state_dict())
    error = largest_error(gradients(module, x), gradients(exact, x))
    assert error < 3 * tolerance
    assert records(module)["l0"].error <= tolerance
    assert run(module, x, 20).halo < 40


def test_probes_come_every_so_many_steps(monkeypatch):
    seen = []
    compare = controller.Controller._compare
    monkeypatch.setattr(
        controller.Controller, "_compare", lambda self, *arguments: seen.append(self) or compare(self, *arguments)
    )
    module, x = prepared(solver="jacobi_gs", probe_every=4)
    found = [len(seen) for _ in range(9) if run(module, x)]
    assert [after - before for before, after in itertools.pairwise(found)] == [0, 0, 1, 0, 0, 0, 1, 0]


def test_a_probe_sees_what_truncation_misses():
    module, x = prepared(solver="jacobi", iterations=2, probe_every=1)
    keep_state(module, 4.0)
    assert run(module, x, 2).probe_error > 0.1


def test_auto_chooses_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(swap._ParallelForward, "_take_ordinary", lambda self, *_: False)
    module, x = prepared(solver="auto")
    with caplog.at_level(logging.INFO):
        record = run(module, x, 3)
    chosen = [entry for entry in caplog.records if entry.levelno == logging.INFO]
    assert len(chosen) == 1
    assert chosen[0].message.startswith(f"l0: {record.solver}")
    assert record.solver in ("jacobi_gs", "two_level")


def timed(monkeypatch, ordinary: float, parallel: float) -> dict[str, float]:
    """Let the probe measure given times."""
    times = {"ordinary": ordinary, "parallel": parallel}
    compare = controller.Controller._compare

    def pretended(self, tuned, *arguments):
        compare(self, tuned, *arguments)
        tuned.ordinary_seconds, tuned.parallel_seconds = times["ordinary"], times["parallel"]

    monkeypatch.setattr(controller.Controller, "_compare", pretended)
    return times


def is_parallel(module, x) -> bool:
    output, _ = module(x)
    name = output.grad_fn.name()
    output.sum().backward()
    return name.startswith("_Layer")


def test_auto_takes_the_ordinary_way_where_it_is_faster_and_comes_back_to_look(caplog, monkeypatch):
    times = timed(monkeypatch, ordinary=1.0, parallel=2.0)
    module, x = prepared(solver="auto", probe_every=4)
    assert [is_parallel(module, x) for _ in range(5)] == [True, False, False, False, True]
    assert [entry.message for entry in caplog.records] == [
        f"The module trains as fast or faster with its ordinary backward pass for {LENGTH} steps of 2 sequences "
        "(1000.00 ms against 2000.00 ms), which is used."
    ]
    times["parallel"] = 0.5
    seen = [is_parallel(module, x) for _ in range(30)]
    assert all(seen[-4:])  # found out, and stays
    assert len(caplog.records) == 1
    # Another shape is another question.
    assert is_parallel(module, x[:90])


def test_a_chosen_solver_is_kept_and_told_that_it_is_slower(caplog, monkeypatch):
    timed(monkeypatch, ordinary=1.0, parallel=2.0)
    module, x = prepared(solver="jacobi_gs", probe_every=2)
    assert all(is_parallel(module, x) for _ in range(6))
    assert len(caplog.records) == 1
    assert "callbacks.jacobi_backprop.solver=auto would use it" in caplog.records[0].message


def test_under_autocast_the_ordinary_way_is_taken_as_well(monkeypatch):
    timed(monkeypatch, ordinary=1.0, parallel=2.0)
    module = nn.LSTM(3, 8)
    parallelize(module, probe_every=0)
    x = torch.randn(LENGTH, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_parallel(module, x)
        assert not is_parallel(module, x)


def test_own_cells_are_compared_as_well(monkeypatch):
    timed(monkeypatch, ordinary=1.0, parallel=2.0)
    module = Recurrence(SoftplusCell(3, 5), 5).double()
    parallelize(module, probe_every=0)
    x = torch.randn(40, 2, 3, dtype=torch.float64)
    names = []
    for _ in range(2):
        output, _ = module(x)
        output.sum().backward()
        names.append(output.grad_fn.name())
    assert "CellRecurrence" in names[0]
    assert "CellRecurrence" not in names[1]


@pytest.mark.parametrize(
    ("target", "per_step", "length", "steps"),
    [(1e-6, 0.5, 100, 20), (1e-6, 0.5, 10, 10), (1e-6, 1.0, 70, 70), (1e-6, 1.2, 70, 70), (1e-6, 0.0, 70, 0)],
)
def test_steps_until_a_vector_is_forgotten(target, per_step, length, steps):
    assert forgetting_steps(target, per_step, length) == steps


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "two_level", "iterations": 5},
        {"iterations": 5},
        {"solver": "jacobi", "iterations": 5, "tolerance": 1e-3},
        {"solver": "jacobi_gs", "rank": 3},
        {"solver": "jacobi", "block_size": 3},
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(options):
    with pytest.raises(UserError) as error:
        parallelize(nn.LSTM(2, 3), **options)
    assert "\n" not in str(error.value)


def test_k_iterations_walk_k_steps_whatever_the_block():
    module = nn.RNN(2, 3)
    parallelize(module, solver="jacobi_gs", iterations=3, block_size=7, probe_every=0)
    module(torch.randn(20, 2))[0].sum().backward()
    assert records(module)["l0"].iterations == 3


def test_many_lengths_are_not_all_tuned_one_by_one():
    module = nn.GRU(2, 3)
    parallelize(module)
    for length in range(5, 100):
        module(torch.randn(length, 2))[0].sum().backward()
    controller = module.forward.controllers["l0"]
    assert len(controller._tuned) <= 64
    assert sum(len(tuned.plans) > 1 for tuned in controller._tuned.values()) <= 4
