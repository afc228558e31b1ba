"""The run folder's own lines: where the numbers of every run go while it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica import files


class JsonLines:
    """A file of one JSON record a line; a number that JSON has no word for (NaN, infinity) becomes null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def log(self, record: Mapping[str, Any]) -> None:
        files.append_record(self.path, {key: _plain(value) for key, value in record.items()})


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
