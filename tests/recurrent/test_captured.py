"""Backward passes as captured CUDA graphs: the same gradients as without, whatever happens between two of them."""

import pytest
import torch
from torch import nn

from lit_parallel.recurrent import parallelize, records

pytestmark = pytest.mark.gpu


def parallel(cell, **options):
    torch.manual_seed(0)
    module = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cell](3, 32).cuda()
    parallelize(module, solver="jacobi_gs", probe_every=0, **options)
    return module


def gradients(module, x, g, **options):
    leaf = x.clone().requires_grad_()
    output, _ = module(leaf)
    return torch.autograd.grad(output, [leaf, *module.parameters()], g, **options)


def exact(module, x, g):
    other = type(module)(3, 32).cuda().double()
    other.load_state_dict(module.state_dict())
    return gradients(other, x.double(), g.double())


def assert_near(found, expected):
    distance = sum(float((a.double() - b).square().sum()) for a, b in zip(found, expected, strict=True))
    assert (distance / sum(float(b.square().sum()) for b in expected)) ** 0.5 < 1e-5


def is_captured(module):
    return any(tuned.captured for tuned in module.forward.controllers["l0"]._tuned.values())


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_many_passes_with_other_inputs_weights_and_gradients(cell):
    module = parallel(cell)
    with torch.backends.cudnn.flags(allow_tf32=False):
        for seed in range(8):
            generator = torch.Generator("cuda").manual_seed(seed)
            x = torch.randn(500, 2, 3, device="cuda", generator=generator)
            g = torch.randn(500, 2, 32, device="cuda", generator=generator)
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


def test_a_sequence_without_a_gradient_does_not_keep_a_graph_busy():
    module = parallel("gru")
    x, g = torch.randn(400, 2, 3, device="cuda"), torch.randn(400, 2, 32, device="cuda")
    g[:, 1] = 0
    for _ in range(20):
        found = gradients(module, x, g)
    assert not is_captured(module)
    assert_near(found, exact(module, x, g))
