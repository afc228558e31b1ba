"""A whole adapter: the updates of named modules, with the algebra of one update, and the heads of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from lorica.adapters.compression import compress
from lorica.adapters.delta import LowRank
from lorica.errors import ShapeError

Head = Mapping[str, Tensor]
MergeMode = Literal["common", "strict", "union"]


@dataclass(frozen=True, eq=False)
class Adapter:
    """Module path -> update, and module path -> head (its parameters by their names inside the module).

    `+`, `-` and scalar `*` act on the updates; a module that only one side has is taken as zero on the other. Heads are
    whole parameters, not updates: they do not scale, and a sum keeps both sides' heads. Two different heads of one name
    cannot be added (ShapeError).
    """

    updates: Mapping[str, LowRank]
    heads: Mapping[str, Head] = field(default_factory=dict)
    base_model: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "updates", MappingProxyType(dict(self.updates)))
        object.__setattr__(self, "heads", MappingProxyType(dict(self.heads)))

    def __add__(self, other: Adapter) -> Adapter:
        updates = {
            path: self.updates[path] + other.updates[path]
            if path in self.updates and path in other.updates
            else (self.updates.get(path) or other.updates[path])
            for path in {**self.updates, **other.updates}
        }
        base_model = self.base_model if self.base_model == other.base_model else None
        return Adapter(updates, _joined_heads(self.heads, other.heads), base_model)

    def __mul__(self, factor: float) -> Adapter:
        return self._each(lambda update: update * factor)

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        return self * -1.0

    def __sub__(self, other: Adapter) -> Adapter:
        return self + (-other)

    def inner(self, other: Adapter) -> float:
        """Σ over modules of <Δ1, Δ2>; heads do not count."""
        return sum(update.inner(other.updates[path]) for path, update in self.updates.items() if path in other.updates)

    def norm(self) -> float:
        """sqrt(Σ over modules of ‖Δ‖²); heads do not count."""
        return sum(update.norm() ** 2 for update in self.updates.values()) ** 0.5

    def compress(self, rank: int | None = None, energy: float | None = None) -> tuple[Adapter, dict[str, float]]:
        """Each update compressed (see `compression.compress`), and the relative error of each module."""
        pairs = {path: compress(update, rank, energy) for path, update in self.updates.items()}
        smaller = Adapter({path: update for path, (update, _) in pairs.items()}, self.heads, self.base_model)
        return smaller, {path: error for path, (_, error) in pairs.items()}

    def num_parameters(self) -> int:
        """Numbers stored: factors and heads."""
        factors = sum(update.A.numel() + update.B.numel() for update in self.updates.values())
        return factors + sum(tensor.numel() for head in self.heads.values() for tensor in head.values())

    def is_finite(self) -> bool:
        """Whether no update and no head holds NaN or infinity; looked at once, for an adapter is a value."""
        return self._is_finite

    @cached_property
    def _is_finite(self) -> bool:
        heads = (tensor for head in self.heads.values() for tensor in head.values())
        return all(bool(torch.isfinite(tensor).all()) for tensor in heads) and all(
            update.is_finite() for update in self.updates.values()
        )

    def _each(self, change: Callable[[LowRank], LowRank]) -> Adapter:
        return Adapter({path: change(update) for path, update in self.updates.items()}, self.heads, self.base_model)


def aligned(adapters: Sequence[Adapter], mode: MergeMode = "common") -> tuple[list[Adapter], list[str]]:
    """The adapters cut or checked to one set of modules, and the paths that were dropped to get there.

    `common` keeps the modules that all have; `strict` raises ShapeError unless the sets are the same; `union` keeps all
    (absent is zero). A module whose shape differs between adapters is a ShapeError in every mode.
    """
    everywhere = set.intersection(*(set(adapter.updates) for adapter in adapters))
    anywhere = list(dict.fromkeys(path for adapter in adapters for path in adapter.updates))
    for path in anywhere:
        shapes = {adapter.updates[path].shape for adapter in adapters if path in adapter.updates}
        if len(shapes) > 1:
            raise ShapeError(f"{path} has different shapes in the adapters: {sorted(shapes)}")
    dropped = [path for path in anywhere if path not in everywhere]
    if mode == "union" or not dropped:
        return list(adapters), []
    if mode == "strict":
        raise ShapeError(f"merge_mode=strict, and not every adapter has {', '.join(dropped[:3])}: use common or union")
    if not everywhere:
        raise ShapeError("the adapters have no module in common: use merge_mode=union, or other adapters")
    kept = [
        Adapter({path: each.updates[path] for path in anywhere if path in everywhere}, each.heads, each.base_model)
        for each in adapters
    ]
    return kept, dropped


def _joined_heads(left: Mapping[str, Head], right: Mapping[str, Head]) -> dict[str, Head]:
    for name in left.keys() & right.keys():
        mine, other = left[name], right[name]
        if mine.keys() != other.keys() or not all(torch.equal(mine[part], other[part]) for part in mine):
            raise ShapeError(f"both adapters have their own head {name!r}: heads do not add, drop one first")
    return {**left, **right}
