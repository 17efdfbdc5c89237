"""Let DenseNets be evaluated in parallel, and undo it: ``evaluate_in_parallel(module)``, ``restore(module)``."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_parallel.dense.auto import Evaluator, shown
from lit_parallel.dense.evaluation import EvaluationRecord
from lit_parallel.dense.options import DenseOptions, check_dense_options
from lit_parallel.dense.structure import find_dense_nets, structure_of
from lit_parallel.errors import UserError, did_you_mean
from lit_parallel.options import fields_of


def evaluate_in_parallel(module: nn.Module, options: DenseOptions | None = None, **chosen: Any) -> list[str]:
    """Let every DenseNet in a module evaluate the layers of its dense blocks in parallel.

    DenseNets are found at any depth, the module itself included, by torchvision's attribute names. Parameters, their
    names, checkpoints and hooks of the network stay as they are; hooks of modules within it are not called where
    kernels do their work. In training mode, and where gradients are recorded, a network goes the ordinary way.

    Changed weights are noticed at the next call, but for what leaves no trace in PyTorch: writing through ``.data``
    (``parameter.data.mul_(2)``), or into weights made in inference mode. Call :func:`refresh` after that.

    Args:
        module: Changed in place.
        options: How; by default :class:`~lit_parallel.dense.options.DenseOptions`.
        **chosen: Single options, such as ``solver="gs_jacobi"``.

    Returns:
        The names of the networks.

    Raises:
        UserError: An option is out of range, or a network is parallel already.
    """
    options = dataclasses.replace(options or DenseOptions())
    known = fields_of(options)
    for name, value in chosen.items():
        if name not in known:
            raise UserError(f"There is no option '{name}' of parallel evaluation.{did_you_mean(name, known)}")
        setattr(options, name, value)
    check_dense_options(options)
    networks = find_dense_nets(module)
    for name, network in networks.items():
        if _is_parallel(network):
            raise UserError(f"{shown(name)} is parallel already: call lit_parallel.dense.restore first.")
    able = {}
    for name, network in networks.items():  # a warning may be an error: nothing is changed before all are told
        obstacle = _obstacle(module, name, network)
        if obstacle is None:
            able[name] = network
        else:
            warnings.warn(f"{shown(name)} {obstacle} and is evaluated as before.", stacklevel=2)
    for name, network in able.items():
        network.forward = ParallelForward(network, name, options)
    return list(able)


def restore(module: nn.Module) -> None:
    """Undo :func:`evaluate_in_parallel`."""
    for part in module.modules():
        if _is_parallel(part):
            del part.forward


def refresh(module: nn.Module) -> None:
    """Read the weights of a module's DenseNets anew, after a change without trace, such as through ``.data``."""
    for part in module.modules():
        if _is_parallel(part):
            part.__dict__["forward"].refresh()


def records(module: nn.Module) -> dict[str, EvaluationRecord]:
    """What the newest evaluations took, by the names of the networks."""
    found = {forward.name: forward.record for forward in parallel_forwards(module).values()}
    return {name: record for name, record in found.items() if record is not None}


def parallel_forwards(module: nn.Module) -> dict[str, ParallelForward]:
    """What stands in for the forwards of a module's DenseNets, by the names of the networks."""
    parts = module.modules()
    forwards = [part.__dict__["forward"] for part in parts if _is_parallel(part)]
    return {forward.name: forward for forward in forwards}


