"""One recurrent layer in one direction: PyTorch's forward pass, and a backward pass that is parallel in time."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_parallel.errors import UserError
from lit_parallel.kernels import triton_runs_on
from lit_parallel.recurrent.cells import Layer, cell_of
from lit_parallel.recurrent.chain import CellChain, Chain

_FORWARD: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "rnn_tanh": torch._VF.rnn_tanh,
    "rnn_relu": torch._VF.rnn_relu,
    "gru": torch._VF.gru,
    "lstm": torch._VF.lstm,
}
_MAX_KERNEL_HIDDEN = 512
_PART_OF_MEMORY = 1 / 40  # that the tensors of a graph may take for as long as it lives
_CUDNN_MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}


def run_layer(
    kind: str, input: Tensor, h_0: Tensor, c_0: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """PyTorch's own forward pass of one layer in one direction.

    Args:
        kind: ``rnn_tanh``, ``rnn_relu``, ``gru`` or ``lstm``.
        input: ``[time, batch, input]``.
        h_0: ``[1, batch, hidden]``.
        c_0: ``[1, batch, hidden]``, of an LSTM.
        weights: ``weight_ih``, ``weight_hh`` and, with biases, ``bias_ih``, ``bias_hh``.

    Returns:
        The output ``[time, batch, hidden]``, and the last h and c, ``[1, batch, hidden]``.
    """
    state = h_0 if c_0 is None else (h_0, c_0)
    output, h, *c = _FORWARD[kind](
        input, state, in_one_piece(kind, weights), len(weights) == 4, 1, 0.0, torch.is_grad_enabled(), False, False
    )
    return output, h, c[0] if c else None


def in_one_piece(kind: str, weights: list[Tensor]) -> list[Tensor]:
    """Weights as cuDNN wants them: it copies, and warns, unless they lie in one piece, as a single layer's do."""
    first = weights[0]
    if first.device.type != "cuda" or not torch.cudnn_is_acceptable(first):
        return weights
    storage = first.untyped_storage()
    begin, size = storage.data_ptr(), storage.nbytes()
    together = all(begin <= weight.data_ptr() < begin + size for weight in weights)
    if together and size < 1.1 * sum(weight.nbytes for weight in weights):
        return weights
    if torch.is_grad_enabled():
        return weights  # copies would get the gradients
    copies = [weight.detach().clone() for weight in weights]
    hidden = weights[1].shape[1]
    torch._cudnn_rnn_flatten_weight(copies, len(copies), first.shape[1], _CUDNN_MODES[kind], hidden, 0, 1, False, False)
    return copies


def refuse_second_derivatives() -> None:
    """Raise an error if this backward pass is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise UserError(
            "The parallel backward pass has no second derivative (create_graph=True): take these layers out with "
            "lit_parallel.recurrent.restore(module), or set solver='sequential'."
        )


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in float32 as float32, whatever the user chose for training."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision if torch.cuda.is_available() else "ieee"
    if before == "ieee":
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


#: Solves a chain: fills its second argument with what the steps leave behind and returns what arrives before the first
#: step; calls the third while the device is busy, and again if what it saw has changed since.
Solve = Callable[[Chain, Tensor, Callable[[], None]], Tensor]


class Task(ABC):
    """A pass of one recurrent layer, forward or backward, most of which is to solve a chain.

    Attributes:
        input: ``[time, batch, input]``.
    """

    input: Tensor

    @abstractmethod
    def solved(self, solve: Solve) -> tuple[Tensor | None, ...]:
        """The results."""


class BackwardPass(Task):
    """The backward pass of one recurrent layer that has run forward.

    Attributes:
        parameters: Which of the gradients belong to parameters.
        needed: Which of the gradients are wanted.
    """

    parameters: slice
    needed: tuple[bool, ...]

    @abstractmethod
    def gradients(self, solve: Solve) -> tuple[Tensor | None, ...]:
        """All gradients that are wanted."""

    def solved(self, solve: Solve) -> tuple[Tensor | None, ...]:
        return self.gradients(solve)

    @abstractmethod
    def forward(self) -> object:
        """Run forward once more, in PyTorch's own way without gradients."""

    @abstractmethod
    def ordinary_forward(self) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        """Run forward in PyTorch's own way, with gradients: outputs, inputs, and the outputs' gradients."""


