"""DELLA: drop entries at random, small ones more often, scale up the others, elect a sign, average what agrees.

Source: Deep et al. 2024, arXiv 2406.11617 (MagPrune). The defaults are those of the example in the authors' repository,
drop rate 0.3 and window 0.14; mergekit's `epsilon` is half of ours, 0.15 by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor

from lorica.errors import ConfigError
from lorica.merging.coordinates import Space, mapped
from lorica.merging.density import complement
from lorica.merging.election import elected_mean
from lorica.merging.method import Site, Update
from lorica.randomness import uniforms

ALIASES = {"density": ("drop_rate", complement)}
EXEMPT = {
    "single": "the dropped entries do not come back",
    "duplicate": "a copy under another name has a mask of its own",
}


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    site: Site,
    *,
    drop_rate: Annotated[float, Ge(0), Lt(1)] = 0.3,
    epsilon: Annotated[float, Ge(0)] = 0.14,
    lambda_: Annotated[float, Ge(0)] = 1.0,
    seed: int = 42,
    space: Space = "full",
) -> Update:
    """λ times the elected mean of what MagPrune leaves of each update.

    The probability p that an entry is dropped falls evenly with the rank of its magnitude in its row, from
    drop_rate + ε/2 for the smallest to drop_rate - ε/2 for the largest; what stays is divided by 1 - p.
    """
    middle = 1 - drop_rate

    def rule(stack: Tensor, block: int) -> Tensor:
        by_rank = torch.linspace(middle - epsilon / 2, middle + epsilon / 2, stack.shape[2])  # smallest first
        for name, entries in zip(site.names, stack, strict=True):
            drawn = uniforms(seed, "della", name, site.path, space, block, size=entries.numel())
            keep = torch.empty_like(entries).scatter_(1, _by_magnitude(entries), by_rank.expand_as(entries))
            entries.mul_((drawn.view_as(entries) < keep).float().div_(keep))
        return elected_mean(stack.unbind(), weights, vote="weighted", tie="drop").mul_(lambda_)

    return mapped(rule, updates, space)


def check(num_adapters: int, *, drop_rate: float, epsilon: float, **others: object) -> None:
    """Raises ConfigError if the window of probabilities leaves [0, 1)."""
    lowest, highest = drop_rate - epsilon / 2, drop_rate + epsilon / 2
    if lowest < 0 or highest >= 1:
        raise ConfigError(
            f"drop_rate={drop_rate} with epsilon={epsilon} gives probabilities from {lowest:g} to {highest:g}, "
            "and they must stay in [0, 1): make epsilon smaller"
        )


def _by_magnitude(entries: Tensor) -> Tensor:
    """(rows, columns) int64: each row's columns, the smallest magnitude first and among equals the first column.

    A magnitude's bits, read as a whole number, rise with it. One sort of (bits, column) pairs is ten times faster than
    an argsort, and the same on every platform.
    """
    bits = entries.abs().numpy().view(np.uint32).astype(np.uint64)
    pairs = (bits << np.uint64(32)) | np.arange(entries.shape[1], dtype=np.uint64)
    pairs.sort(axis=1)
    return torch.from_numpy((pairs & np.uint64(0xFFFF_FFFF)).astype(np.int64))
