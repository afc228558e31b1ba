"""Searches on planted objectives: grids, and Bayes with one surrogate or one for each task."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from lorica.errors import ConfigError
from lorica.studies.composite import log_expected_improvement
from lorica.studies.search import Acquisition, Bayes, Grid, Search, Trial, ranked, told
from lorica.studies.space import Parameter, Point, Space, grid_points, key
from lorica.studies.surrogate import fitted

LAMBDA = Space((Parameter("lambda", "float", 0.0, 1.0),))
Objective = Callable[[Point], float]


def searched(search: Search, objective: Objective, known: tuple[Trial, ...] = ()) -> list[Trial]:
    """Every trial of a search of `objective`; where that is NaN, nothing came of the point."""
    trials: list[Trial] = []
    while (point := search.propose(trials, known)) is not None:
        value = objective(point)
        trials.append(Trial(len(trials), point, () if math.isnan(value) else (value, value), not math.isnan(value)))
    return trials


def tent(point: Point) -> float:
    """Two tasks, the one lost where the other is kept: highest at 0.37."""
    return min(point["lambda"] / 0.37, (1 - point["lambda"]) / 0.63)


def test_a_grid_is_tried_in_order_and_its_best_found() -> None:
    points = grid_points({"a": [1, 2], "b": ["x", "y", "z"]})
    assert [tuple(point.values()) for point in points[:4]] == [(1, "x"), (1, "y"), (1, "z"), (2, "x")]
    trials = searched(Grid(tuple(points)), lambda point: point["a"] - (point["b"] != "y"))
    assert [each.point for each in trials] == points
    assert ranked(trials)[0].point == {"a": 2, "b": "y"}


def test_ties_are_broken_by_the_mean_and_then_by_the_order() -> None:
    values = [(0.5, 0.6), (0.5, 0.7), (0.5, 0.7), (0.4, 1.0), (math.nan, 1.0)]
    trials = [Trial(number, {"a": number}, each) for number, each in enumerate(values)]
    trials.append(Trial(5, {"a": 5}, (0.9, 0.9), feasible=False))
    assert [each.number for each in ranked(trials)] == [1, 2, 0, 3]


def test_bayes_is_no_worse_than_a_grid_of_as_many_points() -> None:
    best_of_grid = max(tent({"lambda": place / 19}) for place in range(20))
    found = (ranked(searched(Bayes(LAMBDA, 20, 6, seed), tent))[0].values[0] for seed in range(5))
    good = (value for value in found if value >= best_of_grid - 0.02)
    assert len(list(itertools.islice(good, 4))) == 4  # of the five seeds


def test_bayes_learns_from_points_that_came_to_nothing() -> None:
    trials = searched(Bayes(LAMBDA, 12, 4, 0), lambda point: math.nan if point["lambda"] > 0.5 else tent(point))
    assert any(not each.feasible for each in trials)
    assert tent(ranked(trials)[0].point) > 0.95
    assert sum(each.feasible for each in trials[-6:]) >= 4


def test_bayes_goes_on_where_nothing_came_of_any_point() -> None:
    trials = searched(Bayes(LAMBDA, 5, 2, 0), lambda point: math.nan)
    assert len({key(each.point) for each in trials}) == 5 and ranked(trials) == []


def test_bayes_stays_in_its_space_and_ends_with_it() -> None:
    space = Space(
        (
            Parameter("choice", "categorical", choices=(1, True, [1], None)),
            Parameter("count", "int", 1, 2),
        )
    )
    trials = searched(Bayes(space, 20, 3, 0), lambda point: point["count"])
    assert len({key(each.point) for each in trials}) == len(trials) == 8
    wide = Space((Parameter("rate", "log", 1e-4, 1.0),))
    rates = [each.point["rate"] for each in searched(Bayes(wide, 7, 4, 0), lambda point: -abs(point["rate"] - 0.01))]
    assert all(1e-4 <= rate <= 1 for rate in rates)
    assert sorted(int(-math.log10(rate)) for rate in rates[:4]) == [0, 1, 2, 3]


def test_what_is_proposed_follows_from_what_was_tried() -> None:
    search = Bayes(LAMBDA, 9, 4, 3)
    trials = searched(search, tent)
    for number in (0, 3, 4, 8):
        read = [Trial(each.number, json.loads(json.dumps(each.point)), each.values) for each in trials[:number]]
        assert search.propose(read) == trials[number].point


MIXED = Space(
    (
        Parameter("a", "float", 0.0, 1.0),
        Parameter("b", "log", 1e-3, 1.0),
        Parameter("c", "int", 1, 4),
        Parameter("d", "categorical", choices=("x", [1], None)),
    )
)


def in_parts(search: Search, parts_of: Callable[[Point], dict[str, float]]) -> list[Trial]:
    """Every trial of a search by each task's value; the least of them counts."""
    trials: list[Trial] = []
    while (point := search.propose(trials)) is not None:
        parts = parts_of(point)
        trials.append(Trial(len(trials), point, (min(parts.values()),), parts=parts))
    return trials


def three_tasks(point: Point) -> dict[str, float]:
    """Each smooth, and none kept where the others are: a ridge that no axis runs along, highest at (0.62, 0.27)."""
    a, b = point["a"], point["b"]
    return {"left": 1 - (a - 0.9) ** 2 - b, "right": 1 - (b - 0.9) ** 2 - 0.6 * a, "all": 0.4 + 0.3 * (a + b)}


