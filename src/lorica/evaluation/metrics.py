"""Metrics from the confusion matrix or of each example, each with its percentile bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lorica import plugins
from lorica.errors import UnknownNameError

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Score:
    """A metric's value over n examples, and its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    higher_is_better: bool = True

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


def accuracy(confusion: Array) -> Array:
    """(..., K, K) counts, label by row, prediction by column -> (...,): the share on the diagonal."""
    return np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum(axis=(-2, -1))


def macro_f1(confusion: Array) -> Array:
    """(..., K, K) counts -> (...,): the mean over classes that occur of F1 = 2·tp / (labelled + predicted)."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    total = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    f1 = np.divide(2 * hits, total, out=np.zeros(hits.shape), where=total > 0)
    return f1.sum(axis=-1) / np.maximum((total > 0).sum(axis=-1), 1)


def f1a(confusion: Array) -> Array:
    """(..., 2, 2) counts -> (...,): F1 of the second class, over all answers of all questions (MultiRC's F1a)."""
    hits = confusion[..., 1, 1]
    total = confusion[..., 1, :].sum(axis=-1) + confusion[..., :, 1].sum(axis=-1)
    return np.divide(2 * hits, total, out=np.zeros(hits.shape), where=total > 0)


METRICS: dict[str, Callable[[Array], Array]] = {"accuracy": accuracy, "macro_f1": macro_f1, "f1a": f1a}


def scored(
    names: Sequence[str], labels: Array, predictions: Array, num_classes: int, seed: int = 0
) -> dict[str, Score]:
    """Each metric of `predictions` (n,) against `labels` (n,), with its bootstrap interval over examples.

    Resamples are drawn from `seed` alone, so the same predictions give the same interval.
    """
    cells = np.asarray(labels) * num_classes + np.asarray(predictions)  # (n,) cell of the confusion matrix
    whole = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    # A resample of n examples is a multinomial draw of the cells: only the counts matter.
    draws = np.random.Generator(np.random.Philox(seed)).multinomial(
        len(cells), whole.ravel() / len(cells), size=NUM_RESAMPLES
    )
    resampled = draws.reshape(NUM_RESAMPLES, num_classes, num_classes)
    found = {}
    for name in names:
        if name not in METRICS:
            raise UnknownNameError(plugins.unknown("metric", name, METRICS))
        found[name] = _score(float(METRICS[name](whole)), METRICS[name](resampled), len(cells))
    return found


def mean_score(values: Array, seed: int = 0) -> Score:
    """The mean of the examples' values (n,), with its bootstrap interval over examples, drawn from `seed` alone."""
    kinds, counts = np.unique(values, return_counts=True)  # a resample only counts how often each value comes
    draws = np.random.Generator(np.random.Philox(seed)).multinomial(
        len(values), counts / len(values), size=NUM_RESAMPLES
    )
    return _score(float(np.mean(values)), draws @ kinds / len(values), len(values))


def _score(value: float, resampled: Array, n: int) -> Score:
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Score(value, float(low), float(high), n)
