"""Each update without a random part of its entries: the first step of DARE alone.

Source: Yu et al. 2024, arXiv 2311.03099.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Lt
from torch import Tensor

from lorica.merging.coordinates import mapped_each
from lorica.merging.density import complement
from lorica.merging.dropping import drop_
from lorica.merging.method import Site, Update

ALIASES = {"density": ("drop_rate", complement)}


def transform(
    updates: Sequence[Update],
    site: Site,
    *,
    drop_rate: Annotated[float, Ge(0), Lt(1)] = 0.9,
    seed: int = 42,
    rescale: bool = True,
) -> list[Update]:
    """m_i⊙Δ_i, over 1 - drop_rate with `rescale`, dense, by the masks of `dare`; drop_rate=0 returns the updates."""
    if drop_rate == 0:
        return list(updates)
    scale = 1 / (1 - drop_rate) if rescale else 1.0

    def rule(stack: Tensor, block: int) -> Sequence[Tensor]:
        return drop_(stack, drop_rate, seed, site, "full", block).mul_(scale).unbind()

    return mapped_each(rule, updates)
