"""How much of each task survives a merge: the interference delta, with the interval of its paired bootstrap.

d = (merged - base) / (single - base): 0 is the base model, 1 the task's own adapter, above 1 transfer. A task whose own
adapter is not surely better than the base has no headroom to recover; it is flagged, and left out of minimum and means
(MATH section 6.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorica.errors import DataError
from lorica.evaluation.metrics import CONFIDENCE, METRICS, NUM_RESAMPLES, Array

EDGES = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def as_record(self) -> list[float]:
        return [self.value, self.low, self.high]


@dataclass(frozen=True)
class Recovery:
    """One task before and after the merge; `draws` are the resamples of d, for combining tasks."""

    task: str
    metric: str
    base: float
    single: float
    merged: float
    delta: Interval
    headroom: Interval
    n: int
    draws: Array = field(repr=False)

    @property
    def has_headroom(self) -> bool:
        """Whether the task's own adapter is surely better than the base."""
        return self.headroom.low > 0

    def as_record(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "metric": self.metric,
            "base": self.base,
            "single": self.single,
            "merged": self.merged,
            "interference_delta": self.delta.as_record() if self.has_headroom else None,
            "headroom": self.headroom.as_record(),
            "n": self.n,
        }


@dataclass(frozen=True)
class Summary:
    """Recovery over all tasks with headroom; `flagged` names the others."""

    minimum: Interval
    mean: Interval
    geometric_mean: float  # of max(d, 0)
    shortfall: float  # -√mean(max(0, 1 - d)²)
    flagged: tuple[str, ...]

    def as_record(self) -> dict[str, Any]:
        return {
            "minimum": self.minimum.as_record(),
            "mean": self.mean.as_record(),
            "geometric_mean": self.geometric_mean,
            "shortfall": self.shortfall,
            "flagged": list(self.flagged),
        }


def recovery(
    task: str, metric: str, labels: Array, *, base: Array, single: Array, merged: Array, num_classes: int, seed: int = 0
) -> Recovery:
    """The interference delta of `merged`'s predictions against those of the base and of the task's own adapter.

    All (n,), class numbers. The three are resampled together: an example stays with its three predictions.
    """
    predictions = np.stack([base, single, merged])  # (3, n)
    if predictions.shape[1] != len(labels):
        raise DataError(f"{task}: {predictions.shape[1]} predictions for {len(labels)} examples")
    cells = np.asarray(labels) * num_classes + predictions
    kinds, counts = np.unique(cells, axis=1, return_counts=True)  # (3, m) examples that fared alike, (m,)
    generator = np.random.Generator(np.random.Philox(seed))
    resampled = generator.multinomial(len(labels), counts / len(labels), size=NUM_RESAMPLES)  # (resamples, m)
    rows = np.concatenate([counts[None], resampled])
    scores = np.stack([METRICS[metric](_confusions(kind, rows, num_classes)) for kind in kinds])  # (3, 1 + resamples)
    gained, headroom = scores[2] - scores[0], scores[1] - scores[0]
    d = np.divide(gained, headroom, out=np.full_like(gained, np.nan), where=headroom != 0)
    return Recovery(
        task=task,
        metric=metric,
        base=float(scores[0, 0]),
        single=float(scores[1, 0]),
        merged=float(scores[2, 0]),
        delta=_interval(float(d[0]), d[1:]),
        headroom=_interval(float(headroom[0]), headroom[1:]),
        n=len(labels),
        draws=d[1:],
    )


def summarise(found: Sequence[Recovery]) -> Summary | None:
    """Minimum and means over the tasks with headroom; None if no task has any. Tasks are resampled independently."""
    counted = [each for each in found if each.has_headroom]
    if not counted:
        return None
    values = np.array([each.delta.value for each in counted])
    draws = np.stack([each.draws for each in counted])  # (tasks, resamples)
    return Summary(
        minimum=_interval(float(values.min()), draws.min(axis=0)),
        mean=_interval(float(values.mean()), draws.mean(axis=0)),
        geometric_mean=float(np.exp(np.log(np.maximum(values, 1e-12)).mean())),
        shortfall=-math.sqrt(float((np.maximum(0, 1 - values) ** 2).mean())),
        flagged=tuple(each.task for each in found if not each.has_headroom),
    )


def _confusions(cells: Array, rows: Array, num_classes: int) -> Array:
    """(resamples, K, K): for each row of counts (resamples, m) of the examples in `cells` (m,)."""
    found = np.zeros((len(rows), num_classes**2))
    order = np.argsort(cells, kind="stable")
    distinct, starts = np.unique(cells[order], return_index=True)
    found[:, distinct] = np.add.reduceat(rows[:, order], starts, axis=1)
    return found.reshape(len(rows), num_classes, num_classes)


def _interval(value: float, draws: Array) -> Interval:
    finite = draws[np.isfinite(draws)]
    low, high = np.quantile(finite, EDGES) if len(finite) else (math.nan, math.nan)
    return Interval(value, float(low), float(high))
