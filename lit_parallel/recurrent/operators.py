"""A recurrent layer as an operation of PyTorch: for autograd, and for ``torch.compile`` as registered operators.

Eager code goes through an ``autograd.Function``, which costs less; a compiler sees ``lit_parallel::recurrent_layer``
and ``lit_parallel::recurrent_layer_backward``, whose results' shapes it knows without running them. Both call the
functions of :mod:`lit_parallel.recurrent.layers`. Operators take no Python objects, so what decides how a chain is
solved is found by its number.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from lit_parallel.recurrent.cells import Layer
from lit_parallel.recurrent.controller import Controller
from lit_parallel.recurrent.layers import LayerPass, refuse_second_derivatives, run_layer

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
    """:func:`lit_parallel.recurrent.layers.run_layer`, with a backward pass that is parallel in time."""
    weight_ih, weight_hh, bias_ih, bias_hh = (*weights, None, None)[:4]
    if torch.compiler.is_compiling():
        output, h, c = _layer(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, kind, controller)
    else:
        output, h, c = _Layer.apply(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, kind, controller)
    return output, h, None if c_0 is None else c


def _forward(inputs: tuple[Any, ...], kind: str, controller: int) -> tuple[Tensor, Tensor, Tensor]:
    input, h_0, c_0, *weights = inputs
    with torch.no_grad(), _controllers[controller].timed("forward", input.device):
        output, h, c = run_layer(kind, input, h_0, c_0, [weight for weight in weights if weight is not None])
    return output, h, h if c is None else c


def _backward(
    grads: tuple[Tensor, Tensor, Tensor], inputs: tuple[Any, ...], output: Tensor, needed: tuple[bool, ...], kind: str,
    controller: int, *, compare: bool = True,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    refuse_second_derivatives()
    input, h_0, c_0, *weights = inputs
    layer = Layer(input, output, h_0, c_0, *weights)
    known = _controllers[controller]
    outer = (grads[0], grads[1], None if c_0 is None else grads[2])
    task = LayerPass(kind, layer, outer, needed, known.options.precision)
    if not torch.is_autocast_enabled(input.device.type):
        return known.backward(task, compare=compare)
    with torch.autocast(input.device.type, enabled=False):  # a backward pass may be called under it
        return known.backward(task, compare=compare)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, kind, controller = arguments
        output, h, c = _forward(tuple(inputs), kind, controller)
        ctx.save_for_backward(*inputs, output)
        ctx.kind, ctx.controller = kind, controller
        ctx.known = _controllers[controller]  # the module may be restored before the backward pass
        ctx.set_materialize_grads(False)  # zeros made anew in every pass cost the host more than they seem to
        return output, h, None if inputs[2] is None else c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *inputs, output = ctx.saved_tensors
        h_0, known = inputs[1], ctx.known
        outer = (known.given(grads[0], output), known.given(grads[1], h_0), known.given(grads[2], h_0))
        done = _backward(outer, tuple(inputs), output, ctx.needs_input_grad[:7], ctx.kind, ctx.controller)
        return (*done, None, None)


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
    output, h, c = _forward((input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh), kind, controller)
    return output.contiguous(), h.clone(), h.new_empty(0) if c_0 is None else c.clone()


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
        done = _backward((grad_output, grad_h, grad_c), inputs, output, tuple(needed), kind, controller, compare=False)
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