class LayerTask(Task):
    """A pass of a layer of an ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` in one direction, which a graph may be made of.

    Attributes:
        kind: See :func:`run_layer`.
        layer: What the pass has.
        needed: Which results are wanted, if not always all.
        precision: Of the products in the chain.
        factors: Of the adjoint, ``[time, batch, factors, hidden]``, if a kernel finds them on its way forward.
    """

    kind: str
    layer: Layer
    needed: tuple[bool, ...] = ()
    precision: str
    factors: Tensor | None

    def variant(self) -> Hashable:
        """Passes of different variants read or write different tensors."""
        return self.needed, self.factors is not None

    @abstractmethod
    def memory(self) -> int:
        """Bytes that a pass takes, about."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What it reads."""

    @abstractmethod
    def with_tensors(self, tensors: Sequence[Tensor]) -> LayerTask:
        """The same pass of other tensors."""

    @abstractmethod
    def new_results(self) -> tuple[Tensor | None, ...]:
        """Memory for the results that are wanted."""

    @abstractmethod
    def solved_near(self, solve: Solve, results: Sequence[Tensor]) -> list[Tensor]:
        """The results that are wanted, those that can be in given memory."""

    def by_kernels(self) -> bool:
        """Whether kernels compute it."""
        return triton_runs_on(self.input.device) and kernels_support(self.kind, self.layer)


class LayerPass(LayerTask, BackwardPass):
    """Of a layer of an ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` in one direction.

    Args:
        kind: See :func:`run_layer`.
        layer: What the forward pass had and made.
        grads: Gradients of the output ``[time, batch, hidden]``, and of the last h and c, ``[batch, hidden]``.
        needed: Whether the gradients of input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh are wanted.
        precision: Of the products in the chain.
        factors: From a forward pass that has found them.
    """

    parameters = slice(3, 7)

    def __init__(
        self,
        kind: str,
        layer: Layer,
        grads: tuple[Tensor, Tensor, Tensor | None],
        needed: tuple[bool, ...],
        precision: str = "full",
        factors: Tensor | None = None,
    ) -> None:
        self.kind, self.layer, self.grads, self.needed, self.precision = kind, layer, grads, needed, precision
        self.input, self.factors = layer.input, factors

    def memory(self) -> int:
        cell = cell_of(self.kind)
        hidden = 4 * self.layer.output.numel()  # passes in a narrower type run in float32
        copies = 2 * 4 * self.layer.input.numel()  # of the input and its gradient
        return copies + hidden * (4 + cell.factors + cell.gates + cell.pre_activations)

    @full_precision()
    def gradients(self, solve: Solve, of_input_into: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """All gradients that are wanted.

        Args:
            solve: The chain.
            of_input_into: Where the input's goes, by far the largest, if it need not be converted.
        """
        cell, needed = cell_of(self.kind), self.needed
        dtype = self.layer.output.dtype
        inner = torch.promote_types(dtype, torch.float32)  # bfloat16 cannot hold a sum over thousands of steps
        layer = self.layer.to(inner)
        grad_output, grad_h, grad_c = self.grads
        last = (grad_h if grad_c is None else torch.cat([grad_h, grad_c], dim=-1)).to(inner)
        chain = build_chain(self.kind, layer, grad_output.to(inner), last, self.precision, self.factors)
        p = torch.empty(chain.length, chain.batch, chain.gradient_size, dtype=inner, device=last.device)
        hidden = layer.h_0.shape[-1]
        of_input, of_hidden = cell.of_input(p, hidden), cell.of_hidden(p, hidden)
        grads: list[Tensor | None] = [None] * 7

        def products() -> None:
            if needed[0]:
                of_rows = of_input.flatten(0, 1)
                out = None if of_input_into is None or inner != dtype else of_input_into.flatten(0, 1)
                product = torch.mm(of_rows, cell.rows_of_input(layer.weight_ih), out=out)
                grads[0] = product.view_as(layer.input)
            if needed[3]:
                grads[3] = cell.rows_from_input(of_input.flatten(0, 1).t() @ layer.input.flatten(0, 1))
            if needed[4]:
                product = of_hidden[1:].flatten(0, 1).t() @ layer.output[:-1].flatten(0, 1)
                grads[4] = product.addmm_(of_hidden[0].t(), layer.h_0)
            if needed[5] or needed[6]:
                sums = _column_sums(p)
                grads[5] = cell.rows_from_input(cell.of_input(sums, hidden)) if needed[5] else None
                grads[6] = cell.of_hidden(sums, hidden).clone() if needed[6] else None

        initial = solve(chain, p, products)
        if needed[1]:
            grads[1] = initial[:, :hidden]
        if needed[2]:
            grads[2] = initial[:, hidden:]
        return tuple(grad if grad is None else grad.to(dtype) for grad in grads)

    def tensors(self) -> list[Tensor]:
        return given((*vars(self.layer).values(), *self.grads, self.factors))

    def with_tensors(self, tensors: Sequence[Tensor]) -> LayerPass:
        each = iter(tensors)
        layer = {name: None if x is None else next(each) for name, x in vars(self.layer).items()}
        grads = tuple(None if grad is None else next(each) for grad in self.grads)
        factors = None if self.factors is None else next(each)
        return LayerPass(self.kind, Layer(**layer), grads, self.needed, self.precision, factors)  # type: ignore[arg-type]

    def solved_near(self, solve: Solve, results: Sequence[Tensor]) -> list[Tensor]:
        return given(self.gradients(solve, results[0] if self.needed[0] else None))

    def new_results(self) -> tuple[Tensor | None, ...]:
        layer = self.layer
        inputs = (layer.input, layer.h_0, layer.c_0, layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh)
        return tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and wanted else None
            for x, wanted in zip(inputs, self.needed, strict=True)
        )

    @torch.no_grad()
    def forward(self) -> object:
        layer = self.layer
        c_0 = None if layer.c_0 is None else layer.c_0[None]
        return run_layer(self.kind, layer.input, layer.h_0[None], c_0, layer.weights)

    def ordinary_forward(self) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        layer = self.layer
        states = [None if x is None else x.detach()[None] for x in (layer.h_0, layer.c_0)]
        with torch.no_grad():
            weights = in_one_piece(self.kind, [weight.detach() for weight in layer.weights])
        inputs = [layer.input.detach(), *states, *weights, None, None][:7]
        for x, wanted in zip(inputs, self.needed, strict=True):
            if x is not None:
                x.requires_grad_(wanted)
        with torch.enable_grad():
            outputs = run_layer(self.kind, inputs[0], inputs[1], inputs[2], weights)  # type: ignore[arg-type]
        of_output, *of_states = self.grads
        grads = [of_output, *(grad[None] for grad in of_states if grad is not None)]
        return [x for x in outputs if x is not None], inputs, grads


