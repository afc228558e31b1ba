"""Two adapters' factors interpolated, A and B apart: their own rank, but only near the interpolated update.

Source: WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903, on factors instead of weights. What that costs is the
distance to weighted_delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from lorica.adapters.delta import LowRank
from lorica.merging.method import Site, Update
from lorica.merging.methods.uniform import combined_factors

NUM_ADAPTERS = 2
APPROXIMATES = "weighted_delta"
EQUAL_RANKS = True
USES_WEIGHTS = False
EXEMPT = {
    "refactoring": "a mean of factors depends on the bases that they are written in",
    "scaling": "a mean of factors depends on how an update's size is shared between A and B",
    "order": "lambda is the first adapter's share: it would have to become 1 - lambda",
}


def merge(
    updates: Sequence[Update], weights: Sequence[float], site: Site, *, lambda_: Annotated[float, Ge(0), Le(1)] = 0.5
) -> LowRank:
    """A = λ·A_1 + (1 - λ)·A_2 and B = λ·s_1·B_1 + (1 - λ)·s_2·B_2. Raises ShapeError if the ranks differ."""
    return combined_factors(updates, [lambda_, 1 - lambda_], site, "weighted", APPROXIMATES)
