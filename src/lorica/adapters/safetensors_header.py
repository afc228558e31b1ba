"""The header of a safetensors file from elsewhere: every tensor's shape, checked before anything is allocated."""

from __future__ import annotations

import json
import math
import operator
import os
from collections import Counter
from pathlib import Path
from typing import Any

from lorica import files
from lorica.errors import AdapterFormatError, DataError

LIMIT_BYTES = 8 << 20
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file, from its header alone, checked against the file's size."""
    try:
        with files.open_regular(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size_bytes - 8, LIMIT_BYTES):
                raise AdapterFormatError(f"{path} is truncated or no safetensors file: header of {length} bytes")
            header = json.loads(file.read(length), object_pairs_hook=without_duplicates)
    except DataError as error:
        raise AdapterFormatError(str(error)) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, AdapterFormatError):
            raise
        raise AdapterFormatError(f"{path} is corrupt: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise AdapterFormatError(f"{path} is corrupt: its header is no table of tensors")
    header.pop("__metadata__", None)
    return {key: _checked_shape(path, key, entry, size_bytes - 8 - length) for key, entry in header.items()}


def _checked_shape(path: Path, key: str, entry: Any, data_bytes: int) -> tuple[int, ...]:
    try:
        shape = tuple(operator.index(size) for size in entry["shape"])
        start, end = map(operator.index, entry["data_offsets"])
        dtype = str(entry["dtype"])
    except (TypeError, KeyError, ValueError):
        raise AdapterFormatError(f"{path} is corrupt: the header's entry for {key!r} is not a tensor") from None
    if dtype not in ITEM_BYTES:
        raise AdapterFormatError(f"{path}: {key!r} has dtype {dtype}, a factor is one of {', '.join(ITEM_BYTES)}")
    fits = 0 <= start <= end <= data_bytes and all(size >= 0 for size in shape)
    if not fits or math.prod(shape) * ITEM_BYTES[dtype] != end - start:
        raise AdapterFormatError(f"{path} is truncated or corrupt: {key!r} does not fit into the file")
    return shape


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json: an object whose keys differ, for which of two equal ones counts is anyone's guess."""
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise AdapterFormatError(f"the key {twice[0]!r} is given twice")
    return dict(pairs)
