"""The mean of the weighted updates, ΔW = 1/T·Σ w_i·Δ_i: exact, of rank Σ r_i.

Source: Ilharco et al. 2023, arXiv 2212.04089, a task vector being the update that a task's training made.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorica.merging.linear import combination
from lorica.merging.method import Site, Update


def merge(updates: Sequence[Update], weights: Sequence[float], site: Site) -> Update:
    """Σ w_i·Δ_i / T: divided by the number of adapters, not by the sum of the weights."""
    return combination(updates, [weight / len(updates) for weight in weights])
