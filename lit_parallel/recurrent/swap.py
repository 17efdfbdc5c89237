"""Let recurrent layers be parallel in time, and undo it: ``parallelize(module)``, ``restore(module)``."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import PackedSequence

from lit_parallel.errors import UserError, did_you_mean
from lit_parallel.networks.rnn import Recurrence
from lit_parallel.options import fields_of
from lit_parallel.recurrent.controller import BackwardRecord, Controller, shape_of
from lit_parallel.recurrent.operators import recurrent_layer, register
from lit_parallel.recurrent.options import RecurrentOptions, check_recurrent_options
from lit_parallel.recurrent.own_cell import CellRecurrence

logger = logging.getLogger(__name__)

_KINDS = (nn.RNN, nn.GRU, nn.LSTM)
_WORTH_IT = 1.05  # times faster than the ordinary way, or auto takes that
_UNSEEN = 2e-4  # seconds, on a slow host, that a parallel pass takes beside what is measured of it


def parallelize(module: nn.Module, options: RecurrentOptions | None = None, **chosen: Any) -> list[str]:
    """Let every recurrent layer in a module backpropagate in parallel over time, and with ``forward=True`` run so too.

    ``nn.RNN``, ``nn.GRU``, ``nn.LSTM`` and :class:`lit_parallel.networks.rnn.Recurrence` are found at any depth, the
    module itself included. Their parameters and names stay as they are, and so do their forward results, with
    ``forward=True`` to the tolerance. What cannot be done in parallel (``proj_size``, packed sequences, the forward
    pass of a cell of one's own) goes on as before, with a warning.

    Args:
        module: Changed in place.
        options: How; by default :class:`RecurrentOptions`.
        **chosen: Single options, such as ``solver="jacobi"``.

    Returns:
        The names of the layers.

    Raises:
        UserError: An option is out of range, or layers are parallel already.
    """
    options = dataclasses.replace(options or RecurrentOptions())
    known = fields_of(options)
    for name, value in chosen.items():
        if name not in known:
            raise UserError(f"There is no option '{name}' of parallel backpropagation.{did_you_mean(name, known)}")
        setattr(options, name, value)
    check_recurrent_options(options)
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, (*_KINDS, Recurrence))]
    for name, layer in layers:
        if _is_parallel(layer):
            raise UserError(f"{_shown(name)} is parallel already: call lit_parallel.recurrent.restore first.")
    able = []
    for name, layer in layers:  # a warning may be an error: nothing is changed before all are told
        if _has_own_forward(layer):
            warnings.warn(f"{_shown(name)} has a forward of its own and keeps its backward pass.", stacklevel=2)
        elif isinstance(layer, nn.RNNBase) and layer.proj_size > 0:
            warnings.warn(f"{_shown(name)} has proj_size={layer.proj_size} and keeps its backward pass.", stacklevel=2)
        else:
            able.append((name, layer))
            if options.forward and isinstance(layer, Recurrence):
                warnings.warn(f"{_shown(name)} has a cell of its own and keeps its forward pass.", stacklevel=2)
    for name, layer in able:
        made = ParallelRecurrence if isinstance(layer, Recurrence) else _rnn_forward()
        layer.forward = made(layer, name, options)  # type: ignore[method-assign]
    return [name for name, _ in able]


def restore(module: nn.Module) -> None:
    """Undo :func:`parallelize`."""
    for layer in module.modules():
        if _is_parallel(layer):
            del layer.forward


def records(module: nn.Module, *, wait: bool = True) -> dict[str, BackwardRecord]:
    """What the newest backward passes took, by the names of the layers, such as ``lstm.l0`` and ``lstm.l0_reverse``.

    Args:
        module: The layers, or what contains them.
        wait: For the device to say how they went; if not, a record may be completed only later.
    """
    found = {}
    for forward in _forwards(module):
        for controller in forward.controllers.values():
            if (record := controller.record(wait=wait)) is not None:
                found[controller.name] = record
    return found


def _forwards(module: nn.Module) -> Iterator[_ParallelForward]:
    for layer in module.modules():
        forward = layer.__dict__.get("forward")
        if isinstance(forward, _ParallelForward):
            yield forward


def _is_parallel(layer: nn.Module) -> bool:
    return isinstance(layer.__dict__.get("forward"), _ParallelForward)


def _has_own_forward(layer: nn.Module) -> bool:
    known = [kind.forward for kind in (*_KINDS, Recurrence)]
    return "forward" in layer.__dict__ or type(layer).forward not in known


def _shown(name: str) -> str:
    return f"'{name}'" if name else "The module"


class _ParallelForward:
    """Stands in for a module's ``forward``: the same results, other ways to them and to the gradients."""

    def __init__(self, module: nn.Module, name: str, options: RecurrentOptions) -> None:
        self.module, self.name, self.options = module, name, options
        self._parts = _parts_of(module)
        self._ordinary_calls = 0
        self._told: set[str] = set()
        self._settled: set[tuple[Any, ...]] = set()  # inputs for which the ordinary way was found to be faster
        self._begin()

    def _begin(self) -> None:
        """Register a controller for every layer and direction: now, as a compiler cannot do it later."""
        names = {part: f"{self.name}.{part}" if self.name else part for part in self._parts}
        self.controllers = {part: Controller(name, self.options) for part, name in names.items()}
        self.numbers = {part: register(controller) for part, controller in self.controllers.items()}

    def __getstate__(self) -> dict[str, Any]:
        learnt = ("controllers", "numbers")  # which belongs to a device and a process
        return {name: value for name, value in self.__dict__.items() if name not in learnt} | {"_settled": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _is_settled(self, input: Any) -> bool:
        """Whether nothing but the ordinary way need be thought of: this costs the host next to nothing."""
        if not self._settled or _kind_of(input) not in self._settled:
            return False
        every = self.options.probe_every
        if every > 0 and (self._ordinary_calls + 1) % every == 0:
            return False
        self._ordinary_calls += 1
        return True

    def _ordinary(self, *arguments: Any) -> Any:
        return type(self.module).forward(self.module, *arguments)

    def _is_slower(self, input: Tensor) -> bool:
        """Whether the ordinary way was measured to be faster for such an input; says so once."""
        shape = shape_of(input)
        measured = [controller.seconds(shape) for controller in self.controllers.values()]
        times = [seconds for seconds in measured if seconds is not None]
        if len(times) < len(measured):
            return False
        ordinary, parallel = (sum(column) for column in zip(*times, strict=True))
        auto = self.options.solver == "auto"
        if (_WORTH_IT * parallel + _UNSEEN if auto else parallel) <= ordinary:
            return False
        self._tell_once(
            "slower",
            f"{_shown(self.name)} trains as fast or faster with its ordinary backward pass for {shape[0]} steps of "
            f"{shape[1]} sequences ({1000 * ordinary:.2f} ms against {1000 * parallel:.2f} ms)"
            + (", which is used." if auto else "; callbacks.jacobi_backprop.solver=auto would use it."),
        )
        return auto

    def _take_ordinary(self, x: Tensor, differentiated: bool = True) -> bool:
        controllers, shape = self.controllers.values(), shape_of(x)
        if differentiated:
            ordinary = self._is_slower(x)
        else:
            ordinary = all(controller.ahead.is_ordinary(shape) for controller in controllers)
        if not ordinary:
            return False
        self._ordinary_calls += 1
        every = self.options.probe_every
        if every == 0 or self._ordinary_calls % every != 0:
            return True
        for controller in controllers:  # now and then: is it still so?
            controller.recheck = differentiated or controller.recheck
            controller.ahead.recheck = True
        return False

    def _tell_once(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            logger.warning(message)


class ParallelForward(_ParallelForward):
    """The forward of an ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``, one layer and direction after the other."""

    module: nn.RNNBase

    def __call__(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """The module's own forward: same arguments, same results."""
        if not torch.compiler.is_compiling() and self._is_settled(input):
            return self._ordinary(input, hx)
        return self._run(input, hx)

    @torch.compiler.disable
    def _run(self, input: Tensor | PackedSequence, hx: Any) -> Any:
        return self.run(input, hx)

    def run(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """The same, as a compiler may trace it."""
        module = self.module
        hx = tuple(hx) if isinstance(hx, list) else hx
        if isinstance(input, PackedSequence):
            self._tell_once("packed", f"{_shown(self.name)} was given a packed sequence and keeps its backward pass.")
            return self._ordinary(input, hx)
        differentiated = self._needs_gradients(input, hx)
        if self.options.solver == "sequential" or not (differentiated or self.options.forward):
            return self._ordinary(input, hx)
        if input.dim() not in (2, 3) or input.numel() == 0 or (hx is not None and not self._fits(input, hx)):
            return self._ordinary(input, hx)  # which says what is wrong
        batched = input.dim() == 3
        is_lstm = isinstance(module, nn.LSTM)
        x = input if batched else input.unsqueeze(1)
        if batched and module.batch_first:
            x = x.transpose(0, 1)
        directions = 2 if module.bidirectional else 1
        if hx is None:
            h_0 = x.new_zeros(len(self._parts), x.shape[1], module.hidden_size)
            c_0 = h_0 if is_lstm else None
        else:
            h_0, c_0 = hx if is_lstm else (hx, None)
            if not batched:
                h_0, c_0 = h_0.unsqueeze(1), None if c_0 is None else c_0.unsqueeze(1)
        # It looks for the batch where batch_first says.
        shown = x.transpose(0, 1) if module.batch_first else x
        module.check_forward_args(shown, (h_0, c_0) if is_lstm else h_0, None)  # type: ignore[arg-type]
        dtype = _autocast_dtype(x)
        if dtype is not None and x.device.type == "cpu" and isinstance(module, nn.GRU):
            dtype = h_0.dtype  # there only its products are cast
        if dtype is not None:
            x, h_0, c_0 = x.to(dtype), h_0.to(dtype), None if c_0 is None else c_0.to(dtype)
        if not torch.compiler.is_compiling():
            if self._take_ordinary(x, differentiated):
                self._settled.add(_kind_of(input))
                return self._ordinary(input, hx)
            self._settled.discard(_kind_of(input))

        first_h, first_c = _split(h_0), [None] * len(self._parts) if c_0 is None else _split(c_0)
        last_h: list[Tensor] = []
        last_c: list[Tensor] = []
        for layer in range(module.num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                part = self._parts[index]
                weights = [
                    getattr(module, f"{name}_{part}")
                    for name in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))
                ]
                if dtype is not None:
                    weights = [weight.to(dtype) for weight in weights]
                output, h, c = recurrent_layer(
                    self._kind,
                    self.numbers[part],
                    x.flip(0) if direction else x,
                    first_h[index],
                    first_c[index],
                    weights,
                )
                outputs.append(output.flip(0) if direction else output)
                last_h.append(h)
                if c is not None:
                    last_c.append(c)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
            if module.dropout > 0 and layer < module.num_layers - 1:
                x = F.dropout(x, module.dropout, module.training)
        output = x if batched else x.squeeze(1)
        if batched and module.batch_first:
            output = output.transpose(0, 1)
        h_n = _join(last_h, batched)
        return (output, (h_n, _join(last_c, batched))) if is_lstm else (output, h_n)

    @property
    def _kind(self) -> str:
        module = self.module
        if isinstance(module, nn.RNN):
            return f"rnn_{module.nonlinearity}"
        return "gru" if isinstance(module, nn.GRU) else "lstm"

    def _needs_gradients(self, input: Tensor, hx: Any) -> bool:
        if not torch.is_grad_enabled():
            return False
        states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
        return any(x.requires_grad for x in itertools.chain((input,), states, self.module.parameters()))

    def _fits(self, input: Tensor, hx: Any) -> bool:
        states = hx if isinstance(hx, tuple) else (hx,)
        expected = 2 if isinstance(self.module, nn.LSTM) else 1
        return len(states) == expected and all(state.dim() == input.dim() for state in states)


class ParallelRecurrence(_ParallelForward):
    """The forward of a :class:`~lit_parallel.networks.rnn.Recurrence`, whose cell is the user's own."""

    module: Recurrence

    def __call__(self, input: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The module's own forward: same arguments, same results."""
        if not torch.compiler.is_compiling() and self._is_settled(input):
            return self._ordinary(input, h_0)
        return self._run(input, h_0)

    @torch.compiler.disable
    def _run(self, input: Tensor, h_0: Tensor | None) -> tuple[Tensor, Tensor]:
        module = self.module
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        differentiable = [input, *weights] if h_0 is None else [input, h_0, *weights]
        if (
            self.options.solver == "sequential"
            or not torch.is_grad_enabled()
            or not any(x.requires_grad for x in differentiable)
            or input.dim() not in (2, 3)
            or input.numel() == 0
            or (h_0 is not None and (h_0.dim() != input.dim() or len(h_0) != 1))
        ):
            return self._ordinary(input, h_0)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and module.batch_first:
            x = x.transpose(0, 1)
        if self._take_ordinary(x):
            self._settled.add(_kind_of(input))
            return self._ordinary(input, h_0)
        self._settled.discard(_kind_of(input))
        if h_0 is None:
            h_0 = x.new_zeros(1, x.shape[1], module.hidden_size)
        elif not batched:
            h_0 = h_0.unsqueeze(1)
        output, h = CellRecurrence.apply(module, self.controllers["cell"], x, h_0[0], *weights)
        if not batched:
            return output.squeeze(1), h
        return output.transpose(0, 1) if module.batch_first else output, h[None]


class TracedForward(ParallelForward):
    """The same for a compiler that was told to trace recurrent layers (``torch._dynamo.config.allow_rnn``)."""

    __call__ = ParallelForward.run


def _kind_of(input: Any) -> tuple[Any, ...]:
    """What decides which way is taken; of a packed sequence nothing."""
    if not isinstance(input, Tensor):
        return ()
    device, graded = input.device, torch.is_grad_enabled()
    return input.shape, input.dtype, device, graded, torch.is_autocast_enabled(device.type)


def _rnn_forward() -> type[ParallelForward]:
    dynamo = sys.modules.get("torch._dynamo.config")
    return TracedForward if getattr(dynamo, "allow_rnn", False) else ParallelForward


def _parts_of(module: nn.Module) -> list[str]:
    """What has a backward pass of its own: each layer in each direction, as in the parameters' names, or the cell."""
    if not isinstance(module, nn.RNNBase):
        return ["cell"]
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]


def _split(states: Tensor) -> Sequence[Tensor]:
    """The states ``[1, batch, hidden]`` of each layer and direction; a single one's need no work."""
    return [states] if len(states) == 1 else states.split(1)


def _join(states: list[Tensor], batched: bool) -> Tensor:
    """The states of all layers and directions; a single one's are its own, not a view, which has no ``detach_``."""
    joined = states[0] if len(states) == 1 else torch.cat(states)
    return joined if batched else joined.squeeze(1)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What a recurrent layer computes in under autocast, as PyTorch's own does."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)
