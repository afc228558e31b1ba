"""A run's state on the disk: saved whole or not at all, and resumed from the newest that is whole.

A checkpoint is a folder `step-NNNNNNNN` staged beside its place with a manifest (size and SHA-256 of every file)
written last, and renamed into it. Only tensors and plain values are kept: no pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorica import files
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.adapters.peft_format import apart

FORMAT_VERSION = 2
TENSORS, VALUES, MANIFEST = "state.safetensors", "state.json", "MANIFEST.json"


@dataclass(frozen=True)
class Snapshot:
    """Tensors by name and plain values: everything that a run needs to go on from `step`."""

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def save_checkpoint(folder: Path, snapshot: Snapshot, keep: int = 2) -> None:
    """Commit a snapshot under `folder`, then delete all but the newest `keep` by step."""
    folder.mkdir(exist_ok=True)
    with files.staged_folder(folder / f"step-{snapshot.step:08d}") as staging:
        # Straight from the tensors' own memory: of a model that is trained whole, the only copy is on the disk.
        save_file(apart(snapshot.tensors), staging / TENSORS)
        files.write_json(staging / VALUES, {"step": snapshot.step, **snapshot.values})
        manifest = {name: _described(staging / name) for name in (TENSORS, VALUES)}
        files.write_json(staging / MANIFEST, {"format": FORMAT_VERSION, "files": manifest})
    for old in _by_step(folder)[keep:]:
        trash = old.with_name(f".{old.name}.trash")
        old.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def newest_checkpoint(folder: Path) -> tuple[Snapshot | None, list[str]]:
    """The newest whole checkpoint by step, and why each newer one was passed over."""
    skipped: list[str] = []
    for path in _by_step(folder):
        fault = _fault(path)
        if fault is None:
            return _read(path), skipped
        skipped.append(f"{path.name}: {fault}")
    return None, skipped


def whole_checkpoints(folder: Path) -> list[Snapshot]:
    """Every checkpoint whose files match their manifest, by rising step."""
    return [_read(path) for path in reversed(_by_step(folder)) if _fault(path) is None]


def _read(path: Path) -> Snapshot:
    values = json.loads((path / VALUES).read_text("utf-8"))
    return Snapshot(values.pop("step"), load_file(path / TENSORS), values)


def _by_step(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they match their manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        if manifest["format"] != FORMAT_VERSION:
            return f"format {manifest['format']}, and this lorica reads {FORMAT_VERSION}"
        for name in (TENSORS, VALUES):
            found, expected = _described(path / name), manifest["files"][name]
            if found["bytes"] != expected["bytes"]:
                return f"{name} is truncated"
            if found["sha256"] != expected["sha256"]:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"incomplete ({type(error).__name__})"
    return None


def _described(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def adapter_tensors(prefix: str, adapter: Adapter) -> dict[str, Tensor]:
    """An adapter's factors, scales and heads as tensors by name."""
    tensors: dict[str, Tensor] = {}
    for path, update in adapter.updates.items():
        tensors[f"{prefix}|{path}|A"] = update.A
        tensors[f"{prefix}|{path}|B"] = update.B
        tensors[f"{prefix}|{path}|scale"] = torch.tensor(update.scale, dtype=torch.float64)
    for path, head in adapter.heads.items():
        tensors |= {f"{prefix}|{path}|head|{part}": value for part, value in head.items()}
    return tensors


def adapter_of(prefix: str, tensors: Mapping[str, Tensor], base_model: str | None = None) -> Adapter | None:
    """The adapter that `adapter_tensors` took apart; None if there is none of that prefix."""
    updates: dict[str, LowRank] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    for key in sorted(each for each in tensors if each.startswith(f"{prefix}|")):
        value = tensors[key]
        _, path, kind, *part = key.split("|")
        if kind == "head":
            heads.setdefault(path, {})[part[0]] = value
        elif kind == "A":
            updates[path] = LowRank(value, tensors[f"{prefix}|{path}|B"], float(tensors[f"{prefix}|{path}|scale"]))
    return Adapter(updates, dict(heads), base_model) if updates or heads else None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments and step counts as tensors by name."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer|{index}|{name}": torch.as_tensor(value)
        for index, moments in state.items()
        for name, value in moments.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put kept moments back into an optimizer over the same parameters in the same order."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        owner, *rest = key.split("|")
        if owner == "optimizer":
            state.setdefault(int(rest[0]), {})[rest[1]] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
