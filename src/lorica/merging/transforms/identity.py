"""The updates as they are."""

from __future__ import annotations

from collections.abc import Sequence

from lorica.merging.method import Site, Update


def transform(updates: Sequence[Update], site: Site) -> list[Update]:
    """Δ_i."""
    return list(updates)
