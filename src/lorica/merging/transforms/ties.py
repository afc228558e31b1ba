"""Each update trimmed, and without the entries that go against the elected sign: TIES before its mean.

Source: Yadav et al. 2023, arXiv 2306.01708.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Gt, Le
from torch import Tensor

from lorica.merging.coordinates import mapped_each
from lorica.merging.density import percent
from lorica.merging.election import agreeing
from lorica.merging.method import Modules, Site, Update
from lorica.merging.thresholds import Threshold
from lorica.merging.transforms import trim
from lorica.merging.transforms.trim import Scope

ALIASES = {"density": ("k", percent)}


def transform(
    updates: Sequence[Update], site: Site, *, k: Annotated[float, Gt(0), Le(100)] = 20.0, scope: Scope = "adapter"
) -> list[Update]:
    """Of the largest k % of each update's entries those with the sign of their sum over the updates, dense."""

    def rule(stack: Tensor, block: int) -> list[Tensor]:
        return agreeing(stack.unbind())

    return mapped_each(rule, trim.transform(updates, site, k=k, scope=scope))


def survey(modules: Modules, *, k: float, scope: Scope) -> list[Threshold] | None:
    """As of `trim`."""
    return trim.survey(modules, k=k, scope=scope)