class ParallelForward:
    """Stands in for a DenseNet's ``forward``: the same logits within the tolerance, another way to them.

    Args:
        network: The DenseNet.
        name: Of the network, for messages.
        options: How it is evaluated.

    Attributes:
        record: What the newest evaluation took; ``None`` before the first.
    """

    def __init__(self, network: nn.Module, name: str, options: DenseOptions) -> None:
        self.network, self.name, self.options = network, name, options
        self._begin()

    def _begin(self) -> None:
        self.record: EvaluationRecord | None = None
        self._evaluator: Evaluator | None = None
        self._parts: _Parts | None = None
        self._weights: tuple[Any, ...] | None = None  # as they were when the evaluator last saw them
        self._calls = 0

    def __getstate__(self) -> dict[str, Any]:
        # What was learnt belongs to a device and a process.
        return {"network": self.network, "name": self.name, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @torch.compiler.disable
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The network's own forward: same arguments, same results."""
        if self._goes_the_ordinary_way(arguments, named) or self._trains_within():
            self.refresh()  # they may be in training: what was made of them is to be made anew
            return self._ordinary(*arguments, **named)
        (images,) = arguments
        evaluator = self._evaluator
        if evaluator is None:
            evaluator = self._evaluator = Evaluator(self.network, self.name, self.options, self._ordinary)
        assert self._parts is not None
        if self._weights is None:
            evaluator.refresh()
            self._weights = self._parts.outline()
        every = self.options.probe_every
        probed = every > 0 and self._calls % every == 0
        self._calls += 1
        evaluate = evaluator.probe if probed else evaluator
        logits, self.record = evaluate(images)
        weights = self._parts.outline()  # only now: a device works meanwhile
        if weights != self._weights:
            evaluator.refresh()
            self._weights = weights
            logits, self.record = evaluate(images)
        return logits

    def refresh(self) -> None:
        """Read the weights anew at the next call."""
        self._weights = None

    def learn_from(self, other: ParallelForward | None) -> None:
        """Take over what another one has learnt, if it has stood in for the same network with the same options."""
        if other is None or other._evaluator is None or other.network is not self.network:
            return
        if other.options == self.options and other._evaluator.structure == structure_of(self.network):
            self._evaluator, self._parts = other._evaluator, other._parts

    def _trains_within(self) -> bool:
        """Whether a part is in training mode, such as a batch norm that takes the batch's own statistics."""
        if self._parts is None or not self._parts.complete():
            self._parts, self._evaluator, self._weights = _Parts(self.network), None, None
        return self._parts.training()

    def _ordinary(self, *arguments: Any, **named: Any) -> Any:
        return type(self.network).forward(self.network, *arguments, **named)

    def _goes_the_ordinary_way(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
        images = arguments[0] if len(arguments) == 1 and not named else None
        if not isinstance(images, Tensor) or images.dim() != 4 or images.numel() == 0 or self.network.training:
            return True
        if not images.is_floating_point() or torch.jit.is_tracing():
            return True
        return torch.is_grad_enabled() and any(x.requires_grad for x in (images, *self.network.parameters()))


def _obstacle(module: nn.Module, name: str, network: nn.Module) -> str | None:
    """Why a network cannot be evaluated in parallel."""
    if isinstance(network, torch.jit.ScriptModule):
        return "is scripted"
    if any(_wraps_compiled(part) or part._compiled_call_impl is not None for part in _path(module, name)):
        return "is compiled (torch.compile)"
    if "forward" in network.__dict__:
        return "has a forward of its own"
    if any(part._forward_hooks or part._forward_pre_hooks for part in network.modules() if part is not network):
        return "has hooks within"
    try:
        structure_of(network)
    except UserError as error:
        return f"is not the usual one ({str(error).rstrip('.')})"
    return None


def _wraps_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules


def _path(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """A module, and what leads from it to a module within, that one included."""
    yield module
    for part in name.split(".") if name else ():
        module = module._modules[part]  # type: ignore[assignment]
        yield module


def _is_parallel(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), ParallelForward)


class _Parts:
    """A network's modules and tensors, listed once: then a look at all of them is a matter of microseconds.

    What is kept are the containers, since a move puts other tensors into them.
    """

    def __init__(self, network: nn.Module) -> None:
        self._modules = list(network.modules())
        self._children = [part._modules for part in self._modules if part._modules]
        self._known = list(_values_of(self._children))
        both = ((part._parameters, part._buffers) for part in self._modules)
        self._tensors = [tensors for tensors in itertools.chain.from_iterable(both) if tensors]

    def complete(self) -> bool:
        """Whether these are still all modules."""
        return list(_values_of(self._children)) == self._known

    def training(self) -> bool:
        """Whether any of them is in training mode."""
        return any(map(_TRAINING, self._modules))

    def outline(self) -> tuple[Any, ...]:
        """Changes when a training step, a checkpoint, a move or an operation in place has changed a tensor."""
        tensors = [x for x in _values_of(self._tensors) if x is not None]
        try:
            versions = list(map(_VERSION, tensors))
        except RuntimeError:  # some are made in inference mode, and have none
            versions = [0 if x.is_inference() else x._version for x in tensors]
        return versions, list(map(_ADDRESS, tensors))


_TRAINING, _VERSION = operator.attrgetter("training"), operator.attrgetter("_version")
_ADDRESS = Tensor.data_ptr


def _values_of(containers: list[Any]) -> Iterator[Any]:
    return itertools.chain.from_iterable(container.values() for container in containers)
