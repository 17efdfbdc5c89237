"""A recurrence with any cell: its chain by batched vector-Jacobian products of the cell itself."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_parallel.errors import UserError
from lit_parallel.networks.rnn import Recurrence
from lit_parallel.recurrent.chain import SteppedChain
from lit_parallel.recurrent.controller import Controller
from lit_parallel.recurrent.layers import BackwardPass, Solve, refuse_second_derivatives


class CellModuleChain(SteppedChain):
    """The adjoint of ``h_t = cell(x_t, h_{t-1})``, linearised at known hidden states.

    The cell runs once on all steps of every place in a block at once; what a step leaves behind is the gradient of its
    hidden state, from which the cell's own backward pass gives all others.
    """

    step_costs = (2e-4, 1e-6)

    def __init__(self, cell: nn.Module, input: Tensor, before: Tensor, source: Tensor, last: Tensor) -> None:
        """Take what the forward pass left.

        Args:
            cell: ``forward(x_t, h) -> h``.
            input: ``[time, batch, input]``.
            before: The hidden states before each step, ``[time, batch, hidden]``.
            source: Gradient of the output, ``[time, batch, hidden]``.
            last: Gradient of the last state, ``[batch, hidden]``.
        """
        self.cell, self.input, self.before, self.source, self.last = cell, input, before, source, last
        self.length, self.batch, self.state_size = before.shape
        self.gradient_size = self.state_size
        self._graphs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def step(self, first: int, stride: int, v: Tensor, source: bool) -> tuple[Tensor, Tensor]:
        s = v + self.source[first::stride][:, :, None] if source else v.clone()
        place, skipped = first % stride, first // stride
        before, after = self._graph(place, stride)
        grads = torch.zeros(after.shape[0] // self.batch, self.batch, self.state_size).to(v)
        earlier = torch.empty_like(s)
        for column in range(s.shape[2]):
            grads[skipped:] = s[:, :, column]
            (found,) = _differentiate(after, [before], grads)
            earlier[:, :, column] = 0 if found is None else found.unflatten(0, grads.shape[:2])[skipped:]
        return s, earlier

    def _graph(self, place: int, stride: int) -> tuple[Tensor, Tensor]:
        """The cell's run on the steps ``place, place + stride, ...``: its states before and after."""
        key = (place, stride)
        if key not in self._graphs:
            if any(other != stride for _, other in self._graphs):
                self._graphs.clear()
            before = self.before[place::stride].flatten(0, 1).detach().requires_grad_()
            with torch.enable_grad():
                self._graphs[key] = before, self.cell(self.input[place::stride].flatten(0, 1).detach(), before)
        return self._graphs[key]


class RecurrencePass(BackwardPass):
    """The backward pass of a :class:`Recurrence`.

    Args:
        recurrence: The module.
        input: ``[time, batch, input]``.
        output: ``[time, batch, hidden]``.
        h_0: ``[batch, hidden]``.
        grads: Of the output and of the last state ``[batch, hidden]``.
        parameters: Of the cell.
        needed: Whether the gradients of input, h_0 and the parameters are wanted.
        autocast: What the forward pass ran under.
    """

    parameters = slice(2, None)

    def __init__(
        self,
        recurrence: Recurrence,
        input: Tensor,
        output: Tensor,
        h_0: Tensor,
        grads: tuple[Tensor, Tensor],
        parameters: list[Tensor],
        needed: tuple[bool, ...],
        autocast: torch.dtype | None,
    ) -> None:
        self.recurrence, self.input, self.output, self.h_0, self.grads = recurrence, input, output, h_0, grads
        self.weights, self.needed, self.autocast = parameters, needed, autocast

    def gradients(self, solve: Solve) -> tuple[Tensor | None, ...]:
        weights = [weight.detach().requires_grad_(needed) for weight, needed in self._with_needs()]
        cell = _with_weights(self.recurrence.cell, weights)
        with _autocast(self.input.device, self.autocast):
            before = torch.cat([self.h_0[None], self.output[:-1]])
            chain = CellModuleChain(cell, self.input, before, *self.grads)
            s = torch.empty_like(before)
            initial = solve(chain, s, lambda: None)
            x = self.input.flatten(0, 1).detach().requires_grad_(self.needed[0])
            with torch.enable_grad():
                after = cell(x, before.flatten(0, 1))
        wanted = [w for w, needed in zip([x, *weights], (self.needed[0], *self.needed[2:]), strict=True) if needed]
        _check_repeatable(after, self.output)
        found = iter(_differentiate(after, wanted, s))
        of_input = next(found) if self.needed[0] else None
        of_input = of_input if of_input is None else of_input.unflatten(0, self.input.shape[:2])
        of_weights = [next(found) if needed else None for needed in self.needed[2:]]
        return of_input, initial if self.needed[1] else None, *of_weights

    @torch.no_grad()
    def forward(self) -> object:
        return run(self.recurrence, self.input, self.h_0, self.autocast)

    def ordinary_forward(self) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        x = self.input.detach().requires_grad_(self.needed[0])
        h_0 = self.h_0.detach().requires_grad_(self.needed[1])
        weights = [weight.detach().requires_grad_(needed) for weight, needed in self._with_needs()]
        copy = Recurrence(_with_weights(self.recurrence.cell, weights), self.recurrence.hidden_size)
        with torch.enable_grad():
            outputs = run(copy, x, h_0, self.autocast)
        return list(outputs), [x, h_0, *weights], list(self.grads)

    def _with_needs(self) -> list[tuple[Tensor, bool]]:
        return list(zip(self.weights, self.needed[2:], strict=True))


