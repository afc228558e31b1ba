"""Tables of plain rows, and numbers as they stand in them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Column, Table


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*(Column(name, overflow="fold") for name in head))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def size(num_bytes: int) -> str:
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e9:.2f} GB"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 0.1 else f"{value * 1000:.0f} ms"


def span(numbers: Sequence[int]) -> str:
    """`8`, or `4 to 16`."""
    if not numbers:
        return ""
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def share(value: float | None) -> str:
    return "of nothing" if value is None else f"{value:.3%}"


def interval(found: Sequence[float] | None) -> str:
    """A value with its interval; None is a recovery that could not be told."""
    if found is None:
        return "no headroom"
    value, low, high = found
    return escape(f"{value:.3f} [{low:.3f}, {high:.3f}]")
