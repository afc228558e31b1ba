"""Zeroth order of a whole model: what a probe sees, what it leaves, what a step does, what it all holds in memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from lorica import randomness
from lorica.errors import ModelError
from lorica.models import Base
from lorica.optim import streamed
from lorica.optim.directions import Directions, Distribution
from lorica.optim.probes import Probe
from lorica.optim.scaling import Scaling
from lorica.optim.slopes import SlopesName
from lorica.optim.streamed import Moved, Streamed, StreamedDescent, StreamedZerothOrder
from lorica.planning import peak_bytes
from lorica.processes import ALONE
from lorica.tasks.batching import Batch, ChoiceBatch
from lorica.tasks.objectives import LossModule
from test_zeroth_order_steps import Classifier, given
from training_cases import batch, halves

Load = Callable[..., Base]
EPSILON = 1e-2
DISTRIBUTIONS: tuple[Distribution, ...] = ("rademacher", "gaussian")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's matrices are to come in several parts too."""
    monkeypatch.setitem(streamed.CHUNK, "cpu", 300)


def direction(parameter: Tensor, directions: Directions, step: int, index: int, name: str) -> Tensor:
    """All of a direction's part of one parameter, drawn in one piece."""
    num_rows = 1 if parameter.dim() < 2 else len(parameter)
    drawn = directions.of_rows(step, index, name, range(num_rows), parameter.numel() // num_rows)
    return drawn.view(parameter.shape)


def moved_copy(model: nn.Module, directions: Directions, step: int, probe: Probe) -> Any:
    """A float64 copy of the model with θ + distance · z written into it."""
    made = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(direction(parameter, directions, step, probe.direction, name).double(), alpha=probe.distance)
    return made


def choices(model: Any, *, one_token: bool) -> ChoiceBatch:
    """A batch for a language model: three prompts, two options."""
    inputs = tiny.inputs(model)
    inputs["position_ids"] = torch.arange(7).expand(3, -1)
    targets = torch.tensor([[5, 9], [9, 5], [7, 8]]) if one_token else torch.arange(12).view(6, 2) + 4
    if one_token:
        return ChoiceBatch(inputs, targets, torch.tensor([0, 1, 1]), 2, one_token=True)
    repeated = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    return ChoiceBatch(repeated, targets, torch.tensor([0, 1, 1]), 2, one_token=False)


def case(base: Base) -> tuple[LossModule, Batch]:
    if base.kind == "classification":
        return LossModule(base.model, "classification"), batch(base.model)
    if base.kind == "seq2seq":
        inputs = tiny.inputs(base.model)
        made = ChoiceBatch(inputs, inputs["decoder_input_ids"], torch.tensor([0, 0, 0]), 1, one_token=False)
        return LossModule(base.model, "lm"), made
    return LossModule(base.model, "classification"), choices(base.model, one_token=False)


@pytest.mark.parametrize(
    ("family", "distribution"), [*((family, "rademacher") for family in (*tiny.FAMILIES, "bart")), ("opt", "gaussian")]
)
def test_a_probe_has_the_loss_of_a_model_that_was_moved(load: Load, family: str, distribution: Distribution) -> None:
    base = load(family)
    objective, one = case(base)
    directions, probes = Directions(2, distribution, seed=3), [Probe(0, EPSILON), Probe(1, -EPSILON), Probe(1, 0.0)]
    trainable = dict(base.model.named_parameters())
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    found = Streamed(objective, trainable, [one], directions, 7, ALONE).losses(probes)
    for loss, probe in zip(found, probes, strict=True):
        reference = LossModule(moved_copy(base.model, directions, 7, probe), objective.train_as)
        assert loss == pytest.approx(float(reference(one)), abs=2e-5)
    assert len({round(loss, 4) for loss in found}) == 3, "the probes hardly moved the loss: that all agree says nothing"
    for name, value in base.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_options_of_one_token_move_their_rows_of_the_output_embedding_alone(
    load: Load, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPT's is tied to the embedding, Llama's is its own."""
    base, drawn = load(family), []
    objective, one, directions = (
        LossModule(base.model, "classification"),
        choices(base.model, one_token=True),
        Directions(1),
    )
    original = Directions.of_rows

    def noted(self: Directions, step: int, index: int, name: str, rows: Any, *rest: Any) -> Tensor:
        drawn.append((name, len(rows)))
        return original(self, step, index, name, rows, *rest)

    monkeypatch.setattr(Directions, "of_rows", noted)
    found = Streamed(objective, dict(base.model.named_parameters()), [one], directions, 0, ALONE).losses(
        [Probe(0, EPSILON)]
    )
    num_asked = {name: count for name, count in drawn if count in (4, 5)}  # the options are four tokens
    assert any("embed" in name or "lm_head" in name for name in num_asked), drawn
    assert (
        sum(count for name, count in drawn if "lm_head" in name or "embed_tokens" in name)
        < 2 * base.model.config.vocab_size
    )
    reference = LossModule(moved_copy(base.model, directions, 0, Probe(0, EPSILON)), "classification")
    assert found[0] == pytest.approx(float(reference(one)), abs=2e-5)


@pytest.mark.parametrize("estimator", ["spsa", "one_sided"])
def test_estimates_are_those_of_the_definitions(load: Load, estimator: SlopesName) -> None:
    base, num = load("bert"), 3
    objective, whole = LossModule(base.model, "classification"), batch(base.model)
    directions, trainable = Directions(num, "rademacher", seed=3), dict(base.model.named_parameters())
    estimate = StreamedZerothOrder(estimator, EPSILON, directions)(objective, trainable, halves(whole), 7)

    def loss(index: int, distance: float) -> float:
        return float(LossModule(moved_copy(base.model, directions, 7, Probe(index, distance)), "classification")(whole))

    plus = [loss(index, EPSILON) for index in range(num)]
    if estimator == "spsa":
        minus = [loss(index, -EPSILON) for index in range(num)]
        slopes = [(one - other) / (2 * EPSILON) for one, other in zip(plus, minus, strict=True)]
    else:
        minus = []
        slopes = [(one - (sum(plus) - one) / (num - 1)) / EPSILON for one in plus]
    assert estimate.projected == pytest.approx(slopes, abs=2e-3, rel=1e-3)
    assert estimate.weights == pytest.approx([slope / num for slope in estimate.projected])
    assert estimate.loss == pytest.approx(sum(plus + minus) / len(plus + minus), abs=1e-5)
    assert estimate.num_forwards == 2 * num * len([*minus, *plus]) // num, "each candidate on each half"


def test_a_metric_can_be_the_objective(load: Load) -> None:
    base = load("bert")
    objective = LossModule(base.model, "classification", "accuracy")
    estimate = StreamedZerothOrder("spsa", 0.3, Directions(4, "rademacher"))(
        objective, dict(base.model.named_parameters()), [batch(base.model, rows=8)], 0
    )
    assert any(estimate.projected) and estimate.loss * 64 == round(estimate.loss * 64)


def test_forward_gradients_are_refused(load: Load) -> None:
    base = load("bert")
    with pytest.raises(ModelError, match=r"second model.*spsa"):
        StreamedZerothOrder("forward_gradient")(
            LossModule(base.model, "classification"), dict(base.model.named_parameters()), [batch(base.model)], 0
        )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("decay", [0.0, 0.125])
def test_a_step_adds_up_the_directions_and_needs_nothing_but_their_weights(
    load: Load, distribution: Distribution, decay: float
) -> None:
    base = load("gpt2")
    trainable, weights, rate = dict(base.model.named_parameters()), (0.5, 0.0, -2.0), 2.0**-6
    estimator = StreamedZerothOrder(directions=Directions(3, distribution, seed=1))
    optimizer = StreamedDescent(trainable, estimator, learning_rate=rate, weight_decay=decay)
    before = {name: parameter.detach().double() for name, parameter in trainable.items()}
    estimator.set_gradient(trainable, 11, weights)
    optimizer.step()
    for name, parameter in trainable.items():
        z = [direction(parameter, estimator.directions, 11, index, name).double() for index in range(3)]
        change = sum(weight * each for weight, each in zip(weights, z, strict=True)) + decay * before[name]
        torch.testing.assert_close(parameter.detach().double(), before[name] - rate * change, rtol=1e-5, atol=1e-6)
        assert parameter.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("estimator", "num", "num_steps"), [("spsa", 1, 2000), ("one_sided", 2, 300)])
def test_thousands_of_steps_at_rate_zero_change_no_bit(
    estimator: SlopesName, num: int, num_steps: int, dtype: torch.dtype
) -> None:
    model, one, projected = Classifier().to(dtype), given(), set()
    model.body.weight.data[0] = -0.0  # which has a bit that moves first
    objective, trainable = LossModule(model, "classification"), dict(model.named_parameters())
    zeroth = StreamedZerothOrder(estimator, 0.125, Directions(num, "rademacher"), Scaling("rms", clip=3.0))
    optimizer = StreamedDescent(trainable, zeroth, learning_rate=0.0, weight_decay=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(num_steps):
        projected.add(zeroth(objective, trainable, [one], step).projected)
        optimizer.step()
    assert len(projected) > 0.3 * num_steps, "the probes hardly moved the loss, so that nothing changed says nothing"
    for name, value in model.state_dict().items():
        assert value.view(torch.uint8).tolist() == before[name].view(torch.uint8).tolist(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_descent_finds_what_the_loss_asks_for(dtype: torch.dtype) -> None:
    """In bfloat16 a step is below a number's resolution, and without stochastic rounding nothing would move."""
    model, one = Classifier().to(dtype), given()
    objective, trainable = LossModule(model, "classification"), dict(model.named_parameters())
    zeroth = StreamedZerothOrder("spsa", 2.0**-4, Directions(2, "rademacher"))
    optimizer = StreamedDescent(trainable, zeroth, learning_rate=2.0**-7)
    losses = []
    for step in range(400):
        losses.append(zeroth(objective, trainable, [one], step).loss)
        optimizer.step()
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])


