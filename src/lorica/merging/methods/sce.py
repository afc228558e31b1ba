"""SCE: select the entries that differ most between updates, weigh each update by its energy there, erase minorities.

Source: FuseChat, Wan et al. 2024, arXiv 2408.07990; everything is selected by default, as in mergekit's `sce`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from lorica.merging.coordinates import coordinates, mapped
from lorica.merging.election import elected_mean
from lorica.merging.method import Module, OneModule, Site, Update
from lorica.merging.thresholds import kth_largest

USES_WEIGHTS = False


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    select_topk: Annotated[float, Gt(0), Le(1)] = 1.0,
    lambda_: Annotated[float, Ge(0)] = 1.0,
) -> Update:
    """λ·Σ c_i·Δ_i / Σ c_i over the values that agree with the sign of the sum, entry by entry; the others are zero.

    `select_topk` is the share of the module's entries that are selected, those whose variance over the adapters is the
    largest; c_i is the share of update i in the sum of squares of the selected entries.
    """
    least = 0.0
    if select_topk < 1:
        module = OneModule(Module(site, updates, weights))
        least = kth_largest(module, select_topk, measure=_variance)[0].value
    shares = _energy_shares(updates, least)

    def rule(stack: Tensor, block: int) -> Tensor:
        selected = _selected(stack, least).unbind()
        return elected_mean(selected, shares, divisor="weights", tie="drop").mul_(lambda_)

    return mapped(rule, updates, "full")


def _energy_shares(updates: Sequence[Update], least: float) -> list[float]:
    squares = torch.zeros(len(updates), dtype=torch.float64)
    for block in coordinates(updates, "full").blocks():
        squares += torch.linalg.vector_norm(_selected(block, least), dim=(1, 2)).double().square()
    total = float(squares.sum())
    return [float(each) / total if total > 0 else 1.0 for each in squares]


def _selected(stack: Tensor, least: float) -> Tensor:
    """The block itself, its entries of less than the `least` variance set to zero."""
    return stack if least == 0 else stack.mul_((_variance(stack.clone()) >= least).float())


def _variance(stack: Tensor) -> Tensor:
    """(T, ...) -> (1, ...); over the adapters, written over them."""
    return stack.sub_(stack.mean(dim=0)).square_().mean(dim=0, keepdim=True)
