"""When a round ends: scripted losses through every branch of the rules."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from lorica import config
from lorica.config import TrainConfig
from lorica.errors import ConfigError
from lorica.training.fit import MAX_STEPS, Step
from lorica.training.rounds import Adaptive, EverySteps, Smoothed, Verdict, round_rule


def step(number: int, loss: float, applied: bool = True) -> Step:
    return Step(number, loss, 1e-3, number, number, 0.0, applied)


def rule(**given: object) -> EverySteps | Adaptive:
    options = {"steps_per_iteration": None, "use_adaptive_merge": False, "merge_frequency": None, **given}
    return round_rule(steps_per_epoch=7, adaptive=Adaptive(), **options)  # type: ignore[arg-type]


def test_there_is_one_precedence_steps_adaptive_epochs() -> None:
    assert rule(steps_per_iteration=5, use_adaptive_merge=True, merge_frequency=2) == EverySteps(5)
    assert rule(use_adaptive_merge=True, merge_frequency=2) == Adaptive()
    assert rule(merge_frequency=2) == EverySteps(14, name="epochs")
    assert rule() == EverySteps(7, name="epochs")


def test_a_merge_frequency_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="merge_frequency=0"):
        config.read(TrainConfig, ["--xgblora", "--xgblora_merge_frequency", "0"])


def test_boosting_keys_without_boosting_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not boost"):
        config.read(TrainConfig, ["boosting.patience=3"])
    with pytest.raises(ConfigError, match="contradict"):
        config.read(TrainConfig, ["--xgblora", "--lora"])


def test_xgblora_sets_rank_1_and_scale_1() -> None:
    adapter = config.read(TrainConfig, ["--xgblora"]).resolved().adapter
    assert (adapter.rank, adapter.alpha) == (1, 1.0)


def test_a_scripted_run_through_improve_stall_patience_and_the_end() -> None:
    adaptive = Adaptive(patience=3, beta=0.5, threshold=0.1)
    adaptive.begin(0)
    script = [
        (4.0, Verdict(is_best=True), Smoothed(4.0, 4.0, 0)),  # the first raw loss starts the smoothing
        (2.0, Verdict(is_best=True), Smoothed(3.0, 3.0, 0)),
        (2.9, Verdict(), Smoothed(2.95, 3.0, 1)),  # better, but by less than the threshold
        (2.0, Verdict(is_best=True), Smoothed(2.475, 2.475, 0)),
        (3.0, Verdict(), Smoothed(2.7375, 2.475, 1)),
        (3.0, Verdict(), Smoothed(2.86875, 2.475, 2)),
        (3.0, Verdict(reason="patience"), Smoothed(2.934375, 2.475, 3)),
    ]
    for number, (loss, verdict, after) in enumerate(script, 1):
        assert adaptive.after(step(number, loss)) == verdict
        assert adaptive.smoothed == after
    assert adaptive.rolls_back("patience") and adaptive.rolls_back(MAX_STEPS)
    adaptive.begin(7)
    assert adaptive.smoothed == Smoothed(None, math.inf, 0)


def test_the_best_of_the_run_carries_over_where_asked() -> None:
    adaptive = Adaptive(patience=2, beta=0.0, threshold=0.0, best_scope="run")
    adaptive.begin(0)
    adaptive.after(step(1, 1.0))
    adaptive.begin(1)
    assert adaptive.after(step(2, 1.5)) == Verdict() and adaptive.smoothed.best == 1.0


def test_patience_zero_ends_at_the_last_step_alone() -> None:
    adaptive = Adaptive(patience=0)
    adaptive.begin(0)
    assert all(adaptive.after(step(n, 1.0)).reason is None for n in range(1, 500))


def test_beta_zero_is_the_raw_loss() -> None:
    adaptive = Adaptive(beta=0.0)
    adaptive.begin(0)
    for number, loss in enumerate((3.0, 1.0, 2.0), 1):
        adaptive.after(step(number, loss))
        assert adaptive.smoothed.loss == loss


def test_a_step_that_was_not_applied_is_no_evidence() -> None:
    adaptive = Adaptive(patience=1)
    adaptive.begin(0)
    adaptive.after(step(1, 1.0))
    before = adaptive.state()
    assert adaptive.after(step(2, float("nan"), applied=False)) == Verdict() and adaptive.state() == before


def test_rolling_back_on_patience_alone_keeps_the_last_booster_at_the_end() -> None:
    assert not Adaptive(roll_back_on_patience_alone=True).rolls_back(MAX_STEPS)
    assert not EverySteps(3).rolls_back("steps")


def test_a_rules_state_survives_json() -> None:
    for one, other in ((Adaptive(), Adaptive()), (EverySteps(4), EverySteps(4))):
        one.begin(3)
        other.restore(json.loads(json.dumps(one.state())))
        assert other == one
        one.after(step(4, 0.5))
        other.restore(json.loads(json.dumps(one.state())))
        assert other == one


def ends(losses: np.ndarray, adaptive: Adaptive) -> tuple[list[int], int]:
    """(steps at which rounds ended, number of improvements after the first 50 steps of a round)"""
    ended, improvements, begun = [], 0, 0
    adaptive.begin(0)
    for number, loss in enumerate(losses, 1):
        verdict = adaptive.after(step(number, float(loss)))
        improvements += verdict.is_best and number - begun > 50
        if verdict.reason:
            ended.append(number)
            begun = number
            adaptive.begin(number)
    return ended, improvements


@pytest.mark.parametrize("seed", range(5))
def test_noise_about_a_constant_loss_is_not_progress(seed: int) -> None:
    """Every round ends by patience soon; a running mean, which falls like 1/t, would go on for ever."""
    losses = 1.0 + 0.2 * np.random.default_rng(seed).standard_normal(2000)
    ended, improvements = ends(losses, Adaptive())
    assert len(ended) >= 2000 / 300
    assert improvements <= 2 * len(ended)


@pytest.mark.parametrize("seed", range(5))
def test_a_falling_loss_is_not_cut_every_patience_steps(seed: int) -> None:
    losses = np.linspace(2.5, 0.5, 2000) + 0.1 * np.random.default_rng(seed).standard_normal(2000)
    ended, _ = ends(losses, Adaptive())
    assert len(ended) <= 2
