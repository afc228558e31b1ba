"""How the updates of one module lie to each other, in factors: inner products and shared directions of all pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.adapters.delta import LowRank
from lorica.merging.coordinates import NEGLIGIBLE


def inner_products(updates: Sequence[LowRank]) -> Tensor:
    """(T, T) float64: <Δ_i, Δ_j>, from the Grams of the stacked factors; the work is (Σr)²·(in + out)."""
    A = torch.cat([each.A.double() for each in updates])  # (R, in)
    B = torch.cat([each.B.double() * each.scale for each in updates], dim=1)  # (out, R)
    return _block_sums((A @ A.T) * (B.T @ B), [each.rank for each in updates])


def overlaps(bases: Sequence[Tensor]) -> Tensor:
    """(T, T): ‖U_iᵀU_j‖²_F / min(r_i, r_j) of orthonormal bases U_i (n, r_i); NaN where one has no direction.

    Source: Hu et al. 2021, arXiv 2106.09685, section 7.2: 1 where the smaller space lies in the larger one, 0 where
    they are orthogonal.
    """
    U = torch.cat(list(bases), dim=1)  # (n, R)
    ranks = [each.shape[1] for each in bases]
    least = torch.tensor(ranks, dtype=U.dtype)
    return _block_sums((U.T @ U).square(), ranks) / torch.minimum(least[:, None], least[None, :])


def directions(update: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), σ (r,) and V (in, r), float64, without the directions that are float32 noise."""
    U, sigma, V = update.svd()
    kept = sigma > NEGLIGIBLE * sigma[:1]
    return U[:, kept], sigma[kept], V[:, kept]


def _block_sums(matrix: Tensor, sizes: Sequence[int]) -> Tensor:
    """(R, R) -> (T, T): the sum of each block of rows and columns."""
    owner = torch.eye(len(sizes), dtype=matrix.dtype).repeat_interleave(torch.tensor(sizes), dim=0)  # (R, T)
    return owner.T @ matrix @ owner
