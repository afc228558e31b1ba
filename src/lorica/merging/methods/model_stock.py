"""The mean of the updates, drawn towards zero by as much as they disagree: exact, of rank Σ r_i.

Source: Model Stock, Jang et al. 2024, arXiv 2403.19522, module by module, the base model being the anchor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from lorica.adapters.delta import LowRank
from lorica.analysis.spectrum import NEGLIGIBLE
from lorica.merging.coordinates import factors
from lorica.merging.linear import combination
from lorica.merging.method import Site, Update

USES_WEIGHTS = False
EXEMPT = {"duplicate": "the ratio rises with the mean agreement of two updates, and a copy agrees wholly"}


def merge(updates: Sequence[Update], weights: Sequence[float], site: Site) -> Update:
    """t·Σ Δ_i / T with t = T·c / (1 + (T - 1)·c), c the mean cosine of two updates, not below 0; t is 1 for T = 1."""
    num_adapters = len(updates)
    cosine = _mean_cosine(factors(updates, "method model_stock"))
    return combination(updates, [cosine / (1 + (num_adapters - 1) * cosine)] * num_adapters)


def _mean_cosine(updates: Sequence[LowRank]) -> float:
    """In [0, 1], over all pairs of updates; 1 if there is no pair. Without a direction the cosine is 0."""
    precise = [each.to(torch.float64) for each in updates]  # each meets all others: converted once
    norms = [each.norm() for each in precise]
    least = NEGLIGIBLE * max(norms)
    cosines = [
        precise[i].inner(precise[j]) / (norms[i] * norms[j]) if min(norms[i], norms[j]) > least else 0.0
        for i, j in itertools.combinations(range(len(updates)), 2)
    ]
    return min(1.0, max(0.0, sum(cosines) / len(cosines))) if cosines else 1.0