class Broken(LossModule):
    """Fails in the middle of a forward pass, as a device that is out of memory does."""

    def forward(self, batch: Batch, num_branches: int | None = None) -> Tensor:
        super().forward(batch)
        raise RuntimeError("out of memory")


def test_a_probe_that_fails_leaves_the_model_and_torch_as_they_were(load: Load) -> None:
    base = load("llama")
    one, trainable = choices(base.model, one_token=True), dict(base.model.named_parameters())
    before, logits = {name: value.clone() for name, value in trainable.items()}, tiny.logits(base.model)
    with pytest.raises(RuntimeError, match="out of memory"):
        StreamedZerothOrder(epsilon=0.5)(Broken(base.model, "classification"), trainable, [one], 0)
    assert all(torch.equal(value, before[name]) for name, value in trainable.items())
    assert torch.equal(tiny.logits(base.model), logits)


def test_an_operation_of_any_kind_sees_the_moved_parameter() -> None:
    """Views, lists, keywords, in-place work: none of them reaches the parameter itself."""
    parameter = nn.Parameter(torch.randn(40, 12, generator=torch.Generator().manual_seed(0)))
    directions, probe = Directions(1, "rademacher"), Probe(0, 0.25)
    moved = parameter.detach() + 0.25 * direction(parameter, directions, 0, 0, "p")
    x, places = torch.randn(5, 12), torch.tensor([[3, 39, 3], [0, 7, 1]])
    with torch.no_grad(), Moved({"p": parameter}, directions, 0, probe):
        found = [
            x @ parameter.T,
            nn.functional.linear(input=x, weight=parameter),
            torch.cat([parameter, x]),
            nn.functional.embedding(places, parameter),
            parameter[places],
            parameter[-2:],
            parameter[torch.tensor([-1])],
            torch.addmm(torch.ones(12), torch.ones(2, 40), parameter),
            torch.addmm(torch.ones(12), torch.ones(2, 40), mat2=parameter, beta=2),
            torch.mul(input=parameter, other=2),
            parameter.data.clone().zero_() + parameter.sum(),
        ]
        shape = parameter.shape, parameter.dtype, len(parameter), parameter.numel()
    expected = [
        *(x @ moved.T, x @ moved.T, torch.cat([moved, x]), moved[places], moved[places], moved[-2:], moved[[-1]]),
        *(
            1 + moved.sum(dim=0).expand(2, -1),
            2 + moved.sum(dim=0).expand(2, -1),
            2 * moved,
            moved.sum().expand(40, 12),
        ),
    ]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert shape == ((40, 12), torch.float32, 40, 480)


