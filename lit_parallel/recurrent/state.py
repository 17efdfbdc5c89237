"""What parallel layers have learnt, as plain values: a checkpoint keeps it, and training goes on with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lit_parallel.recurrent.solve import Gain, Plan
from lit_parallel.recurrent.swap import _forwards, _ParallelForward
from lit_parallel.recurrent.tuning import Tuner, _Tuned

_OF_A_PROCESS = ("outcome", "captured", "pending", "in_one_walk")  # of the newest pass, and a graph


def state_of(module: nn.Module) -> dict[str, Any]:
    """What was learnt by every layer that :func:`~lit_parallel.recurrent.parallelize` has changed in a module.

    Returns:
        Plans (blocks, halos, ranks), measured gains, bases and times for each shape of input, by the layers' names.
    """
    return {
        forward.name: {
            "ordinary_calls": forward._ordinary_calls,
            "passes": {name: _learnt(tuner) for name, tuner in _passes(forward)},
        }
        for forward in _forwards(module)
    }


def set_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Go on with what :func:`state_of` has told of a module of the same layers, on a device of the same kind."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    for forward in _forwards(module):
        if saved := state.get(forward.name):
            forward._ordinary_calls = saved["ordinary_calls"]
            for name, tuner in _passes(forward):
                of_device = [each for each in saved["passes"][name] if each["device"] == device.type]
                tuner._tuned = dict(_tuned(each, device) for each in of_device)


def _passes(forward: _ParallelForward) -> Iterator[tuple[str, Tuner]]:
    for part, controller in forward.controllers.items():
        yield f"{part} backward", controller
        yield f"{part} forward", controller.ahead


def _learnt(tuner: Tuner) -> list[dict[str, Any]]:
    tuner.settle()
    return [
        {name: value for name, value in vars(tuned).items() if name not in _OF_A_PROCESS}
        | {"plans": {solver: dataclasses.asdict(plan) for solver, plan in tuned.plans.items()}}
        | {"gains": {solver: dataclasses.asdict(gain) for solver, gain in tuned.gains.items()}}
        | {"time": time, "batch": batch, "device": device.type, "dtype": str(dtype).removeprefix("torch.")}
        for (time, batch, device, dtype), tuned in tuner._tuned.items()
    ]


def _tuned(saved: dict[str, Any], device: torch.device) -> tuple[Any, _Tuned]:
    values = dict(saved)
    time, batch, _, dtype = (values.pop(name) for name in ("time", "batch", "device", "dtype"))
    tuned = _Tuned(**values)
    tuned.plans = {solver: Plan(**plan) for solver, plan in values["plans"].items()}
    tuned.gains = {solver: Gain(**gain) for solver, gain in values["gains"].items()}
    tuned.basis = None if tuned.basis is None else tuned.basis.to(device)
    return (time, batch, device, getattr(torch, dtype)), tuned
