"""Which point to try next, as a function of what was tried: a search that stops goes on where it stood.

Nothing is kept between two questions. What is asked of chance is keyed by the seed and the trial's number, so that a
resumed search proposes what the uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from lorica import randomness
from lorica.errors import ConfigError
from lorica.studies import composite, single
from lorica.studies.space import Point, Space, key

Acquisition = Literal["single", "composite"]
TIE_WEIGHT = 1e-3  # of each further value in the one number that the surrogate models


@dataclass(frozen=True)
class Trial:
    """A point and what came of it."""

    number: int
    point: Point
    values: tuple[float, ...] = ()  # the higher the better, the first counts first; empty if nothing came of the point
    feasible: bool = True
    parts: Mapping[str, float] = field(
        default_factory=dict
    )  # task -> value; the least of them is the first of `values`

    @property
    def counts(self) -> bool:
        """Whether the point may be chosen."""
        return self.feasible and self.is_finite

    @property
    def is_finite(self) -> bool:
        return bool(self.values) and all(map(math.isfinite, self.values))


class Search(Protocol):
    """A way to search."""

    @property
    def total(self) -> int:
        """How many trials there are at most."""

    def propose(
        self, trials: Sequence[Trial], known: Sequence[Trial] = (), pending: Sequence[Point] = ()
    ) -> Point | None:
        """The point after `trials`, in their order; None at the end.

        `known` are trials of earlier searches, `pending` the points that others try at this moment.
        """


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that count, the best first; of equal ones the earlier."""
    return sorted((each for each in trials if each.counts), key=lambda each: each.values, reverse=True)


@dataclass(frozen=True)
class Grid:
    """Every point of a list, in its order."""

    points: tuple[Point, ...]

    @property
    def total(self) -> int:
        return len(self.points)

    def propose(
        self, trials: Sequence[Trial], known: Sequence[Trial] = (), pending: Sequence[Point] = ()
    ) -> Point | None:
        tried = {key(point) for point in (*(each.point for each in trials), *pending)}
        return next((point for point in self.points if key(point) not in tried), None)


@dataclass(frozen=True)
class Bayes:
    """Random points, then those of the largest log expected improvement under Gaussian processes.

    `acquisition` is `single`, one process over the values as one number, or `composite`, one for each of the trials'
    parts, and the improvement of the least of them. `known` trials stand for as many of the random points. No point is
    proposed twice.
    """

    space: Space
    budget: int
    init_points: int
    seed: int
    acquisition: Acquisition = "single"

    @property
    def total(self) -> int:
        listed = self.space.listed()
        return self.budget if listed is None else min(self.budget, len(listed))

    def propose(
        self, trials: Sequence[Trial], known: Sequence[Trial] = (), pending: Sequence[Point] = ()
    ) -> Point | None:
        number = len(trials) + len(pending)
        if number >= self.budget:
            return None
        if len(known) + number < self.init_points:
            point = self.space.spread(number, self.init_points, self.seed)
        else:
            point = self._improving([*known, *trials], pending, number)
        tried = {key(each) for each in (*(each.point for each in (*known, *trials)), *pending)}
        return point if key(point) not in tried else self._untried(tried, number)

    def _improving(self, trials: Sequence[Trial], pending: Sequence[Point], number: int) -> Point:
        seed = randomness.key(self.seed, "surrogate", number) % 2**31
        points = [*(each.point for each in trials), *pending]
        values = told(trials, len(pending), _rows(trials, self.acquisition))
        if self.acquisition == "single":
            return single.improving(self.space, points[: len(values)], values[:, 0], seed)
        if not len(values):
            return self.space.drawn(self.seed, "nothing known", number)
        best = max((each.values[0] for each in trials if each.counts), default=float(values.min(axis=1).max()))
        return composite.improving(self.space, points, values, best, seed)

    def _untried(self, tried: set[str], number: int) -> Point | None:
        """A random point that was not tried; None if there is none left."""
        listed = self.space.listed()
        if listed is not None:
            left = [point for point in listed if key(point) not in tried]
            return randomness.python_generator(self.seed, "left", number).choice(left) if left else None
        attempts = (self.space.drawn(self.seed, number, attempt) for attempt in range(len(tried) + 1000))
        return next((point for point in attempts if key(point) not in tried), None)


def told(trials: Sequence[Trial], num_pending: int, rows: np.ndarray) -> np.ndarray:
    """What the surrogates are told of the trials and then of the pending points: finite, or nothing at all.

    `rows` (trials, columns) are what came of the trials, NaN where nothing did. An infeasible point is told to be no
    better than the worst that counts: so it repels although a surrogate knows no constraints. One of which nothing came
    is as bad as any. A pending one is average, so that a second worker looks elsewhere. NaN and infinity never reach a
    surrogate: Optuna takes an infinity without a word and is of no use afterwards.
    """
    finite = np.isfinite(rows).all(axis=1)
    if not finite.any():
        return rows[:0]
    counted = finite & np.array([each.counts for each in trials])
    worst = rows[counted].min() if counted.any() else math.inf
    rows = np.where((finite & ~counted)[:, None], np.minimum(rows, worst), rows)
    rows = np.where(finite[:, None], rows, rows[finite].min(axis=0))
    return np.concatenate([rows, np.tile(rows.mean(axis=0), (num_pending, 1))])


def _rows(trials: Sequence[Trial], acquisition: Acquisition) -> np.ndarray:
    """(trials, columns): the values as one number, or each part's; NaN where nothing came of the point."""
    if acquisition == "single":
        return np.array([[_scalar(each)] for each in trials]).reshape(len(trials), 1)
    names = next((tuple(each.parts) for each in trials if each.is_finite), None)
    if names is None:
        return np.full((len(trials), 1), math.nan)
    if not names or any(set(each.parts) != set(names) for each in trials if each.is_finite):
        raise ConfigError("search.acquisition=composite needs the same tasks' values of every trial: take single")
    return np.array([[each.parts.get(name, math.nan) for name in names] for each in trials])


def _scalar(trial: Trial) -> float:
    scalar = sum(value * TIE_WEIGHT**place for place, value in enumerate(trial.values))
    return scalar if trial.is_finite else math.nan
