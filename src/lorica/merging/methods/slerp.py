"""Two updates interpolated along the arc between them, as vectors: exact, of rank r_1 + r_2.

Source: Shoemake 1985, "Animating rotation with quaternion curves", SIGGRAPH.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le

from lorica.adapters.delta import LowRank
from lorica.analysis.spectrum import NEGLIGIBLE
from lorica.merging.coordinates import factors
from lorica.merging.linear import combination
from lorica.merging.method import Site, Update

NUM_ADAPTERS = 2
USES_WEIGHTS = False
EXEMPT = {"order": "t runs from the first adapter to the second: it would have to become 1 - t"}
STRAIGHT = 1e-3  # sin of the angle: below it arc and chord differ by less than float32 can hold


def merge(
    updates: Sequence[Update], weights: Sequence[float], site: Site, *, t: Annotated[float, Ge(0), Le(1)] = 0.5
) -> Update:
    """(sin((1 - t)·θ)·Δ_1 + sin(t·θ)·Δ_2) / sin θ, θ the angle between the two updates; t = 0 is the first.

    Where one of them is zero, or they are parallel or opposite (no arc is the shortest then), (1 - t)·Δ_1 + t·Δ_2.
    """
    first, second = factors(updates, "method slerp")
    return combination(updates, _shares(_angle(first, second), t))


def _angle(first: LowRank, second: LowRank) -> float:
    """In radians, 0 to π; 0 if one has no direction."""
    norms = first.norm(), second.norm()
    if min(norms) <= NEGLIGIBLE * max(norms):
        return 0.0
    return math.acos(max(-1.0, min(1.0, first.inner(second) / math.prod(norms))))


def _shares(angle: float, t: float) -> tuple[float, float]:
    if math.sin(angle) < STRAIGHT:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
