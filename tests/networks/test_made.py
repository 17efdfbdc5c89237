"""MADE against its definition: output of rank r is a function of the inputs of rank below r, and of nothing else."""

import pickle

import pytest
import torch

from lit_parallel.networks import MADE

HIDDEN = ([24], [5], [24, 24], [30, 5], [5, 30], [16, 24, 12])
every_shape = pytest.mark.parametrize("hidden", HIDDEN, ids=str)
every_length = pytest.mark.parametrize("length", [1, 2, 3, 12])


def positive(made: MADE) -> MADE:
    """Give every weight a positive value: with positive inputs no path through the network is closed or cancels."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(0.5, 1.0)
    return made.double()


def reads(made: MADE) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether output p reads input q, by the Jacobians of mean and log-scale, each ``[length, length]``."""
    x = torch.rand(made.length, dtype=torch.float64) + 0.5
    jacobians = torch.autograd.functional.jacobian(lambda v: tuple(y[0] for y in made(v[None])), x)
    return tuple(jacobian != 0 for jacobian in jacobians)


def earlier(rank: torch.Tensor) -> torch.Tensor:
    """Entry p, q: whether q is generated before p."""
    return rank[:, None] > rank[None, :]


@every_length
@every_shape
@pytest.mark.parametrize("order", ["natural", "random"])
@pytest.mark.parametrize("degrees", ["spaced", "random"])
def test_no_output_reads_its_own_or_a_later_input(length, hidden, order, degrees):
    made = positive(MADE(length, hidden, order=order, degrees=degrees, num_masks=3, seed=length))
    for index in range(3):
        made.use_mask(index)
        for jacobian in reads(made):
            assert not (jacobian & ~earlier(made.rank[index])).any()


@every_length
@pytest.mark.parametrize("hidden", [[11], [24, 11], [11, 30, 24]], ids=str)
@pytest.mark.parametrize("order", ["natural", "random"])
def test_spaced_degrees_read_every_earlier_input_when_there_are_enough_units(length, hidden, order):
    made = positive(MADE(length, hidden, order=order, num_masks=2 if order == "random" else 1, seed=5))
    for index in range(made.num_masks):
        made.use_mask(index)
        for jacobian in reads(made):
            assert torch.equal(jacobian, earlier(made.rank[index]))


@pytest.mark.parametrize("hidden", [[1], [3], [3, 2], [2, 4, 3]], ids=str)
def test_the_first_input_is_read_by_every_later_output_however_few_units_there_are(hidden):
    for jacobian in reads(positive(MADE(12, hidden))):
        assert jacobian[1:, 0].all()


@every_shape
def test_random_degrees_leave_no_unit_without_inputs_and_some_last_output_connected(hidden):
    made = MADE(12, hidden, degrees="random", seed=3)
    assert all(layer.mask.any(dim=1).all() for layer in made.hidden)
    assert made.output.mask[11].any()


def test_ranks_are_permutations_and_depend_on_the_seed():
    made, other = (MADE(12, [8], order="random", num_masks=4, seed=seed) for seed in (0, 1))
    assert torch.equal(made.rank.sort(dim=1).values, torch.arange(12).expand(4, 12))
    assert len({tuple(rank.tolist()) for rank in (*made.rank, *other.rank)}) == 8
    assert torch.equal(MADE(12, [8], num_masks=2).rank, torch.arange(12).expand(2, 12))


@pytest.mark.parametrize("order", ["natural", "random"])
def test_masks_differ_and_can_be_switched_back_and_forth(order):
    made = MADE(12, [24, 24], order=order, num_masks=3)
    x = torch.randn(2, 12)

    def outputs(index):
        made.use_mask(index)
        return torch.cat(made(x))

    first = torch.cat(made(x))
    others = [outputs(1), outputs(2)]
    assert not torch.allclose(first, others[0])
    assert not torch.allclose(others[0], others[1])
    assert torch.equal(outputs(0), first)
    assert torch.equal(outputs(4), others[0])  # cycles
    assert made.mask_index == 1


@pytest.mark.parametrize("in_use", [0, 2])
def test_a_state_dict_keeps_orders_and_masks(in_use):
    def build(seed):
        return MADE(12, [24, 9], order="random", degrees="random", num_masks=3, seed=seed)

    made, fresh = build(0), build(1)
    x = torch.randn(2, 12)
    made.use_mask(in_use)
    fresh.use_mask(in_use)
    assert not torch.equal(made.rank, fresh.rank)
    fresh.load_state_dict(made.state_dict())
    # The mask in use follows at once, the others when they are switched to.
    for index in (in_use, 0, 1, 2):
        if index != in_use:
            made.use_mask(index)
            fresh.use_mask(index)
        assert all(torch.equal(a, b) for a, b in zip(made(x), fresh(x), strict=True))
        assert torch.equal(made.output.mask, fresh.output.mask)


def test_a_masked_weight_gets_no_gradient_and_never_matters():
    made = MADE(6, [8, 8])
    x = torch.randn(3, 6)
    before = torch.cat(made(x)).detach()
    torch.cat(made(x)).square().sum().backward()
    for layer in (*made.hidden, made.output):
        assert (layer.weight.grad[layer.mask == 0] == 0).all()
        with torch.no_grad():
            layer.weight[layer.mask == 0] = 1e3
    assert torch.equal(torch.cat(made(x)), before)


def test_mean_and_log_scale_are_two_functions():
    mean, log_scale = MADE(6, [8])(torch.randn(3, 6))
    assert mean.shape == log_scale.shape == (3, 6)
    assert not torch.allclose(mean, log_scale)


def test_masks_depend_on_their_own_seed_alone():
    def build():
        return MADE(12, [8, 5], order="random", degrees="random", num_masks=3, seed=4)

    a = build()
    torch.manual_seed(99)
    b = build()
    assert torch.equal(a.rank, b.rank)
    assert torch.equal(a.degrees, b.degrees)


def test_a_module_can_be_pickled():
    made = MADE(6, [8], order="random")
    x = torch.randn(2, 6)
    copy = pickle.loads(pickle.dumps(made))
    assert torch.equal(copy(x)[0], made(x)[0])
