"""Zeroth-order steps: scaling of slopes, units of the weights' change, metrics, and a rate of zero (MATH section 3)."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.adapters.injection import Live
from lorica.evaluation import metrics
from lorica.optim.coordinates import update_scales
from lorica.optim.directions import Directions, flat_size
from lorica.optim.probes import Probing
from lorica.optim.scaling import RMS_BETA, Normalize, Scaling
from lorica.optim.slopes import SlopesName
from lorica.optim.updates import RuleName, update_rule
from lorica.optim.zeroth_order import ZerothOrder
from lorica.planning import peak_bytes
from lorica.tasks.batching import HeadBatch
from lorica.tasks.objectives import LossModule, shortfall

# torch's own, when forward-mode differentiation is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

WIDTH, CLASSES, ROWS = 6, 3, 8
NO_LOSSES = [0.0, 0.0]


class Classifier(nn.Module):
    """Two linear modules over given features: the smallest base that carries an adapter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.score = nn.Linear(WIDTH, CLASSES)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, features: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = self.body(features.to(self.body.weight.dtype)).tanh()
        return SimpleNamespace(logits=self.score(hidden.to(self.score.weight.dtype)))


def given() -> HeadBatch:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(ROWS, WIDTH, generator=generator)
    return HeadBatch({"features": features, "attention_mask": torch.ones(ROWS, 1)}, torch.arange(ROWS) % CLASSES)


def laid_on(model: nn.Module, *, rank: int = 2, alpha: float = 2.0, stretch: float = 1.0) -> tuple[Live, Adapter]:
    """A live adapter whose B is zero and whose A is a fixed draw times `stretch`."""
    start = injection.create(model, ["body"], rank=rank, alpha=alpha)
    stretched = {path: LowRank(update.A * stretch, update.B, update.scale) for path, update in start.updates.items()}
    adapter = Adapter(stretched)
    return injection.inject(model, adapter), adapter


def test_a_slope_is_clipped_at_a_multiple_of_the_median_magnitude() -> None:
    scaling, history = Scaling(clip=3.0), np.random.default_rng(0).standard_normal(150)
    for value in history:
        scaling([float(value)], NO_LOSSES, 1.0)
    limit = 3.0 * float(np.median(np.abs(history[-100:])))
    found = scaling([1e6, -1e6, limit / 2], NO_LOSSES, 1.0)
    assert found == pytest.approx([limit, -limit, limit / 2])


def test_clipping_waits_for_a_history_and_heeds_no_zeros() -> None:
    scaling = Scaling(clip=1.0)
    for _ in range(19):
        scaling([0.0, 1.0, 0.0], NO_LOSSES, 1.0)
    assert scaling([50.0], NO_LOSSES, 1.0) == [50.0]
    assert scaling([50.0], NO_LOSSES, 1.0) == [1.0], "the median of twenty slopes, zeros left out"


def test_rms_divides_by_the_running_root_mean_square() -> None:
    scaling, history = Scaling("rms"), np.random.default_rng(0).standard_normal((40, 3))
    for step, values in enumerate(history, 1):
        found = scaling(values.tolist(), NO_LOSSES, 1.0)
        weights = RMS_BETA ** np.arange(step - 1, -1, -1)
        rms = math.sqrt(float(weights @ (history[:step] ** 2).mean(axis=1) / weights.sum()))
        assert found == pytest.approx((values / rms).tolist())


def test_std_divides_by_the_spread_of_the_losses_over_epsilon() -> None:
    losses = [0.3, 0.5, 0.8]
    found = Scaling("std")([1.0, -2.0], losses, 0.1)
    assert found == pytest.approx([value / (np.std([0.3, 0.5, 0.8], ddof=1) / 0.1) for value in (1.0, -2.0)])
    assert Scaling("std")([0.0], [0.7, 0.7], 0.1) == [0.0], "a flat loss divides by nothing"


@pytest.mark.parametrize("normalize", ["none", "std", "rms"])
def test_a_scaling_goes_on_where_its_state_was_kept(normalize: Normalize) -> None:
    values = np.random.default_rng(0).standard_normal((60, 2)).tolist()
    unbroken, first, second = (Scaling(normalize, clip=1.5) for _ in range(3))
    expected = [unbroken(row, row, 0.1) for row in values]
    for row in values[:30]:
        first(row, row, 0.1)
    second.restore(json.loads(json.dumps(first.state())))
    found = [second(row, row, 0.1) for row in values[30:]]
    assert found == expected[30:]


def changes(
    *, alpha: float, stretch: float, factors: str, rule: RuleName, estimator: SlopesName, space: str
) -> list[Tensor]:
    """ΔW after each of twelve steps."""
    live, start = laid_on(Classifier(), alpha=alpha, stretch=stretch)
    live.train_only(factors)
    trainable, found = live.trainable(), []
    scales = update_scales(start, trainable) if space == "update" else None
    zeroth = ZerothOrder(estimator, 2.0**-5, Directions(3), Scaling("rms", clip=3.0), scales, Probing(1))
    optimizer = update_rule(rule, trainable.values(), learning_rate=2.0**-4, weight_decay=2.0**-3)
    objective = LossModule(live.model, "classification")
    for step in range(12):
        zeroth(objective, trainable, [given()], step)
        optimizer.step()
        found.append(injection.extract(live).updates["body"].dense())
    return found


