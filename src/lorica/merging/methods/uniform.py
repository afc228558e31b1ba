"""The mean of the A and the mean of the B, apart: the adapters' own rank, but only near the mean of the updates.

Source: FedIT, Zhang et al. 2023, arXiv 2305.05644, which averages LoRA factors so. The product of the means is not the
mean of the products; the distance to uniform_delta is what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorica.adapters.delta import LowRank
from lorica.merging.coordinates import factors
from lorica.merging.method import Site, Update, check_equal_ranks

APPROXIMATES = "uniform_delta"
EQUAL_RANKS = True
USES_WEIGHTS = False
EXEMPT = {
    "refactoring": "a mean of factors depends on the bases that they are written in",
    "scaling": "a mean of factors depends on how an update's size is shared between A and B",
}


def merge(updates: Sequence[Update], weights: Sequence[float], site: Site) -> LowRank:
    """A = Σ A_i / T and B = Σ s_i·B_i / T. Raises ShapeError if the ranks differ."""
    return combined_factors(updates, [1 / len(updates)] * len(updates), site, "uniform", APPROXIMATES)


def combined_factors(
    updates: Sequence[Update], coefficients: Sequence[float], site: Site, method: str, exact: str
) -> LowRank:
    """A = Σ c_i·A_i and B = Σ c_i·s_i·B_i, float32. Raises ShapeError, pointing to `exact`, if the ranks differ."""
    low_rank = factors(updates, f"method {method}")
    first = low_rank[0]
    ranks = {name: each.rank for name, each in zip(site.names, low_rank, strict=True)}
    check_equal_ranks(method, exact, site.path, ranks)
    A, B = (torch.zeros_like(factor, dtype=torch.float32) for factor in (first.A, first.B))
    for each, coefficient in zip(low_rank, coefficients, strict=True):
        A.add_(each.A, alpha=coefficient)
        B.add_(each.B, alpha=coefficient * each.scale)
    return LowRank(A, B)
