"""Two updates interpolated, ΔW = λ·Δ_1 + (1 - λ)·Δ_2: exact, of rank r_1 + r_2.

Source: WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903, on updates instead of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from lorica.merging.linear import combination
from lorica.merging.method import Site, Update

NUM_ADAPTERS = 2
USES_WEIGHTS = False
EXEMPT = {"order": "lambda is the first adapter's share: it would have to become 1 - lambda"}


def merge(
    updates: Sequence[Update], weights: Sequence[float], site: Site, *, lambda_: Annotated[float, Ge(0), Le(1)] = 0.5
) -> Update:
    """λ·Δ_1 + (1 - λ)·Δ_2, of the same rank for every λ."""
    return combination(updates, [lambda_, 1 - lambda_])
