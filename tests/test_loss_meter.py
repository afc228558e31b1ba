"""What a noisy run is told of its loss: the trend's t-statistic, and the warnings that come of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from lorica.training.loss_meter import LossMeter, LossTrend


def noise(size: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(size)


def t_of(losses: Sequence[float]) -> float:
    """Least squares by numpy: the slope over its standard error."""
    place = np.arange(len(losses)) - (len(losses) - 1) / 2
    slope = place @ losses / (place @ place)
    left = losses - np.mean(losses) - slope * place
    return float(slope / math.sqrt(left @ left / (len(losses) - 2) / (place @ place)))


def filled(losses: Sequence[float], window: int) -> LossTrend:
    trend = LossTrend(window)
    for loss in losses:
        trend.add(float(loss))
    return trend


def warnings(meter: LossMeter, losses: Sequence[float]) -> list[str]:
    return [warning for loss in losses for warning in meter.after(float(loss))]


@pytest.mark.parametrize("slope", [0.0, -1e-3, 1e-2])
def test_the_trend_is_least_squares_over_the_last_window(slope: float) -> None:
    trend, window = LossTrend(50), 50
    losses = 2.5 + slope * np.arange(400) + 0.1 * noise(400)
    for step, loss in enumerate(losses, 1):
        trend.add(float(loss))
        if step < window:
            assert trend.t() is None
        else:
            assert trend.t() == pytest.approx(t_of(losses[step - window : step]), rel=1e-9)


def test_an_outlier_leaves_no_rounding_behind() -> None:
    losses = 0.7 + 0.1 * noise(300)
    losses[100] = 1e12
    assert filled(losses, 50).t() == pytest.approx(t_of(losses[-50:]), rel=1e-9)


def test_losses_that_are_all_the_same_have_no_trend() -> None:
    assert filled([0.7] * 120, 50).t() == 0.0
    assert filled([1.0 - step / 64 for step in range(50)], 50).t() == -math.inf


def test_a_run_that_does_not_learn_is_told_so_once() -> None:
    told = warnings(LossMeter(), 0.7 + 0.1 * noise(2000))
    assert len(told) == 1
    assert all(part in told[0] for part in ("no fall", "500 steps", "t = ", "zo.num_directions", "trainer=backprop"))


def test_a_run_that_learns_is_told_nothing() -> None:
    losses = 2.0 * np.exp(-np.arange(900) / 600) + 0.1 * noise(900)
    assert warnings(LossMeter(), losses) == []
    assert warnings(LossMeter(), 0.7 + 0.1 * noise(499)) == [], "a window that is not full shows nothing"


@pytest.mark.parametrize("spread", [0.05, 0.7])
@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_is_no_rise(spread: float, seed: int) -> None:
    assert warnings(LossMeter(), np.abs(0.7 + spread * noise(499, seed))) == []


@pytest.mark.parametrize(
    "losses",
    [
        np.linspace(2.5, 5.6, 400) + 0.3 * noise(400),  # the drift of rank 1 with alpha 16
        np.array([0.7, *[40.0] * 99]),  # all at once
    ],
    ids=["drift", "jump"],
)
def test_a_loss_that_rises_far_is_told_once(losses: NDArray[np.float64]) -> None:
    told = warnings(LossMeter(), losses)
    assert len(told) == 1
    assert all(part in told[0] for part in ("risen", "diverges", "learning_rate", "adapter.alpha"))


def test_a_loss_that_rises_again_is_told_though_it_is_below_the_first() -> None:
    falls, rises = np.linspace(4.0, 0.5, 200), np.linspace(0.5, 3.0, 200)
    told = warnings(LossMeter(), np.concatenate([falls, rises]) + 0.2 * noise(400))
    assert len(told) == 1
    assert all(part in told[0] for part in ("at its lowest", "diverges", "a lower learning_rate"))


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_has_converged_is_not_told_that_it_rises(seed: int) -> None:
    losses = 0.02 + 1.5 * np.exp(-np.arange(3000) / 100) + np.abs(0.1 * noise(3000, seed))
    (told,) = warnings(LossMeter(), losses)
    assert "no fall" in told and "a larger zo.num_directions" in told


def test_a_slow_rise_is_no_failure_to_learn() -> None:
    """To be told of a larger learning_rate would be the worst advice."""
    losses = 1.0 + np.linspace(0, 0.2, 600) + 0.1 * noise(600)
    told = warnings(LossMeter(), losses)
    assert len(told) == 1
    assert all(part in told[0] for part in ("rises over the last 500 steps", "t = ", "a lower learning_rate"))
    (unsure,) = warnings(LossMeter(), 1.0 + np.linspace(0, 0.05, 500) + 0.1 * noise(500))
    assert "no fall" in unsure and "a lower learning_rate" in unsure


def test_what_is_not_finite_is_passed_over() -> None:
    meter, losses = LossMeter(), 0.7 + 0.1 * noise(600)
    with_holes = [value for loss in losses for value in (math.nan, float(loss), math.inf)]
    assert len(warnings(meter, with_holes)) == 1
    assert meter.trend.t() == filled(losses, 500).t()


@pytest.mark.parametrize("kept_after", [2, 499, 700])
def test_a_meter_goes_on_where_its_state_was_kept(kept_after: int) -> None:
    losses, unbroken, first, second = 0.7 + 0.1 * noise(1100), LossMeter(), LossMeter(), LossMeter()
    losses[60:120] -= 0.1  # the lowest mean is one from before a kept state
    expected = [(unbroken.after(float(loss)), unbroken.trend.t()) for loss in losses]
    for loss in losses[:kept_after]:
        first.after(float(loss))
    second.restore(json.loads(json.dumps(first.state())))
    found = [(second.after(float(loss)), second.trend.t()) for loss in losses[kept_after:]]
    assert found == expected[kept_after:]
    assert second == unbroken
