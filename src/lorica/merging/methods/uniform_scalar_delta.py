"""Task arithmetic, ΔW = scale·Σ w_i·Δ_i: exact, of rank Σ r_i.

Source: Ilharco et al. 2023, arXiv 2212.04089.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorica.merging.linear import combination
from lorica.merging.method import Site, Update

EXEMPT = {"duplicate": "a sum counts a duplicate twice"}


def merge(updates: Sequence[Update], weights: Sequence[float], site: Site, *, scale: float = 1.0) -> Update:
    """scale·Σ w_i·Δ_i."""
    return combination(updates, [scale * weight for weight in weights])
