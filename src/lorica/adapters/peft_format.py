"""Adapter folders in PEFT's format, read and written without importing peft.

A folder from elsewhere is untrusted: only JSON and safetensors are read, every key must be a factor or a declared head,
shapes are checked in the file's header before anything is allocated, and no pattern of the file is run as a regex.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorica import files
from lorica.adapters import outline, peft_config
from lorica.adapters.adapter import Adapter, Head
from lorica.adapters.delta import LowRank, zero
from lorica.adapters.outline import PREFIX, WEIGHTS_FILE
from lorica.adapters.peft_config import CONFIG_FILE, Layout
from lorica.errors import AdapterFormatError, ShapeError

Profile = Literal["peft", "portable"]

__all__ = [
    "CONFIG_FILE",
    "PREFIX",
    "WEIGHTS_FILE",
    "Profile",
    "Settings",
    "as_stored",
    "read",
    "settings",
    "write",
    "write_into",
]


def read(folder: Path) -> Adapter:
    """The adapter in a PEFT folder, its scale from lora_alpha, rank_pattern, alpha_pattern and use_rslora.

    Raises MissingPathError if a file is not there, AdapterFormatError for anything that cannot be read faithfully:
    the message names the file, the key and the reason.
    """
    adapter = as_stored(folder)
    if not adapter.is_finite():
        raise AdapterFormatError(f"{folder / WEIGHTS_FILE} holds NaN or infinity")
    return adapter


def as_stored(folder: Path) -> Adapter:
    """What `read` would read, NaN and infinity included, for those who look at what is wrong with it."""
    found = outline.contents(folder)
    tensors = outline.tensors_of(found.path)
    updates = {
        module: LowRank(tensors[keys["A"]], tensors[keys["B"]], found.scales[module])
        for module, keys in found.modules.items()
    }
    heads: dict[str, Head] = {
        module: {part: tensors[key] for part, key in parts.items()} for module, parts in found.heads.items()
    }
    return Adapter(updates, heads, found.base_model)


@dataclass(frozen=True)
class Settings:
    """What an adapter's config says beside its factors, and a merge of it hands on."""

    task_type: str | None
    fan_in_fan_out: bool


def settings(folder: Path) -> Settings:
    """The settings of a PEFT folder. Raises as `read` does."""
    config = peft_config.read_config(folder)
    task_type = config.get("task_type")
    return Settings(task_type if isinstance(task_type, str) else None, config.get("fan_in_fan_out") is True)


def write(adapter: Adapter, folder: Path, **options: Any) -> None:
    """Write the adapter as a PEFT folder, replacing `folder` in one rename; options as of `write_into`."""
    with files.staged_folder(folder) as staging:
        write_into(adapter, staging, **options)


def write_into(
    adapter: Adapter,
    folder: Path,
    *,
    profile: Profile = "peft",
    layout: Layout | None = None,
    task_type: str | None = None,
    dropout: float = 0.0,
    fan_in_fan_out: bool = False,
) -> None:
    """Write an adapter's two files into a folder that is there, after everything that can be refused has been.

    `peft` keeps every module's own rank and alpha (rank_pattern, alpha_pattern). `portable` is what the inference
    servers' loaders read: one rank, lora_alpha = rank, scale folded into B, suffix targets, and every layer of a target
    type present, zero-filled; it needs `layout` and cannot carry heads (ShapeError).
    """
    if profile == "portable":
        adapter = _portable(adapter, layout or {})
    if not adapter.is_finite():
        raise AdapterFormatError("the adapter holds NaN or infinity: nothing was written")
    adapter = _without_rank_zero(adapter)
    if task_type == "SEQ_CLS" and not adapter.heads:
        task_type = None  # under it PEFT insists on a head
    config = peft_config.new_config(adapter, layout, task_type, dropout, fan_in_fan_out)
    tensors = {}
    for path, update in adapter.updates.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = update.A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = update.B
    for path, head in adapter.heads.items():
        tensors |= {f"{PREFIX}{path}.{part}": tensor for part, tensor in head.items()}
    tensors = apart(tensors)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU; those that share memory are copied, for safetensors refuses them."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, given in tensors.items():
        tensor = given.detach().cpu()
        storage = tensor.untyped_storage()
        if not tensor.is_contiguous() or storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        taken.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found


def _without_rank_zero(adapter: Adapter) -> Adapter:
    """PEFT knows no rank 0: an update of none becomes a zero of rank 1."""
    updates = {path: _padded(each, 1) if each.rank == 0 else each for path, each in adapter.updates.items()}
    return Adapter(updates, adapter.heads, adapter.base_model)


def _portable(adapter: Adapter, layout: Layout) -> Adapter:
    if adapter.heads:
        raise ShapeError(
            f"profile=portable cannot carry the head {', '.join(adapter.heads)}: the loaders that it is for refuse "
            "heads; use profile=peft"
        )
    unknown = [path for path in adapter.updates if path not in layout]
    if unknown:
        raise ShapeError(f"profile=portable needs the base's layout, and it has no {unknown[0]}")
    suffixes = {path.rpartition(".")[2] for path in adapter.updates}
    rank = max((update.rank for update in adapter.updates.values()), default=1)
    updates = {
        path: _padded(adapter.updates.get(path) or zero(layout[path]), rank)
        for path in peft_config.of_suffixes(list(suffixes), layout)
    }
    return Adapter(updates, {}, adapter.base_model)


def _padded(update: LowRank, rank: int) -> LowRank:
    """The same update at `rank` and scale 1: scale folded into B, missing directions zero."""
    missing = rank - update.rank
    A = torch.cat([update.A, update.A.new_zeros(missing, update.shape[1])])  # (rank, in)
    B = torch.cat([update.scaled_B(), update.B.new_zeros(update.shape[0], missing)], dim=1)  # (out, rank)
    return LowRank(A, B)
