"""A recurrent layer's forward pass as a chain: nonlinear, and solved by the same blocks as the backward pass.

``h_t = f(x_t, h_{t-1})`` is a chain like the adjoint's, walked in the other direction: here its steps are numbered from
the end of the sequence, so that step 0 is the last in time and everything that is said of a chain holds. A block starts
from zero ``halo`` steps before its own (multiple shooting; what lies further back is mostly forgotten); neighbours that
disagree at their border walk again from what was found there. For recurrences that remember see DEER (Lim et al. 2024,
https://arxiv.org/abs/2309.12252), whose Newton iterations this does not need where a network forgets.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_parallel.kernels import triton_runs_on
from lit_parallel.recurrent.cells import Cell, Layer, cell_of
from lit_parallel.recurrent.chain import Chain, SteppedChain, blocks_of
from lit_parallel.recurrent.layers import LayerTask, Solve, fits, full_precision, given, kernels_support, run_layer
from lit_parallel.recurrent.solve import SAFETY, Gain, Plan

_NUDGE = 1e-3  # of the states: small enough to be linear, far above float32's rounding
_MEASURED_STEPS = 16  # over which a nudge is followed: by then it need not have sunk into rounding


class StateChain(Chain):
    """The states of a layer; what a step leaves behind is its output."""

    leaves_the_rest = True

    @abstractmethod
    def in_time(self, into: Tensor) -> Tensor:
        """What :meth:`walk` has filled, ``[time, batch, hidden]``, from the first step in time to the last."""


class CellStateChain(SteppedChain, StateChain):
    """The states of an RNN, a GRU or an LSTM in plain PyTorch."""

    def __init__(self, cell: Cell, from_input: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor) -> None:
        """Take what is there before the forward pass.

        Args:
            cell: The kind.
            from_input: What the input contributes to the gates, ``[time, batch, gates * hidden]``.
            weight: ``weight_hh``, ``[gates * hidden, hidden]``.
            bias: ``bias_hh``, ``[gates * hidden]``, or None.
            first: The state before the first step in time, ``[batch, states * hidden]``.
        """
        self.cell, self.weight, self.bias, self.last = cell, weight, bias, first
        self.from_input = from_input.flip(0)
        self.length, self.batch, _ = from_input.shape
        self.gradient_size = weight.shape[1]
        self.state_size = first.shape[1]
        operations = 2 * weight.numel()
        self.step_costs = (1e-4, operations / 2e13) if first.is_cuda else (6e-5, operations / 3e10)

    def step(self, first: int, stride: int, v: Tensor, source: bool) -> tuple[Tensor, Tensor]:
        state = self.cell.advance(self.from_input[first::stride][:, :, None], v, self.weight, self.bias)
        return state[..., : self.gradient_size], state

    def in_time(self, into: Tensor) -> Tensor:
        return into.flip(0)


def measure_state_gain(chain: StateChain, plan: Plan) -> Gain:
    """How errors of states grow: nudge the states that a walk finds at all borders, and see what becomes of it."""
    block = min(_MEASURED_STEPS, chain.length)
    blocks = blocks_of(chain.length, block)
    start = chain.walk(block, max(plan.halo, block)).arrived
    generator = torch.Generator(start.device).manual_seed(1)
    nudge = torch.randn(start.shape, generator=generator, dtype=start.dtype, device=start.device)
    size = start.square().mean().sqrt()
    nudge = nudge * (_NUDGE * torch.where(size > 0, size, 1.0))
    outputs = start.new_empty(2, chain.length, chain.batch, chain.gradient_size)
    before, after = chain.walk(block, 0, start, into=outputs[0]), chain.walk(block, 0, start + nudge, into=outputs[1])
    squares = chain.in_time((outputs[1] - outputs[0]).square().sum(-1, keepdim=True)).flip(0)[..., 0]
    padded = torch.cat([squares, squares.new_zeros(blocks * block - len(squares), chain.batch)])
    norm = nudge.square().sum(-1).sqrt()[..., 0]
    inside = padded.unflatten(0, (blocks, block)).sum(1).sqrt() / norm
    growth = ((after.left - before.left).square().sum(-1).sqrt()[..., 0] / norm)[: max(1, chain.length // block)]
    numbers = torch.stack([inside.amax(), growth.amax() ** (1 / block)]).tolist()
    return Gain(SAFETY * numbers[0], numbers[1])


class ForwardPass(LayerTask):
    """The forward pass of a layer of an ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` in one direction.

    Args:
        kind: See :func:`~lit_parallel.recurrent.layers.run_layer`.
        input: ``[time, batch, input]``.
        h_0: ``[batch, hidden]``.
        c_0: ``[batch, hidden]``, of an LSTM.
        weights: ``weight_ih``, ``weight_hh`` and, with biases, ``bias_ih``, ``bias_hh``.
        precision: Of the products in the chain.
        linearised: Whether the factors of the backward pass are wanted as well, where a kernel finds them on its way.
    """

    def __init__(
        self,
        kind: str,
        input: Tensor,
        h_0: Tensor,
        c_0: Tensor | None,
        weights: Sequence[Tensor | None],
        precision: str = "full",
        *,
        linearised: bool = False,
    ) -> None:
        self.kind, self.input, self.precision = kind, input, precision
        output = input.new_empty(*input.shape[:2], h_0.shape[-1])
        weight_ih, weight_hh, bias_ih, bias_hh = (*weights, None, None)[:4]
        assert weight_ih is not None
        assert weight_hh is not None
        self.layer = Layer(input, output, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
        cell = cell_of(kind)
        self.factors = None
        if linearised and cell.gates > 1 and self.by_kernels() and fits(self):
            shape = (*input.shape[:2], cell.factors, h_0.shape[-1])
            self.factors = input.new_empty(shape, dtype=torch.float32)

    def ordinary(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """PyTorch's own: output ``[time, batch, hidden]``, last h and c ``[1, batch, hidden]``."""
        layer = self.layer
        c_0 = None if layer.c_0 is None else layer.c_0[None]
        return run_layer(self.kind, layer.input, layer.h_0[None], c_0, layer.weights)

    def solved(self, solve: Solve) -> tuple[Tensor | None, ...]:
        return self._states(solve, self.layer, self.factors)

    @full_precision()
    def _states(self, solve: Solve, layer: Layer, factors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The output, the last h and c, ``[batch, hidden]``, and the factors."""
        dtype, hidden = layer.output.dtype, layer.h_0.shape[-1]
        layer = layer.to(torch.promote_types(dtype, torch.float32))
        chain = build_state_chain(self.kind, layer, self.precision)
        if factors is not None:
            chain.factors = factors  # type: ignore[attr-defined]
        into = layer.output
        initial = solve(chain, into, lambda: None)
        output = chain.in_time(into)
        h, c = initial[:, :hidden], None if layer.c_0 is None else initial[:, hidden:]
        return *(None if x is None else x.to(dtype).contiguous() for x in (output, h, c)), factors

    def by_kernels(self) -> bool:
        if not super().by_kernels():
            return False
        from lit_parallel.kernels.recurrent_states import supports

        return supports(self.layer)

    def memory(self) -> int:
        cell = cell_of(self.kind)
        return 4 * self.layer.output.numel() * (2 + cell.gates + cell.factors) + 4 * self.input.numel()

    def tensors(self) -> list[Tensor]:
        return given(value for name, value in vars(self.layer).items() if name != "output")

    def with_tensors(self, tensors: Sequence[Tensor]) -> ForwardPass:
        each = iter(tensors)
        other = ForwardPass.__new__(ForwardPass)
        named = vars(self.layer).items()
        layer = {name: x if x is None or name == "output" else next(each) for name, x in named}
        other.kind, other.precision, other.layer = self.kind, self.precision, Layer(**layer)
        other.input, other.factors = other.layer.input, self.factors
        return other

    def new_results(self) -> tuple[Tensor | None, ...]:
        layer = self.layer
        c = None if layer.c_0 is None else torch.empty_like(layer.c_0)
        return layer.output, torch.empty_like(layer.h_0), c, self.factors

    def solved_near(self, solve: Solve, results: Sequence[Tensor]) -> list[Tensor]:
        factors = None if self.factors is None else results[-1]
        return given(self._states(solve, dataclasses.replace(self.layer, output=results[0]), factors))


def build_state_chain(kind: str, layer: Layer, precision: str = "full") -> StateChain:
    """The chain of a layer's states, with its kernel where there is one."""
    if triton_runs_on(layer.input.device) and kernels_support(kind, layer):
        from lit_parallel.kernels.recurrent_states import KernelStateChain, supports

        if supports(layer):
            return KernelStateChain(kind, layer, precision)
    first = layer.h_0 if layer.c_0 is None else torch.cat([layer.h_0, layer.c_0], dim=-1)
    return CellStateChain(cell_of(kind), layer.from_input(), layer.weight_hh, layer.bias_hh, first)
