"""Each update without its smallest entries: the first step of TIES alone.

Source: Yadav et al. 2023, arXiv 2306.01708.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Gt, Le
from torch import Tensor

from lorica.merging.coordinates import mapped_each
from lorica.merging.density import percent
from lorica.merging.election import Trim
from lorica.merging.method import Module, Modules, OneModule, Site, Update
from lorica.merging.thresholds import Threshold, kth_largest

ALIASES = {"density": ("k", percent)}

Scope = Literal["adapter", "module"]


def transform(
    updates: Sequence[Update], site: Site, *, k: Annotated[float, Gt(0), Le(100)] = 20.0, scope: Scope = "adapter"
) -> list[Update]:
    """Δ_i with its largest k % of entries kept, dense; the updates themselves if that is all of them.

    `scope` adapter trims each adapter over all its modules at once, module each module by itself. Entries as large as
    the smallest that is kept are kept too.
    """
    if k == 100:
        return list(updates)
    thresholds = site.found
    if thresholds is None:
        thresholds = kth_largest(OneModule(Module(site, updates, [1.0] * len(updates))), k / 100)
    trim = Trim(thresholds)

    def rule(stack: Tensor, block: int) -> list[Tensor]:
        return trim(stack)

    return mapped_each(rule, updates)


def survey(modules: Modules, *, k: float, scope: Scope) -> list[Threshold] | None:
    """The thresholds of scope=adapter; None where each module has its own."""
    return None if scope == "module" or k == 100 else kth_largest(modules, k / 100)
