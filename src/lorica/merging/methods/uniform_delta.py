"""The mean of the updates, ΔW = 1/T·ΣΔ_i: exact, of rank Σ r_i.

Source: model soups, Wortsman et al. 2022, arXiv 2203.05482, on updates instead of weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorica.merging.linear import combination
from lorica.merging.method import Site, Update

USES_WEIGHTS = False


def merge(updates: Sequence[Update], weights: Sequence[float], site: Site) -> Update:
    """Σ Δ_i / T."""
    return combination(updates, [1 / len(updates)] * len(updates))
