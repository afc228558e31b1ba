"""Where each coefficient of a learned merge belongs: adapters, layers, modules, directions, and one flat vector.

The vector is what a learner moves; the layout says what it means, to the model that runs it (merging/runtime.py) and to
the method that saves it (weighted_delta_n).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lorica import plugins
from lorica.adapters.delta import LowRank
from lorica.errors import ConfigError, ShapeError, UnknownNameError
from lorica.merging.layers import layer_of
from lorica.merging.method import Update

Granularity = Literal["task", "layer", "module", "direction"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Which coefficient each adapter, or each of its rank-1 directions, has in each module: its place in c (K,)."""

    names: tuple[str, ...]  # of the T adapters
    granularity: Granularity
    keys: tuple[tuple[str, str], ...]  # (group, adapter) of each coefficient; the group of all is ""
    index: Mapping[str, Tensor]  # module path -> places in c: (T,), or (R,) by direction
    ranks: Mapping[str, tuple[int, ...]]  # module path -> rank of each adapter's update, R in all

    @property
    def size(self) -> int:
        """K, the number of coefficients."""
        return len(self.keys)

    def directions(self, path: str) -> Tensor:
        """(R,) the place in c of each rank-1 direction of the module's updates, one adapter's behind the other's."""
        if self.granularity == "direction":
            return self.index[path]
        return self.index[path].repeat_interleave(torch.tensor(self.ranks[path]))

    def one_hot(self, name: str) -> Tensor:
        """(K,) the coefficients at which the merge is the adapter called `name` alone."""
        if name not in self.names:
            raise UnknownNameError(plugins.unknown("adapter", name, self.names))
        return torch.tensor([float(adapter == name) for _, adapter in self.keys])

    def uniform(self, value: float) -> Tensor:
        """(K,) the same coefficient everywhere."""
        return torch.full((self.size,), value)

    def params(self, c: Tensor) -> dict[str, Any]:
        """The method_params with which weighted_delta_n makes the merge at exactly c (K,)."""
        if c.shape != (self.size,):
            raise ShapeError(f"coefficients of shape {tuple(c.shape)}, and the layout has ({self.size},)")
        values: list[float] = c.detach().tolist()
        switches = {
            "normalize_coefficients": False,
            "allow_negative_coefficients": min(values, default=0.0) < 0,
            "allow_unbounded": max(map(abs, values), default=0.0) > 1,
        }
        return {**self._tables(values), **switches}

    def _tables(self, values: Sequence[float]) -> dict[str, Any]:
        if self.granularity == "direction":
            return {"module_task_coefficients": {path: self._by_direction(path, values) for path in self.index}}
        groups: dict[str, dict[str, float]] = {}
        for (group, name), value in zip(self.keys, values, strict=True):
            groups.setdefault(group, {})[name] = value
        if self.granularity == "task":
            return {"task_coefficients": groups.get("", {})}
        tables: dict[str, Any] = {}
        for group, table in groups.items():
            key = "module_task_coefficients" if group in self.index else "layer_task_coefficients"
            tables.setdefault(key, {})[group] = table
        return tables

    def _by_direction(self, path: str, values: Sequence[float]) -> dict[str, list[float]]:
        parts = torch.split(self.index[path], list(self.ranks[path]))
        return {name: [values[at] for at in part] for name, part in zip(self.names, parts, strict=True)}


def layout(ranks: Mapping[str, Sequence[int]], names: Sequence[str], granularity: Granularity) -> Layout:
    """The layout of the adapters called `names`, whose updates have `ranks`: module path -> rank of each adapter.

    The coefficients of `layer` are those of layers.layer_of; a module in no layer has its own. Raises ConfigError for a
    granularity that is not known, ShapeError for ranks of another number of adapters.
    """
    if granularity not in get_args(Granularity):
        raise ConfigError(plugins.unknown("granularity", granularity, get_args(Granularity)))
    places: dict[tuple[str, str], int] = {}
    index = {}
    for path, of_adapters in ranks.items():
        if len(of_adapters) != len(names):
            raise ShapeError(f"{path} has updates of {len(of_adapters)} adapters, and there are {len(names)}")
        keys = _keys(path, of_adapters, names, granularity)
        index[path] = torch.tensor([places.setdefault(key, len(places)) for key in keys], dtype=torch.long)
    return Layout(tuple(names), granularity, tuple(places), index, {path: tuple(ranks[path]) for path in ranks})


def ranks_of(updates: Mapping[str, Sequence[Update]]) -> dict[str, tuple[int, ...]]:
    """Module path -> rank of each adapter's update there; a dense one is of full rank."""
    return {
        path: tuple(each.rank if isinstance(each, LowRank) else min(each.shape) for each in of_adapters)
        for path, of_adapters in updates.items()
    }


def _keys(path: str, ranks: Sequence[int], names: Sequence[str], granularity: Granularity) -> list[tuple[str, str]]:
    """The coefficients of one module, in the order of its adapters, or of their directions."""
    if granularity == "direction":
        return [(f"{path}#{at}", name) for name, rank in zip(names, ranks, strict=True) for at in range(rank)]
    group = {"task": "", "layer": str(layer_of(path) or path), "module": path}[granularity]
    return [(group, name) for name in names]
