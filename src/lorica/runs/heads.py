"""The heads that a merge keeps beside its adapter, one file a task: heads are whole parameters, and do not merge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from lorica.adapters.adapter import Head
from lorica.adapters.safetensors_header import read_header

HEADS = "heads"  # the folder beside the adapter
SEPARATOR = "::"  # between the head's module and its parameter


def write_heads(heads: Mapping[str, Head], file: Path) -> None:
    """One safetensors file of all parameters of a task's heads."""
    file.parent.mkdir(exist_ok=True)
    save_file({f"{path}{SEPARATOR}{part}": each for path, head in heads.items() for part, each in head.items()}, file)


def read_heads(file: Path) -> dict[str, Head]:
    """The heads in such a file. Raises AdapterFormatError if it is corrupt."""
    read_header(file)
    heads: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in load_file(file).items():
        path, _, part = name.partition(SEPARATOR)
        heads[path][part] = tensor
    return dict(heads)
