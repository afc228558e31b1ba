"""What `lorica verify` found, as a table: a row for each check, and one line that counts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lorica.tables.cells import seconds, size

if TYPE_CHECKING:
    from lorica.analysis.checks import Check
    from lorica.analysis.equivalence import Speed
    from lorica.runs import Verification

STYLES = {"pass": "green", "fail": "bold red", "skip": "dim"}


def verification(found: Verification) -> list[Table | str]:
    """Every check with its figure and tolerance, the speed if it was taken, and what it comes to."""
    table = Table("check", "", "figure", "at most", "of what")
    for each in found.checks:
        state = f"[{STYLES[each.state]}]{each.state.upper()}[/]"
        table.add_row(each.name, state, _number(each.figure), _number(each.tolerance), escape(each.said))
    table.caption = escape(f"asked by {found.batch}")
    said = [_speed(found.speed)] if found.speed is not None else []
    missing = [escape(f"no speed: {found.no_speed}")] if found.no_speed is not None else []
    return [table, *said, *missing, _summary(found.checks)]


def _summary(checks: tuple[Check, ...]) -> str:
    counts = {state: [each.name for each in checks if each.state == state] for state in STYLES}
    failed = f": {', '.join(counts['fail'])}" if counts["fail"] else ""
    return f"{len(counts['pass'])} passed, {len(counts['fail'])} failed{failed}, {len(counts['skip'])} skipped"


def _speed(found: Speed) -> str:
    peaks = ""
    if found.live_peak_bytes is not None and found.fused_peak_bytes is not None:
        peaks = f"; peak of a pass {size(found.live_peak_bytes)} live, {size(found.fused_peak_bytes)} fused"
    return (
        f"live takes {found.ratio:.3f} times as long as fused (median of {found.num_rounds} rounds, "
        f"{seconds(found.live_seconds)} and {seconds(found.fused_seconds)}); its factors hold "
        f"{size(found.adapter_bytes)}{peaks}"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
