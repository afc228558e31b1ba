"""Iso-CTS: Iso-C whose weakest directions make room for each update's own ones: exact, of rank Σ r_i at most.

Source: Marczak et al. 2025, arXiv 2502.04959, with the R singular values that a sum of adapters has in place of a full
rank, and their split of R into common and own directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from lorica.adapters.delta import LowRank, combination
from lorica.analysis.spectrum import NEGLIGIBLE, directions
from lorica.merging.method import Site, Update
from lorica.merging.subspace import polar, product, weighted

EXEMPT = {
    "single": "its singular values come back as their mean",
    "duplicate": "a sum counts a duplicate twice",
}

Triples = tuple[Tensor, Tensor, Tensor]  # U (out, k), σ (k,), V (in, k)


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    common_space_fraction: Annotated[float, Ge(0), Le(1)] = 0.8,
    lambda_: Annotated[float, Ge(0)] = 1.0,
) -> LowRank:
    """λ·mean(σ)·P(U)·P(V)ᵀ, P the polar factor, of the common triples and each update's own, side by side.

    The common ones are the first of Σ w_i·Δ_i; an update's own are the first of w_i·Δ_i behind its projection on the
    common U, as many for every update. No others take the place of negligible ones.
    """
    low_rank = weighted(updates, weights, "method iso_cts")
    U, sigma, V = directions(combination(low_rank, [1.0] * len(updates)))
    num_own = _num_own(len(sigma), len(updates), common_space_fraction)
    num_common = len(sigma) - num_own * len(updates)
    common = U[:, :num_common], sigma[:num_common], V[:, :num_common]
    triples = [common, *(_own(each, common[0], num_own) for each in low_rank)]
    U, sigma, V = (torch.cat(parts, dim=-1) for parts in zip(*triples, strict=True))
    return product(polar(U), lambda_ * sigma.mean().expand_as(sigma), polar(V))


def _num_own(rank: int, num_adapters: int, common_space_fraction: float) -> int:
    """Of each update: an equal share, rounded, of what ⌊common_space_fraction·R⌋ leaves of R."""
    num_common = math.floor(round(common_space_fraction * rank, 9))  # 0.29·100 is below 29
    return min(rank // num_adapters, round((rank - num_common) / num_adapters))


def _own(update: LowRank, common: Tensor, num_own: int) -> Triples:
    """The first singular triples of Δ - U·Uᵀ·Δ with U (out, k) the common directions."""
    U, sigma, V = LowRank(update.A, update.B - common @ (common.T @ update.B), update.scale).svd()
    kept = sigma[:num_own] > NEGLIGIBLE * update.singular_values()[:1]  # what lies in U leaves but rounding
    return U[:, :num_own][:, kept], sigma[:num_own][kept], V[:, :num_own][:, kept]
