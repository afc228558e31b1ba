"""An older name for `trim` with k = 100, which trims nothing."""

from __future__ import annotations

from collections.abc import Sequence

from lorica.merging.method import Site, Update
from lorica.merging.transforms import trim


def transform(updates: Sequence[Update], site: Site) -> list[Update]:
    """Δ_i, in factors where it was."""
    return trim.transform(updates, site, k=100.0)
