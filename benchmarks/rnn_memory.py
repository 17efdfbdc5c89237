"""Recurrent layers that forget, and layers trained until they remember: what the backward pass is measured on."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.data.adding import AddingData, adding_problem
from lit_parallel.data.in_memory import Samples
from lit_parallel.networks.rnn import LastState, build_recurrence
from lit_parallel.recurrent.cells import Layer
from lit_parallel.recurrent.chain import Chain
from lit_parallel.recurrent.layers import LayerPass
from lit_parallel.recurrent.solve import Plan, solve_chain

_BATCH = 64
_CHECK_EVERY = 25  # steps between two looks at the loss, each of which waits for the device
_SOLVED = 0.02  # squared error relative to that of always answering the mean
_RIGHT = 0.04  # the customary limit of an answer's error
_LARGEST_STATE = 1e4  # of a network that does not grow without bound


@dataclass
class Problem:
    """A recurrent layer, its inputs, and what is to be differentiated.

    Attributes:
        layer: Time first, one layer.
        input: ``[time, batch, input]``.
        states: The initial ones, ``[1, batch, hidden]``: h, and c of an LSTM.
        target: Without a read-out the gradient of the output, ``[time, batch, hidden]``; with one what it is to answer,
            ``[batch]``.
        readout: Answers from the last hidden state; the loss is the mean squared error.
    """

    layer: nn.RNNBase
    input: Tensor
    states: tuple[Tensor, ...]
    target: Tensor
    readout: nn.Linear | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are wanted of: weights, input and initial states."""
        return [self.input, *self.states, *self.layer.parameters()]

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """What is differentiated, and its gradient (None: it is a loss)."""
        return self._objective(*self._run())

    def _run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, last = self.layer(self.input, self.states if len(self.states) > 1 else self.states[0])
        return output, last if isinstance(last, tuple) else (last,)

    def _objective(self, output: Tensor, last: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        if self.readout is None:
            return output, self.target
        answers: Tensor = self.readout(last[0][0])
        return F.mse_loss(answers[:, 0], self.target), None

    def backward(self, result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
        """All gradients."""
        return torch.autograd.grad(result[0], self.leaves, result[1])

    def step(self) -> tuple[Tensor, ...]:
        """A training step without an optimiser."""
        return self.backward(self.forward())

    def copy(self, dtype: torch.dtype) -> Problem:
        """The same with a layer of its own, in a type."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(dtype).requires_grad_()

        return Problem(
            copy.deepcopy(self.layer).to(dtype),
            leaf(self.input),
            tuple(leaf(state) for state in self.states),
            self.target.to(dtype),
            None if self.readout is None else copy.deepcopy(self.readout).to(dtype),
        )

    def exact_backward(self) -> list[Tensor]:
        """The backward pass in float64, one step after another, of a forward pass in the layer's own type.

        The errors of a backward pass alone, while those of a run in float64 contain the forward pass's.
        """
        with torch.no_grad():
            output, last = self._run()
        exact = self.copy(torch.float64)
        results = [x.double().requires_grad_() for x in (output, *last)]
        value, given = exact._objective(results[0], tuple(results[1:]))
        grads = torch.autograd.grad(value, results, given, allow_unused=True)
        of_output, *of_last = (g if g is not None else torch.zeros_like(x) for g, x in zip(grads, results, strict=True))
        c_0 = exact.states[1][0] if len(self.states) > 1 else None
        weights = list(exact.layer.parameters())
        layer = Layer(exact.input, results[0].detach(), exact.states[0][0], c_0, *weights)
        outer = (of_output, of_last[0][0], None if c_0 is None else of_last[1][0])
        kind = f"rnn_{self.layer.nonlinearity}" if isinstance(self.layer, nn.RNN) else self.layer.mode.lower()
        with torch.no_grad():
            needed = (True, True, c_0 is not None, *[True] * len(weights))
            found = [g for g in LayerPass(kind, layer, outer, needed).gradients(_one_block) if g is not None]
        return [grad.view_as(leaf) for grad, leaf in zip(found, self.leaves, strict=True)]

    def reach(self) -> dict[str, float]:
        """Norm of the loss's gradient with respect to the state so many steps before the end, relative to one step.

        Of an LSTM the state is the pair (h, c).
        """
        length = len(self.input)
        return {
            f"{distance} steps": self._gradient_norm(distance) / self._gradient_norm(1)
            for distance in sorted({min(100, length), max(1, length // 2)})
        }

    def _gradient_norm(self, distance: int) -> float:
        earlier, first = self.states, len(self.input) - distance
        if first > 0:
            with torch.no_grad():
                _, earlier = replace(self, input=self.input[:first])._run()
        states = tuple(state.detach().requires_grad_() for state in earlier)
        loss, _ = replace(self, input=self.input[first:].detach(), states=states).forward()
        return math.sqrt(sum(float(grad.square().sum()) for grad in torch.autograd.grad(loss, states)))


def short_memory(cell: str, batch: int, length: int, hidden: int, device: torch.device, seed: int = 0) -> Problem:
    """Fresh weights, which forget within some tens of steps; random inputs, and a loss on all outputs.

    The input has as many features as the hidden state, as between two layers of a deep network.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layer = build_recurrence(cell, hidden, hidden).to(device)
    assert isinstance(layer, nn.RNNBase)
    layer.batch_first = False
    input, target = (torch.randn(length, batch, hidden, generator=generator).to(device) for _ in range(2))
    return Problem(layer, input.requires_grad_(), _initial_states(layer, batch), target)


def long_memory(network: LastState, batch: int, length: int, seed: int = 0) -> Problem:
    """A trained network on sequences of its own task, with its own loss on the last state.

    A rectified network may grow without bound on sequences longer than those it was trained on: if it does, its
    recurrent matrix is divided by its spectral radius.
    """
    layer, readout = copy.deepcopy(network.recurrence), copy.deepcopy(network.output)
    assert isinstance(layer, nn.RNNBase)
    layer.batch_first = False  # the layer alone is measured, without a transposition
    samples = adding_problem(batch, length, np.random.default_rng([2, seed]))
    input = samples.inputs.transpose(0, 1).contiguous().to(readout.weight.device)
    target = samples.targets.to(readout.weight.device)
    with torch.no_grad():
        output, _ = layer(input)
        if not bool((output.abs() < _LARGEST_STATE).all()):
            matrix = layer.weight_hh_l0
            assert isinstance(matrix, Tensor)
            matrix.div_(torch.linalg.eigvals(matrix).abs().amax())
    return Problem(layer, input.requires_grad_(), _initial_states(layer, batch), target, readout)


def train_on_adding(
    cell: str, hidden: int, length: int, seconds: float, device: torch.device, seed: int = 0
) -> tuple[LastState, dict[str, Any]]:
    """Train with the ordinary backward pass until the adding problem is solved, or the time is over.

    Gated cells begin with a gate that keeps the state (:func:`lit_parallel.networks.rnn.keep_state`), for about a third
    of the sequence. A plain RNN has the identity as its recurrent matrix and is rectified (Le, Jaitly and Hinton, "A
    simple way to initialize recurrent networks of rectified linear units", 2015): with tanh it was not seen to solve
    the task in such a time.

    Args:
        cell: ``rnn``, ``gru`` or ``lstm``.
        hidden: Numbers in a hidden state.
        length: Steps of a sequence.
        seconds: At most so long.
        device: Where.
        seed: Of weights and data.

    Returns:
        The network, and how far it came.
    """
    torch.manual_seed(seed)
    gated = cell in ("gru", "lstm")
    bias = max(math.log(length / 3), 1.0)
    recurrence = build_recurrence(cell if gated else "rnn_relu", 2, hidden, forget_bias=bias if gated else None)
    if not gated:
        _begin_with_identity(recurrence)
    network = LastState(recurrence, 1).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3 if gated else 1e-3)
    random = np.random.default_rng([0, seed])
    losses: list[Tensor] = []
    began, steps, error = time.perf_counter(), 0, math.inf
    good = copy.deepcopy(network.state_dict())
    while error > _SOLVED and time.perf_counter() - began < seconds:
        loss = _errors(network, adding_problem(_BATCH, length, random), device).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        steps += 1
        if steps % _CHECK_EVERY == 0:
            error, losses = float(torch.stack(losses).mean()) / AddingData.target_variance, []
            if math.isfinite(error):
                good = copy.deepcopy(network.state_dict())
            else:  # a rectified network may explode: back to where it had not, and more slowly
                network.load_state_dict(good)
                error, optimizer = (
                    math.inf,
                    torch.optim.Adam(network.parameters(), lr=optimizer.param_groups[0]["lr"] / 2),
                )
    took = time.perf_counter() - began
    with torch.no_grad():
        errors = _errors(network, adding_problem(512, length, np.random.default_rng([1, seed])), device)
    relative = float(errors.square().mean()) / AddingData.target_variance
    return network, {
        "task": f"adding problem, {length} steps",
        "network": "identity, relu" if not gated else f"gate that keeps the state: bias {bias:.1f}",
        "steps": steps,
        "seconds": took,
        "solved": error <= _SOLVED,
        "test_relative_error": relative,
        "test_accuracy": float((errors.abs() < _RIGHT).float().mean()),
    }


def _one_block(chain: Chain, into: Tensor, meanwhile: Callable[[], None]) -> Tensor:
    return solve_chain(chain, Plan(chain.length, 0), None, into, meanwhile=meanwhile).initial


def _errors(network: LastState, samples: Samples, device: torch.device) -> Tensor:
    return network(samples.inputs.to(device))[:, 0] - samples.targets.to(device)


@torch.no_grad()
def _begin_with_identity(recurrence: nn.Module) -> None:
    for name, parameter in recurrence.named_parameters():
        if name == "weight_hh_l0":
            nn.init.eye_(parameter)
        elif name == "weight_ih_l0":
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.zeros_(parameter)


def _initial_states(layer: nn.RNNBase, batch: int) -> tuple[Tensor, ...]:
    shape = (1, batch, layer.hidden_size)
    number = 2 if isinstance(layer, nn.LSTM) else 1
    weight = next(layer.parameters())
    return tuple(weight.new_zeros(shape).requires_grad_() for _ in range(number))
