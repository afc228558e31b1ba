"""Metrics agree with scikit-learn, and their intervals hold what they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from lorica.errors import UnknownNameError
from lorica.evaluation.metrics import METRICS, Array, mean_score, scored

NAMES = ("accuracy", "macro_f1")


@st.composite
def answers(draw: st.DrawFn) -> tuple[Array, Array, int]:
    """(labels, predictions, number of classes): random, and some classes may not occur."""
    num_classes, size = draw(st.integers(2, 6)), draw(st.integers(1, 60))
    generator = np.random.Generator(np.random.Philox(draw(st.integers(0, 2**32 - 1))))
    labels = generator.integers(0, num_classes, size)
    guesses = generator.integers(0, num_classes, size)
    return labels, np.where(generator.random(size) < 0.5, labels, guesses), num_classes


@given(answers())
def test_metrics_agree_with_scikit_learn(given_answers: tuple[Array, Array, int]) -> None:
    labels, predictions, num_classes = given_answers
    found = scored(NAMES, labels, predictions, num_classes)
    assert found["accuracy"].value == pytest.approx(accuracy_score(labels, predictions))
    assert found["macro_f1"].value == pytest.approx(f1_score(labels, predictions, average="macro", zero_division=0))
    assert {score.n for score in found.values()} == {len(labels)}


@given(answers())
def test_f1a_is_the_second_classs(given_answers: tuple[Array, Array, int]) -> None:
    labels, predictions = (each % 2 for each in given_answers[:2])
    found = scored(["f1a"], labels, predictions, 2)["f1a"]
    assert found.value == pytest.approx(f1_score(labels, predictions, zero_division=0))
    assert 0.0 <= found.low <= found.high <= 1.0


@given(answers())
def test_a_mean_of_examples_agrees_with_the_metric_of_their_counts(given_answers: tuple[Array, Array, int]) -> None:
    labels, predictions, num_classes = given_answers
    found = mean_score((labels == predictions).astype(float))
    expected = scored(["accuracy"], labels, predictions, num_classes)["accuracy"]
    assert found.value == pytest.approx(expected.value) and found.n == expected.n
    assert found.low <= found.value <= found.high
    assert abs(found.high - expected.high) <= 1.01 * max(0.1, 1 / found.n)  # the same law, other draws


@given(answers())
def test_an_interval_is_ordered_and_inside_the_metrics_range(given_answers: tuple[Array, Array, int]) -> None:
    for score in scored(NAMES, *given_answers).values():
        assert 0.0 <= score.low <= score.high <= 1.0


def flips(generator: np.random.Generator, size: int, right: float) -> tuple[Array, Array]:
    """Binary labels and predictions that are right with probability `right`."""
    labels = generator.integers(0, 2, size)
    return labels, np.where(generator.random(size) < right, labels, 1 - labels)


@pytest.mark.parametrize("metric", NAMES)
@pytest.mark.parametrize("right", [0.6, 0.8])
def test_the_interval_covers_the_true_value(metric: str, right: float) -> None:
    """Balanced classes and symmetric mistakes: accuracy and macro F1 are both `right` in the long run."""
    generator = np.random.Generator(np.random.Philox(0))
    intervals = [scored([metric], *flips(generator, 200, right), 2)[metric] for _ in range(300)]
    covered = sum(score.low <= right <= score.high for score in intervals) / len(intervals)
    assert 0.90 <= covered <= 0.99


def test_the_interval_narrows_with_the_root_of_the_examples() -> None:
    generator = np.random.Generator(np.random.Philox(0))
    widths = []
    for size in (400, 1600):
        score = scored(["accuracy"], *flips(generator, size, 0.7), 2)["accuracy"]
        widths.append(score.high - score.low)
    assert widths[0] / widths[1] == pytest.approx(2.0, rel=0.2)


def test_the_interval_is_a_function_of_answers_and_seed() -> None:
    labels, predictions = flips(np.random.Generator(np.random.Philox(0)), 100, 0.7)
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global generator is what must not move
    first = scored(NAMES, labels, predictions, 2)
    assert scored(NAMES, labels, predictions, 2) == first
    assert scored(NAMES[::-1], labels, predictions, 2) == first
    assert scored(NAMES, labels, predictions, 2, seed=1) != first
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_order_of_examples_does_not_matter() -> None:
    labels, predictions = flips(np.random.Generator(np.random.Philox(0)), 100, 0.7)
    assert scored(NAMES, labels[::-1], predictions[::-1], 2) == scored(NAMES, labels, predictions, 2)


def test_all_right_and_all_wrong_are_certain() -> None:
    labels = np.array([0, 1, 2, 0])
    for predictions, value in ((labels, 1.0), ((labels + 1) % 3, 0.0)):
        for score in scored(NAMES, labels, predictions, 3).values():
            assert (score.value, score.low, score.high) == (value, value, value)


def test_an_unknown_metric_names_the_near_one() -> None:
    with pytest.raises(UnknownNameError, match="accuracy"):
        scored(["acuracy"], np.array([0]), np.array([0]), 2)
    assert set(METRICS) == {*NAMES, "f1a"}


def test_a_record_holds_the_whole_score() -> None:
    record = scored(["accuracy"], np.array([0, 1]), np.array([0, 1]), 2)["accuracy"].as_record()
    assert record == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 2, "higher_is_better": True}
