"""RegMean: the update that acts like each of the updates on the inputs of its own task: exact, of rank Σ r_i.

Source: Jin et al. 2023, arXiv 2212.09849, with their shrinkage of each Gram towards its diagonal (alpha 0.9, but 0.1
for T5). The ridge is ours: an input that is always zero would leave no inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from lorica.adapters.delta import LowRank
from lorica.errors import ConfigError
from lorica.merging.method import Site, Update
from lorica.merging.subspace import weighted

NEEDS_GRAMS = True
GRAMS = "own"  # of the inputs under each adapter alone


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    alpha: Annotated[float, Gt(0), Le(1)] = 0.9,
    ridge: Annotated[float, Ge(0)] = 1e-6,
    lambda_: Annotated[float, Ge(0)] = 1.0,
) -> LowRank:
    """λ·(Σ w_i·Δ_i·G̃_i)(ΣG̃_i)⁻¹ = λ·[B_i]·[w_i·s_i·A_i·G̃_i·(ΣG̃_i)⁻¹], with the G_i of `site.grams` and

    G̃ = alpha·G + (1 - alpha)·diag(G) + ridge·mean(diag(G))·I. Raises ConfigError if Grams are missing, or say too
    little to be inverted.
    """
    low_rank = weighted(updates, weights, "a regression mean")
    if len(site.grams) != len(low_rank):
        raise ConfigError(
            f"a regression mean needs the inputs of {site.path} under each adapter, and knows {len(site.grams)} of "
            f"{len(low_rank)}: merge adapters whose tasks are known, or give the Grams that grams.collect finds"
        )
    total, moved = torch.zeros_like(site.grams[0], dtype=torch.float64), []
    for each, gram in zip(low_rank, site.grams, strict=True):
        regular = _regularized(gram, alpha, ridge)
        total += regular
        moved.append(each.scale * each.A @ regular)
    L, failed = torch.linalg.cholesky_ex(total)
    if failed:
        raise ConfigError(
            f"the inputs of {site.path} do not determine a regression mean with alpha={alpha} and ridge={ridge}: "
            "give more of them, a smaller alpha, or a larger ridge"
        )
    A = torch.cholesky_solve(torch.cat(moved).T, L).T  # (R, in)
    return LowRank(A.contiguous(), lambda_ * torch.cat([each.B for each in low_rank], dim=1)).to(torch.float32)


def _regularized(gram: Tensor, alpha: float, ridge: float) -> Tensor:
    """G̃ (in, in) in float64, symmetric to the last bit: the rounding of XᵀX is not, and its inverse would show it."""
    diagonal = gram.diagonal().double()
    regular = gram.double()
    regular = (regular + regular.T).mul_(alpha / 2)
    regular.diagonal().copy_(diagonal + ridge * diagonal.mean())
    return regular
