"""Hierarchical merging: groups of adapters are fitted apart, then the groups' merges, up to a single one.

A group is fitted with its own updates mounted and no others. Its merge Σ c_i·Δ_i is one update of the level above, with
coefficients of its own, so the coefficients of the adapters are the products along their paths and the result is a
weighted sum of them like any other. Source: Yang et al. 2024, arXiv 2412.10416.

Dense updates are summed where they are needed: no more than `group_size` of them are mounted at a time, beside one of
the module that is being summed, where a flat fit holds all T. Low-rank ones are joined exactly, so the root holds the
factors of all T, as the flat fit does; `group_rank` bounds that at the price of the compression's error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorica.adapters import delta
from lorica.adapters.compression import compress, spectrum
from lorica.adapters.delta import LowRank
from lorica.errors import ConfigError
from lorica.merging.fitting.descent import Learned
from lorica.merging.fitting.layout import Granularity, Layout
from lorica.merging.fitting.problem import Problem, layout_of
from lorica.merging.method import Update

Fit = Callable[[Problem, str], Learned]  # a problem and what to call its fitting -> its coefficients
Make = Callable[[str], Update]


@dataclass(frozen=True, eq=False)
class Node:
    """Adapters merged so far, and what each has in the merge."""

    names: tuple[str, ...]
    shares: Mapping[str, tuple[Tensor, ...]]  # module path -> of each adapter (1,), or (r,) by direction

    @property
    def name(self) -> str:
        return "+".join(self.names)


def fitted(problem: Problem, granularity: Granularity, fit: Fit, *, group_size: int, group_rank: int | None) -> Learned:
    """The coefficients of all adapters, fitted level by level with `fit`.

    The history is that of every node, each entry with the node's name, and with what `group_rank` lost if anything.
    `best_step` is the root's. Raises ConfigError for group_rank with coefficients by direction, which would be of
    directions that no adapter has.
    """
    if granularity == "direction" and group_rank is not None:
        raise ConfigError(f"group_rank={group_rank} with variant=direction_wise: directions are lost, drop one of them")
    layout = layout_of(problem, granularity)
    nodes = [_leaf(name, layout, problem.paths) for name in layout.names]
    done: list[tuple[str, Learned]] = []
    history: list[dict[str, Any]] = []
    while len(nodes) > 1 or not done:
        groups = [nodes[start : start + group_size] for start in range(0, len(nodes), group_size)]
        nodes = []
        for group in groups:
            if len(group) == 1 and len(groups) > 1:
                nodes += group
                continue
            history += [_told(problem, node, group_rank) for node in group if group_rank and len(node.names) > 1]
            found = fit(_part(problem, group, group_rank, number=len(done)), f"group {_name(group)}")
            done.append((_name(group), found))
            nodes.append(_joined(group, found))
    history += [{"node": name, **entry} for name, found in done for entry in found.history]
    root = done[-1][1]
    return Learned(
        layout,
        _flat(layout, nodes[0]),
        history,
        best_step=root.best_step,
        stopped=root.stopped,
        seconds=math.fsum(found.seconds for _, found in done),
    )


def _leaf(name: str, layout: Layout, paths: Sequence[str]) -> Node:
    place = layout.names.index(name)
    by_direction = layout.granularity == "direction"
    sizes = {path: layout.ranks[path][place] if by_direction else 1 for path in paths}
    return Node((name,), {path: (torch.ones(size, dtype=torch.float64),) for path, size in sizes.items()})


def _name(group: Sequence[Node]) -> str:
    return "+".join(node.name for node in group)


def _part(problem: Problem, group: Sequence[Node], group_rank: int | None, number: int) -> Problem:
    """The group's own tasks, with its nodes as adapters and a state file of its own."""
    names = {name for node in group for name in node.names}
    state = problem.state
    return replace(
        problem,
        tasks=[task for task in problem.tasks if task.name in names],
        updates={node.name: _make(problem, node, group_rank) for node in group},
        state=state and state.with_name(f"{state.stem}-{number}{state.suffix}"),
    )


def _make(problem: Problem, node: Node, group_rank: int | None) -> Make:
    """Makes the node's update of the module at a path."""
    if len(node.names) == 1:
        return problem.updates[node.names[0]]
    if group_rank is None:
        return lambda path: _merged(problem, node, path)
    return lambda path: compress(_factors(problem, node, path), group_rank)[0]


def _merged(problem: Problem, node: Node, path: str) -> Update:
    """Σ c_i·Δ_i at a path, in factors where all are low-rank; dense ones come and go one at a time."""
    low_rank: list[LowRank] = []
    dense: Tensor | None = None
    for name, share in zip(node.names, node.shares[path], strict=True):
        update = problem.updates[name](path)
        if isinstance(update, LowRank):
            low_rank.append(LowRank(update.A, update.B * share.to(update.B), update.scale))
        elif dense is None:
            dense = update * share.to(update)
        else:
            dense.addcmul_(update, share.to(update))
        del update  # or a dense one would live on while the next is made
    if dense is None:
        return delta.combination(low_rank, [1.0] * len(low_rank))
    for each in low_rank:
        dense += each.dense().to(dense)
    return dense


def _told(problem: Problem, node: Node, group_rank: int) -> dict[str, Any]:
    """What compressing the node's merge loses, relative to its norm."""
    found = [spectrum(_factors(problem, node, path)) for path in problem.paths]
    lost = math.fsum((each.error(group_rank) * each.norm) ** 2 for each in found)
    norm = math.fsum(each.norm**2 for each in found)
    return {"node": node.name, "group_rank": group_rank, "error": (lost / norm) ** 0.5 if norm > 0 else 0.0}


def _factors(problem: Problem, node: Node, path: str) -> LowRank:
    merged = _merged(problem, node, path)
    if not isinstance(merged, LowRank):
        raise ConfigError(f"group_rank compresses low-rank merges, and that of {node.name} is dense at {path}: drop it")
    return merged


def _joined(group: Sequence[Node], found: Learned) -> Node:
    """The group as one node, its coefficients multiplied into the shares."""
    shares = {}
    for path, places in found.layout.index.items():
        own = [share for node in group for share in node.shares[path]]
        if found.layout.granularity == "direction":
            factors = torch.split(found.c[places], [len(share) for share in own])
        else:
            of_each = found.c[places].repeat_interleave(torch.tensor([len(node.names) for node in group]))
            factors = torch.split(of_each, 1)
        shares[path] = tuple(factor * share for factor, share in zip(factors, own, strict=True))
    return Node(tuple(name for node in group for name in node.names), shares)


def _flat(layout: Layout, root: Node) -> Tensor:
    """(K,) the root's shares where the layout of all adapters has them."""
    c = torch.zeros(layout.size, dtype=torch.float64)
    for path, places in layout.index.items():
        c[places] = torch.cat(root.shares[path])
    return c
