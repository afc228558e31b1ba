"""Records from elsewhere, made fit to be shown: no control characters, no half letters, no NaN for a number."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorica import files
from lorica.report.subjects import Record

# Letters that turn the direction of the text around them, and so could dress a name up as another.
TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")


def read_json(path: Path) -> Any:
    """A file's JSON value, clean. Raises MissingPathError or DataError."""
    return clean(files.read_json(path))


def read_json_or(path: Path, otherwise: Any) -> Any:
    return read_json(path) if path.is_file() else otherwise


def read_lines(path: Path) -> list[Any]:
    """The records of a JSON Lines file, clean; none where there is no file."""
    return clean(files.read_records(path)) if path.is_file() else []


def clean(value: Any) -> Any:
    """The value with every text in it fit for a page."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {text(str(key)): clean(each) for key, each in value.items()}
    if isinstance(value, list):
        return [clean(each) for each in value]
    return value


def text(given: str) -> str:
    """The text with what cannot or should not be shown replaced by a box."""
    if given.isascii() and given.isprintable():
        return given
    return "".join("\ufffd" if _is_unfit(letter) else letter for letter in given.replace("\n", " "))


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    return dict(_leaves(tree, prefix))


def interval(value: Any) -> tuple[float, float, float] | None:
    """Value, low and high as a record lists them; None if they are not three finite numbers."""
    if not isinstance(value, list) or len(value) != 3:
        return None
    first, low, high = (number(each) for each in value)
    return None if first is None or low is None or high is None else (first, low, high)


def origin_of(folder: Path) -> Record:
    found = read_json_or(folder / "origin.json", {})
    return found if isinstance(found, dict) else {}


def _is_unfit(letter: str) -> bool:
    return letter in TURNING or unicodedata.category(letter) in ("Cc", "Cs", "Cn")


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
