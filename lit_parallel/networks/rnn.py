"""Recurrent networks, and recurrence with a cell of one's own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.errors import UserError

_LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "rnn": nn.RNN,
    "rnn_relu": functools.partial(nn.RNN, nonlinearity="relu"),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}


class SoftplusCell(nn.Module):
    """One step of the recurrent network of Song et al. (2021), section 4.1.

    Initialised like PyTorch's own cells.

    Args:
        input_size: Features of an input.
        hidden_size: Numbers in a hidden state.
        device: Where the parameters are.
        dtype: Their type.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bound = 1 / math.sqrt(hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x_t: Tensor, h: Tensor) -> Tensor:
        """The next hidden state.

        Args:
            x_t: ``[batch, input]``.
            h: ``[batch, hidden]``, the state before.

        Returns:
            ``[batch, hidden]``.
        """
        return F.softplus(F.linear(x_t, self.weight_ih, self.bias) + F.linear(h, self.weight_hh))

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


class Recurrence(nn.Module):
    """Runs a cell over time: what ``nn.RNN`` is to ``nn.RNNCell``, for any cell.

    Args:
        cell: A module ``forward(x_t, h) -> h``, from ``[batch, input]`` and ``[batch, hidden]`` to ``[batch, hidden]``.
        hidden_size: Numbers in a hidden state.
        batch_first: Whether batched inputs and outputs are ``[batch, time, ...]`` instead of ``[time, batch, ...]``.

    Raises:
        UserError: If the cell says that its ``hidden_size`` is another.

    Example:
        >>> recurrence = Recurrence(SoftplusCell(2, 128), 128)
        >>> output, last = recurrence(torch.rand(100, 16, 2))
    """

    def __init__(self, cell: nn.Module, hidden_size: int, batch_first: bool = False) -> None:
        super().__init__()
        known = getattr(cell, "hidden_size", hidden_size)
        if known != hidden_size:
            raise UserError(f"{type(cell).__name__} has hidden_size={known}, not {hidden_size}.")
        self.cell = cell
        self.hidden_size = hidden_size
        self.batch_first = batch_first

    def forward(self, input: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All hidden states of a sequence.

        Args:
            input: ``[time, batch, input]``, or with ``batch_first`` ``[batch, time, input]``, or ``[time, input]``.
            h_0: The state before the first input, ``[1, batch, hidden]`` (for unbatched input ``[1, hidden]``); by
                default 0.

        Returns:
            The states, ``[time, batch, hidden]`` (or batch first, or ``[time, hidden]``), and the last one,
            ``[1, batch, hidden]`` (or ``[1, hidden]``).

        Raises:
            UserError: If a shape is not one of these, or the cell's output is not the next state.
        """
        if input.dim() not in (2, 3):
            raise UserError(
                f"Recurrence needs input of 3 dimensions, or 2 if unbatched, not of shape {[*input.shape]}."
            )
        batched = input.dim() == 3
        time = 1 if batched and self.batch_first else 0
        steps = input.unbind(time) if batched else input[:, None].unbind()
        if not steps:
            raise UserError(f"Recurrence needs at least one time step, and input of shape {[*input.shape]} has none.")
        features = getattr(self.cell, "input_size", input.shape[-1])
        if features != input.shape[-1]:
            raise UserError(
                f"{type(self.cell).__name__} reads {features} features, and input of shape {[*input.shape]} has "
                f"{input.shape[-1]}."
            )
        batch = len(steps[0])
        wanted = [1, batch, self.hidden_size] if batched else [1, self.hidden_size]
        if h_0 is None:
            h_0 = input.new_zeros(wanted)
        elif [*h_0.shape] != wanted:
            raise UserError(
                f"h_0 must be of shape {wanted} for input of shape {[*input.shape]}, not of shape {[*h_0.shape]}."
            )
        h = h_0.reshape(batch, self.hidden_size)
        states = []
        for x_t in steps:
            h = self.cell(x_t, h)
            states.append(h)
            if len(states) == 1 and (not isinstance(h, Tensor) or [*h.shape] != [batch, self.hidden_size]):
                found = f"shape {[*h.shape]}" if isinstance(h, Tensor) else f"type {type(h).__name__}"
                raise UserError(
                    f"{type(self.cell).__name__} must return the next state, of shape {[batch, self.hidden_size]}, not "
                    f"something of {found}."
                )
        output = torch.stack(states, dim=time)
        return (output, h[None]) if batched else (output[:, 0], h)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, batch_first={self.batch_first}"


def build_recurrence(
    cell: str,
    input_size: int,
    hidden_size: int,
    *,
    layers: int = 1,
    dropout: float = 0.0,
    bidirectional: bool = False,
    forget_bias: float | None = None,
) -> nn.RNNBase | Recurrence:
    """A recurrent network by the name of its cell; it reads ``[batch, time, input]``.

    Args:
        cell: ``softplus``, ``rnn`` (tanh), ``rnn_relu``, ``gru`` or ``lstm``.
        input_size: Features of an input.
        hidden_size: Numbers in a hidden state, per direction.
        layers: Layers, one upon the other.
        dropout: Part of the states between two layers that training leaves out.
        bidirectional: Whether every layer reads from both ends.
        forget_bias: Initial bias of the gate that keeps the state, see :func:`keep_state`.

    Raises:
        UserError: If there is no such network.
    """
    if cell == "softplus" and (layers > 1 or bidirectional):
        raise UserError(
            "model.cell=softplus has one layer and one direction: set model.layers=1 and model.bidirectional=false, or "
            "another cell."
        )
    if dropout and layers == 1:
        raise UserError("model.dropout acts between layers: set model.layers=2 or more, or model.dropout=0.")
    if forget_bias is not None and cell not in ("gru", "lstm"):
        raise UserError(f"model.forget_bias belongs to lstm and gru, and model.cell={cell} has no gates: leave it out.")
    if cell == "softplus":
        return Recurrence(SoftplusCell(input_size, hidden_size), hidden_size, batch_first=True)
    network = _LAYERS[cell](
        input_size, hidden_size, layers, batch_first=True, dropout=dropout, bidirectional=bidirectional
    )
    if forget_bias is not None:
        keep_state(network, forget_bias)
    return network


@torch.no_grad()
def keep_state(network: nn.RNNBase, bias: float) -> None:
    """Set the bias of the gate that keeps the state: an LSTM's forget gate, a GRU's update gate.

    With a bias of b, a state fades to 1/e in about ``1 + e^b`` steps. An LSTM adds its input to the state without
    regard to how much it keeps; so that the state does not overflow, its input gate gets the bias -b, as in Tallec and
    Ollivier, "Can recurrent neural networks warp time?", ICLR 2018.

    Args:
        network: ``nn.LSTM`` or ``nn.GRU``; changed in place.
        bias: The sum of the gate's two biases in PyTorch.
    """
    size = network.hidden_size
    # PyTorch's order of gates: input, forget, cell, output; reset, update, new.
    gates = {1: bias, 0: -bias} if isinstance(network, nn.LSTM) else {1: bias}
    for name, parameter in network.named_parameters():
        if name.startswith("bias"):
            for gate, value in gates.items():
                parameter[gate * size : (gate + 1) * size] = value if "ih" in name else 0.0


class _ReadOut(nn.Module):
    """A recurrent network with a linear layer on its states."""

    def __init__(self, recurrence: nn.RNNBase | Recurrence, outputs: int) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.directions = 2 if getattr(recurrence, "bidirectional", False) else 1
        self.output = nn.Linear(self.directions * recurrence.hidden_size, outputs)


class NextLevel(_ReadOut):
    """Predicts each level of a sequence from those before it: ``[batch, time]`` integers to ``[batch, time, levels]``.

    The network reads the level before, scaled to [0, 1]; at first it reads 0.

    Args:
        recurrence: Reads ``[batch, time, 1]``, in one direction.
        levels: How many levels there are.
    """

    def __init__(self, recurrence: nn.RNNBase | Recurrence, levels: int = 256) -> None:
        super().__init__(recurrence, levels)
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x[:, :-1], (1, 0)).to(self.output.weight.dtype) / (self.levels - 1)
        states, _ = self.recurrence(before[..., None])
        return self.output(states)


class NextCharacter(_ReadOut):
    """Predicts what follows each character: ``[batch, time]`` integers to ``[batch, time, characters]``, logits.

    The network reads a character as a vector of zeros with a one in its place.

    Args:
        recurrence: Reads ``[batch, time, characters]``, in one direction.
        outputs: How many characters there are.
    """

    def forward(self, x: Tensor) -> Tensor:
        one_hot = F.one_hot(x.long(), self.output.out_features)
        states, _ = self.recurrence(one_hot.to(self.output.weight.dtype))
        return self.output(states)


class LastState(_ReadOut):
    """Answers when it has read a sequence: ``[batch, time, input]`` to ``[batch, outputs]``.

    Args:
        recurrence: Reads ``[batch, time, input]``; of several layers the last one counts, of two directions both.
        outputs: Numbers in an answer.
    """

    def forward(self, x: Tensor) -> Tensor:
        _, last = self.recurrence(x)
        last = last[0] if isinstance(last, tuple) else last  # an LSTM's hidden state, not that of its cells
        return self.output(last[-self.directions :].transpose(0, 1).flatten(1))
