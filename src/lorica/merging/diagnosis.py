"""How adapters lie to each other before they are merged, and which methods suit that (MATH section 1).

Norms, angles and shared directions come from the factors. Signs are entries' own: they are counted in blocks of rows,
all of them while they are few, else those of every so many-th row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter, aligned
from lorica.adapters.delta import zero
from lorica.analysis.conflict import Measured, Pair, measure, norms, pairs
from lorica.analysis.spectrum import of_update
from lorica.errors import ConfigError
from lorica.merging.parallel import default_num_workers, ordered_map

SIGNED_ENTRIES = 1 << 24  # of each adapter: with more of them, rows are sampled
ORTHOGONAL = 0.1
DUPLICATE = 0.98
OVERLAPPING = 0.3
CONFLICTING = 0.3
UNBALANCED = 3.0


@dataclass(frozen=True)
class Portrait:
    """One adapter by itself."""

    name: str
    norm: float
    ranks: tuple[int, ...]  # nominal, each once
    effective_rank: float  # mean over the modules that are not zero; 0 if there is none
    num_modules: int
    heads: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """Adapters by themselves and in pairs, and what follows for a merge."""

    adapters: tuple[Portrait, ...]
    pairs: tuple[Pair, ...]
    norm_imbalance: float  # largest norm / smallest, of the adapters that are not zero
    row_stride: int  # of the signs: 1 is every row and exact, n is the n-th, 2n-th, ... row of each module
    advice: tuple[str, ...]

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(adapters: Mapping[str, Adapter], *, num_workers: int | None = None) -> Diagnosis:
    """Measure and compare; a module that an adapter does not have is zero there.

    Raises ConfigError without adapters, ShapeError if a module's shape differs between them.
    """
    if not adapters:
        raise ConfigError("no adapters to diagnose: name at least one")
    aligned(list(adapters.values()), "union")
    shapes = {path: update.shape for adapter in adapters.values() for path, update in adapter.updates.items()}
    stride = max(1, -(-sum(map(math.prod, shapes.values())) // SIGNED_ENTRIES))

    def measured(path: str) -> tuple[Measured, list[float]]:
        updates = [adapter.updates.get(path) or zero(shapes[path]) for adapter in adapters.values()]
        single = [update.to(torch.float32) for update in updates]
        return measure(single, stride), [of_update(each).effective_rank for each in single]

    found = list(ordered_map(measured, shapes, default_num_workers() if num_workers is None else num_workers))
    modules = [each for each, _ in found]
    lengths = norms(modules, len(adapters))
    alive = lengths[lengths > 0]
    imbalance = float(alive.max() / alive.min()) if len(alive) else 1.0
    portraits = _portraits(adapters, lengths, [ranks for _, ranks in found])
    between = tuple(pairs(list(adapters), modules))
    return Diagnosis(portraits, between, imbalance, stride, advise(portraits, between, imbalance))


def advise(adapters: Sequence[Portrait], pairs: Sequence[Pair], norm_imbalance: float) -> tuple[str, ...]:
    """Which methods suit, by these rules, each where it applies.

    - An adapter that is zero only thins a mean.
    - A cosine above 0.98: the mean of the two is within a tenth of each, and a sum counts the same thing twice. Below
      -0.98 their mean is next to nothing.
    - Norms apart by 3 or more: of orthogonal updates the smaller gives a tenth of the mean's energy at most.
    - Unequal ranks: A and B cannot be averaged apart.
    - Opposite signs in 3 of 10 entries, and a third of the directions shared on both sides: a sum cancels what each has
      learned, so entries or directions must be chosen between. Random signs disagree in half of the entries, so
      a conflict means nothing without the shared directions.
    - All cosines within 0.1 and few shared directions, in balance: <ΣΔ, Δ_i> = ‖Δ_i‖², a sum keeps the whole of each.
    - Two adapters have one arc between them.
    """
    alive = [each for each in adapters if each.norm > 0]
    return tuple(
        itertools.chain(
            (f"{each.name} is zero: leave it out" for each in adapters if each.norm == 0),
            _of_alike(pairs),
            _of_sizes(alive, norm_imbalance),
            _of_conflicts(pairs),
            _of_orthogonal(alive, pairs, norm_imbalance),
            ["two adapters: method=slerp can take any point of the arc between them"] if len(alive) == 2 else [],
        )
    ) or ("no rule applies: compare method=uniform_delta with method=ties on a validation split",)


def _of_alike(pairs: Sequence[Pair]) -> Iterator[str]:
    for pair in pairs:
        said = f"{pair.first} and {pair.second}"
        if pair.cosine > DUPLICATE:
            yield (
                f"{said} are near duplicates (cosine {pair.cosine:.3f}): average them by method=uniform_delta; a sum "
                "counts what they share twice"
            )
        elif pair.cosine < -DUPLICATE:
            yield f"{said} are opposites (cosine {pair.cosine:.3f}): their mean is next to nothing, so choose one"


def _of_sizes(adapters: Sequence[Portrait], norm_imbalance: float) -> Iterator[str]:
    if norm_imbalance >= UNBALANCED:
        largest = max(adapters, key=lambda each: each.norm)
        yield (
            f"norms are apart by a factor of {norm_imbalance:.1f}, and {largest.name} outweighs the others: balance "
            "them with transform=layer_l2_normalize"
        )
    if len({rank for each in adapters for rank in each.ranks}) > 1:
        yield "ranks differ: method=uniform and method=weighted need equal ones; method=uniform_delta is exact at any"


def _of_conflicts(pairs: Sequence[Pair]) -> Iterator[str]:
    found = [each for each in pairs if each.sign_conflict >= CONFLICTING and each.overlap >= OVERLAPPING]
    if found:
        worst = max(found, key=lambda each: each.sign_conflict)
        yield (
            f"{worst.first} and {worst.second} share {worst.overlap:.0%} of their directions and disagree on the sign "
            f"of {worst.sign_conflict:.0%} of the entries: method=ties elects signs, method=knots does so in shared "
            "directions and stays in factors, method=iso_c evens the directions out"
        )


def _of_orthogonal(adapters: Sequence[Portrait], pairs: Sequence[Pair], norm_imbalance: float) -> Iterator[str]:
    apart = all(abs(each.cosine) < ORTHOGONAL and each.overlap < OVERLAPPING for each in pairs)
    if len(adapters) > 1 and apart and norm_imbalance < UNBALANCED:
        yield (
            "nearly orthogonal and in balance: a sum keeps the whole of each, so task arithmetic "
            "(method=uniform_scalar_delta) loses nothing that a dearer method could save"
        )


def _portraits(
    adapters: Mapping[str, Adapter], lengths: Tensor, effective_ranks: Sequence[Sequence[float]]
) -> tuple[Portrait, ...]:
    """`effective_ranks` has a row for each module and a column for each adapter."""
    return tuple(
        Portrait(
            name=name,
            norm=float(lengths[at]),
            ranks=tuple(sorted({update.rank for update in adapter.updates.values()})),
            effective_rank=_mean([ranks[at] for ranks in effective_ranks if ranks[at] > 0]),
            num_modules=len(adapter.updates),
            heads=tuple(adapter.heads),
        )
        for at, (name, adapter) in enumerate(adapters.items())
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
