"""A recurrent layer as an operation of PyTorch: for autograd, and for ``torch.compile`` as registered operators.

Eager code goes through an ``autograd.Function``, which costs less; a compiler sees ``lit_parallel::recurrent_layer``
and ``lit_parallel::recurrent_layer_backward``, whose results' shapes it knows without running them. Both call the
functions of :mod:`lit_parallel.recurrent.layers`. Operators take no Python objects, so what decides how a chain is
solved is found by its number.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_parallel.recurrent.cells import Layer
from lit_parallel.recurrent.controller import Controller
from lit_parallel.recurrent.forward_pass import ForwardPass
from lit_parallel.recurrent.layers import LayerPass, refuse_second_derivatives, run_layer
from lit_parallel.recurrent.tuning import shape_of

_STATES = (1, 2)  # of a layer's inputs, which stand for a single layer here
_numbers = itertools.count()
_controllers: weakref.WeakValueDictionary[int, Controller] = weakref.WeakValueDictionary()


def register(controller: Controller) -> int:
    """Give a controller a number."""
    number = next(_numbers)
    _controllers[number] = controller
    return number


def recurrent_layer(
    kind: str, controller: int, input: Tensor, h_0: Tensor, c_0: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`lit_parallel.recurrent.layers.run_layer`, with passes that are parallel in time.

    States have the shape that cuDNN and PyTorch's modules give them, ``[1, batch, hidden]``: taking a layer's own out
    of several, or putting them together, would cost two launches in either direction.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = (*weights, None, None)[:4]
    if torch.compiler.is_compiling():
        output, h, c = _layer(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, kind, controller)
    else:
        recorded = torch.is_grad_enabled()
        output, h, c = _Layer.apply(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, kind, controller, recorded)
    return output, h, None if c_0 is None else c


def _forward(
    inputs: Sequence[Any], kind: str, known: Controller, *, linearised: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The output, the last states and, if wanted and found on the way, the factors of the backward pass."""
    input, h_0, c_0, *weights = inputs
    ahead = known.ahead
    with known.timed("forward", input.device):
        if ahead.skips(shape_of(input)):
            return *run_layer(kind, input, h_0, c_0, [weight for weight in weights if weight is not None]), None
        c = None if c_0 is None else c_0[0]
        task = ForwardPass(kind, input, h_0[0], c, weights, known.options.precision, linearised=linearised)
        if torch.is_autocast_enabled(input.device.type):
            with torch.autocast(input.device.type, enabled=False):  # its sums are in float32
                states = ahead.forward(task)
        else:
            states = ahead.forward(task)
        return *states, None if ahead.newest is None else task.factors


def _backward(
    grads: Sequence[Tensor | None], inputs: Sequence[Any], output: Tensor, needed: tuple[bool, ...], kind: str,
    known: Controller, factors: Tensor | None = None, *, compare: bool = True,
) -> list[Tensor | None]:  # fmt: skip
    refuse_second_derivatives()
    input, h_0, c_0, *weights = inputs
    of_output, of_h, of_c = grads
    h = h_0[0]
    layer = Layer(input, output, h, None if c_0 is None else c_0[0], *weights)
    outer = (
        known.given(of_output, output),
        known.given(of_h if of_h is None else of_h[0], h),
        None if c_0 is None else known.given(of_c if of_c is None else of_c[0], h),
    )
    task = LayerPass(kind, layer, outer, needed, known.options.precision, factors)
    if torch.is_autocast_enabled(input.device.type):
        with torch.autocast(input.device.type, enabled=False):  # a backward pass may be called under it
            done = known.backward(task, compare=compare)
    else:
        done = known.backward(task, compare=compare)
    return [grad if grad is None or i not in _STATES else grad[None] for i, grad in enumerate(done)]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, ctx.kind, controller, recorded = arguments
        ctx.known = _controllers[controller]  # the module may be restored before the backward pass
        output, h, c, factors = _forward(inputs, ctx.kind, ctx.known, linearised=recorded)
        ctx.save_for_backward(*inputs, output, factors)
        ctx.set_materialize_grads(False)  # zeros made anew in every pass cost the host more than they seem to
        return output, h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *inputs, output, factors = ctx.saved_tensors
        needed = ctx.needs_input_grad[:7]
        return *_backward(grads, inputs, output, needed, ctx.kind, ctx.known, factors), None, None, None


@torch.library.custom_op("lit_parallel::recurrent_layer", mutates_args=())
def _layer(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    kind: str,
    controller: int,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
    with torch.no_grad():
        output, h, c, _ = _forward(inputs, kind, _controllers[controller])
    return output.contiguous(), h.clone(), h.new_empty(0) if c is None else c.clone()


@_layer.register_fake
def _(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, kind, controller):
    output = input.new_empty(input.shape[0], input.shape[1], weight_hh.shape[1])
    return output, torch.empty_like(h_0), h_0.new_empty(0) if c_0 is None else torch.empty_like(c_0)


@torch.library.custom_op("lit_parallel::recurrent_layer_backward", mutates_args=())
def _layer_backward(
    grad_output: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    output: Tensor,
    needed: list[bool],
    kind: str,
    controller: int,
) -> list[Tensor]:
    inputs = (input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
    with torch.no_grad():
        known = _controllers[controller]
        done = _backward((grad_output, grad_h, grad_c), inputs, output, tuple(needed), kind, known, compare=False)
    return [
        input.new_empty(0) if grad is None else grad.contiguous().clone() for grad in done
    ]  # an operator's results are tensors, and share no memory


@_layer_backward.register_fake
def _(
    grad_output, grad_h, grad_c, input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, output, needed, kind,
    controller,
):  # fmt: skip
    inputs = (input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
    return [
        x.new_empty(x.shape) if wanted and x is not None else input.new_empty(0)
        for x, wanted in zip(inputs, needed, strict=True)
    ]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], output[0])
    ctx.kind, ctx.controller = inputs[7:]


def _compiled_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:7])
    done = _layer_backward(*grads, *ctx.saved_tensors, needed, ctx.kind, ctx.controller)
    return (*(grad if wanted else None for grad, wanted in zip(done, needed, strict=True)), None, None)


_layer.register_autograd(_compiled_backward, setup_context=_set_up)
