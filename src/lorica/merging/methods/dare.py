"""DARE: drop entries of each update at random, scale up the others, and take the mean.

Source: Yu et al. 2024, arXiv 2311.03099. With consensus=ties the mean is of the values that agree with the elected sign
(Yadav et al. 2023, arXiv 2306.01708); mergekit's `dare_ties` adds them up instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from lorica.merging.coordinates import Space, mapped
from lorica.merging.density import complement
from lorica.merging.dropping import drop_
from lorica.merging.election import elected_mean
from lorica.merging.linear import combination
from lorica.merging.method import Site, Update

ALIASES = {"density": ("drop_rate", complement)}
EXEMPT = {
    "single": "the dropped entries do not come back",
    "duplicate": "a copy under another name has a mask of its own",
}

Consensus = Literal["none", "ties"]


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    drop_rate: Annotated[float, Ge(0), Lt(1)] = 0.9,
    lambda_: Annotated[float, Ge(0)] = 1.0,
    consensus: Consensus = "none",
    seed: int = 42,
    space: Space = "full",
) -> Update:
    """λ/T·Σ w_i·m_i⊙Δ_i/(1 - drop_rate), m_i random masks; drop_rate=0 is the plain mean, in factors.

    consensus=ties divides by the number of values that agree with the sign of the sum instead of by T.
    """
    if drop_rate == 0 and consensus == "none":
        return combination(updates, [lambda_ * weight / len(updates) for weight in weights])
    scale = lambda_ / (1 - drop_rate)
    shares = torch.tensor([scale * weight / len(updates) for weight in weights])

    def rule(stack: Tensor, block: int) -> Tensor:
        kept = drop_(stack, drop_rate, seed, site, space, block)
        if consensus == "none":
            return torch.tensordot(shares, kept, dims=1)
        return elected_mean(kept.unbind(), weights, vote="weighted", tie="drop").mul_(scale)

    return mapped(rule, updates, space)
