"""What an adapter folder holds, told by its config and the header of its weights; numbers are read where asked for.

The folder is held to the rules of `peft_format.read`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter, Head
from lorica.adapters.delta import LowRank
from lorica.errors import AdapterFormatError


@dataclass(frozen=True)
class Outline:
    """An adapter without its numbers: `adapter` is on the meta device, with every shape, rank and scale."""

    path: Path  # of the weights
    num_bytes: int  # of the weights' file
    adapter: Adapter
    keys: Mapping[str, Mapping[str, str]]  # module path -> key of A, key of B

    def load(self, paths: Iterable[str]) -> dict[str, LowRank]:
        """The updates at `paths`, of those that the adapter has. Raises AdapterFormatError for a corrupt file."""
        known = [path for path in paths if path in self.keys]
        try:
            with safe_open(self.path, framework="pt") as file:
                pairs = {path: [file.get_tensor(self.keys[path][factor]) for factor in "AB"] for path in known}
        except SafetensorError as error:
            raise AdapterFormatError(f"{self.path} is corrupt: {error}") from None
        return {path: LowRank(A, B, self.adapter.updates[path].scale) for path, (A, B) in pairs.items()}


def outline(folder: Path) -> Outline:
    """The outline of a PEFT folder. Raises as `peft_format.read` does, but for NaN and infinity."""
    config = peft_format._read_config(folder / peft_format.CONFIG_FILE)
    path = folder / peft_format.WEIGHTS_FILE
    shapes = peft_format.read_header(path)
    modules, heads = peft_format._sorted_keys(shapes, peft_format._declared_heads(config), path)
    scales = peft_format._scales(config, {module: shapes[keys["A"]][0] for module, keys in modules.items()})
    with torch.device("meta"):
        updates = {
            module: LowRank(torch.empty(shapes[keys["A"]]), torch.empty(shapes[keys["B"]]), scales[module])
            for module, keys in modules.items()
        }
        found: dict[str, Head] = {
            module: {part: torch.empty(shapes[key]) for part, key in parts.items()} for module, parts in heads.items()
        }
    adapter = Adapter(updates, found, config.get("base_model_name_or_path"))
    return Outline(path, path.stat().st_size, adapter, modules)
