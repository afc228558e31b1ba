"""Schedules, update rules and the two ways to a gradient (MATH section 3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import tiny
from lorica import models, randomness
from lorica.adapters import injection
from lorica.adapters.injection import Live
from lorica.models import Base
from lorica.optim.backprop import Estimator, backprop
from lorica.optim.schedules import multiplier
from lorica.optim.updates import set_learning_rate, update_rule
from lorica.optim.zeroth_order import Spsa, sliced
from lorica.tasks.batching import Batch, HeadBatch
from lorica.tasks.objectives import LossModule

Load = Callable[..., Base]
EPSILON = 1e-2
SIGNS = "-+-+--+++----+-+--++-+--+-------"  # of seed 0, name a: from the bits of Philox, so a constant of the format


@dataclass(frozen=True)
class Setup:
    """A tiny encoder with an adapter and a head to train."""

    objective: LossModule
    live: Live

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.live.trainable()


def setup(base: Base) -> Setup:
    adapter = tiny.adapter(base.model, models.target_modules(base, "standard"), heads=base.heads)
    return Setup(LossModule(base.model, "classification"), injection.inject(base.model, adapter))


@pytest.fixture
def bert(load: Load) -> Setup:
    return setup(load("bert"))


def batch(model: nn.Module, rows: int = 4, seed: int = 0) -> HeadBatch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(tiny.NUM_LABELS, (rows,), generator=generator)
    return HeadBatch(tiny.inputs(model, rows=rows, seed=seed), labels)


def halves(whole: HeadBatch) -> list[Batch]:
    parts = [{name: value.chunk(2)[at] for name, value in whole.inputs.items()} for at in (0, 1)]
    return [HeadBatch(part, labels) for part, labels in zip(parts, whole.labels.chunk(2), strict=True)]


def gradients(trainable: dict[str, nn.Parameter]) -> Tensor:
    """Every gradient in one flat vector."""
    found = [parameter.grad for parameter in trainable.values()]
    return torch.cat([each.flatten() for each in found if each is not None])


def flat(trainable: dict[str, nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in trainable.values()])


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
    assert (estimate.num_forwards, estimate.projected) == (1, ())


def _loss_moved(setup: Setup, given: Batch, z: Tensor, step: float) -> float:
    """The loss of a copy of the model whose parameters were moved by hand."""
    moved = copy.deepcopy(setup.objective)
    with torch.no_grad():
        parts = iter(sliced(z, setup.trainable))
        for name, parameter in moved.model.named_parameters():
            if name in setup.trainable:
                parameter.add_(next(parts), alpha=step)
        return float(moved(given))


@pytest.mark.parametrize("num_directions", [1, 3])
def test_spsa_is_the_mean_of_two_point_differences_along_z(bert: Setup, num_directions: int) -> None:
    given, size = batch(bert.live.model), sum(parameter.numel() for parameter in bert.trainable.values())
    estimate = Spsa(EPSILON, num_directions, seed=3)(bert.objective, bert.trainable, [given], 7)
    expected, losses = torch.zeros(size), []
    for direction in range(num_directions):
        z = randomness.normals(3, "perturbation", 7, direction, size=size)
        plus, minus = (_loss_moved(bert, given, z, step) for step in (EPSILON, -EPSILON))
        losses += [plus, minus]
        assert estimate.projected[direction] == pytest.approx((plus - minus) / (2 * EPSILON), rel=1e-3, abs=1e-3)
        expected += z * estimate.projected[direction] / num_directions
    torch.testing.assert_close(gradients(bert.trainable), expected, rtol=1e-4, atol=1e-6)
    assert max(map(abs, estimate.projected)) > 0.05, "the loss is flat, so the comparison says nothing"
    assert estimate.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert (estimate.num_forwards, len(estimate.projected)) == (2 * num_directions, num_directions)


def test_spsa_agrees_with_the_true_directional_derivative(bert: Setup) -> None:
    given = batch(bert.live.model)
    backprop(bert.objective, bert.trainable, [given], 0)
    true = gradients(bert.trainable)
    estimate = Spsa(1e-3, num_directions=8)(bert.objective, bert.trainable, [given], 0)
    zs = [randomness.normals(0, "perturbation", 0, direction, size=len(true)) for direction in range(8)]
    assert estimate.projected == pytest.approx([float(true @ z) for z in zs], rel=0.02, abs=0.02)


def test_spsa_depends_on_seed_and_step_alone(bert: Setup) -> None:
    given = batch(bert.live.model)

    def gradient(seed: int, step: int) -> Tensor:
        Spsa(EPSILON, seed=seed)(bert.objective, bert.trainable, [given], step)
        return gradients(bert.trainable)

    state, first = torch.get_rng_state(), gradient(1, 1)
    others = gradient(1, 2), gradient(2, 1)
    assert torch.equal(gradient(1, 1), first)
    assert not any(torch.equal(other, first) for other in others)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_five_hundred_spsa_steps_at_rate_zero_change_no_bit(load: Load, dtype: str) -> None:
    ready = setup(load("bert", dtype=dtype))
    given = batch(ready.live.model, rows=1)
    optimizer = update_rule("sgd", ready.trainable.values(), learning_rate=0.0)
    before = {name: value.clone() for name, value in ready.live.model.state_dict().items()}
    spsa, projected = Spsa(EPSILON), set()
    for step in range(500):
        projected.add(spsa(ready.objective, ready.trainable, [given], step).projected)
        optimizer.step()
    assert len(projected) > 450, "the probes hardly moved the loss, so that nothing changed says nothing"
    for name, value in ready.live.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_probe_that_fails_leaves_the_parameters(bert: Setup) -> None:
    before = flat(bert.trainable)
    broken = HeadBatch({"no_such_input": torch.ones(1)}, torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="input_ids"):
        Spsa(EPSILON)(bert.objective, bert.trainable, [broken], 0)
    assert torch.equal(flat(bert.trainable), before)


class Quadratic(LossModule):
    """½·xᵀDx with D from 1 to 2: its gradient is D·x."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def loss_at(self, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
        x = parameters["x"].double()
        return 0.5 * (torch.linspace(1, 2, len(x)).double() * x.square()).sum()


