"""The point where one number is expected to improve most: a Gaussian process over the number itself."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lorica.studies.space import Parameter, Point, Space


def improving(space: Space, points: Sequence[Point], values: np.ndarray, seed: int) -> Point:
    """The point of the largest log expected improvement on `values` (points,), all finite; without any, a random one.

    Source: Optuna's GPSampler; Ament et al. 2023, arXiv 2310.20708.
    """
    import optuna

    distributions = {each.name: _distribution(each) for each in space.parameters}
    with _quiet():
        # One random point is the sampler's own least; with fewer it has nothing to fit.
        study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)
        )
        study.add_trials(
            [
                optuna.trial.create_trial(
                    params=_encoded(space, point), distributions=distributions, value=float(value)
                )
                for point, value in zip(points, values, strict=True)
            ]
        )
        found = study.ask(distributions).params
    return {
        each.name: each.choices[found[each.name]] if each.kind == "categorical" else found[each.name]
        for each in space.parameters
    }


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
