"""The second level: what the blocks' maps do to a small subspace, carried from border to border.

Over a block of C steps the adjoint is a linear map ``M_n`` (a transfer operator), and maps of trained networks have
low numerical rank. If every border starts with an error ``e_n``, then ``e_n = rho_n + M_{n+1} e_{n+1}`` with the
residual ``rho_n`` that two neighbours see there. One level of blocks carries an error one border per sweep; the coarse
correction solves this equation, with ``M_n`` replaced by its action on r vectors, for all borders at once: the cure of
one-level Schwarz methods, in time (compare parareal; Lions, Maday, Turinici 2001).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_parallel.kernels import triton_runs_on
from lit_parallel.recurrent.chain import Chain, blocks_of


@dataclass(frozen=True)
class CoarseSpace:
    """The maps of all blocks on r vectors each.

    Attributes:
        basis: Nearly orthonormal columns, ``[blocks, batch, rank, state_size]``: of what arrives at block n.
        image: What block n makes of them, same shape.
        amplification: Largest norm of what a block's steps leave behind, for a unit vector of the subspace.
    """

    basis: Tensor
    image: Tensor
    amplification: Tensor

    def errors(self, residual: Tensor) -> Tensor:
        """Solve for the errors at all borders.

        Args:
            residual: ``[blocks - 1, batch, state_size]``: behind the last block there is no border.

        Returns:
            The errors, same shape.
        """
        # In coordinates: a_n = V_n^T rho_n + (V_n^T Y_{n+1}) a_{n+1}; nothing comes from behind the last border.
        of_residual = (self.basis[:-1] @ residual[..., None])[..., 0]
        between = self.basis[:-1] @ self.image[1:].mT
        coordinates = suffix_sums(between, of_residual)
        errors = residual.clone()
        errors[:-1] += (coordinates[1:, :, None] @ self.image[1:-1])[:, :, 0]
        return errors


def suffix_sums(maps: Tensor, terms: Tensor) -> Tensor:
    """Solve ``x_n = terms_n + maps_n x_{n+1}`` from the last to the first.

    Args:
        maps: ``[n, batch, r, r]``; the last is not used.
        terms: ``[n, batch, r]``.
    """
    if triton_runs_on(terms.device) and terms.dtype == torch.float32:
        from lit_parallel.kernels.suffix_sums import suffix_sums as by_kernel

        return by_kernel(maps, terms)
    return doubling(maps, terms)


def doubling(maps: Tensor, terms: Tensor) -> Tensor:
    """:func:`suffix_sums` in log2(n) steps."""
    distance, x = 1, terms
    while distance < len(maps):
        reach = len(maps) - distance
        further = x.clone()
        further[:reach] += (maps[:reach] @ x[distance:, ..., None])[..., 0]
        if 2 * distance < len(maps):
            product = maps[:reach] @ maps[distance:]
            maps = torch.cat([product, torch.zeros_like(maps[reach:])])
        x, distance = further, 2 * distance
    return x


def orthonormal(vectors: Tensor) -> Tensor:
    """Make rows orthonormal by Cholesky factorisation of their products in float64; what depends on others shrinks.

    Args:
        vectors: ``[..., rank, size]``.
    """
    vectors = vectors / vectors.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    double = vectors.double()
    gram = double @ double.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(1e-12 * vectors.shape[-2])
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(factor, double, upper=False).to(vectors.dtype)


def coarse_space(chain: Chain, block: int, rank: int, basis: Tensor | None = None) -> CoarseSpace:
    """Find the subspace by walking ``rank`` columns through all blocks, from random ones twice.

    Args:
        chain: The chain.
        block: Steps per block.
        rank: Columns, at most the state's size.
        basis: From an earlier chain of the same kind, ``[blocks, batch, rank, state_size]``: walked once.
    """
    blocks = blocks_of(chain.length, block)
    shape = (blocks, chain.batch, rank, chain.state_size)
    if basis is None or basis.shape != shape:
        generator = torch.Generator(chain.last.device).manual_seed(0)
        random = torch.randn(shape[2:], generator=generator, dtype=chain.last.dtype, device=chain.last.device)
        basis = next_basis(chain.walk(block, 0, orthonormal(random).expand(shape).contiguous(), source=False).left)
    walk = chain.walk(block, 0, basis, source=False)
    return CoarseSpace(basis, walk.left, walk.energy.sum(2).sqrt().amax())


def next_basis(image: Tensor) -> Tensor:
    """An orthonormal basis of what arrives at each block: of what the block behind it lets through."""
    behind = torch.cat([image[1:], image[-1:]])  # at the last block nothing but the chain's end arrives
    return orthonormal(behind)
