"""Singular directions of several updates put together: what the methods that work on subspaces have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.adapters.delta import LowRank
from lorica.analysis.spectrum import NEGLIGIBLE
from lorica.merging.coordinates import factors
from lorica.merging.method import Update


def weighted(updates: Sequence[Update], weights: Sequence[float], what: str) -> list[LowRank]:
    """w_i·Δ_i in float64. Raises ShapeError, naming `what` needs factors, if a transform made one dense."""
    return [each.to(torch.float64) * weight for each, weight in zip(factors(updates, what), weights, strict=True)]


def polar(matrix: Tensor) -> Tensor:
    """M·(MᵀM)^(-1/2), (n, R) like M: the nearest matrix with orthonormal columns, or with as many as M has directions.

    The inverse root is a pseudo-inverse, so columns that say the same share one direction.
    """
    squares, Q = torch.linalg.eigh(matrix.T @ matrix)
    kept = squares > NEGLIGIBLE**2 * squares[-1:]
    return matrix @ (Q[:, kept] * squares[kept].rsqrt()) @ Q[:, kept].T


def product(U: Tensor, sigma: Tensor, V: Tensor) -> LowRank:
    """U·diag(σ)·Vᵀ in float32; U (out, k), σ (k,) not negative, V (in, k). The factors share σ evenly."""
    root = sigma.sqrt()
    return LowRank((V * root).T.contiguous(), U * root).to(torch.float32)
