"""Task arithmetic around the mean: to the mean, add each update's deviation from it, cut to the update's own rank.

Source: Choi et al. 2024, arXiv 2412.12153. They keep about 8 % of the full rank; an adapter is below that already, and
its deviation holds the others' directions too, so by default just the adapter's own rank is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from lorica.merging.coordinates import factors, mapped
from lorica.merging.method import Site, Update

USES_WEIGHTS = False
EXEMPT = {"duplicate": "a sum counts a duplicate's deviation twice"}


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    lambda_: Annotated[float, Ge(0)] = 1.0,
    rank_fraction: Annotated[float, Gt(0), Le(1)] = 1.0,
) -> Update:
    """m + λ·Σ trunc_k(Δ_i - m), m = Σ Δ_i / T, k = ⌈rank_fraction·r_i⌉; of rank Σ r_i at most.

    Two adapters of equal rank deviate by opposite amounts, so their merge is their mean whatever the options.
    """
    low_rank = factors(updates, "method cart")
    ranks = [math.ceil(round(rank_fraction * each.rank, 9)) for each in low_rank]  # 0.28·25 is above 7

    def rule(stack: Tensor, block: int) -> Tensor:
        cores = stack.double()  # (T, p, q)
        merged = mean = cores.mean(dim=0)
        for core, rank in zip(cores, ranks, strict=True):
            merged = merged + lambda_ * _truncated(core - mean, rank)
        return merged.float()

    return mapped(rule, low_rank, "core")


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]
