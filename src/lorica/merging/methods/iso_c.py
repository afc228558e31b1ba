"""Iso-C: the sum of the updates with all its singular values made equal: exact, of rank Σ r_i at most.

Source: Marczak et al. 2025, arXiv 2502.04959. They average over all singular values of a full-rank sum; a sum of
adapters has no more than Σ r_i, and the mean is over those, not over the zeros behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge

from lorica.adapters.delta import LowRank, combination
from lorica.analysis.spectrum import directions
from lorica.merging.method import Site, Update
from lorica.merging.subspace import product, weighted

EXEMPT = {
    "single": "its singular values come back as their mean",
    "duplicate": "a sum counts a duplicate twice",
}


def merge(
    updates: Sequence[Update], weights: Sequence[float], site: Site, *, lambda_: Annotated[float, Ge(0)] = 1.0
) -> LowRank:
    """λ·mean(σ)·U·Vᵀ with Σ w_i·Δ_i = U·diag(σ)·Vᵀ."""
    U, sigma, V = directions(combination(weighted(updates, weights, "method iso_c"), [1.0] * len(updates)))
    return product(U, lambda_ * sigma.mean().expand_as(sigma), V)
