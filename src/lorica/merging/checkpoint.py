"""A base checkpoint in safetensors shards: which tensor lies where, told by the headers; no number is read.

The folder may be from elsewhere: a name in the index must be a plain file name, and no link is followed but those
of the hub's cache.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lorica import files
from lorica.adapters.injection import Placement
from lorica.errors import AdapterFormatError, ConfigError, MissingPathError, ModelError, ShapeError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".py")  # config, tokenizer, own code
LEGAL = ("LICENSE", "NOTICE")
NOT_THE_MODELS = ("trainer_state.json",)
LIMIT_BYTES = 64 << 20  # of a file beside the weights
FLOATS = ("F64", "F32", "F16", "BF16")
OTHERWISE = "take save=adapter or save=dense, which leave the base as it is"


@dataclass(frozen=True)
class Stored:
    """A tensor of a shard, by the bytes that it has in the file."""

    key: str
    dtype: str  # in safetensors' words
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file; its tensors in the order of their bytes."""

    name: str
    path: Path
    tensors: tuple[Stored, ...]


@dataclass(frozen=True)
class Checkpoint:
    """All shards of a model, and the small files beside them that belong to it."""

    folder: Path
    shards: tuple[Shard, ...]
    beside: Mapping[str, Path]

    def homes(self, shapes: Mapping[str, tuple[int, int]], layout: Mapping[str, Placement]) -> dict[str, str]:
        """Key of a tensor -> the module in `shapes` (path -> (out, in)) whose weight it is.

        Raises AdapterFormatError for a module that the layout lacks, ShapeError for another shape, ModelError for one
        whose weight is not exactly one float tensor of the checkpoint.
        """
        stored = defaultdict(list)
        for shard in self.shards:
            for tensor in shard.tensors:
                stored[tensor.key].append((shard.name, tensor))
        found: dict[str, str] = {}
        for path, shape in shapes.items():
            if path not in layout:
                raise AdapterFormatError(f"the merge updates {path!r}, which the model does not have")
            tensor = self._weight(path, layout[path], stored)
            kept = shape[::-1] if layout[path].transposed else shape
            if layout[path].shape != shape or tensor.shape != kept:
                raise ShapeError(f"the merge updates {path} as {shape}, and {tensor.key} is {tensor.shape}")
            if tensor.key in found:
                raise ModelError(f"{tensor.key} is the weight of both {found[tensor.key]} and {path}")
            found[tensor.key] = path
        return found

    def _weight(self, path: str, place: Placement, stored: Mapping[str, list[tuple[str, Stored]]]) -> Stored:
        """The one tensor that is the module's weight."""
        if place.tied_to is not None:
            raise ModelError(f"{path} shares its weight with {place.tied_to}, which would change with it: {OTHERWISE}")
        found = [home for key in place.keys for home in stored.get(key, ())]
        if not found:
            raise ModelError(f"{self.folder} has no tensor for {path}: looked for {' and '.join(place.keys)}")
        if len(found) > 1:
            both = " and ".join(f"{each.key} in {name}" for name, each in found)
            raise ModelError(f"{self.folder} has more than one tensor for {path}: {both}")
        [(name, tensor)] = found
        if tensor.dtype not in FLOATS:
            raise ModelError(
                f"{tensor.key} in {name} is {tensor.dtype}, no float matrix (quantised base?): give the base in a "
                f"float dtype, or {OTHERWISE}"
            )
        return tensor


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint that transformers would load from a folder.

    Raises ConfigError if its weights are not safetensors, MissingPathError if there are none or a shard is missing,
    ModelError if a shard or the index is corrupt or leaves the folder.
    """
    if not folder.is_dir():
        raise MissingPathError(f"no checkpoint folder {str(folder)!r}")
    weight_map = {} if (folder / WHOLE).exists() else _weight_map(folder)
    names = sorted(set(weight_map.values())) or [WHOLE]
    shards = {name: _shard(folder, name) for name in names}
    keys = {name: {tensor.key for tensor in shard.tensors} for name, shard in shards.items()}
    for key, name in weight_map.items():
        if key not in keys[name]:
            raise ModelError(f"{folder / INDEX}: {name} does not hold {key!r}")
    return Checkpoint(folder, tuple(shards.values()), _beside(folder, with_index=bool(weight_map)))


def _weight_map(folder: Path) -> dict[str, str]:
    """Key -> shard, as the index says."""
    if not (folder / INDEX).exists():
        pickles = sorted(folder.glob("pytorch_model*.bin"))
        if pickles:
            raise ConfigError(
                f"save=model reads a base in safetensors alone, and {folder} holds {pickles[0].name}: load it with "
                "transformers and save it again (save_pretrained), or take save=adapter or save=dense"
            )
        raise MissingPathError(f"{folder} has neither {WHOLE} nor {INDEX}")
    with files.open_regular(folder / INDEX, LIMIT_BYTES) as file:
        text = file.read()
    try:
        weight_map = json.loads(text)["weight_map"]
    except (ValueError, RecursionError, TypeError, KeyError):
        raise ModelError(f"{folder / INDEX} is corrupt: it has no weight_map") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX} is corrupt: its weight_map is no table of shards")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{folder / INDEX}: {name!r} is not the name of a safetensors file in its folder")
    return weight_map


def _shard(folder: Path, name: str) -> Shard:
    path = folder / name
    with files.open_regular(path) as file:
        try:
            with safe_open(path, framework="pt"):  # refuses what overlaps, has holes or does not fit into the file
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except SafetensorError as error:
            raise ModelError(f"{folder / name} is corrupt: {error}") from None
    header.pop("__metadata__", None)
    tensors = []
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        tensors.append(Stored(key, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start))
    return Shard(name, path, tuple(sorted(tensors, key=lambda tensor: tensor.start)))


def _beside(folder: Path, with_index: bool) -> dict[str, Path]:
    """Name -> file: config, tokenizer, the index if it is in use, the licence; no folder and nothing else."""
    unwanted = NOT_THE_MODELS if with_index else (*NOT_THE_MODELS, INDEX)
    found = {}
    for path in sorted(folder.iterdir()):
        foreign_index = path.name.endswith(".index.json") and path.name != INDEX
        belongs = (path.suffix in BESIDE or path.stem in LEGAL) and path.name not in unwanted and not foreign_index
        if belongs and not path.is_dir():
            found[path.name] = path
            files.open_regular(path, LIMIT_BYTES).close()
    return found
