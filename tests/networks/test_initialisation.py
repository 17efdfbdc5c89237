"""Data-dependent initialisation: what every layer puts out on that batch, and that training then starts well."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

from lit_parallel.conditionals import DiscretizedLogisticMixture
from lit_parallel.networks import PixelCNNpp
from lit_parallel.networks.initialisation import initialise_from_data

CONDITIONAL = DiscretizedLogisticMixture(1, 3)


def network(filters: int, resnets: int, **options) -> PixelCNNpp:
    return PixelCNNpp(1, CONDITIONAL.num_parameters, filters=filters, resnets=resnets, **options)


def levels(number: int) -> torch.Tensor:
    """Images with structure: a gradient of brightness, and noise."""
    ramp = torch.linspace(20, 200, 8).expand(8, 8)
    return (ramp + torch.randint(0, 40, (number, 1, 8, 8))).round()


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_parametrized(module, "weight")}


def outputs_of_layers(model: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
        for name, layer in layers(model).items()
    ]
    with torch.no_grad():
        model.eval()(*inputs)
    for handle in handles:
        handle.remove()
    return found


def nll(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    parameters = model(CONDITIONAL.encode(x)).flatten(2).transpose(1, 2)
    return -CONDITIONAL.log_prob(parameters, x.flatten(1)[..., None]).mean()


@pytest.mark.parametrize(("filters", "resnets"), [(8, 1), (64, 1), (12, 5)])
@pytest.mark.parametrize("num_classes", [None, 4])
def test_every_layer_is_standard_on_the_batch(filters, resnets, num_classes):
    model = network(filters, resnets, num_classes=num_classes)
    inputs = [CONDITIONAL.encode(levels(16))]
    if num_classes:
        inputs.append(torch.arange(16) % 4)
    initialise_from_data(model, *inputs)
    found = outputs_of_layers(model, *inputs)
    assert len(found) == len(layers(model)) == 3 + 3 * resnets * 5 + (3 * resnets + 2) * 6 + 8 + 1
    for name, output in found.items():
        expected = 0.1 if name.endswith("second") else 1.0
        deviation, mean = torch.std_mean(output, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(deviation, torch.full_like(deviation, expected), rtol=1e-3, atol=0)
        assert mean.abs().max() < 1e-3 * expected


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_lengths_and_biases_are_set_and_directions_kept(kind):
    layer = weight_norm(kind(3, 5, 2), dim=1 if kind is nn.ConvTranspose2d else 0)
    direction = layer.parametrizations.weight.original1.clone()
    x = 3 + 2 * torch.randn(20, 3, 6, 6)
    before = layer(x)
    deviation, mean = torch.std_mean(before, dim=(0, 2, 3), correction=0, keepdim=True)
    initialise_from_data(nn.Sequential(layer), x)
    torch.testing.assert_close(layer(x), (before - mean) / deviation, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.parametrizations.weight.original1, direction)


def test_constant_features_stay_small():
    model = network(8, 1)
    black = torch.full((4, 1, 8, 8), -1.0)
    initialise_from_data(model, black)
    for output in outputs_of_layers(model, black).values():
        assert output.isfinite().all()
        assert output.std(dim=(0, 2, 3)).max() < 1.1
    layer = weight_norm(nn.Conv2d(1, 2, 1))
    initialise_from_data(nn.Sequential(layer), torch.full((2, 1, 4, 4), 0.5))
    assert layer(torch.full((1, 1, 1, 1), 0.5)).abs().max() < 1e-3
    assert layer.weight.abs().max() <= 1.001e3


def test_a_second_time_changes_nothing_and_neither_leaves_traces():
    model, x = network(8, 1, dropout=0.5), CONDITIONAL.encode(levels(16))
    for training in (True, False):
        model.train(training)
        initialise_from_data(model, x)
        assert all(module.training is training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())
    once = {name: parameter.clone() for name, parameter in model.named_parameters()}
    initialise_from_data(model, x)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, once[name], rtol=1e-3, atol=1e-3)
        assert parameter.requires_grad
        assert parameter.grad is None


def test_a_failing_forward_pass_leaves_no_hooks_and_the_mode():
    model = network(4, 1).train()
    with pytest.raises(RuntimeError):
        initialise_from_data(model, torch.zeros(1, 5, 8, 8))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def first_losses(filters: int, resnets: int, *, initialise: bool, warmup: int) -> list[float]:
    """Losses of the first six steps of Adam at the default learning rate."""
    model, x = network(filters, resnets, dropout=0.0), levels(8)
    if initialise:
        initialise_from_data(model, CONDITIONAL.encode(x))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    losses = []
    for _ in range(6):
        loss = nll(model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("filters", "resnets"), [(8, 1), (64, 1), (96, 5)])
def test_training_starts_well_at_every_width_and_depth(filters, resnets):
    losses = first_losses(filters, resnets, initialise=True, warmup=20)
    assert losses[0] < 8  # nats; a uniform guess costs 5.5
    assert losses[-1] < losses[0] - 0.05
    assert max(losses) < losses[0] + 0.05


def test_a_wide_and_deep_network_diverges_without_it():
    losses = first_losses(96, 5, initialise=False, warmup=1)
    assert not max(losses) < 1.5 * losses[0]  # or not a number
