"""MagMax: of each entry's values the one with the largest magnitude.

Source: Marczak et al. 2024, arXiv 2407.06322.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from lorica.merging.coordinates import Space, mapped
from lorica.merging.method import Site, Update


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    lambda_: Annotated[float, Ge(0)] = 1.0,
    space: Space = "full",
) -> Update:
    """λ times that w_i·Δ_i which is the largest in magnitude, entry by entry; of x and -x it is the positive one."""
    factors = torch.tensor(list(weights))[:, None, None]

    def rule(stack: Tensor, block: int) -> Tensor:
        stack.mul_(factors)
        low, high = stack.amin(dim=0), stack.amax(dim=0)
        return torch.where(high >= -low, high, low).mul_(lambda_)

    return mapped(rule, updates, space)