def test_composite_finds_the_kink_that_a_grid_of_as_many_points_misses() -> None:
    square = Space((Parameter("a", "float", 0.0, 1.0), Parameter("b", "float", 0.0, 1.0)))
    grid = max(min(three_tasks({"a": a / 4, "b": b / 3}).values()) for a in range(5) for b in range(4))
    for seed in (0, 1):
        trials = in_parts(Bayes(square, 12, 6, seed, "composite"), three_tasks)
        assert ranked(trials)[0].values[0] > grid + 0.02


@pytest.mark.parametrize("acquisition", ["single", "composite"])
def test_points_under_work_are_not_proposed_and_proposals_follow_from_what_is_known(acquisition: Acquisition) -> None:
    search = Bayes(MIXED, 12, 4, 0, acquisition)
    trials = [
        Trial(number, MIXED.spread(number, 6, 1), (number / 6,), parts={"s": number / 6, "t": 1.0})
        for number in range(6)
    ]
    first = search.propose(trials)
    assert first is not None and MIXED.holds(first)
    pending = [first]
    for _ in range(2):
        again = [
            Trial(each.number, json.loads(json.dumps(each.point)), each.values, True, each.parts) for each in trials
        ]
        point = search.propose(trials, (), pending)
        assert point is not None and point not in pending and point == search.propose(again, (), list(pending))
        pending.append(point)
    assert (
        search.propose(trials, (), [MIXED.drawn(9, number) for number in range(6)]) is None
    )  # the budget is under work


def test_what_the_surrogates_are_told_is_finite_and_never_better_than_it_was() -> None:
    nothing = [math.nan, math.nan]
    rows = np.array([[0.5, 0.9], [0.8, 0.9], nothing, [0.2, 0.3]])
    point: Point = {"a": 0}
    trials = [
        Trial(0, point, (0.5,)),
        Trial(1, point, (0.8,), feasible=False),
        Trial(2, point),
        Trial(3, point, (0.2,)),
    ]
    expected = np.array([[0.5, 0.9], [0.2, 0.2], [0.2, 0.2], [0.2, 0.3]])
    np.testing.assert_allclose(told(trials, 0, rows), expected)
    np.testing.assert_allclose(told(trials, 2, rows)[4:], np.tile(expected.mean(axis=0), (2, 1)))
    assert len(told(trials[2:3], 1, rows[2:3])) == 0


def test_composite_goes_on_where_nothing_came_of_any_point_and_needs_every_part() -> None:
    search = Bayes(LAMBDA, 6, 2, 0, "composite")
    trials: list[Trial] = []
    while (point := search.propose(trials)) is not None:
        trials.append(Trial(len(trials), point, (), feasible=False))
    assert len({key(each.point) for each in trials}) == 6
    with pytest.raises(ConfigError, match="acquisition=composite"):
        search.propose([Trial(number, {"lambda": number / 4}, (0.5,)) for number in range(4)])


def test_a_surrogate_knows_what_it_was_told_and_doubts_the_rest() -> None:
    rng = np.random.default_rng(0)
    at, new = rng.uniform(size=(12, 2)), rng.uniform(size=(20, 2))

    def truth(places: np.ndarray) -> np.ndarray:
        return np.sin(5 * places[:, 0]) + places[:, 1] ** 2

    surrogate = fitted(at, truth(at))
    mean, deviation = surrogate(at)
    np.testing.assert_allclose(mean, truth(at), atol=0.05)
    assert (deviation < 0.1).all() and surrogate(np.array([[5.0, 5.0]]))[1][0] > 5 * deviation.max()
    mean, deviation = surrogate(new)
    assert (abs(mean - truth(new)) < 4 * deviation + 0.05).all()


def test_the_expected_improvement_of_one_task_is_the_closed_form() -> None:
    points: list[Point] = [{"lambda": share} for share in (0.05, 0.3, 0.6, 0.95)]
    values = np.array([0.1, 0.7, 0.5, 0.2])
    shares = np.linspace(0.0, 0.99, 40)[:, None]
    mean, deviation = fitted(np.array([[each["lambda"]] for each in points]), values)(shares)
    gain = (mean - values.max()) / deviation
    normal = np.exp(-(gain**2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([(1 + math.erf(each / math.sqrt(2))) / 2 for each in gain])
    expected = deviation * (gain * below + normal)
    found = log_expected_improvement(LAMBDA, points, values[:, None], values.max(), 0)(shares)
    softness = 1e-3 * values.std()
    likely = expected > 0.1 * expected.max()  # a few draws say little of what is rare
    np.testing.assert_allclose(softness * np.exp(found[likely]), expected[likely], rtol=0.1)
    assert np.isfinite(found).all() and len(set(found)) == len(found)  # none is as good as another for being hopeless


BAD_SPACES: dict[str, tuple[Callable[[], object], str]] = {
    "no values": (lambda: grid_points({"a": []}), "search.grid.a has no value"),
    "twice": (lambda: grid_points({"a": [1, 1]}), "1 twice"),
    "empty": (lambda: grid_points({}), "0 points"),
    "reversed": (lambda: Parameter("a", "float", 1, 0), "min below max"),
    "log of zero": (lambda: Parameter("a", "log", 0, 1), "min above 0"),
    "half": (lambda: Parameter("a", "int", 0, 1.5), "whole numbers"),
    "one choice": (lambda: Parameter("a", "categorical", choices=(1,)), "two choices"),
    "both": (lambda: Parameter("a", "float", 0, 1, (1, 2)), "drop choices"),
}


@pytest.mark.parametrize("make, message", BAD_SPACES.values(), ids=BAD_SPACES.keys())
def test_a_bad_space_is_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
