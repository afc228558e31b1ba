"""What a merge is saved as: an adapter, a file of ΔW, or a whole model, one module in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorica import files
from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.adapters.injection import Placement
from lorica.adapters.safetensors_header import read_header
from lorica.errors import AdapterFormatError, ConfigError, ModelError, ShapeError
from lorica.merging.checkpoint import LIMIT_BYTES, Checkpoint, Stored, open_checkpoint
from lorica.merging.merge import Merge, Merged
from lorica.merging.method import Update

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK_BYTES = 16 << 20
DENSE_PATCH = "delta.safetensors"  # the file of ΔW in a merge's folder

Shapes = Mapping[str, tuple[int, ...]]  # module path -> (out, in)


def adapter(merged: Iterable[Merged]) -> Adapter:
    """The merge as an adapter without heads. Raises ShapeError if a module is dense."""
    updates = {}
    for each in merged:
        if not isinstance(each.update, LowRank):
            raise ShapeError(
                f"the merge of {each.path} is dense, and an adapter holds factors: give rank= to cut it, or take "
                "save=dense or save=model"
            )
        updates[each.path] = each.update
    return Adapter(updates)


def dense_patch(merged: Iterable[Merged], shapes: Shapes, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write one safetensors file of ΔW (out, in) by module path, each module as it comes; `path` is replaced whole.

    Raises ShapeError unless `merged` are just the modules in `shapes`, ModelError for NaN, infinity or an overflow of
    `dtype`; nothing is left behind then.
    """
    header, starts = _patch_header(shapes, dtype)
    with files.replacing(path) as file:
        file.write(header)
        for each in merged:
            if each.path not in starts:
                raise ShapeError(f"the merge gives {each.path} twice, or it is not among the modules to write")
            if tuple(each.update.shape) != tuple(shapes[each.path]):
                raise ShapeError(f"the merge gives {each.path} as {tuple(each.update.shape)}, not {shapes[each.path]}")
            file.seek(starts.pop(each.path))
            file.write(_bytes(_dense(each, dtype)))
            del each  # or it would live on while the next is made
        if starts:
            raise ShapeError(f"the merge does not give {next(iter(starts))} ({len(starts)} missing in all)")


def read_dense_patch(path: Path) -> dict[str, Tensor]:
    """Module path -> ΔW (out, in), mapped: numbers come off the disk when they are used.

    Raises MissingPathError, or AdapterFormatError for a file that is no dense patch.
    """
    for key, shape in read_header(path).items():
        if len(shape) != 2:
            raise AdapterFormatError(f"{path}: {key!r} is {shape}, and an update is (out, in)")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping: it has no iterator
    except SafetensorError as error:
        raise AdapterFormatError(f"{path} is corrupt: {error}") from None


@dataclass(frozen=True)
class Fused:
    """One module of a merge as it stands in a whole model: what the base's dtype has kept of its update."""

    full_rank: int | None  # of what the method made; None where that is dense
    error: float  # ‖kept - made‖ / ‖made‖, where kept is cast(W0 + ΔW) - W0
    norm: float  # ‖made‖
    distance: float | None  # from the method that this one approximates, relative to that one's norm

    def as_record(self) -> dict[str, Any]:
        """As `Merged` has it, of no rank."""
        return {"rank": None, **asdict(self)}


def fused_model(merge: Merge, base_folder: Path, target: Path, layout: Mapping[str, Placement]) -> dict[str, Fused]:
    """Write base + merge as a checkpoint like the base's: the same shards, headers and dtypes, `target` replaced whole.

    A merged tensor is cast(W0 + ΔW), summed in fp32; all other bytes are the base's. One tensor and its update are in
    memory at a time. Returns what each module came to, by its path. Whatever can be refused by the headers is refused
    before anything is written: see `homes`. Raises ModelError for NaN or an overflow, with nothing left behind.
    """
    if base_folder.resolve().is_relative_to(target.resolve()):
        raise ConfigError(f"{str(target)!r} holds the base model: name another folder for the merged one")
    checkpoint, path_of = homes(merge, base_folder, layout)
    found: dict[str, Fused] = {}

    def fused(key: str, weight: Tensor) -> Tensor:
        path = path_of[key]
        each, transposed = merge.module(path), layout[path].transposed
        total = injection.summed(weight, each.update, path, transposed=transposed)
        found[path] = _fused(each, weight, total, transposed)
        return total

    with files.staged_folder(target) as staging:
        for shard in checkpoint.shards:
            changed = [tensor for tensor in shard.tensors if tensor.key in path_of]
            _rewrite(shard.path, staging / shard.name, changed, fused)
        for name, path in checkpoint.beside.items():
            with files.open_regular(path, LIMIT_BYTES) as source:
                (staging / name).write_bytes(source.read())
    return found