def test_a_step_holds_little_beside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two matrices of 4 MiB: a step may hold parts of them, and an adapter's way would hold them whole."""
    monkeypatch.setitem(streamed.CHUNK, "cpu", 1 << 14)  # 64 KiB
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))

    class Sum(LossModule):
        def forward(self, batch: Batch, num_branches: int | None = None) -> Tensor:
            return self.model(torch.ones(2, 1024)).square().mean()

    trainable = dict(model.named_parameters())
    zeroth = StreamedZerothOrder(directions=Directions(2, "rademacher"))
    optimizer = StreamedDescent(trainable, zeroth, learning_rate=1e-3)

    def step() -> None:
        zeroth(Sum(model, "classification"), trainable, [given()], 0)
        optimizer.step()

    step()  # which fills the table of signs
    assert peak_bytes(step) < 6 * (1 << 16)


@pytest.mark.parametrize("draw", [randomness.sign_rows, randomness.normal_rows, randomness.uniform_rows])
@pytest.mark.parametrize("width", [1, 5, 768])
def test_a_row_is_drawn_the_same_in_any_company(draw: Callable[..., Tensor], width: int) -> None:
    whole = draw(5, "name", 3, rows=range(40), width=width)
    assert whole.shape == (40, width)
    for rows in (range(7, 19), [0, 1, 5, 30, 31, 39], [12], range(40)):
        assert torch.equal(draw(5, "name", 3, rows=rows, width=width), whole[list(rows)])
    assert not torch.equal(draw(5, "name", 4, rows=range(40), width=width), whole)
    if width > 1:
        assert len({tuple(row) for row in whole.tolist()}) > 10, "rows repeat each other"


