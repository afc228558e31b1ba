"""TIES: trim each update to its largest entries, elect a sign for every entry, average what agrees.

Source: Yadav et al. 2023, arXiv 2306.01708. The presets are the paper's definition, PEFT's `ties` and mergekit's
`ties`; they differ in the scope of the trimming, in what is kept among equal magnitudes, in who wins a tied vote, in
whether weights act before or after the vote, and in what the mean divides by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor

from lorica.merging.coordinates import Space, mapped
from lorica.merging.density import percent
from lorica.merging.election import Divisor, Tie, Trim, Vote, elected_mean
from lorica.merging.method import Module, Modules, OneModule, Site, Update
from lorica.merging.thresholds import Threshold, kth_largest

ALIASES = {"density": ("k", percent)}
EXEMPT = {"single": "the trimmed entries do not come back"}

Scope = Literal["adapter", "module"]
Preset = Literal["paper", "peft", "mergekit"]


@dataclass(frozen=True)
class Rules:
    """Where the presets differ."""

    scope: Scope
    exact_count: bool  # just k entries stay, rather than all that equal the k-th too
    tie: Tie
    vote: Vote
    divisor: Divisor


PRESETS: dict[str, Rules] = {
    "paper": Rules("adapter", exact_count=False, tie="drop", vote="plain", divisor="count"),
    "peft": Rules("module", exact_count=True, tie="positive", vote="plain", divisor="count"),
    "mergekit": Rules("module", exact_count=True, tie="positive", vote="weighted", divisor="weights"),
}


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    k: Annotated[float, Gt(0), Le(100)] = 20.0,
    lambda_: Annotated[float, Ge(0)] = 1.0,
    preset: Preset = "paper",
    scope: Scope | None = None,
    space: Space = "full",
) -> Update:
    """The elected mean of the largest k % of each update's entries, times λ.

    `scope` adapter trims each adapter over all its modules at once, module each module by itself; None is the preset's.
    """
    rules = PRESETS[preset]
    if site.found is None:
        found = kth_largest(OneModule(Module(site, updates, weights)), k / 100, space)
        trim = Trim(found, rules.exact_count)
    else:
        trim = Trim(site.found)  # what equals a threshold of all modules is not one module's excess

    def rule(stack: Tensor, block: int) -> Tensor:
        kept = trim(stack)
        return elected_mean(kept, weights, vote=rules.vote, divisor=rules.divisor, tie=rules.tie).mul_(lambda_)

    return mapped(rule, updates, space)


def survey(
    modules: Modules, *, k: float, lambda_: float, preset: Preset, scope: Scope | None, space: Space
) -> list[Threshold] | None:
    """The thresholds of scope=adapter; None where each module has its own."""
    if (scope or PRESETS[preset].scope) == "module":
        return None
    return kth_largest(modules, k / 100, space)
