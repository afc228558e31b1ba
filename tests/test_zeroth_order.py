"""Gradients from forward passes alone (MATH section 3): formulas, statistics, and what they leave untouched."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from lorica import randomness
from lorica.errors import ModelError
from lorica.models import Base
from lorica.optim.backprop import Estimator, backprop
from lorica.optim.directions import Directions, Distribution, sliced
from lorica.optim.probes import Probe, Probing
from lorica.optim.slopes import SlopesName
from lorica.optim.updates import update_rule
from lorica.optim.zeroth_order import ZerothOrder
from lorica.tasks.batching import Batch, HeadBatch
from lorica.tasks.objectives import LossModule
from lorica.training.fit import Progress, fit
from training_cases import Setup, batch, flat, gradients, halves, setup

# torch's own, when forward-mode differentiation is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

Load = Callable[..., Base]
EPSILON = 1e-2
NOTHING = HeadBatch({"attention_mask": torch.zeros(0)}, torch.zeros(0, dtype=torch.long))
DISTRIBUTIONS: tuple[Distribution, ...] = ("gaussian", "rademacher")


@pytest.fixture
def bert(load: Load) -> Setup:
    return setup(load("bert"))


def drawn(distribution: Distribution, seed: int, step: int, num: int, size: int) -> list[Tensor]:
    draw = randomness.normals if distribution == "gaussian" else randomness.signs
    return [draw(seed, "perturbation", step, direction, size=size) for direction in range(num)]


def loss_moved(setup: Setup, given: Batch, move: Tensor) -> float:
    """The loss of a copy of the model whose parameters were moved by hand."""
    moved = copy.deepcopy(setup.objective)
    with torch.no_grad():
        parts = iter(sliced(move, setup.trainable))
        for name, parameter in moved.model.named_parameters():
            if name in setup.trainable:
                parameter.add_(next(parts))
        return float(moved(given))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num", [1, 3])
def test_spsa_is_the_mean_of_two_point_differences_along_z(bert: Setup, num: int, distribution: Distribution) -> None:
    given = batch(bert.live.model)
    zeroth = ZerothOrder("spsa", EPSILON, Directions(num, distribution, seed=3))
    estimate = zeroth(bert.objective, bert.trainable, [given], 7)
    zs = drawn(distribution, 3, 7, num, len(flat(bert.trainable)))
    losses = [[loss_moved(bert, given, sign * EPSILON * z) for sign in (1, -1)] for z in zs]
    slopes = [(plus - minus) / (2 * EPSILON) for plus, minus in losses]
    must_be(estimate, slopes, [loss for pair in losses for loss in pair], zs, bert, 2 * num)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_one_sided_slopes_leave_their_own_loss_out_of_the_baseline(bert: Setup, distribution: Distribution) -> None:
    given, num = batch(bert.live.model), 4
    zeroth = ZerothOrder("one_sided", EPSILON, Directions(num, distribution, seed=3))
    estimate = zeroth(bert.objective, bert.trainable, [given], 7)
    zs = drawn(distribution, 3, 7, num, len(flat(bert.trainable)))
    losses = [loss_moved(bert, given, EPSILON * z) for z in zs]
    slopes = [(loss - (sum(losses) - loss) / (num - 1)) / EPSILON for loss in losses]
    must_be(estimate, slopes, losses, zs, bert, num)


def must_be(
    estimate: Any, slopes: list[float], losses: list[float], zs: list[Tensor], setup: Setup, num_forwards: int
) -> None:
    assert estimate.projected == pytest.approx(slopes, rel=2e-3, abs=2e-3)
    assert max(map(abs, slopes)) > 0.05, "the loss is flat, so the comparison says nothing"
    assert estimate.weights == pytest.approx([slope / len(zs) for slope in estimate.projected])
    expected = sum((weight * z for weight, z in zip(estimate.weights, zs, strict=True)), torch.zeros(()))
    torch.testing.assert_close(gradients(setup.trainable), expected, rtol=1e-4, atol=1e-6)
    assert estimate.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert (estimate.num_forwards, estimate.num_left_out) == (num_forwards, 0)


@pytest.mark.parametrize("family", ["bert", "opt", "llama", "gpt2"])
def test_a_forward_gradient_is_the_true_directional_derivative(load: Load, family: str) -> None:
    """Under the attention kernel that transformers chooses, whose fused form has no forward mode."""
    ready = setup(load(family, "classification"))
    given = batch(ready.live.model)
    loss = backprop(ready.objective, ready.trainable, [given], 0).loss
    true = gradients(ready.trainable)
    zeroth = ZerothOrder("forward_gradient", directions=Directions(3))
    estimate = zeroth(ready.objective, ready.trainable, halves(given), 0)
    zs = drawn("gaussian", 0, 0, 3, len(true))
    assert estimate.projected == pytest.approx([float(true @ z) for z in zs], rel=1e-4, abs=1e-5)
    assert estimate.loss == pytest.approx(loss, rel=1e-6)
    assert estimate.num_forwards == 2 * 3 * 2, "a pass with its slope costs two, for each direction and batch"


def test_a_kernel_without_forward_mode_is_named(bert: Setup) -> None:
    class Opaque(LossModule):
        def loss_at(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
            raise NotImplementedError("Trying to use forward AD with some_kernel that does not support it\nmore")

    with pytest.raises(ModelError, match=r"some_kernel.*model\.attention=eager"):
        ZerothOrder("forward_gradient")(Opaque(bert.live.model, "classification"), bert.trainable, [NOTHING], 0)


def test_an_estimate_depends_on_seed_and_step_alone(bert: Setup) -> None:
    given = batch(bert.live.model)

    def gradient(seed: int, step: int) -> Tensor:
        ZerothOrder(epsilon=EPSILON, directions=Directions(seed=seed))(bert.objective, bert.trainable, [given], step)
        return gradients(bert.trainable)

    state, first = torch.get_rng_state(), gradient(1, 1)
    others = gradient(1, 2), gradient(2, 1)
    assert torch.equal(gradient(1, 1), first)
    assert not any(torch.equal(other, first) for other in others)
    assert torch.equal(torch.get_rng_state(), state)


ESTIMATORS = [
    backprop,
    ZerothOrder("spsa", EPSILON, Directions(2)),
    ZerothOrder("one_sided", EPSILON, Directions(3)),
    ZerothOrder("forward_gradient", directions=Directions(2)),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["backprop", "spsa", "one_sided", "forward_gradient"])
def test_accumulation_over_parts_is_one_large_batch(bert: Setup, estimator: Estimator) -> None:
    whole = batch(bert.live.model, rows=6)
    results = []
    for batches in ([whole], halves(whole)):
        estimate = estimator(bert.objective, bert.trainable, batches, 0)
        results.append((gradients(bert.trainable), estimate.loss, estimate.num_forwards))
    (once, loss, num_forwards), (parts, loss_of_parts, num_of_parts) = results
    assert tiny.relative(parts, once) < 1e-3
    assert loss == pytest.approx(loss_of_parts, rel=1e-5)
    assert num_of_parts == 2 * num_forwards


def test_a_probe_that_fails_leaves_the_parameters(bert: Setup) -> None:
    before = flat(bert.trainable)
    broken = HeadBatch({"no_such_input": torch.ones(1)}, torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="input_ids"):
        ZerothOrder(epsilon=EPSILON)(bert.objective, bert.trainable, [broken], 0)
    assert torch.equal(flat(bert.trainable), before)


class Quadratic(LossModule):
    """½·xᵀDx with D from 1 to 2: its gradient is D·x."""

    def __init__(self, size: int) -> None:
        nn.Module.__init__(self)
        self.model = nn.Identity()
        self.D = torch.linspace(1, 2, size, dtype=torch.float64)
        self.x = nn.Parameter(torch.ones(size))

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {"x": self.x}

    def loss_at(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return 0.5 * (self.D * parameters["x"].double().square()).sum(dim=-1)


class Exactly(Probing):
    """Probes without a model: the quadratic at each point."""

    def losses(
        self,
        objective: LossModule,
        trainable: Mapping[str, nn.Parameter],
        batches: Sequence[Batch],
        moves: Tensor,
        probes: Sequence[Probe] | None = None,
    ) -> Tensor:
        assert probes is not None
        distances = torch.tensor([[probe.distance] for probe in probes])  # (G, 1)
        points = trainable["x"].detach() + moves[[probe.direction for probe in probes]] * distances  # (G, n)
        return objective.loss_at({"x": points}, batches[0])


def cosines(estimator: SlopesName, num: int, distribution: Distribution, size: int, num_steps: int) -> Tensor:
    quadratic = Quadratic(size)
    zeroth = ZerothOrder(estimator, 1e-3, Directions(num, distribution), probing=Exactly())
    found = []
    for step in range(num_steps):
        zeroth(quadratic, quadratic.trainable, [NOTHING], step)
        assert quadratic.x.grad is not None
        found.append(torch.cosine_similarity(quadratic.x.grad.double(), quadratic.D, dim=0))
    return torch.stack(found)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("estimator", "num"),
    [
        *[("spsa", 1), ("spsa", 4), ("spsa", 16), ("spsa", 100)],
        *[("one_sided", 2), ("one_sided", 8), ("one_sided", 32)],
    ],
)
def test_estimates_point_along_the_gradient_as_far_as_theory_says(
    estimator: SlopesName, num: int, distribution: Distribution
) -> None:
    """cos² of a mean of K slopes times directions is Beta(K/2, (d−1)/2) distributed for Gaussian z.

    The part of Σ g_i·z_i along ∇ is |g|²/‖∇‖, the rest is |g| times a Gaussian in d−1 dimensions. A baseline costs one
    degree of freedom, so one-sided K count as K−1, each for one forward instead of two.
    """
    d, K = 100, num - 1 if estimator == "one_sided" else num
    cosine = cosines(estimator, num, distribution, d, num_steps=max(40, 3000 // num))
    log_mean = sum(math.lgamma(x) for x in ((K + 1) / 2, (K + d - 1) / 2))
    log_mean -= sum(math.lgamma(x) for x in (K / 2, (K + d) / 2))
    assert float(cosine.abs().mean()) == pytest.approx(math.exp(log_mean), rel=0.05)
    if K > 1:  # one direction's cos² is too spread out to be told so closely
        assert float(cosine.square().mean()) == pytest.approx(K / (K + d - 1), rel=0.05)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_on_a_quadratic_a_forward_gradient_is_the_two_sided_one(distribution: Distribution) -> None:
    """Two-sided differences are exact there, so the statistics above are its own too."""
    quadratic = Quadratic(100)
    for step in range(5):
        weights = [
            ZerothOrder(name, 1e-2, Directions(8, distribution), probing=Exactly())(
                quadratic, quadratic.trainable, [NOTHING], step
            ).weights
            for name in ("spsa", "forward_gradient")
        ]
        assert weights[0] == pytest.approx(weights[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_root_mean_square_cosine_grows_as_the_root_of_the_directions(distribution: Distribution) -> None:
    one, sixteen = (cosines("spsa", num, distribution, 1000, 3000 // num) for num in (1, 16))
    ratio = float((sixteen.square().mean() / one.square().mean()).sqrt())
    assert ratio == pytest.approx(4.0, rel=0.05)


class Bad(Exactly):
    """Probes whose losses at these places are not finite."""

    def __init__(self, bad: Mapping[int, float]) -> None:
        super().__init__()
        self.bad = bad

    def losses(self, *given: Any) -> Tensor:
        found = super().losses(*given)
        for place, value in self.bad.items():
            found[place] = value
        return found


@pytest.mark.parametrize(
    ("estimator", "bad", "out"),
    [
        ("spsa", {3: math.inf}, [1]),
        ("spsa", {0: math.nan, 5: math.inf}, [0, 2]),
        ("spsa", {4: math.inf, 5: math.inf}, [2]),
        ("one_sided", {1: -math.inf}, [1]),
    ],
)
def test_a_direction_without_a_finite_loss_is_left_out(
    estimator: SlopesName, bad: dict[int, float], out: list[int]
) -> None:
    quadratic, num = Quadratic(20), 4
    zeroth = ZerothOrder(estimator, EPSILON, Directions(num), probing=Bad(bad))
    estimate = zeroth(quadratic, quadratic.trainable, [NOTHING], 0)
    kept = [index for index in range(num) if index not in out]
    zs = drawn("gaussian", 0, 0, num, 20)
    slopes = [estimate.projected[index] for index in kept]
    expected = sum((slope * zs[index] for slope, index in zip(slopes, kept, strict=True)), torch.zeros(20)) / len(kept)
    torch.testing.assert_close(quadratic.x.grad, expected)
    assert [estimate.weights[index] for index in out] == [0.0] * len(out)
    assert math.isfinite(estimate.loss)
    assert estimate.num_left_out == len(out)
    if estimator == "one_sided":  # the baselines are those of the directions that are left
        assert sum(slopes) == pytest.approx(0.0, abs=1e-6 * max(map(abs, slopes)))


@pytest.mark.parametrize(("estimator", "num_bad"), [("spsa", 4), ("one_sided", 3), ("one_sided", 4)])
def test_a_step_without_a_usable_direction_is_not_applied(estimator: SlopesName, num_bad: int) -> None:
    quadratic, progress = Quadratic(20), Progress()
    places = range(0, 8, 2) if estimator == "spsa" else range(num_bad)
    zeroth = ZerothOrder(estimator, EPSILON, Directions(4), probing=Bad(dict.fromkeys(places, math.nan)))
    steps: list[Any] = []
    fit(
        quadratic,
        quadratic.trainable,
        iter([NOTHING] * 3),
        estimator=zeroth,
        optimizer=update_rule("momentum", [quadratic.x], learning_rate=0.1),
        learning_rate=lambda step: 0.1,
        num_steps=3,
        progress=progress,
        on_step=steps.append,
    )
    assert torch.equal(quadratic.x, torch.ones(20))
    assert [(step.applied, step.num_left_out) for step in steps] == [(False, 4)] * 3
    assert (progress.num_bad, progress.num_left_out) == (3, 12)