@pytest.mark.parametrize(
    ("draw", "moments"),
    [
        (randomness.sign_rows, (0.0, 1.0, 1.0)),
        (randomness.normal_rows, (0.0, 1.0, 3.0)),
        (randomness.uniform_rows, (0.5, 1 / 3, 0.2)),
    ],
)
def test_draws_of_rows_have_their_moments(draw: Callable[..., Tensor], moments: tuple[float, float, float]) -> None:
    x = draw(0, "moments", rows=range(200), width=1000).double()
    found = [float((x**power).mean()) for power in (1, 2, 4)]
    assert found == pytest.approx(list(moments), abs=0.02)
    columns, rows = (float(x.mean(dim=dim).std()) for dim in (0, 1))
    spread = math.sqrt(moments[1] - moments[0] ** 2)
    assert columns == pytest.approx(spread / math.sqrt(200), rel=0.15), "columns are not independent"
    assert rows == pytest.approx(spread / math.sqrt(1000), rel=0.3), "rows are not independent"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_in_the_mean_and_leaves_what_needs_none(dtype: torch.dtype) -> None:
    generator, mantissa = torch.Generator().manual_seed(0), {torch.bfloat16: 7, torch.float16: 10}[dtype]
    exact = torch.randn(2000, 4, generator=generator) * torch.tensor([1e-8, 1e-4, 1.0, 300.0])
    smallest = torch.finfo(dtype).smallest_normal * 2.0**-mantissa
    gap = (2.0 ** (exact.double().abs().log2().floor() - mantissa)).clamp(min=smallest)
    uniform = (torch.arange(64) + 0.5) / 64
    found = torch.stack(
        [streamed.stochastically_rounded(exact, dtype, torch.full_like(exact, float(u))) for u in uniform]
    ).double()
    assert bool(((found - exact).abs() < gap).all()), "no neighbour is a whole gap away"
    assert bool(((found == found[0]) | (found == found[-1])).all()), "there are two"
    assert float(((found.mean(dim=0) - exact) / gap).abs().max()) < 1 / 64
    own = torch.tensor([0.0, -0.0, 1.0, -1.5, 65504.0, 6e-8, math.inf], dtype=dtype)
    for u in (0.0, 0.999):
        back = streamed.stochastically_rounded(own.float(), dtype, torch.full((7,), u))
        assert back.view(torch.int16).tolist() == own.view(torch.int16).tolist()


def test_stochastic_rounding_takes_neighbours_alone() -> None:
    """Between 1 and the next bfloat16 there is nothing, and what lies beyond the range stays infinite."""
    step = 2.0**-7
    exact = torch.tensor([1 + 0.25 * step, -1 - 0.75 * step, 0.3e-40, 3.4e38])
    found = {
        tuple(streamed.stochastically_rounded(exact, torch.bfloat16, torch.full((4,), u)).tolist())
        for u in np.linspace(0, 1, 200, endpoint=False)
    }
    assert {each[0] for each in found} == {1.0, 1 + step}
    assert {each[1] for each in found} == {-1 - step, -1.0}
    assert len({each[2] for each in found}) == 2


def test_what_a_checkpoint_keeps_goes_on(load: Load) -> None:
    base = load("bert")
    objective, one = LossModule(base.model, "classification"), batch(base.model)
    trainable: Mapping[str, nn.Parameter] = dict(base.model.named_parameters())
    first = StreamedZerothOrder(scaling=Scaling("rms"))
    for step in range(3):
        first(objective, trainable, [one], step)
    second = StreamedZerothOrder(scaling=Scaling("rms"))
    second.restore(first.state())
    assert second(objective, trainable, [one], 3) == first(objective, trainable, [one], 3)
