"""RegMean++: RegMean on the inputs that each layer gets when the layers before it are merged: exact, of rank Σ r_i.

Source: Nguyen et al. 2025, arXiv 2508.03121. A module's merge is RegMean's own; `grams.merge_sequentially` finds the
Grams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Gt, Le

from lorica.adapters.delta import LowRank
from lorica.merging.method import Site, Update
from lorica.merging.methods import regmean

NEEDS_GRAMS = True
GRAMS = "merged"  # of the inputs behind merged layers


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    alpha: Annotated[float, Gt(0), Le(1)] = 0.9,
    ridge: Annotated[float, Ge(0)] = 1e-6,
    lambda_: Annotated[float, Ge(0)] = 1.0,
) -> LowRank:
    """`regmean`."""
    return regmean.merge(updates, weights, site, alpha=alpha, ridge=ridge, lambda_=lambda_)
