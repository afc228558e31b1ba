"""Which point to try next, as a function of what was tried: a search that stops goes on where it stood.

Nothing is kept between two questions. What is asked of chance is keyed by the seed and the trial's number, so that a
resumed search proposes what the uninterrupted one does.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorica import randomness
from lorica.studies.space import Parameter, Point, Space, key

TIE_WEIGHT = 1e-3  # of each further value in the one number that the surrogate models


@dataclass(frozen=True)
class Trial:
    """A point and what came of it."""

    number: int
    point: Point
    values: tuple[float, ...] = ()  # the higher the better, the first counts first; empty if nothing came of the point
    feasible: bool = True

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

    def propose(self, trials: Sequence[Trial], known: Sequence[Trial] = ()) -> Point | None:
        """The point after `trials`, in their order; None at the end. `known` are trials of earlier searches."""


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

    def propose(self, trials: Sequence[Trial], known: Sequence[Trial] = ()) -> Point | None:
        tried = {key(each.point) for each in trials}
        return next((point for point in self.points if key(point) not in tried), None)


@dataclass(frozen=True)
class Bayes:
    """Random points, then those of the largest log expected improvement under a Gaussian process.

    `known` trials stand for as many of the random points. No point is proposed twice.
    Source: Optuna's GPSampler; Ament et al. 2023, arXiv 2310.20708.
    """

    space: Space
    budget: int
    init_points: int
    seed: int

    @property
    def total(self) -> int:
        listed = self.space.listed()
        return self.budget if listed is None else min(self.budget, len(listed))

    def propose(self, trials: Sequence[Trial], known: Sequence[Trial] = ()) -> Point | None:
        number = len(trials)
        if number >= self.budget:
            return None
        told = [*known, *trials]
        if len(told) < self.init_points:
            point = self.space.spread(number, self.init_points, self.seed)
        else:
            point = _improving(self.space, told, randomness.key(self.seed, "surrogate", number) % 2**31)
        tried = {key(each.point) for each in told}
        return point if key(point) not in tried else self._untried(tried, number)

    def _untried(self, tried: set[str], number: int) -> Point | None:
        """A random point that was not tried; None if there is none left."""
        listed = self.space.listed()
        if listed is not None:
            left = [point for point in listed if key(point) not in tried]
            return randomness.python_generator(self.seed, "left", number).choice(left) if left else None
        attempts = (self.space.drawn(self.seed, number, attempt) for attempt in range(len(tried) + 1000))
        return next((point for point in attempts if key(point) not in tried), None)


def _improving(space: Space, trials: Sequence[Trial], seed: int) -> Point:
    """The point of the largest log expected improvement on `trials`; a random one where they say nothing."""
    import optuna

    told = _told(trials)
    distributions = {each.name: _distribution(each) for each in space.parameters}
    with _quiet():
        # One random point is the sampler's own least; with fewer it has nothing to fit.
        study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)
        )
        study.add_trials(
            [
                optuna.trial.create_trial(params=_encoded(space, point), distributions=distributions, value=value)
                for point, value in told
            ]
        )
        found = study.ask(distributions).params
    return {
        each.name: each.choices[found[each.name]] if each.kind == "categorical" else found[each.name]
        for each in space.parameters
    }


def _told(trials: Sequence[Trial]) -> list[tuple[Point, float]]:
    """What the surrogate is told of each point: a finite number, and of an infeasible one none better than the worst.

    So an infeasible point repels although the surrogate knows no constraints, and NaN and infinity never reach it: the
    sampler takes an infinity without a word and is of no use afterwards.
    """
    scored = [(each, sum(value * TIE_WEIGHT**place for place, value in enumerate(each.values))) for each in trials]
    worst = min((value for each, value in scored if each.counts), default=math.inf)
    lowest = min((value for each, value in scored if each.is_finite), default=math.nan)
    told = []
    for each, value in scored:
        if not each.counts:
            value = min(value, worst) if each.is_finite else lowest
        if math.isfinite(value):
            told.append((each.point, value))
    return told


def _encoded(space: Space, point: Point) -> dict[str, Any]:
    """The point as Optuna has it: a choice by its place, for a choice may be a list, and 1 and true are two."""
    return {
        each.name: each.choices.index(point[each.name]) if each.kind == "categorical" else point[each.name]
        for each in space.parameters
    }


def _distribution(parameter: Parameter) -> Any:
    from optuna import distributions

    if parameter.kind == "categorical":
        return distributions.CategoricalDistribution(range(len(parameter.choices)))
    low, high = parameter.range
    if parameter.kind == "int":
        return distributions.IntDistribution(int(low), int(high))
    return distributions.FloatDistribution(low, high, log=parameter.kind == "log")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of every study it makes and calls the sampler experimental; neither is for whoever waits."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
