"""A named check of an adapter, with its figure and the tolerance that it is held to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["pass", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """What was looked at, and what came of it; `said` is what the figure counts, or why there is none."""

    name: str
    state: State
    said: str
    figure: float | None = None
    tolerance: float | None = None


def judged(name: str, figure: float, tolerance: float, said: str) -> Check:
    """Passed if the figure is at most the tolerance; NaN is not, and is no figure."""
    state: State = "pass" if figure <= tolerance else "fail"
    return Check(name, state, said, figure if math.isfinite(figure) else None, tolerance)


def counted(name: str, wrong: Sequence[str], said: str) -> Check:
    """Passed if nothing is wrong; the first of what is wrong is named."""
    if not wrong:
        return Check(name, "pass", said, 0, 0)
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return Check(name, "fail", f"{wrong[0]}{more}", len(wrong), 0)


def skipped(names: Sequence[str], reason: str) -> list[Check]:
    """Checks that could not be made, and why."""
    return [Check(name, "skip", reason) for name in names]


def failed(names: Sequence[str], reason: str) -> list[Check]:
    """Checks that an error kept from their end."""
    return [Check(name, "fail", reason) for name in names]


def first_line(error: Exception) -> str:
    """What an error says, for a line of a table; its kind where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
