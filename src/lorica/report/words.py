"""Figures in words: every number of a report is written by one of these."""

from __future__ import annotations

from typing import Any

# Metrics that are shares, and read best in per cent.
PERCENTAGES = {"accuracy", "macro_f1", "f1", "f1a", "exact_match", "drop_f1", "drop_exact_match"}
MINUS, SPACE = "−", "\u00a0"  # a number and its unit are not torn apart at the end of a line


def score(value: float | None, metric: str = "accuracy") -> str:
    """0.9123 -> 91.2 %; a metric that is no share keeps its own scale."""
    if value is None:
        return "–"
    return f"{_signed(100 * value, '.1f')}{SPACE}%" if metric in PERCENTAGES else _signed(value, ".3f")


def bare_score(value: float | None, metric: str) -> str:
    """The same without the sign for per cent."""
    return score(value, metric).removesuffix(f"{SPACE}%")


def between(low: float | None, high: float | None, metric: str = "accuracy") -> str:
    """`88.9 to 93.1`; a dash where there is no interval."""
    if low is None or high is None:
        return "–"
    return f"{bare_score(low, metric)} to {bare_score(high, metric)}"


def points(value: float | None) -> str:
    """A difference of two shares in points, with its sign: +2.1."""
    return "–" if value is None else _signed(100 * value, "+.1f")


def delta(value: float | None) -> str:
    """A recovery: 1 is the task's own adapter."""
    return "–" if value is None else _signed(value, ".2f")


def count(value: float | None) -> str:
    """16,384; from a million on 1.25 M."""
    if value is None:
        return "–"
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{SPACE}{letter}"
    return f"{value:,.0f}"


def share(part: float | None, whole: float | None) -> str:
    return "–" if part is None or not whole else f"{100 * part / whole:.3g}{SPACE}%"


def size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return "–"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g}{SPACE}{unit}"
    return f"{num_bytes:.0f}{SPACE}B"


def duration(seconds: float | None) -> str:
    """8.3 s, 4 min 10 s, 2 h 5 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f}{SPACE}s"
    minutes = round(seconds) // 60
    return (
        f"{minutes}{SPACE}min {round(seconds) % 60}{SPACE}s"
        if minutes < 60
        else f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"
    )


def rate(value: float | None) -> str:
    """1e-4, 0.01."""
    return "–" if value is None else f"{value:g}"


def value(given: Any) -> str:
    """Whatever a config or a point of a search holds."""
    if isinstance(given, float):
        return f"{given:.6g}"
    return "–" if given is None else str(given)


def listed(names: list[str], most: int = 6) -> str:
    """a, b and c; what goes beyond `most` is counted."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def numbered(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def short(name: str, most: int) -> str:
    """The name cut to `most` letters, its end marked."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _signed(number: float, form: str) -> str:
    """The number with a minus sign that is as wide as a plus sign, and no minus before a zero."""
    written = format(number, form)
    if not any(letter in "123456789" for letter in written):
        written = written.lstrip("+-")
    return written.replace("-", MINUS)
