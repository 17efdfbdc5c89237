"""What the tests of recurrent layers share: layers, their gradients, and chains whose solution is known."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lit_parallel.recurrent import RecurrentOptions
from lit_parallel.recurrent.cells import Layer, cell_of
from lit_parallel.recurrent.chain import CellChain, SteppedChain

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")

#: Each solver with blocks so small that even short sequences have several.
SOLVERS = {
    "jacobi": RecurrentOptions(solver="jacobi", probe_every=0),
    "jacobi_gs": RecurrentOptions(solver="jacobi_gs", block_size=4, probe_every=0),
    "two_level": RecurrentOptions(solver="two_level", block_size=5, rank=3, probe_every=0),
    "auto": RecurrentOptions(probe_every=0),
}


def build(cell: str, input_size: int, hidden_size: int, layers: int = 1, **options) -> nn.RNNBase:
    """A layer of PyTorch by the name that its cell has here."""
    if cell.startswith("rnn"):
        return nn.RNN(input_size, hidden_size, layers, nonlinearity=cell[4:], **options)
    return (nn.GRU if cell == "gru" else nn.LSTM)(input_size, hidden_size, layers, **options)


def states_of(module: nn.RNNBase, batch: int | None) -> tuple[Tensor, ...]:
    """Random initial states, h and for an LSTM c."""
    weight = module.weight_ih_l0
    shape = [module.num_layers * (2 if module.bidirectional else 1), batch, module.hidden_size]
    shape = [size for size in shape if size is not None]
    return tuple(torch.randn(shape).to(weight) for _ in range(2 if isinstance(module, nn.LSTM) else 1))


def outputs_of(module: nn.Module, x: Tensor, states: tuple[Tensor, ...] = ()) -> dict[str, Tensor]:
    """What a module returns, by name."""
    hx = () if not states else (states,) if isinstance(module, nn.LSTM) else states
    output, last = module(x, *hx)
    last = last if isinstance(last, tuple) else (last,)
    return {"output": output} | dict(zip(("h_n", "c_n"), last, strict=False))


def gradients(
    module: nn.Module,
    x: Tensor,
    states: tuple[Tensor, ...] = (),
    of: Sequence[str] = ("output", "h_n", "c_n"),
    frozen: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Gradients of a random linear function of some outputs, by the names of parameters, ``input``, ``h_0``, ``c_0``.

    Args:
        module: A recurrent layer.
        x: Its input.
        states: Its initial states; none: zeros.
        of: Outputs that have gradients.
        frozen: Names of what needs no gradient, as beginnings of names: ``weight`` freezes all weights.
    """
    leaves = {"input": x, **dict(zip(("h_0", "c_0"), states, strict=False))}
    leaves = {name: value.detach().clone() for name, value in leaves.items()} | dict(module.named_parameters())
    for name, leaf in leaves.items():
        leaf.requires_grad_(not name.startswith(tuple(frozen)))
    outputs = outputs_of(module, leaves["input"], tuple(leaves[name] for name in ("h_0", "c_0") if name in leaves))
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (value * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)).sum()
        for name, value in outputs.items()
        if name in of
    )
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over that of the second."""
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-300))


def largest_error(ours: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Largest relative error of any tensor."""
    assert ours.keys() == exact.keys()
    return max(relative_error(ours[name], exact[name]) for name in exact)


def covering(factors: Mapping[str, Sequence]) -> Iterator[dict]:
    """Rows of values in which every pair of values of every two factors occurs: a small sample of the product."""

    def pairs(row):
        return set(itertools.combinations(row.items(), 2))

    draw = random.Random(0)
    missing = {
        pair
        for one, other in itertools.combinations(factors, 2)
        for pair in itertools.product(((one, v) for v in factors[one]), ((other, v) for v in factors[other]))
    }
    while missing:
        wanted = dict(min(missing, key=repr))
        rows = [{name: wanted.get(name, draw.choice(values)) for name, values in factors.items()} for _ in range(30)]
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        yield best


class DenseChain(SteppedChain):
    """A chain of given matrices: ``v_{t-1} = (g_t + v_t) J_t``; a step leaves ``g_t + v_t`` behind.

    Args:
        maps: ``[time, batch, size, size]``.
        source: ``[time, batch, size]``.
        last: ``[batch, size]``.
    """

    def __init__(self, maps: Tensor, source: Tensor, last: Tensor) -> None:
        self.maps, self.source, self.last = maps, source, last
        self.length, self.batch, self.state_size = source.shape
        self.gradient_size = self.state_size

    def step(self, first, stride, v, source):
        s = v + self.source[first::stride][:, :, None] if source else v.clone()
        return s, s @ self.maps[first::stride]

    def exact(self) -> tuple[Tensor, Tensor]:
        """What all steps leave behind, and what arrives before the first."""
        v, left_behind = self.last, []
        for t in reversed(range(self.length)):
            left_behind.append(self.source[t] + v)
            v = (left_behind[-1][:, None] @ self.maps[t])[:, 0]
        return torch.stack(left_behind[::-1]), v


def random_chain(length: int, batch: int, size: int, radius: float, seed: int = 0, dtype=torch.float64) -> DenseChain:
    """A chain of random matrices whose products shrink, or grow, by about ``radius`` a step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    maps = (radius * normal(length, batch, size, size) / size**0.5).to(dtype)
    return DenseChain(maps, normal(length, batch, size).to(dtype), normal(batch, size).to(dtype))


def layer_after_forward(cell: str, length: int, batch: int, hidden: int, scale: float = 1.0, dtype=torch.float64):
    """A layer of random weights that has run forward on random input, as :class:`Layer`.

    Args:
        cell: One of :data:`CELLS`.
        length: Steps.
        batch: Sequences.
        hidden: Hidden units.
        scale: Of ``weight_hh``.
        dtype: Of everything.
    """
    module = build(cell, 3, hidden).to(dtype)
    weights = [weight.detach() for weight in module.parameters()]
    weights[1] *= scale
    x, states = torch.randn(length, batch, 3, dtype=dtype), states_of(module, batch)
    with torch.no_grad():
        output = outputs_of(module, x, states)["output"]
    return Layer(x, output, states[0][0], states[1][0] if len(states) > 1 else None, *weights)


def cell_chain(cell: str, length: int, batch: int, hidden: int, scale: float = 1.0, dtype=torch.float64) -> CellChain:
    """The chain of such a layer, with random gradients."""
    layer, kind = layer_after_forward(cell, length, batch, hidden, scale, dtype), cell_of(cell)
    source = torch.randn(length, batch, hidden, dtype=dtype)
    last = torch.randn(batch, kind.states * hidden, dtype=dtype)
    return CellChain(kind, kind.linearise(layer), layer.weight_hh, source, last)


def exactly(chain: SteppedChain) -> tuple[Tensor, Tensor]:
    """What the steps of a chain leave behind, and what arrives before the first, one step after the other."""
    v, left_behind = chain.last[None, :, None], []
    for t in reversed(range(chain.length)):
        p, v = chain.step(t, chain.length, v, True)
        left_behind.append(p[0, :, 0])
    return torch.stack(left_behind[::-1]), v[0, :, 0]
