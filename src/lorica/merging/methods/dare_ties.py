"""DARE with TIES' election: drop at random, scale up, elect a sign for every entry, average what agrees.

Source: Yu et al. 2024, arXiv 2311.03099, and Yadav et al. 2023, arXiv 2306.01708.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Lt

from lorica.merging.coordinates import Space
from lorica.merging.density import complement
from lorica.merging.method import Site, Update
from lorica.merging.methods import dare

ALIASES = {"density": ("drop_rate", complement)}
EXEMPT = dare.EXEMPT


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    drop_rate: Annotated[float, Ge(0), Lt(1)] = 0.9,
    lambda_: Annotated[float, Ge(0)] = 1.0,
    seed: int = 42,
    space: Space = "full",
) -> Update:
    """`dare` with consensus=ties."""
    return dare.merge(
        updates, weights, site, drop_rate=drop_rate, lambda_=lambda_, consensus="ties", seed=seed, space=space
    )
