"""What an adapter folder holds, told by its config and the header of its weights; numbers are read where asked for.

A folder from elsewhere is untrusted: only JSON and safetensors are read, every key must be a factor or a declared head,
and shapes are checked in the file's header before anything is allocated.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorica.adapters import peft_config
from lorica.adapters.adapter import Adapter, Head
from lorica.adapters.delta import LowRank
from lorica.adapters.safetensors_header import read_header
from lorica.errors import AdapterFormatError

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY_LIMIT = 1000  # characters


@dataclass(frozen=True)
class Contents:
    """What is in a PEFT folder, and by which keys of the weights' file."""

    path: Path  # of the weights
    shapes: Mapping[str, tuple[int, ...]]  # of every key
    modules: Mapping[str, Mapping[str, str]]  # module path -> key of A, key of B
    heads: Mapping[str, Mapping[str, str]]  # head -> its parameters' keys
    scales: Mapping[str, float]  # of every module
    base_model: str | None


def contents(folder: Path) -> Contents:
    """The contents of a PEFT folder. Raises as `peft_format.read` does, but for NaN and infinity."""
    config = peft_config.read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.exists() and any(folder.glob("adapter_model.bin")):
        raise AdapterFormatError(f"{folder} holds a pickle, adapter_model.bin: convert it to safetensors first")
    shapes = read_header(path)
    modules, heads = _sorted_keys(shapes, peft_config.declared_heads(config), path)
    scales = peft_config.scales(config, {module: shapes[keys["A"]][0] for module, keys in modules.items()})
    return Contents(path, shapes, modules, heads, scales, config.get("base_model_name_or_path"))


def tensors_of(path: Path, keys: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all or those of `keys`, mapped from the disk."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in (file.keys() if keys is None else keys)}
    except SafetensorError as error:
        raise AdapterFormatError(f"{path} is corrupt: {error}") from None


@dataclass(frozen=True)
class Outline:
    """An adapter without its numbers: `adapter` is on the meta device, with every shape, rank and scale."""

    contents: Contents
    adapter: Adapter

    @property
    def num_bytes(self) -> int:
        """Of the weights' file."""
        return self.contents.path.stat().st_size

    def load(self, paths: Iterable[str]) -> dict[str, LowRank]:
        """The updates at `paths`, of those that the adapter has. Raises AdapterFormatError for a corrupt file."""
        known = {path: self.contents.modules[path] for path in paths if path in self.contents.modules}
        tensors = tensors_of(self.contents.path, [key for keys in known.values() for key in keys.values()])
        scales = self.contents.scales
        return {path: LowRank(tensors[keys["A"]], tensors[keys["B"]], scales[path]) for path, keys in known.items()}


def outline(folder: Path) -> Outline:
    """The outline of a PEFT folder. Raises as `contents` does."""
    found = contents(folder)
    shapes = found.shapes
    with torch.device("meta"):
        updates = {
            module: LowRank(torch.empty(shapes[keys["A"]]), torch.empty(shapes[keys["B"]]), found.scales[module])
            for module, keys in found.modules.items()
        }
        heads: dict[str, Head] = {
            module: {part: torch.empty(shapes[key]) for part, key in parts.items()}
            for module, parts in found.heads.items()
        }
    return Outline(found, Adapter(updates, heads, found.base_model))


def _sorted_keys(
    keys: Mapping[str, tuple[int, ...]], declared: Sequence[str], path: Path
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Module -> its factors' keys, and head -> its parameters' keys. Any other key is an error."""
    modules: dict[str, dict[str, str]] = {}
    heads: dict[str, dict[str, str]] = {}
    for key in keys:
        if len(key) > KEY_LIMIT:
            raise AdapterFormatError(f"{path}: a key of {len(key)} characters is neither a factor nor a head")
        name = key.removeprefix(PREFIX)
        factor = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?(?:\.weight)?", name)
        if factor:
            if factor[2] in modules.setdefault(factor[1], {}):
                raise AdapterFormatError(f"{path}: lora_{factor[2]} of {factor[1]} is given twice")
            modules[factor[1]][factor[2]] = key
            continue
        if "lora_embedding_" in name:
            raise AdapterFormatError(f"{path}: {key!r} adapts an embedding: only linear modules are read")
        if "lora_magnitude_vector" in name:
            raise AdapterFormatError(f"{path}: {key!r}: {peft_config.REFUSED['use_dora']}")
        head, part = _split_head(name, declared)
        if not head or "base_layer" in name:
            raise AdapterFormatError(f"{path}: {key!r} is neither a factor nor a head named in modules_to_save")
        if part in heads.setdefault(head, {}):
            raise AdapterFormatError(f"{path}: {head}.{part} is given twice")
        heads[head][part] = key
    for module, factors in modules.items():
        _check_factors(path, module, [keys[factors[letter]] if letter in factors else None for letter in "AB"])
    return modules, heads


def _split_head(name: str, declared: Sequence[str]) -> tuple[str, str]:
    """("classifier", "dense.weight") for a parameter of a declared head; ("", "") for any other name."""
    name = re.sub(r"\.modules_to_save(\.default)?", "", name)
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if any(module == head or module.endswith("." + head) for head in declared):
            return module, ".".join(parts[end:])
    return "", ""


def _check_factors(path: Path, module: str, shapes: Sequence[tuple[int, ...] | None]) -> None:
    A, B = shapes
    if A is None or B is None:
        raise AdapterFormatError(f"{path}: {module} has no lora_{'A' if A is None else 'B'}")
    if len(A) == 4 or len(B) == 4:
        raise AdapterFormatError(f"{path}: {module} is a convolution: only linear modules are read")
    if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        raise AdapterFormatError(f"{path}: {module} has A {A} and B {B}: they must be (r, in) and (out, r)")
    if A[0] == 0:
        raise AdapterFormatError(f"{path}: {module} has rank 0")
