"""An update brought to a smaller rank by QR and a small SVD of its factors: optimal, and it says what it lost."""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.adapters.delta import LowRank
from lorica.errors import ConfigError


def compress(update: LowRank, rank: int | None = None, energy: float | None = None) -> tuple[LowRank, float]:
    """The nearest update of at most `rank`, or of the least rank that keeps `energy`, and its relative error.

    `energy` in (0, 1] is the kept share Σ_{i≤k} σ² / Σ σ². Optimal in the Frobenius norm (Eckart–Young, MATH
    section 1); the error is sqrt(Σ_{i>k} σ² / Σ σ²). The factors keep their dtype and
    share σ evenly: A = √σ·Vᵀ, B = U·√σ, scale 1.
    Raises ConfigError unless exactly one of the two is given.
    """
    if (rank is None) == (energy is None):
        raise ConfigError(f"compress by rank or by energy: one of them, not rank={rank} and energy={energy}")
    if rank is not None and rank < 0:
        raise ConfigError(f"rank={rank}: give a rank of 0 or more")
    U, sigma, V = update.svd()
    k = rank_for_energy(sigma, energy) if energy is not None else min(rank or 0, len(sigma))
    root = sigma[:k].sqrt()
    kept = LowRank((V[:, :k] * root).T.contiguous(), U[:, :k] * root)
    return kept.to(update.A.dtype), truncation_error(sigma, k)


def rank_for_energy(sigma: Tensor, energy: float) -> int:
    """The least k whose first k singular values hold `energy` of Σ σ²; 0 for the zero update."""
    if not 0 < energy <= 1:
        raise ConfigError(f"energy={energy}: give a share in (0, 1]")
    squares = sigma.double().square()
    if not squares.any():
        return 0
    reached = squares.cumsum(0) >= energy * squares.sum() * (1 - 1e-15)
    return int(torch.nonzero(reached)[0]) + 1


def truncation_error(sigma: Tensor, k: int) -> float:
    """sqrt(Σ_{i>k} σ² / Σ σ²), what keeping the first k singular values loses; 0 for the zero update."""
    squares = sigma.double().square()
    total = float(squares.sum())
    return (float(squares[k:].sum()) / total) ** 0.5 if total > 0 else 0.0
