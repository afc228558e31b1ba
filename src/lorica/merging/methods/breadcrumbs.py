"""Model breadcrumbs: leave out the largest and the smallest entries of each update, and add up what stays.

Source: Davari & Belilovsky 2024, arXiv 2312.06795; `density` and `gamma` have the meaning that mergekit gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from lorica.errors import ConfigError
from lorica.merging.coordinates import Space, coordinates, mapped
from lorica.merging.election import Trim
from lorica.merging.method import Module, OneModule, Site, Update
from lorica.merging.thresholds import kth_largest

EXEMPT = {
    "single": "the entries left out do not come back",
    "duplicate": "a sum counts a duplicate twice",
}


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    density: Annotated[float, Gt(0), Le(1)] = 0.9,
    gamma: Annotated[float, Ge(0), Lt(1)] = 0.01,
    lambda_: Annotated[float, Ge(0)] = 1.0,
    space: Space = "full",
) -> Update:
    """λ·Σ w_i·m_i⊙Δ_i, where m_i leaves out the share `gamma` of largest magnitudes and keeps `density` below them.

    Nothing is scaled up for what is left out.
    """
    module = OneModule(Module(site, updates, weights))
    trim = Trim(kth_largest(module, density + gamma, space), exact_count=True)
    has_outliers = gamma * coordinates(updates, space).num_entries >= 1
    outliers = Trim(kth_largest(module, gamma, space), exact_count=True) if has_outliers else None

    def rule(stack: Tensor, block: int) -> Tensor:
        merged = torch.zeros_like(stack[0])
        above = outliers(stack) if outliers is not None else [None] * len(stack)
        for kept, large, weight in zip(trim(stack), above, weights, strict=True):
            merged.add_(kept if large is None else kept.sub_(large), alpha=lambda_ * weight)
        return merged

    return mapped(rule, updates, space)


def check(num_adapters: int, *, density: float, gamma: float, **others: object) -> None:
    """Raises ConfigError if more is to stay than the outliers leave."""
    if density + gamma > 1:
        raise ConfigError(f"density={density} and gamma={gamma} are more than 1 together: make one of them smaller")
