"""Hand-made triangular systems whose solutions and iteration counts are known; every solver is run over all of them."""

import torch
from torch import Tensor

from lit_parallel.systems import TensorSystem


class FunctionSystem(TensorSystem):
    """A system given by a function of the whole iterate."""

    def __init__(self, guess: Tensor, function) -> None:
        super().__init__(guess)
        self.h = function

    def function(self, x: Tensor) -> Tensor:
        return self.h(x)


def shifted(x: Tensor, by: int = 1) -> Tensor:
    """x_{t-by}, zero at the start."""
    return torch.nn.functional.pad(x[:, : x.shape[1] - by], (by, 0))


def chain(batch: int = 3, length: int = 12) -> FunctionSystem:
    """x_t = x_{t-1} + 1: one equation becomes final per iteration."""
    return FunctionSystem(torch.zeros(batch, length), lambda x: shifted(x) + 1)


def diagonal(batch: int = 3, length: int = 12) -> FunctionSystem:
    """x_t = c_t: exact after one iteration, known to be after two."""
    c = torch.arange(1.0, length + 1).expand(batch, length)
    return FunctionSystem(torch.zeros(batch, length), lambda x: c + 0 * x)


def blocks(batch: int = 3, number: int = 4, size: int = 3) -> FunctionSystem:
    """Every equation reads all earlier blocks and nothing of its own: exact after as many iterations as blocks."""
    block = torch.arange(number * size) // size
    weights = (block[:, None] > block[None, :]).double() * 0.5
    return FunctionSystem(torch.zeros(batch, number * size).double(), lambda x: x @ weights.T + 1)


def nilpotent(batch: int = 3, length: int = 12, stride: int = 5) -> FunctionSystem:
    """x = N x + b with N^3 = 0 (x_t reads x_{t-5}, T = 12): exact after 3 iterations."""
    b = torch.arange(1.0, length + 1).expand(batch, length)
    return FunctionSystem(torch.zeros(batch, length), lambda x: 2 * shifted(x, stride) + b)


def transient_infinities(batch: int = 3, length: int = 12) -> FunctionSystem:
    """Finite solution (5, 1, 6, 1, 6, ..); from the zero guess every second equation overflows on the way.

    0 * inf would leave a not-a-number behind for ever if the overflow entered the iterate.
    """
    odd = torch.arange(length) % 2 == 1

    def h(x: Tensor) -> Tensor:
        earlier = shifted(x)
        target = torch.where(torch.arange(length) == 1, 5.0, 6.0)
        even_value = torch.where(torch.arange(length) == 0, 5.0, 0 * earlier + 6)
        return torch.where(odd, torch.exp(1000 * (target - earlier)), even_value)

    return FunctionSystem(torch.zeros(batch, length), h)


def items(batch: int = 2, length: int = 6) -> FunctionSystem:
    """Equations whose values are vectors: x_t = cumulative mean of everything earlier, plus a constant vector."""
    c = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def h(x: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x.cumsum(dim=1)[:, :-1]], dim=1)
        return c + before / torch.arange(1, length + 1, dtype=x.dtype)[:, None]

    return FunctionSystem(torch.zeros(batch, length, 3, dtype=torch.float64), h)


def alphabet(batch: int = 4, length: int = 15, seed: int = 0, levels: int = 4, density: float = 1.0) -> FunctionSystem:
    """Random system over a finite alphabet: x_t = (A x + b)^2 mod a prime, mod the number of levels."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(length, length, generator=generator) < density
    weights = torch.randint(1, 50, (length, length), generator=generator).tril(-1) * keep
    offsets = torch.randint(0, 50, (batch, length), generator=generator)
    return FunctionSystem(
        torch.zeros(batch, length, dtype=torch.int64), lambda x: ((x @ weights.T + offsets) ** 2 % 97) % levels
    )


ALL = {
    "chain": chain,
    "diagonal": diagonal,
    "blocks": blocks,
    "nilpotent": nilpotent,
    "transient_infinities": transient_infinities,
    "items": items,
    "alphabet": alphabet,
}


def by_hand(system: TensorSystem) -> Tensor:
    """The sequential result, computed without any solver."""
    x = system.guess.clone()
    for t in range(system.length):
        x[:, t] = system.function(x)[:, t]
    return x
