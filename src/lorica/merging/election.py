"""Trim by magnitude, elect a sign for each entry, average what agrees: the steps of TIES, for all that use them.

Source: Yadav et al. 2023, arXiv 2306.01708.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.merging.thresholds import Threshold

Vote = Literal["plain", "weighted"]
Divisor = Literal["count", "weights", "none"]
Tie = Literal["drop", "positive"]


class Trim:
    """Keeps the entries of at least the threshold's magnitude, over the blocks of one module in their order.

    With `exact_count` the first of the entries that equal the threshold go too, so that just k stay.
    """

    def __init__(self, thresholds: Sequence[Threshold], exact_count: bool = False) -> None:
        self._thresholds = [each.value for each in thresholds]
        self._below = [float(np.nextafter(np.float32(each.value), np.float32(-np.inf))) for each in thresholds]
        self._excess = [each.num_excess if exact_count and each.value > 0 else 0 for each in thresholds]

    def __call__(self, stack: Tensor) -> list[Tensor]:
        """(T, rows, columns) -> T new tensors (rows, columns), trimmed to zero below the thresholds."""
        return [self._trimmed(adapter, entries) for adapter, entries in enumerate(stack)]

    def _trimmed(self, adapter: int, entries: Tensor) -> Tensor:
        kept = F.hardshrink(entries, self._below[adapter])  # keeps what exceeds
        if self._excess[adapter]:
            equal = (kept.abs() == self._thresholds[adapter]).flatten().nonzero().flatten()[: self._excess[adapter]]
            kept.view(-1)[equal] = 0.0
            self._excess[adapter] -= len(equal)
        return kept


def elected_mean(
    stack: Sequence[Tensor], weights: Sequence[float], *, vote: Vote = "plain", divisor: Divisor = "count", tie: Tie
) -> Tensor:
    """T tensors (rows, columns) -> one: of each entry's values the mean of those with the sign of their sum.

    A value x_i counts w_i·x_i. The sum is of x_i (vote=plain) or of w_i·x_i (weighted); where it is zero the entry is
    dropped, or taken as positive. The mean divides by the number of non-zero values that agree, by the sum of their
    weights, or not at all.
    """
    elected = _elected(stack, weights if vote == "weighted" else [1.0] * len(stack), tie)
    merged, number = torch.zeros_like(elected), torch.zeros_like(elected)
    agreeing = torch.empty_like(elected)  # the values that agree, their sign made positive
    for entries, weight in zip(stack, weights, strict=True):
        torch.mul(entries, elected, out=agreeing)
        if vote == "weighted" and weight != 1:
            agreeing.mul_(weight)
        merged.add_(agreeing.relu_(), alpha=1.0 if vote == "weighted" else weight)
        if divisor != "none":
            number.add_(agreeing.sign_(), alpha=1.0 if divisor == "count" else weight)
    merged.mul_(elected)
    if divisor == "none":
        return merged
    return merged.div_(number.clamp_(min=1.0) if divisor == "count" else number.masked_fill_(number == 0, 1.0))


def agreeing(stack: Sequence[Tensor]) -> list[Tensor]:
    """T tensors -> T: the entries with the sign of the sum of all T, and zero for the others."""
    elected = _elected(stack, [1.0] * len(stack), "drop")
    return [entries.where(entries * elected > 0, 0.0) for entries in stack]


def _elected(stack: Sequence[Tensor], weights: Sequence[float], tie: Tie) -> Tensor:
    """The sign of each entry's weighted sum: 1, -1, or at a tie what `tie` says, where 0 drops the entry."""
    total = torch.zeros_like(stack[0])
    for entries, weight in zip(stack, weights, strict=True):
        total.add_(entries, alpha=weight)
    return torch.copysign(torch.ones_like(total), total) if tie == "positive" else total.sign_()
