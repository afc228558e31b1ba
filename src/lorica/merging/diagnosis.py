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
from lorica.adapters.delta import LowRank, zero
from lorica.errors import ConfigError
from lorica.merging.coordinates import coordinates
from lorica.merging.geometry import directions, inner_products, overlaps
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
class Pair:
    """Two adapters: the cosine over all modules, the rest over the modules that both have."""

    first: str
    second: str
    cosine: float  # 0 if one is zero
    sign_conflict: float  # share of opposite signs among the entries where neither is zero; 0 if there is none
    left_overlap: float  # of the column spaces, where updates write; mean over modules
    right_overlap: float  # of the row spaces, what updates read

    @property
    def overlap(self) -> float:
        """Of the side where they share less: an update meets another only where it reads and writes the same."""
        return min(self.left_overlap, self.right_overlap)


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


@dataclass(frozen=True)
class _Module:
    """What one module adds, for T adapters; `both` and `opposite` count entries."""

    inner: Tensor  # (T, T)
    left: Tensor  # (T, T), NaN where one is zero
    right: Tensor  # (T, T), likewise
    both: Tensor  # (T, T)
    opposite: Tensor  # (T, T)
    effective_ranks: Tensor  # (T,), NaN where one is zero


def diagnose(adapters: Mapping[str, Adapter], *, num_workers: int | None = None) -> Diagnosis:
    """Measure and compare; a module that an adapter does not have is zero there.

    Raises ConfigError without adapters, ShapeError if a module's shape differs between them.
    """
    if not adapters:
        raise ConfigError("no adapters to diagnose: name at least one")
    aligned(list(adapters.values()), "union")
    shapes = {path: update.shape for adapter in adapters.values() for path, update in adapter.updates.items()}
    stride = max(1, -(-sum(map(math.prod, shapes.values())) // SIGNED_ENTRIES))

    def measured(path: str) -> _Module:
        updates = [adapter.updates.get(path) or zero(shapes[path]) for adapter in adapters.values()]
        return _measured([update.to(torch.float32) for update in updates], stride)

    modules = list(ordered_map(measured, shapes, default_num_workers() if num_workers is None else num_workers))
    inner = _total([each.inner for each in modules], len(adapters))
    norms = inner.diagonal().clamp(min=0).sqrt()
    alive = norms[norms > 0]
    imbalance = float(alive.max() / alive.min()) if len(alive) else 1.0
    portraits = _portraits(adapters, norms, modules)
    pairs = tuple(_pairs(list(adapters), inner, norms, modules))
    return Diagnosis(portraits, pairs, imbalance, stride, advise(portraits, pairs, imbalance))


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


def _measured(updates: Sequence[LowRank], stride: int) -> _Module:
    spaces = [directions(each) for each in updates]
    both, opposite = _signs(updates, stride)
    return _Module(
        inner=inner_products(updates),
        left=overlaps([U for U, _, _ in spaces]),
        right=overlaps([V for _, _, V in spaces]),
        both=both,
        opposite=opposite,
        effective_ranks=torch.stack([_effective_rank(sigma) for _, sigma, _ in spaces]),
    )


def _effective_rank(sigma: Tensor) -> Tensor:
    """exp(H(σ / Σσ)) (Roy & Vetterli 2007); NaN without a direction."""
    share = sigma / sigma.sum()
    return torch.special.entr(share).sum().exp() if len(sigma) else torch.tensor(torch.nan, dtype=sigma.dtype)


def _signs(updates: Sequence[LowRank], stride: int) -> tuple[Tensor, Tensor]:
    """(T, T) float64 each: in how many entries neither is zero, and in how many of those the signs are opposite."""
    step = min(stride, max(1, updates[0].shape[0]))
    chosen = [LowRank(each.A, each.B[step - 1 :: step], each.scale) for each in updates]
    both, difference = torch.zeros(2, len(updates), len(updates), dtype=torch.float64)
    for block in coordinates(chosen, "full").blocks():
        signs = block.flatten(1).sign()
        present = signs.abs()
        both += present @ present.T
        difference += signs @ signs.T
    return both, (both - difference) / 2


def _portraits(adapters: Mapping[str, Adapter], norms: Tensor, modules: Sequence[_Module]) -> tuple[Portrait, ...]:
    effective_ranks = _mean([each.effective_ranks for each in modules], (len(adapters),))
    return tuple(
        Portrait(
            name=name,
            norm=float(norm),
            ranks=tuple(sorted({update.rank for update in adapter.updates.values()})),
            effective_rank=float(effective_rank),
            num_modules=len(adapter.updates),
            heads=tuple(adapter.heads),
        )
        for (name, adapter), norm, effective_rank in zip(adapters.items(), norms, effective_ranks, strict=True)
    )


def _pairs(names: Sequence[str], inner: Tensor, norms: Tensor, modules: Sequence[_Module]) -> Iterator[Pair]:
    size = len(names)
    left, right = (_mean(each, (size, size)) for each in ([m.left for m in modules], [m.right for m in modules]))
    both, opposite = (_total(each, size) for each in ([m.both for m in modules], [m.opposite for m in modules]))
    for i, j in itertools.combinations(range(size), 2):
        lengths = float(norms[i] * norms[j])
        yield Pair(
            first=names[i],
            second=names[j],
            cosine=max(-1.0, min(1.0, float(inner[i, j]) / lengths)) if lengths > 0 else 0.0,
            sign_conflict=float(opposite[i, j] / both[i, j]) if both[i, j] > 0 else 0.0,
            left_overlap=float(left[i, j]),
            right_overlap=float(right[i, j]),
        )


def _total(found: list[Tensor], size: int) -> Tensor:
    return torch.stack(found).sum(dim=0) if found else torch.zeros(size, size, dtype=torch.float64)


def _mean(found: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Over the modules where there is a value; 0 where there is none."""
    return torch.stack(found).nanmean(dim=0).nan_to_num() if found else torch.zeros(shape)