@pytest.mark.parametrize("estimator", ["spsa", "one_sided", "forward_gradient"])
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
@pytest.mark.parametrize("factors", ["both", "B"])
def test_in_update_space_neither_alpha_nor_the_init_scale_plays_a_part(
    factors: str, rule: RuleName, estimator: SlopesName
) -> None:
    """Factors of 2 change no rounding, so the runs agree bit for bit."""
    kind = {"factors": factors, "rule": rule, "estimator": estimator}
    plain, *others = (
        changes(alpha=alpha, stretch=stretch, space="update", **kind)  # type: ignore[arg-type]
        for alpha, stretch in ((2.0, 1.0), (32.0, 1.0), (2.0, 0.25), (32.0, 4.0))
    )
    assert float(plain[-1].norm()) > 0.1, "nothing moved, so that all agree says nothing"
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))
    small, large = (changes(alpha=alpha, stretch=1.0, space="parameter", **kind) for alpha in (2.0, 32.0))  # type: ignore[arg-type]
    assert not torch.allclose(small[0], large[0], rtol=0.5), "in the parameters' own units alpha does play a part"


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("alpha", [1.0, 16.0])
def test_epsilon_is_the_root_mean_square_of_a_move_of_the_weights(rank: int, alpha: float) -> None:
    live, start = laid_on(Classifier(), rank=rank, alpha=alpha)
    live.train_only("B")
    scales, squares = update_scales(start, live.trainable()), []
    for step in range(400):
        B = (scales * Directions()(step, WIDTH * rank)[0]).view(WIDTH, rank)
        squares.append(LowRank(start.updates["body"].A, B, start.updates["body"].scale).dense().square().mean())
    assert float(torch.stack(squares).mean().sqrt()) == pytest.approx(1.0, rel=0.05)


def test_heads_keep_their_own_units() -> None:
    model = Classifier()
    adapter = injection.create(model, ["body"], rank=2, alpha=2, heads=["score"])
    live = injection.inject(model, adapter)
    scales = update_scales(adapter, live.trainable())
    assert len(scales) == sum(parameter.numel() for parameter in live.trainable().values())
    assert (scales == 1.0).sum() == (WIDTH + 1) * CLASSES


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_a_metric_falls_short_of_one_by_what_the_evaluation_says(metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(3, 12, CLASSES, generator=generator)  # (branches, b, options)
    labels = torch.randint(2, (12,), generator=generator)  # one class occurs only where it is predicted
    expected = []
    for branch in found:
        cells = labels.numpy() * CLASSES + branch.argmax(dim=1).numpy()
        confusion = np.bincount(cells, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
        expected.append(1 - float(metrics.METRICS[metric](confusion)))
    assert shortfall(found, labels, metric).tolist() == pytest.approx(expected)  # type: ignore[arg-type]
    assert len(set(expected)) > 1


def test_accuracy_alone_is_something_to_train_for() -> None:
    live, _ = laid_on(Classifier(), rank=4, alpha=4)
    objective, trainable = LossModule(live.model, "classification", "accuracy"), live.trainable()
    zeroth = ZerothOrder("spsa", 0.3, Directions(8))
    optimizer = update_rule("sgd", trainable.values(), learning_rate=0.3)
    before = float(objective(given()))
    for step in range(60):
        zeroth(objective, trainable, [given()], step)
        optimizer.step()
    assert float(objective(given())) <= before - 2 / ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("estimator", "num_steps"), [("spsa", 2000), ("one_sided", 200), ("forward_gradient", 50)])
def test_thousands_of_steps_at_rate_zero_change_no_bit(
    estimator: SlopesName, num_steps: int, dtype: torch.dtype
) -> None:
    live, start = laid_on(Classifier().to(dtype))
    with torch.no_grad():
        live.layers["body"].B.normal_(generator=torch.Generator().manual_seed(2))
    objective, trainable, batch, projected = LossModule(live.model, "classification"), live.trainable(), given(), set()
    zeroth = ZerothOrder(estimator, 0.05, Directions(2), Scaling("rms", clip=3.0), update_scales(start, trainable))
    optimizer = update_rule("sgd", trainable.values(), learning_rate=0.0)
    before = {name: value.clone() for name, value in live.model.state_dict().items()}
    for step in range(num_steps):
        projected.add(zeroth(objective, trainable, [batch], step).projected)
        optimizer.step()
    assert len(projected) > 0.9 * num_steps, "the probes hardly moved the loss, so that nothing changed says nothing"
    for name, value in live.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("estimator", ["spsa", "one_sided", "forward_gradient"])
def test_a_direction_is_held_once(estimator: SlopesName) -> None:
    """The points along it are made when they are asked for, and dropped."""
    wide = LowRank(torch.ones(400, WIDTH), torch.zeros(WIDTH, 400), 1.0)  # so that activations are few beside it
    live = injection.inject(Classifier(), Adapter({"body": wide}))
    objective, trainable = LossModule(live.model, "classification"), live.trainable()

    def peak(num: int) -> int:
        zeroth = ZerothOrder(estimator, directions=Directions(num), probing=Probing(1))
        zeroth(objective, trainable, [given()], 0)
        return peak_bytes(lambda: zeroth(objective, trainable, [given()], 1))

    one = 4 * flat_size(trainable)
    assert peak(20) - peak(4) == pytest.approx(16 * one, rel=0.05)
    assert peak(4) < 9 * one, "four directions, the parameters, a point, the gradients of two steps"
