"""TSV-Merge: every update's singular vectors side by side, made orthonormal: exact, of rank Σ r_i at most.

Source: task singular vectors, Gargiulo et al. 2024, arXiv 2412.00081. They keep 1/T of each full-rank update; an
adapter is of low rank already, so by default all of it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le

from lorica.adapters.delta import LowRank
from lorica.analysis.spectrum import directions
from lorica.merging.method import Site, Update
from lorica.merging.subspace import polar, product, weighted


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    keep: Annotated[float, Gt(0), Le(1)] = 1.0,
    lambda_: Annotated[float, Ge(0)] = 1.0,
) -> LowRank:
    """λ·P(U)·Σ·P(V)ᵀ, P the polar factor; U, Σ and V hold the first ⌈keep·r_i⌉ singular triples of each w_i·Δ_i."""
    found = [directions(each) for each in weighted(updates, weights, "method tsv")]
    ranks = [math.ceil(round(keep * len(sigma), 9)) for _, sigma, _ in found]  # 0.28·25 is above 7
    triples = [[part[..., :rank] for part in each] for each, rank in zip(found, ranks, strict=True)]
    U, sigma, V = (torch.cat(parts, dim=-1) for parts in zip(*triples, strict=True))
    return product(polar(U), lambda_ * sigma, polar(V))