def given(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Those that are not None."""
    return [x for x in tensors if x is not None]


def _column_sums(p: Tensor) -> Tensor:
    """Sums over time and batch; on a GPU as a product, which is faster there."""
    p = p.flatten(0, 1)
    return torch.mv(p.t(), p.new_ones(len(p))) if p.is_cuda else p.sum(0)


def kernels_support(kind: str, layer: Layer) -> bool:
    """Whether there are kernels for a layer: they compute in float32, whatever narrower type it has."""
    return kind in _FORWARD and layer.output.dtype != torch.float64 and layer.h_0.shape[-1] <= _MAX_KERNEL_HIDDEN


def build_chain(
    kind: str, layer: Layer, grad_output: Tensor, last: Tensor, precision: str = "full", factors: Tensor | None = None
) -> Chain:
    """The chain of a layer, with its kernel where there is one, whose factors may be known already."""
    if triton_runs_on(last.device) and kernels_support(kind, layer):
        from lit_parallel.kernels import recurrent as kernels

        return kernels.build_chain(kind, layer, grad_output, last, precision, factors)
    cell = cell_of(kind)
    return CellChain(cell, cell.linearise(layer), layer.weight_hh, grad_output, last)


def can_be_captured(task: Task) -> bool:
    """Whether a graph may be made of a pass: by kernels, on a GPU, and not too large to keep its memory."""
    if not isinstance(task, LayerTask) or task.input.device.type != "cuda":
        return False
    if not task.by_kernels() or torch.cuda.is_current_stream_capturing():
        return False
    return fits(task)


def fits(task: LayerTask) -> bool:
    """Whether what a pass takes may be kept: little of the device's memory."""
    device = task.input.device
    return device.type != "cuda" or task.memory() < _PART_OF_MEMORY * _memory_of(device)


@functools.cache
def _memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory
