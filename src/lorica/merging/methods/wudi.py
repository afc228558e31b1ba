"""WUDI: the update that acts like each of the updates on that one's own input directions: exact, of rank Σ r_i at most.

Source: WUDI-Merging, Cheng et al. 2025, arXiv 2503.08099, whose objective is minimised there by gradient steps and here
in closed form: RegMean with the Grams G_i = Δ_iᵀΔ_i/‖Δ_i‖².
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge

from lorica.adapters.delta import LowRank
from lorica.analysis.spectrum import directions
from lorica.merging.method import Site, Update
from lorica.merging.subspace import weighted


def merge(
    updates: Sequence[Update], weights: Sequence[float], site: Site, *, lambda_: Annotated[float, Ge(0)] = 1.0
) -> LowRank:
    """λ times the Δ of least norm that minimises Σ ‖(Δ - w_i·Δ_i)·Δ_iᵀ‖²/‖Δ_i‖²; a zero Δ_i has no say.

    Δ = (Σw_iΔ_iG_i)(ΣG_i)⁺. With Δ_i = U_i·σ_i·V_iᵀ, D_i = σ_i/‖σ_i‖ and S the D_i·V_iᵀ stacked, ΣG_i = SᵀS and
    Δ = [w_i·U_i·σ_i·D_i]·(S⁺)ᵀ: nothing is squared.
    """
    triples = [directions(each) for each in weighted(updates, [1.0] * len(updates), "method wudi")]
    shares = [sigma / torch.linalg.vector_norm(sigma) for _, sigma, _ in triples]
    pulled = zip(triples, shares, weights, strict=True)
    left = torch.cat([U * (sigma * D * weight) for (U, sigma, _), D, weight in pulled], dim=1)  # (out, R)
    S = torch.cat([(V * D).T for (_, _, V), D in zip(triples, shares, strict=True)])  # (R, in)
    P, sigma, Q = directions(LowRank(S, torch.eye(len(S), dtype=S.dtype)))  # S = P·σ·Qᵀ
    return LowRank(Q.T.contiguous(), lambda_ * left @ (P / sigma)).to(torch.float32)
