"""The interference delta: its fixed points, its headroom test, and its bootstrap against a plain one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from lorica.errors import DataError
from lorica.evaluation.recovery import Recovery, recovery, summarise

N, K = 400, 4
LABELS = np.random.default_rng(0).integers(K, size=N)


def noisy(share_right: float, seed: int) -> np.ndarray:
    """Predictions of which about `share_right` are right."""
    generator = np.random.default_rng(seed)
    return np.where(generator.random(N) < share_right, LABELS, (LABELS + generator.integers(1, K, size=N)) % K)


def found(base: np.ndarray, single: np.ndarray, merged: np.ndarray, metric: str = "accuracy") -> Recovery:
    return recovery("t", metric, LABELS, base=base, single=single, merged=merged, num_classes=K)


BASE, SINGLE, BETWEEN = noisy(0.3, 1), noisy(0.9, 2), noisy(0.6, 3)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_the_base_is_0_and_the_own_adapter_1(metric: str) -> None:
    nothing, everything = found(BASE, SINGLE, BASE, metric), found(BASE, SINGLE, SINGLE, metric)
    assert (nothing.delta.value, nothing.delta.low, nothing.delta.high) == (0, 0, 0)
    assert (everything.delta.value, everything.delta.low, everything.delta.high) == (1, 1, 1)


def test_scores_are_the_metrics_of_the_predictions() -> None:
    scores = found(BASE, SINGLE, BETWEEN, "macro_f1")
    expected = [f1_score(LABELS, each, average="macro") for each in (BASE, SINGLE, BETWEEN)]
    assert [scores.base, scores.single, scores.merged] == pytest.approx(expected)
    assert scores.delta.value == pytest.approx((expected[2] - expected[0]) / (expected[1] - expected[0]))


def test_the_interval_is_that_of_a_plain_paired_bootstrap() -> None:
    generator = np.random.default_rng(5)
    draws = []
    for _ in range(1000):
        rows = generator.integers(N, size=N)
        base, single, merged = ((each == LABELS)[rows].mean() for each in (BASE, SINGLE, BETWEEN))
        draws.append((merged - base) / (single - base))
    low, high = np.quantile(draws, [0.025, 0.975])
    delta = found(BASE, SINGLE, BETWEEN).delta
    assert (delta.low, delta.high) == pytest.approx((low, high), abs=0.02)
    assert delta.low < delta.value < delta.high


def test_a_task_without_headroom_is_flagged_and_left_out() -> None:
    worse = found(SINGLE, BASE, BETWEEN)
    alike = found(BASE, noisy(0.3, 9), BETWEEN)
    good = found(BASE, SINGLE, BETWEEN)
    assert not worse.has_headroom and not alike.has_headroom and good.has_headroom
    assert worse.as_record()["interference_delta"] is None
    assert summarise([worse, alike]) is None
    summary = summarise([good, worse])
    assert summary is not None and summary.flagged == ("t",)
    assert summary.minimum.value == summary.mean.value == good.delta.value


def test_the_summary_is_over_tasks() -> None:
    high, low = found(BASE, SINGLE, noisy(0.8, 4)), found(BASE, SINGLE, noisy(0.5, 6))
    summary = summarise([high, low])
    assert summary is not None
    values = [high.delta.value, low.delta.value]
    assert summary.minimum.value == min(values) and summary.mean.value == pytest.approx(np.mean(values))
    assert summary.geometric_mean == pytest.approx(np.sqrt(np.prod(values)))
    assert summary.shortfall == pytest.approx(-np.sqrt(np.mean(np.square(1 - np.array(values)))))
    assert summary.minimum.low <= summary.minimum.value <= summary.minimum.high


def test_predictions_of_another_split_are_refused() -> None:
    with pytest.raises(DataError, match="399 predictions for 400 examples"):
        recovery("t", "accuracy", LABELS, base=BASE[1:], single=SINGLE[1:], merged=BASE[1:], num_classes=K)
