"""The k-th largest magnitude of each adapter, exactly, over entries that are made anew rather than kept.

A sample brackets the answer; one pass over the blocks counts what lies above the bracket and keeps what lies inside,
and the answer is picked from that. A bracket that misses is widened, so the result never depends on the sample.
"""

from __future__ import annotations

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
Bracket = tuple[float, float]
NOTHING: Bracket = (np.inf, np.inf)
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
    found: list[Threshold | None] = [None] * len(sampled)
    for margin in (MARGIN, 8 * MARGIN, 64 * MARGIN, EVERYTHING) if stride > 1 else (EVERYTHING,):
        if None not in found:
            break
        brackets = [
            _bracket(each, k / num_entries, margin) if done is None else NOTHING
            for each, done in zip(sampled, found, strict=True)
        ]
        counted = modules.map(partial(_counted, brackets=brackets, space=space, measure=measure))
        found = [done or _picked([each[at] for each in counted], k) for at, done in enumerate(found)]
    return _complete(found)


def _complete(found: Sequence[Threshold | None]) -> list[Threshold]:
    complete = [each for each in found if each is not None]
    if len(complete) < len(found):
        raise ShapeError("some entries of the updates are not a number: they cannot be ordered by magnitude")
    return complete


def _bracket(sample: Floats, share: float, margin: float) -> Bracket:
    """The magnitudes between which the one at `share` is expected to lie."""
    first, last = (int((share + side * margin) * len(sample)) for side in (-1, 1))
    high = _nth_largest(sample, first) if first > 0 else np.inf
    low = _nth_largest(sample, last + 1) if last < len(sample) else 0.0
    return low, high


def _counted(module: Module, brackets: Sequence[Bracket], space: Space, measure: Measure) -> list[tuple[int, Floats]]:
    """For each bracket the number of entries above it, and the magnitudes inside it."""
    num_above = [0] * len(brackets)
    inside: list[list[Floats]] = [[] for _ in brackets]
    for block in coordinates(module.updates, space).blocks():
        for at, (magnitudes, (low, high)) in enumerate(zip(measure(block).numpy(), brackets, strict=True)):
            above = magnitudes > high
            num_above[at] += int(np.count_nonzero(above))
            inside[at].append(magnitudes[(magnitudes >= low) ^ above])
    return [(above, np.concatenate(kept)) for above, kept in zip(num_above, inside, strict=True)]


def _picked(counted: Sequence[tuple[int, Floats]], k: int) -> Threshold | None:
    """The k-th largest magnitude, None if it does not lie in the bracket."""
    rank = k - sum(above for above, _ in counted)
    inside = np.concatenate([kept for _, kept in counted])
    if not 1 <= rank <= len(inside):
        return None
    value = _nth_largest(inside, rank)
    return Threshold(value, int(np.count_nonzero(inside >= value)) - rank)


def _nth_largest(values: Floats, n: int) -> float:
    """Counted from 1; the values are put into another order."""
    at = len(values) - n
    values.partition(at)
    return float(values[at])