class _WithWeights(nn.Module):
    """A cell with other tensors in place of its trained parameters, whose hooks are for the real gradients alone."""

    def __init__(self, cell: nn.Module, weights: list[Tensor]) -> None:
        super().__init__()
        names = [name for name, parameter in cell.named_parameters() if parameter.requires_grad]
        self.run = functools.partial(functional_call, cell, dict(zip(names, weights, strict=True)))

    def forward(self, x_t: Tensor, h: Tensor) -> Tensor:
        return self.run((x_t, h))


def _with_weights(cell: nn.Module, weights: list[Tensor]) -> nn.Module:
    return _WithWeights(cell, weights) if weights else cell


def _differentiate(after: Tensor, wanted: list[Tensor], grads: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a cell's run on many steps, given those of its states ``[steps, batch, hidden]``; None: unused."""
    if not wanted or not after.requires_grad:
        return (None,) * len(wanted)
    return torch.autograd.grad(after, wanted, grads.flatten(0, 1), retain_graph=True, allow_unused=True)


def _check_repeatable(again: Tensor, output: Tensor) -> None:
    """Refuse a cell that gave other states in the forward pass: its gradient would be of something else."""
    output = output.flatten(0, 1)
    if bool((again - output).abs().amax() > 10 * torch.finfo(output.dtype).eps ** 0.5 * output.abs().amax()):
        raise UserError(
            "The cell's next state must follow from x_t and h alone, step by step (no dropout, no batch statistics): "
            "take this layer out with lit_parallel.recurrent.restore(module), or set solver='sequential'."
        )


def run(recurrence: Recurrence, input: Tensor, h_0: Tensor, autocast: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The module's own forward, time first: the output ``[time, batch, hidden]`` and the last state."""
    with _autocast(input.device, autocast):
        x = input.transpose(0, 1) if recurrence.batch_first else input
        output, h = Recurrence.forward(recurrence, x, h_0[None])
    return (output.transpose(0, 1) if recurrence.batch_first else output), h[0]


def autocast_type(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on a device; None if it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    # Not cached: weights cast for a forward pass without gradients must not be found by one with gradients.
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


class CellRecurrence(torch.autograd.Function):
    """A :class:`Recurrence` with a backward pass that is parallel in time."""

    @staticmethod
    def forward(ctx: Any, recurrence: Recurrence, controller: Controller, input: Tensor, h_0: Tensor, *weights: Tensor):
        """Run the cell over time."""
        ctx.recurrence, ctx.controller, ctx.autocast = recurrence, controller, autocast_type(input.device)
        with controller.timed("forward", input.device):
            output, h = run(recurrence, input, h_0, ctx.autocast)
        ctx.save_for_backward(input, h_0, output, *weights)
        return output, h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """All gradients."""
        refuse_second_derivatives()
        input, h_0, output, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        task = RecurrencePass(ctx.recurrence, input, output, h_0, grads, weights, needed, ctx.autocast)  # type: ignore[arg-type]
        return None, None, *ctx.controller.backward(task)
