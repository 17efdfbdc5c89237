"""A network that predicts the next character of a text."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.networks.rnn import Recurrence


class NextCharacter(nn.Module):
    """Predicts what follows each character: ``[batch, time]`` integers to ``[batch, time, characters]``, logits.

    The network reads a character as a vector of zeros with a one in its place.

    Args:
        recurrence: Reads ``[batch, time, characters]``, in one direction.
        characters: How many there are.
    """

    def __init__(self, recurrence: nn.RNNBase | Recurrence, characters: int) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.output = nn.Linear(recurrence.hidden_size, characters)

    def forward(self, x: Tensor) -> Tensor:
        one_hot = F.one_hot(x.long(), self.output.out_features)
        states, _ = self.recurrence(one_hot.to(self.output.weight.dtype))
        return self.output(states)
