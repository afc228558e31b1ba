"""Weighted sums of updates, in factors where all are low-rank: what every linear method comes down to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorica.adapters import delta
from lorica.adapters.delta import LowRank
from lorica.merging.method import Update


def combination(updates: Sequence[Update], coefficients: Sequence[float]) -> Update:
    """Σ c_i·Δ_i: exact and of rank Σ r_i if every update is low-rank, dense if a transform has made one dense."""
    low_rank = [each for each in updates if isinstance(each, LowRank)]
    if len(low_rank) == len(updates):
        return delta.combination(low_rank, coefficients)
    total = torch.zeros(updates[0].shape)
    for update, coefficient in zip(updates, coefficients, strict=True):
        total.add_(update.dense().float() if isinstance(update, LowRank) else update, alpha=coefficient)
    return total