@pytest.mark.parametrize("num_directions", [1, 16, 100])
def test_spsa_points_along_the_gradient_as_far_as_theory_says(num_directions: int) -> None:
    """E cos = sqrt(2/πd) for one direction, about sqrt(K / (K + d + 1)) for K of them."""
    d, num_steps = 100, 2_000 // num_directions
    x = nn.Parameter(torch.ones(d))
    true = torch.linspace(1, 2, d)
    cosines = []
    for step in range(num_steps):
        Spsa(EPSILON, num_directions)(Quadratic(), {"x": x}, [batch_of_nothing()], step)
        assert x.grad is not None
        cosines.append(float(torch.cosine_similarity(x.grad, true, dim=0)))
    K = num_directions
    expected = math.sqrt(2 / (math.pi * d)) if K == 1 else math.sqrt(K / (K + d + 1))
    assert sum(cosines) / num_steps == pytest.approx(expected, rel=0.08)


def batch_of_nothing() -> HeadBatch:
    return HeadBatch({}, torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("estimator", [backprop, Spsa(EPSILON, num_directions=2)], ids=["backprop", "spsa"])
def test_accumulation_over_parts_is_one_large_batch(bert: Setup, estimator: Estimator) -> None:
    whole = batch(bert.live.model, rows=6)
    results = [estimate_of(bert, estimator, batches) for batches in ([whole], halves(whole))]
    (once, loss), (parts, loss_of_parts) = results
    assert tiny.relative(parts, once) < 1e-3
    assert loss == pytest.approx(loss_of_parts, rel=1e-5)


def estimate_of(setup: Setup, estimator: Estimator, batches: Sequence[Batch]) -> tuple[Tensor, float]:
    estimate = estimator(setup.objective, setup.trainable, batches, 0)
    return gradients(setup.trainable), estimate.loss


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
