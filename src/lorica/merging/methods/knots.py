"""KnOTS: an elementwise rule on the right singular parts of the stacked updates, which share their left ones.

Source: Stoica et al. 2024, arXiv 2410.19735.
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
    """λ times what the method `rule` makes of the V_i, brought back by U·Σ, with [Δ_1 … Δ_T] = U·Σ·[V_1ᵀ … V_Tᵀ]."""
    chosen = rule_in("knots", rule, rule_params, len(updates))
    return chosen(Module(site, updates, weights)) * lambda_


def survey(modules: Modules, *, rule: str, rule_params: dict[str, Any] | None, lambda_: float) -> Any:
    """The rule's own."""
    return rule_in("knots", rule, rule_params, num_adapters=1).surveyed(modules)


def check(num_adapters: int, *, rule: str, rule_params: dict[str, Any] | None, lambda_: float) -> None:
    """Raises what `rule_in` raises, before anything is computed."""
    rule_in("knots", rule, rule_params, num_adapters)
