"""One step of an RNN, a GRU and an LSTM, and its adjoint, linearised at hidden states that are already known.

The forward pass is over, so every gate follows from the hidden states by one large matrix product, and the backward
pass is linear. With ``v_t`` what arrives at step t from the steps after it and ``g_t`` the gradient of the output
there, every cell reads

    ``s_t = g_t + v_t``,   ``p_t = D_t s_t``,   ``v_{t-1} = E_t s_t + p_t W_hh``

with diagonal ``D_t`` and ``E_t``: ``p_t`` are the gradients of the gates' pre-activations, from which all other
gradients follow by one product each. (An LSTM's v is a pair, for h and for c.) Song et al. 2021, section 4.1, solve
such a chain by Jacobi iteration; Lim et al. 2019 (BPPSA, https://arxiv.org/abs/1907.10134) by a scan.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class Layer:
    """One layer in one direction.

    Attributes:
        input: ``[time, batch, input]``.
        output: The hidden states, ``[time, batch, hidden]``; before the forward pass, memory for them.
        h_0: ``[batch, hidden]``.
        c_0: ``[batch, hidden]``, of an LSTM.
        weight_ih: ``[gates * hidden, input]``.
        weight_hh: ``[gates * hidden, hidden]``.
        bias_ih: ``[gates * hidden]``, or None.
        bias_hh: The same.
    """

    input: Tensor
    output: Tensor
    h_0: Tensor
    c_0: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    @property
    def weights(self) -> list[Tensor]:
        """The parameters that there are, in PyTorch's order."""
        found = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return [weight for weight in found if weight is not None]

    def to(self, dtype: torch.dtype) -> Layer:
        """The layer in another type."""
        given = {name: value.to(dtype) for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(self, **given)

    def from_input(self) -> Tensor:
        """What the input contributes to the gates, ``[time, batch, gates * hidden]``."""
        product = _linear(self.input.flatten(0, 1), self.weight_ih, self.bias_ih)
        return product.unflatten(0, self.input.shape[:2])

    def add_from_hidden(self, gates: Tensor) -> Tensor:
        """Add, in place, what the hidden states before each step contribute to the gates."""
        weight = self.weight_hh.t()
        gates[0].addmm_(self.h_0, weight)
        gates[1:].flatten(0, 1).addmm_(self.output[:-1].flatten(0, 1), weight)
        return gates if self.bias_hh is None else gates.add_(self.bias_hh)

    def previous(self) -> Tensor:
        """The hidden states before each step, ``[time, batch, hidden]``."""
        return torch.cat([self.h_0[None], self.output[:-1]])


class Cell(ABC):
    """The step of one kind of recurrent layer, and the linearised one.

    Attributes:
        gates: Matrices in ``weight_hh``.
        factors: Diagonal factors per step.
        states: 1, or 2 for a pair (h, c).
        pre_activations: Gradients per step in ``p``.
    """

    gates: int
    factors: int
    states: int
    pre_activations: int

    @abstractmethod
    def advance(self, from_input: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One step forward.

        Args:
            from_input: What the input contributes to the gates, ``[..., gates * hidden]``.
            state: The state before, ``[..., states * hidden]``.
            weight: ``weight_hh``.
            bias: ``bias_hh``.

        Returns:
            The state after, whose first part is the output.
        """

    @abstractmethod
    def linearise(self, layer: Layer) -> Tensor:
        """The diagonal factors, ``[time, batch, factors, hidden]``."""

    @abstractmethod
    def step(self, factors: Tensor, v: Tensor, source: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the adjoint.

        Args:
            factors: ``[..., factors, hidden]``.
            v: What arrives from the next step, ``[..., states * hidden]``.
            source: The output's gradient at this step, ``[..., hidden]``; None for zero.
            weight: ``weight_hh``.

        Returns:
            The gradients of the pre-activations, ``[..., pre_activations * hidden]``, and v one step earlier.
        """

    def of_input(self, p: Tensor, hidden: int) -> Tensor:
        """The columns of p that belong to ``weight_ih``, as a view."""
        return p

    def of_hidden(self, p: Tensor, hidden: int) -> Tensor:
        """The columns of p that belong to ``weight_hh``, as a view."""
        return p

    def rows_of_input(self, weight: Tensor) -> Tensor:
        """The rows of ``weight_ih`` (or of its gradient) in the order of :meth:`of_input`."""
        return weight

    def rows_from_input(self, gradient: Tensor) -> Tensor:
        """The gradient of ``weight_ih`` with its rows in PyTorch's order again."""
        return gradient


class RNNCell(Cell):
    """``h' = act(W_ih x + W_hh h + b)``, with tanh or relu: the derivative follows from h' alone."""

    gates, factors, states, pre_activations = 1, 1, 1, 1

    def __init__(self, nonlinearity: str) -> None:
        self.nonlinearity = nonlinearity

    def advance(self, from_input: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        gates = F.linear(state, weight, bias).add_(from_input)
        return gates.relu_() if self.nonlinearity == "relu" else gates.tanh_()

    def linearise(self, layer: Layer) -> Tensor:
        h = layer.output
        slope = (h > 0).to(h.dtype) if self.nonlinearity == "relu" else 1 - h * h
        return slope[:, :, None]

    def step(self, factors: Tensor, v: Tensor, source: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        s = v if source is None else v + source
        slope = factors[..., 0, :]
        # Like autograd's: what is not finite ends at a unit that is off, and goes on where a tanh is flat.
        p = torch.where(slope > 0, s, 0) if self.nonlinearity == "relu" else s * slope
        return p, p @ weight


class GRUCell(Cell):
    """PyTorch's GRU: ``h' = (1 - z) n + z h``, ``n = tanh(W_in x + b_in + r (W_hn h + b_hn))``.

    p holds the gates n (as the input sees it), r, z, n (as the hidden state sees it, r times the first), so that each
    weight's share is a run of columns.
    """

    gates, factors, states, pre_activations = 3, 5, 1, 4

    def advance(self, from_input: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        hidden = state.shape[-1]
        from_hidden = F.linear(state, weight, bias)
        r, z = torch.sigmoid(from_input[..., : 2 * hidden] + from_hidden[..., : 2 * hidden]).chunk(2, dim=-1)
        n = torch.tanh(torch.addcmul(from_input[..., 2 * hidden :], r, from_hidden[..., 2 * hidden :]))
        return torch.lerp(n, state, z)

    def linearise(self, layer: Layer) -> Tensor:
        hidden = layer.h_0.shape[-1]
        gates = layer.from_input()
        from_hidden = layer.add_from_hidden(torch.zeros_like(gates))
        q = from_hidden[..., 2 * hidden :]
        r, z = torch.sigmoid(gates[..., : 2 * hidden] + from_hidden[..., : 2 * hidden]).chunk(2, dim=-1)
        n = torch.tanh(gates[..., 2 * hidden :] + r * q)
        to_n = (1 - z) * (1 - n * n)
        to_z = (layer.previous() - n) * z * (1 - z)
        return torch.stack([to_n, to_n * q * r * (1 - r), to_z, to_n * r, z], dim=2)

    def step(self, factors: Tensor, v: Tensor, source: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        s = v if source is None else v + source
        p = (s[..., None, :] * factors[..., :4, :]).flatten(-2)
        hidden = s.shape[-1]
        return p, torch.addcmul(p[..., hidden:] @ weight, s, factors[..., 4, :])

    def of_input(self, p: Tensor, hidden: int) -> Tensor:
        return p[..., : 3 * hidden]

    def of_hidden(self, p: Tensor, hidden: int) -> Tensor:
        return p[..., hidden:]

    def rows_of_input(self, weight: Tensor) -> Tensor:
        return weight.roll(len(weight) // 3, 0)  # r, z, n -> n, r, z

    def rows_from_input(self, gradient: Tensor) -> Tensor:
        return gradient.roll(-(len(gradient) // 3), 0)


class LSTMCell(Cell):
    """PyTorch's LSTM: ``c' = f c + i g``, ``h' = o tanh(c')``; the cell states are rebuilt by one scan."""

    gates, factors, states, pre_activations = 4, 6, 2, 4

    def advance(self, from_input: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        h, c = state.chunk(2, dim=-1)
        i, f, g, o = F.linear(h, weight, bias).add_(from_input).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.cat([torch.sigmoid(o) * torch.tanh(c), c], dim=-1)

    def linearise(self, layer: Layer) -> Tensor:
        assert layer.c_0 is not None
        gates = layer.add_from_hidden(layer.from_input())
        i, f, g, o = gates.chunk(4, dim=-1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = linear_scan(f, i * g, layer.c_0)
        tanh_c = torch.tanh(c)
        before = torch.cat([layer.c_0[None], c[:-1]])
        return torch.stack(
            [
                o * (1 - tanh_c * tanh_c),
                g * i * (1 - i),
                before * f * (1 - f),
                i * (1 - g * g),
                tanh_c * o * (1 - o),
                f,
            ],
            dim=2,
        )

    def step(self, factors: Tensor, v: Tensor, source: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        s, of_c = v.chunk(2, dim=-1)
        s = s if source is None else s + source
        u = torch.addcmul(of_c, s, factors[..., 0, :])
        p = torch.cat([(u[..., None, :] * factors[..., 1:4, :]).flatten(-2), s * factors[..., 4, :]], dim=-1)
        return p, torch.cat([p @ weight, u * factors[..., 5, :]], dim=-1)


def linear_scan(a: Tensor, b: Tensor, first: Tensor) -> Tensor:
    """Solve ``x_t = a_t x_{t-1} + b_t`` over time in about ``2 sqrt(T)`` steps.

    Args:
        a: ``[time, ...]``.
        b: The same shape.
        first: What stands before the first step, ``[...]``.
    """
    length = len(a)
    block = max(1, round(length**0.5))
    blocks = -(-length // block)
    x, gain = torch.empty_like(b), torch.empty_like(a)
    for k in range(min(block, length)):  # all blocks at once, each from zero
        if k == 0:
            x[::block], gain[::block] = b[::block], a[::block]
        else:
            rows = len(a[k::block])
            x[k::block] = torch.addcmul(b[k::block], a[k::block], x[k - 1 :: block][:rows])
            gain[k::block] = a[k::block] * gain[k - 1 :: block][:rows]
    for n in range(blocks):  # what each block starts from
        part = slice(n * block, min((n + 1) * block, length))
        before = first if n == 0 else x[n * block - 1]
        x[part].addcmul_(gain[part], before)
    return x


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def cell_of(kind: str) -> Cell:
    """The cell of ``rnn_tanh``, ``rnn_relu``, ``gru`` or ``lstm``."""
    return _CELLS[kind]


_CELLS: dict[str, Cell] = {
    "rnn_tanh": RNNCell("tanh"),
    "rnn_relu": RNNCell("relu"),
    "gru": GRUCell(),
    "lstm": LSTMCell(),
}