def homes(merge: Merge, base_folder: Path, layout: Mapping[str, Placement]) -> tuple[Checkpoint, dict[str, str]]:
    """The base's checkpoint, and key of a tensor -> the module of the merge whose weight it is; headers alone are read.

    Raises ConfigError for a rank budget, and what `open_checkpoint` and `Checkpoint.homes` raise.
    """
    if merge.size.rank_budget is not None:
        raise ConfigError(f"rank_budget={merge.size.rank_budget} compresses an adapter, and save=model writes none")
    checkpoint = open_checkpoint(base_folder)
    return checkpoint, checkpoint.homes({path: merge.shape(path) for path in merge.paths}, layout)


def _fused(merged: Merged, weight: Tensor, total: Tensor, transposed: bool) -> Fused:
    """Compared in fp32 at least. What was cut from an update is orthogonal to what stays: the squares of both add."""
    update = _in_float32(merged.update)
    kept = total.to(torch.promote_types(weight.dtype, torch.float32)) - weight
    lost = float(torch.linalg.vector_norm(kept.sub_(update.T if transposed else update)))
    norm = float(torch.linalg.vector_norm(update)) if merged.norm is None else merged.norm
    error = math.hypot(merged.error, lost / norm) if norm > 0 else 0.0
    return Fused(merged.full_rank, error, norm, merged.distance)


def _rewrite(base: Path, target: Path, changed: Sequence[Stored], change: Callable[[str, Tensor], Tensor]) -> None:
    """The base's file with the bytes of the changed tensors exchanged; the header fits as it is."""
    with files.open_regular(base) as source, open(target, "xb") as file:
        for tensor in changed:
            _copy(source, file, tensor.start - source.tell())
            file.write(_bytes(change(tensor.key, _read(source, tensor))))
        _copy(source, file, None)


def _copy(source: BufferedReader, file: BufferedWriter, num_bytes: int | None) -> None:
    """The next bytes; all that are left with None."""
    while chunk := source.read(CHUNK_BYTES if num_bytes is None else min(CHUNK_BYTES, num_bytes)):
        file.write(chunk)
        num_bytes = None if num_bytes is None else num_bytes - len(chunk)


def _read(source: BufferedReader, tensor: Stored) -> Tensor:
    buffer = bytearray(tensor.num_bytes)
    if source.readinto(buffer) != tensor.num_bytes:
        raise ModelError(f"{tensor.key} ends before its {tensor.num_bytes} bytes: the checkpoint changed meanwhile")
    return torch.frombuffer(buffer, dtype=DTYPES[tensor.dtype]).view(tensor.shape)


def _patch_header(shapes: Shapes, dtype: torch.dtype) -> tuple[bytes, dict[str, int]]:
    """The file's bytes before the first tensor, and where each tensor starts."""
    name = next((name for name, each in DTYPES.items() if each == dtype), None)
    if name is None:
        raise ConfigError(f"dtype={dtype}: a dense patch is one of {', '.join(map(str, DTYPES.values()))}")
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for path, (num_rows, num_columns) in shapes.items():
        offsets[path], end = end, end + num_rows * num_columns * dtype.itemsize
        entries[path] = {"dtype": name, "shape": [num_rows, num_columns], "data_offsets": [offsets[path], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the format wants its data aligned
    header = len(text).to_bytes(8, "little") + text
    return header, {path: len(header) + offset for path, offset in offsets.items()}


def _dense(each: Merged, dtype: torch.dtype) -> Tensor:
    cast = _in_float32(each.update).to(dtype)  # (out, in)
    if not torch.isfinite(cast).all():
        raise ModelError(f"the update of {each.path} holds NaN or infinity, or overflows {dtype}: nothing was written")
    return cast


def _in_float32(update: Update) -> Tensor:
    """(out, in)"""
    return update.to(torch.float32).dense() if isinstance(update, LowRank) else update


def _bytes(matrix: Tensor) -> memoryview:
    return matrix.detach().cpu().contiguous().view(torch.uint8).numpy().data
