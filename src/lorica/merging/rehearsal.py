"""A merge tried out before it runs: all of it on small random updates, and a few of its modules on their own.

What a method makes of its inputs is asked of the method, so that nothing has to be declared about it: it merges
adapters of the same names, modules and ranks whose matrices are small. What the merge would refuse is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorica import randomness
from lorica.adapters.adapter import Adapter
from lorica.adapters.compression import Spectrum, spectrum
from lorica.adapters.delta import LowRank, zero
from lorica.adapters.outline import Outline
from lorica.merging.merge import Grams, Merge
from lorica.merging.parallel import ordered_map

LARGEST_RANK = 64  # Σ r; common divisors are taken out of larger ones

Ranks = tuple[int, ...]  # of each adapter at one module, 0 where it has no such module
Settle = Callable[[Mapping[str, Adapter], Grams], Merge]


@dataclass(frozen=True)
class Outcome:
    """What a method makes of updates of certain ranks."""

    rank: int | None  # None: a dense update
    is_concatenation: bool  # of the factors, B scaled: there is nothing to compute


def ranks_at(path: str, adapters: Mapping[str, Adapter]) -> Ranks:
    return tuple(each.updates[path].rank if path in each.updates else 0 for each in adapters.values())


def rehearse(paths: Sequence[str], adapters: Mapping[str, Adapter], settle: Settle, needs_grams: bool) -> list[Outcome]:
    """The outcome at each of the modules, from the adapters' shapes alone; raises whatever the merge would."""
    ranks = {path: ranks_at(path, adapters) for path in paths}
    largest = max(map(sum, ranks.values()), default=0)
    divisor = _divisor(largest, math.gcd(*(rank for each in ranks.values() for rank in each)))
    width = max(2, 2 * largest // divisor)
    square = torch.eye(width)
    merge = settle(
        {name: _stand_in(name, adapter, divisor, width) for name, adapter in adapters.items()},
        {path: (square,) * len(adapters) for path in paths} if needs_grams else {},
    )
    distinct = {each: path for path, each in ranks.items()}
    outcomes = {each: _outcome(merge, path, divisor) for each, path in distinct.items()}
    return [outcomes[ranks[path]] for path in paths]


def spectra(
    paths: Sequence[str], outlines: Mapping[str, Outline], adapters: Mapping[str, Adapter], settle: Settle
) -> list[Spectrum]:
    """The singular values of what the method makes of these modules, which alone are read; the others are zero."""
    loaded = {name: outlines[name].load(paths) for name in adapters}
    merge = settle(
        {
            name: Adapter(
                {path: loaded[name].get(path) or zero(update.shape) for path, update in adapter.updates.items()},
                base_model=adapter.base_model,
            )
            for name, adapter in adapters.items()
        },
        {},
    )

    def found(path: str) -> Spectrum:
        update = merge.module(path).update
        assert isinstance(update, LowRank), path
        return spectrum(update)

    return list(ordered_map(found, paths, merge.num_workers))


def _divisor(largest: int, common: int) -> int:
    """The largest divisor of `common` that leaves Σ r at LARGEST_RANK or more, or 1: shares of a rank stay whole."""
    fitting = (each for each in range(1, common + 1) if common % each == 0 and largest >= LARGEST_RANK * each)
    return max(fitting, default=1)


def _stand_in(name: str, adapter: Adapter, divisor: int, width: int) -> Adapter:
    updates = {}
    for path, update in adapter.updates.items():
        generator = randomness.torch_generator(0, "rehearsal", name, path)
        A, B = torch.randn(2, update.rank // divisor, width, generator=generator)
        updates[path] = LowRank(A, B.T, update.scale)
    return Adapter(updates, base_model=adapter.base_model)


def _outcome(merge: Merge, path: str, divisor: int) -> Outcome:
    made = merge.module(path).update
    if not isinstance(made, LowRank):
        return Outcome(None, is_concatenation=False)
    inputs = [each.A for each in merge.inputs(path).updates if isinstance(each, LowRank)]
    return Outcome(made.rank * divisor, torch.equal(made.A, torch.cat(inputs)))
