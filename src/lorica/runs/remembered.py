"""What was computed once, kept in JSON files that are found by the content of their key."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorica import files
from lorica.errors import LoricaError

Key = Mapping[str, Any]
Check = Callable[[Any], bool]


def remembered(folder: Path, key: Key, make: Callable[[], Any], is_whole: Check) -> Any:
    """The JSON value under `key` in a folder; made, and kept, where there is none that can be trusted."""
    path = folder / f"{files.content_hash(key)}.json"
    found = recall(path, key, is_whole)
    if found is None:
        found = make()
        keep(path, key, found)
    return found


def recall(path: Path, key: Key, is_whole: Check) -> Any | None:
    """The value that a file keeps; None if the file cannot be read, states another key, or its value is not whole."""
    try:
        found = files.read_json(path)
    except (LoricaError, OSError, RecursionError):
        return None
    is_this = isinstance(found, dict) and found.get("key") == json.loads(json.dumps(key))
    return found["value"] if is_this and is_whole(found.get("value")) else None


def keep(path: Path, key: Key, value: Any) -> None:
    """Write a value that is not None, for `recall`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"key": key, "value": value})
