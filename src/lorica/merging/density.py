"""Density, the fraction of entries that is kept, as the methods' own options have it."""

from __future__ import annotations

from typing import Any


def percent(density: Any) -> float:
    """TIES' k. TypeError, which is told of the word that the user gave, for what is no number."""
    return 100 * _number(density)


def complement(density: Any) -> float:
    """DARE's drop_rate. TypeError as in `percent`."""
    return 1 - _number(density)


def _number(density: Any) -> float:
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise TypeError(f"density={density!r}")
    return density
