"""The k-th largest magnitude of each adapter, exactly, over entries that are made anew rather than kept.

A sample brackets the answer; a pass over the blocks counts what lies above the bracket, and how often each float inside
it occurs. A bracket that misses is widened, and one of too many floats narrowed by another pass: the result never
depends on the sample, and what is held neither on the number of modules nor on how many entries are equal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorica.errors import ShapeError
from lorica.merging.coordinates import Space, coordinates
from lorica.merging.method import Module, Modules

SAMPLED_ENTRIES = 1 << 18  # of each adapter
MARGIN = 0.006  # half width of the first bracket, as a share of all entries
EVERYTHING = 1.0
BINS_BITS = 20  # at most 2^20 counts for an adapter, 8 MiB
Bracket = tuple[float, float]
Measure = Callable[[Tensor], Tensor]  # (T, ...) -> (S, ...), none negative; what is given may be overwritten
Floats = NDArray[np.float32]  # numpy compares, selects and sorts floats 5 to 30 times faster than torch on a CPU


@dataclass(frozen=True)
class Threshold:
    """The k-th largest magnitude, and how many entries of just this magnitude the k largest do without."""

    value: float
    num_excess: int


def kth_largest(
    modules: Modules, share: float, space: Space = "full", measure: Measure = Tensor.abs_
) -> list[Threshold]:
    """For each adapter the k-th largest |entry| over all the modules together, k = max(1, ⌊share · entries⌋).

    Another `measure` of the entries is compared instead, and there are as many thresholds as it makes of the T.
    Raises ShapeError if there are entries that are not a number.
    """
    num_entries = sum(modules.map(lambda module: coordinates(module.updates, space).num_entries))
    k = max(1, int(share * num_entries))
    stride = max(1, -(-num_entries // SAMPLED_ENTRIES))
    samples = modules.map(lambda module: measure(coordinates(module.updates, space).sample(stride)))
    sampled = torch.cat(samples, dim=1).numpy()  # (S, n)
    if num_entries == 0:
        return [Threshold(0.0, 0)] * len(sampled)
    if np.isnan(sampled).any():
        raise _not_ordered()
    searches = [_Search(each, k, k / num_entries, exhaustive=stride == 1) for each in sampled]
    while any(search.found is None for search in searches):
        modules.map(partial(_count, searches=searches, space=space, measure=measure))
        for search in searches:
            search.conclude()
    return [search.found for search in searches if search.found is not None]


def _not_ordered() -> ShapeError:
    return ShapeError("some entries of the updates are not a number: they cannot be ordered by magnitude")


def _count(module: Module, searches: Sequence[_Search], space: Space, measure: Measure) -> None:
    """Let every search that is under way count the module's entries."""
    for block in coordinates(module.updates, space).blocks():
        for magnitudes, search in zip(measure(block).numpy(), searches, strict=True):
            if search.found is None:
                search.window.count(magnitudes)


class _Search:
    """For one adapter's k-th largest magnitude: a window at a time, until it holds that and is fine enough."""

    def __init__(self, sample: Floats, k: int, share: float, exhaustive: bool) -> None:
        margins = (EVERYTHING,) if exhaustive else (MARGIN, 8 * MARGIN, 64 * MARGIN, EVERYTHING)
        self._brackets = iter([_bracket(sample, share, margin) for margin in margins])
        self._k = k
        self.window = _Window(*next(self._brackets))
        self.found: Threshold | None = None

    def conclude(self) -> None:
        """After a pass over all modules: the threshold, or another window."""
        if self.found is not None:
            return
        held = self.window.holding(self._k)
        if isinstance(held, Threshold):
            self.found = held
            return
        bracket = next(self._brackets, None) if held is None else held
        if bracket is None:
            raise _not_ordered()
        self.window = _Window(*bracket)


def _bracket(sample: Floats, share: float, margin: float) -> Bracket:
    """The magnitudes between which the one at `share` is expected to lie."""
    first, last = (int((share + side * margin) * len(sample)) for side in (-1, 1))
    high = _nth_largest(sample, first) if first > 0 else np.inf
    low = _nth_largest(sample, last + 1) if last < len(sample) else 0.0
    return low, high


class _Window:
    """The magnitudes from `low` to `high`, counted in bins of one float, or of 2, 4, … neighbours where they are many.

    Floats that are not negative have the order of their bits, read as whole numbers.
    """

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high
        self._first = _bits(low)
        num_floats = _bits(high) - self._first + 1
        self._shift = max(0, (num_floats - 1).bit_length() - BINS_BITS)
        self._counts = np.zeros(((num_floats - 1) >> self._shift) + 1, np.int64)
        self._num_above = 0
        self._adding = threading.Lock()

    def count(self, magnitudes: Floats) -> None:
        above = magnitudes > self._high
        inside = magnitudes[(magnitudes >= self._low) ^ above]
        bins = ((inside.view(np.int32) - self._first) >> self._shift).astype(np.intp)
        with self._adding:
            self._num_above += int(np.count_nonzero(above))
            np.add.at(self._counts, bins, 1)

    def holding(self, k: int) -> Threshold | Bracket | None:
        """The k-th largest of all that was counted, or the bin that it is in, or None if it lies outside."""
        rank = k - self._num_above
        totals = np.cumsum(self._counts[::-1])  # of the largest bin, of the two largest, …
        if not 1 <= rank <= totals[-1]:
            return None
        at = int(np.searchsorted(totals, rank))
        lowest = self._first + ((len(totals) - 1 - at) << self._shift)
        if self._shift == 0:
            return Threshold(_float(lowest), int(totals[at]) - rank)
        return _float(lowest), min(self._high, _float(lowest + (1 << self._shift) - 1))


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _float(bits: int) -> float:
    return float(np.int32(bits).view(np.float32))


def _nth_largest(values: Floats, n: int) -> float:
    """Counted from 1; the values are put into another order."""
    at = len(values) - n
    values.partition(at)
    return float(values[at])
