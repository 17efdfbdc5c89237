"""The metrics over hand-made solutions, over uneven batches, and reduced over two processes."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hand_made import chain, diagonal

from lit_parallel.metrics import BitsPerDimension, Iterations, Speedup
from lit_parallel.solvers import Jacobi, solve


def likelihoods(*bits: float) -> torch.Tensor:
    """Log-likelihoods of samples of 10 dimensions that cost so many bits per dimension."""
    return -torch.tensor(bits) * 10 * math.log(2)


def updates(metric_class):
    """Two uneven updates per metric, and the result of both together: known by hand."""
    return {
        BitsPerDimension: ([(likelihoods(1.0, 2.0, 3.0), 10), (likelihoods(8.0), 10)], 3.5),
        # chain: 4 samples of 12 iterations; diagonal: 2 samples of 2.
        Iterations: (
            [(solve(diagonal(2), Jacobi()),), (solve(chain(4), Jacobi()),)],
            {"mean": (4 * 12 + 2 * 2) / 6, "max": 12.0},
        ),
        # A mean of ratios would be (10 + 1) / 2.
        Speedup: ([(10.0, 1.0), (torch.tensor([40.0, 50.0]), torch.tensor([30.0, 60.0]))], 100 / 91),
    }[metric_class]


def check(result, expected):
    if isinstance(expected, dict):
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            assert float(result[key]) == pytest.approx(value)
    else:
        assert float(result) == pytest.approx(expected)


every_metric = pytest.mark.parametrize("metric_class", [BitsPerDimension, Iterations, Speedup])


@every_metric
@pytest.mark.parametrize("backwards", [False, True])
def test_updates_add_up_and_reset_forgets(metric_class, backwards):
    metric = metric_class()
    steps, expected = updates(metric_class)
    for arguments in reversed(steps) if backwards else steps:
        metric.update(*arguments)
    check(metric.compute(), expected)
    metric.reset()
    metric.update(*steps[0])
    once = metric_class()
    once.update(*steps[0])
    check(metric.compute(), once.compute() if isinstance(expected, dict) else float(once.compute()))


@every_metric
def test_forward_returns_the_batch_and_accumulates(metric_class):
    metric = metric_class()
    steps, expected = updates(metric_class)
    for arguments in steps:
        alone = metric_class()
        alone.update(*arguments)
        check(metric(*arguments), alone.compute())
    check(metric.compute(), expected)


def test_a_certificates_iterations_count():
    metric = Iterations()
    metric.update(solve(diagonal(2), Jacobi(), certify=True))
    check(metric.compute(), {"mean": 3.0, "max": 3.0})


def test_bits_keep_no_graph_and_count_beyond_single_precision():
    metric = BitsPerDimension()
    metric.update(likelihoods(1.0).requires_grad_(), 10)
    assert not metric.total.requires_grad
    # Single precision would stop counting at 2^24 dimensions.
    metric.update(torch.tensor([-3.0 * 2**24 * math.log(2)]), 2**24)
    metric.update(likelihoods(3.0), 10)
    assert int(metric.count) == 2**24 + 20
    check(metric.compute(), 3.0)


def test_images_of_different_sizes_are_weighed_by_their_pixels():
    metric = BitsPerDimension()
    metric.update(likelihoods(2.0), 10)
    metric.update(likelihoods(2.0) * 3, 30)
    metric.update(likelihoods(5.0) * 2, 20)
    check(metric.compute(), (2 * 10 + 2 * 30 + 5 * 20) / 60)


def _process(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for metric_class in (BitsPerDimension, Iterations, Speedup):
        metric = metric_class()
        steps, expected = updates(metric_class)
        metric.update(*steps[rank])  # uneven: the processes see different numbers of samples
        check(metric.compute(), expected)
        # Reducing does not disturb what the process itself goes on counting.
        alone = metric_class()
        alone.update(*steps[rank])
        for name, state in metric.metric_state.items():
            assert torch.equal(state, alone.metric_state[name])
    dist.destroy_process_group()


def test_two_processes_reduce_to_the_result_of_one(tmp_path):
    mp.spawn(_process, args=(str(tmp_path),), nprocs=2)


@every_metric
def test_a_module_in_half_precision_does_not_round_its_metrics(metric_class):
    metric = torch.nn.ModuleDict({"metric": metric_class()}).half()["metric"]
    assert all(state.dtype == torch.float64 for state in metric.metric_state.values())
