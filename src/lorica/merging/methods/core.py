"""Core space: an elementwise rule on the R × R cores of the updates between bases that all of them share.

Source: Panariello et al. 2025, arXiv 2509.17786, with bases that depend on the updates alone (MATH section 6.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Ge

from lorica.merging.method import Module, Modules, Site, Update
from lorica.merging.methods import ties
from lorica.merging.rules import rule_in

EXEMPT = {**ties.EXEMPT, "duplicate": "a rule that draws, like dare, drops other entries of a copy of another name"}


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    rule: str = "ties",
    rule_params: dict[str, Any] | None = None,
    lambda_: Annotated[float, Ge(0)] = 1.0,
) -> Update:
    """λ times what the method `rule` makes of the U_BᵀΔ_iV_A, brought back by U_B and V_Aᵀ."""
    chosen = rule_in("core", rule, rule_params, len(updates))
    return chosen(Module(site, updates, weights)) * lambda_


def survey(modules: Modules, *, rule: str, rule_params: dict[str, Any] | None, lambda_: float) -> Any:
    """The rule's own."""
    return rule_in("core", rule, rule_params, num_adapters=1).surveyed(modules)


def check(num_adapters: int, *, rule: str, rule_params: dict[str, Any] | None, lambda_: float) -> None:
    """Raises what `rule_in` raises, before anything is computed."""
    rule_in("core", rule, rule_params, num_adapters)
