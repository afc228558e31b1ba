"""What `lorica plan` says of memory is what a step of the real model takes, held to the bytes that were alive in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from command_line import lorica
from lorica import models, planning
from lorica.adapters import injection
from lorica.errors import ModelError
from lorica.models import Base
from lorica.optim.backprop import Estimator, backprop
from lorica.optim.directions import Directions
from lorica.optim.probes import Probing
from lorica.optim.streamed import StreamedDescent, StreamedZerothOrder
from lorica.optim.updates import update_rule
from lorica.optim.zeroth_order import ZerothOrder
from lorica.planning import peak_bytes
from lorica.runs.training.prefix import draw, lay_on
from lorica.tasks.batching import Batch, HeadBatch
from lorica.tasks.objectives import LossModule

ROWS, LENGTH, RANK, NUM_PREFIX = 4, 96, 64, 48


class Sum(LossModule):
    def forward(self, batch: Batch, num_branches: int | None = None) -> Tensor:
        found: Tensor = self.model(**batch.inputs, logits_to_keep=1, use_cache=False).logits.float().sum()
        return found


def _adapter(base: Base, is_network: bool) -> Mapping[str, nn.Parameter]:
    paths = models.target_modules(base, "standard")
    return injection.inject(base.model, injection.create(base.model, paths, rank=RANK, alpha=1.0)).trainable()


def _prefix(base: Base, is_network: bool) -> Mapping[str, nn.Parameter]:
    values = draw(base, NUM_PREFIX, init="random", seed=0)
    return lay_on(base, values, reparameterize=is_network).trainable()


def _full(base: Base, is_backprop: bool) -> Mapping[str, nn.Parameter]:
    base.model.requires_grad_(is_backprop)
    return dict(base.model.named_parameters())


TRAINED: dict[str, Callable[[Base, bool], Mapping[str, nn.Parameter]]] = {
    "adapter": _adapter,
    "full": _full,
    "prefix": _prefix,
}


@pytest.fixture(scope="module")
def planned() -> dict[str, planning.Way]:
    asked: dict[str, Any] = {"targets": "standard", "rank": RANK, "optimizer": "adamw", "dtype": "float32"}
    found = planning.plan("demo", **asked, batch_size=ROWS, length=LENGTH, num_prefix=NUM_PREFIX)
    assert found.without is None
    return {way.name: way for way in found.ways}


@pytest.mark.parametrize("trainer", ["backprop", "spsa"])
@pytest.mark.parametrize("kind", TRAINED)
def test_the_memory_of_a_step_is_what_was_planned(planned: dict[str, planning.Way], kind: str, trainer: str) -> None:
    way, base = planned[f"{kind}, {trainer}"], models.load("demo", kind="causal")
    base.model.requires_grad_(False)
    trainable = TRAINED[kind](base, trainer == "backprop")
    assert way.num_trainable == sum(parameter.numel() for parameter in trainable.values())
    held = [*base.model.parameters(), *(each for name, each in base.model.named_buffers() if name == "prefix.start")]
    assert way.weights_bytes == sum(each.nbytes for each in held)
    estimator, optimizer = _stepping(trainable, kind, trainer)
    peak = _peak_of_step(base, trainable, estimator, optimizer, (ROWS, LENGTH))
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    planned_bytes = way.activations_bytes if trainer == "backprop" else way.activations_bytes + way.state_bytes
    assert planned_bytes == pytest.approx(peak, rel=0.03)
    assert kept == (way.state_bytes if trainer == "backprop" else 0)


def test_full_tuning_by_zeroth_order_holds_some_rows_of_a_weight_beside_it() -> None:
    """At a small batch they are the most of what it holds."""
    asked: dict[str, Any] = {"targets": "standard", "rank": 8, "optimizer": "adamw", "dtype": "float32"}
    _, way = planning.plan("demo", **asked, batch_size=1, length=16, kinds=["full"]).ways
    base = models.load("demo", kind="causal")
    trainable = _full(base, is_backprop=False)
    peak = _peak_of_step(base, trainable, *_stepping(trainable, "full", "spsa"), (1, 16))
    assert way.activations_bytes == pytest.approx(peak, rel=0.03)


def _peak_of_step(
    base: Base,
    trainable: Mapping[str, nn.Parameter],
    estimator: Estimator,
    optimizer: torch.optim.Optimizer,
    shape: tuple[int, int],
) -> int:
    """The most bytes alive in a step that is not the first, which makes the optimizer's state."""
    tokens = torch.arange(shape[0] * shape[1]).view(shape)
    batch = HeadBatch({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, torch.zeros(shape[0]))

    def step() -> None:
        estimator(Sum(base.model, "classification"), trainable, [batch], 0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return peak_bytes(step)


def _stepping(
    trainable: Mapping[str, nn.Parameter], kind: str, trainer: str
) -> tuple[Estimator, torch.optim.Optimizer]:
    if trainer == "backprop":
        return backprop, update_rule("adamw", trainable.values(), learning_rate=1e-3)
    if kind != "full":
        estimator = ZerothOrder(probing=Probing(max_branches=1))
        return estimator, update_rule("sgd", trainable.values(), learning_rate=1e-3)
    streamed = StreamedZerothOrder(directions=Directions(1, "rademacher"))
    return streamed, StreamedDescent(trainable, streamed, learning_rate=1e-3)


def test_a_base_that_takes_no_prefix_is_told_so(tiny_models: Callable[..., Any]) -> None:
    printed = " ".join(lorica("plan", f"model={tiny_models('bert')}", "length=8").split())
    assert "full, spsa" in printed and "prefix, spsa" not in printed
    assert "no prefix: adapter.kind=prefix:" in printed and "is a classification model" in printed


def test_a_model_whose_pass_asks_for_numbers_is_told_in_one_line(tiny_models: Callable[..., Any]) -> None:
    """T5 looks for its end of sentence among the tokens."""
    with pytest.raises(ModelError, match=r"classification model cannot be planned: .*aten::unique") as caught:
        lorica("plan", f"model={tiny_models('t5', 'classification')}", "model.kind=classification", "length=8")
    assert "\n" not in str(caught.value)
