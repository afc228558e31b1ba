"""Schedules, update rules, backprop, and random draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorica import randomness
from lorica.models import Base
from lorica.optim.backprop import backprop
from lorica.optim.schedules import multiplier
from lorica.optim.updates import set_learning_rate, update_rule
from training_cases import Setup, batch, setup

Load = Callable[..., Base]
SIGNS = "-+-+--+++----+-+--++-+--+-------"  # of seed 0, name a: from the bits of Philox, so a constant of the format


@pytest.fixture
def bert(load: Load) -> Setup:
    return setup(load("bert"))


def test_constant_linear_and_cosine_without_warmup() -> None:
    assert [multiplier("constant", step, 4) for step in range(4)] == [1.0] * 4
    assert [multiplier("linear", step, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    expected = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    assert [multiplier("cosine", step, 4) for step in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "rise"), [(0.4, 4), (4, 4), (0.31, 4), (0, 0), (1, 1)])
def test_warmup_rises_in_a_line_to_one(schedule: str, warmup: float, rise: int) -> None:
    values = [multiplier(schedule, step, 10, warmup) for step in range(10)]  # type: ignore[arg-type]
    assert values[:rise] == pytest.approx([(step + 1) / rise for step in range(rise)])
    assert values[rise] == 1.0
    assert values[rise:] == sorted(values[rise:], reverse=True)
    assert all(0.0 < value <= 1.0 for value in values)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_schedule_ends_and_stays_there(schedule: str) -> None:
    last = 1.0 if schedule == "constant" else 0.0
    assert [multiplier(schedule, step, 4, 1) for step in (4, 5, 100)] == pytest.approx([last] * 3)  # type: ignore[arg-type]
    assert multiplier(schedule, 0, 1, 1) == 1.0  # type: ignore[arg-type]


def test_update_rules_are_their_formulas() -> None:
    start, gradient = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
    sgd = _after("sgd", start, gradient, num_steps=1)
    torch.testing.assert_close(sgd, start - 0.1 * (gradient + 0.01 * start))
    adamw = _after("adamw", start, gradient, num_steps=1)
    torch.testing.assert_close(adamw, start * (1 - 0.1 * 0.01) - 0.1 * gradient.sign())
    first = gradient + 0.01 * start
    once = start - 0.1 * first
    second = 0.9 * first + gradient + 0.01 * once
    torch.testing.assert_close(_after("momentum", start, gradient, num_steps=2), once - 0.1 * second)


def _after(name: str, start: Tensor, gradient: Tensor, num_steps: int) -> Tensor:
    parameter = nn.Parameter(start.clone())
    optimizer = update_rule(name, [parameter], learning_rate=9.0, weight_decay=0.01)  # type: ignore[arg-type]
    set_learning_rate(optimizer, 0.1)
    for _ in range(num_steps):
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_backprop_is_autograd(bert: Setup) -> None:
    given = batch(bert.live.model)
    loss = bert.objective(given)
    expected = torch.autograd.grad(loss, list(bert.trainable.values()))
    for _ in range(2):  # a gradient left by the step before is not added to
        estimate = backprop(bert.objective, bert.trainable, [given], 0)
    for parameter, gradient in zip(bert.trainable.values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert estimate.loss == pytest.approx(float(loss.detach()))
    assert (estimate.num_forwards, estimate.projected, estimate.weights, estimate.num_left_out) == (1, (), (), 0)


draws = pytest.mark.parametrize("draw", [randomness.normals, randomness.signs])


@draws
def test_a_draw_depends_on_its_key_alone(draw: Callable[..., Tensor]) -> None:
    keys = [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0)]
    forwards = [draw(*key, size=100) for key in keys]
    torch.rand(3)
    backwards = [draw(*key, size=100) for key in reversed(keys)][::-1]
    assert all(torch.equal(one, other) for one, other in zip(forwards, backwards, strict=True))
    assert len({tuple(each.tolist()) for each in forwards}) == len(keys)


@draws
def test_a_draw_touches_no_global_generator(draw: Callable[..., Tensor]) -> None:
    state = torch.get_rng_state()
    draw(0, "a", size=10)
    assert torch.equal(torch.get_rng_state(), state)


@draws
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_a_draw_has_the_size_asked_for(draw: Callable[..., Tensor], size: int) -> None:
    found = draw(0, "a", size=size)
    assert found.shape == (size,)
    assert found.dtype == torch.float32


def test_draws_have_mean_zero_and_variance_one() -> None:
    for found in (randomness.normals(0, "a", size=100_000), randomness.signs(0, "a", size=100_000)):
        assert float(found.mean()) == pytest.approx(0.0, abs=0.015)
        assert float(found.var()) == pytest.approx(1.0, abs=0.02)
    assert set(randomness.signs(0, "a", size=1000).tolist()) == {-1.0, 1.0}
    assert float(randomness.normals(0, "a", size=100_000).pow(4).mean()) == pytest.approx(3.0, abs=0.15)


def test_signs_are_the_same_on_every_platform() -> None:
    assert "".join("+" if sign > 0 else "-" for sign in randomness.signs(0, "a", size=32)) == SIGNS


def test_names_do_not_run_together() -> None:
    assert len({randomness.key(0, "ab"), randomness.key(0, "a", "b"), randomness.key(0, "b", "a")}) == 3
