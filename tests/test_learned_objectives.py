"""Every objective's gradient in u against finite differences of an independent formula, in float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import planted
from lorica.adapters.delta import LowRank
from lorica.errors import ConfigError
from lorica.merging.fitting import feeding, gradients, loading
from lorica.merging.fitting.descent import Learned
from lorica.merging.fitting.gradients import Objective, StepBatches
from lorica.merging.fitting.layout import Layout
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.problem import FittingTask, Problem

VARIANTS = ("task_wise", "layer_wise", "module_wise", "direction_wise")
FITTED = [
    *[("adamerging", {"coefficient_parameterization": name}) for name in ("clip", "sigmoid_alpha")],
    *[("supermerge", {"coefficient_parameterization": name}) for name in ("tanh_alpha", "simplex_softmax_scaled")],
    *[
        ("gradient", {"coefficient_parameterization": name})
        for name in ("free", "clip", "sigmoid_alpha", "tanh_alpha", "simplex_softmax_scaled", "softmax")
    ],
    ("gradient", {"normalize_coefficients": True}),
    ("gradient", {"weighting": "equal"}),
    ("gradient", {"weighting": "manual", "weights": {"a": 0.2, "b": 3.0, "c": 0.0}}),
    ("regret_smoothmax", {}),
]
OPTIONS = {"gradient_accumulation_steps": 2, "batch_size": 4, "num_baseline_batches": 3}


class Caught(Exception):
    """Stands for the fitting that a test does not want to see happen."""


def caught(name: str, params: dict[str, Any], problem: Problem, monkeypatch: pytest.MonkeyPatch, check: Any) -> None:
    """`check` with what the learner asks to be fitted, while the adapters are mounted."""

    def instead(losses: Any, descent: Descent, parameterization: Any, **more: Any) -> Learned:
        objective = Objective(losses, more["total"], parameterization.coefficients)
        batches = next(feeding.step_batches(losses.problem, descent))
        check(objective, descent, parameterization.start, batches)
        raise Caught

    monkeypatch.setattr(importlib.import_module(f"lorica.merging.learned.{name}"), "descend", instead)
    with pytest.raises(Caught):
        loading.load(name, params)(problem)


def settings(name: str, params: dict[str, Any], **more: Any) -> dict[str, Any]:
    chosen = {**OPTIONS, **params, **more}
    if name not in ("gradient", "regret_smoothmax"):
        del chosen["num_baseline_batches"]
    return chosen


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "params"), FITTED)
def test_gradient_agrees_with_finite_differences(
    name: str, params: dict[str, Any], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = planted.net_problem()

    def check(objective: Objective, descent: Descent, start: Tensor, batches: StepBatches) -> None:
        # Away from the start, where symmetric coefficients would hide what is mixed up.
        u = start + 0.2 * torch.sin(1.7 * torch.arange(len(start), dtype=torch.float64))
        found = gradients.backprop(objective, u, batches, step=0)
        kind = "entropy" if name == "adamerging" else "cross_entropy"

        def value(u: Tensor) -> float:
            c = objective.coefficients(u)
            losses = [
                dense_loss(problem, task, kind, objective.losses.mounted.layout, c, own)
                for task, own in zip(objective.tasks, batches, strict=True)
            ]
            return float(objective.total(torch.stack(losses).detach()))

        assert found.value == pytest.approx(value(u), rel=1e-12)
        torch.testing.assert_close(found.gradient, differences(value, u), rtol=1e-6, atol=1e-9)

    caught(name, settings(name, params, variant=variant), problem, monkeypatch, check)


def differences(value: Callable[[Tensor], float], u: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of `value` at u."""
    moved = torch.eye(len(u), dtype=u.dtype) * step
    return torch.tensor([(value(u + each) - value(u - each)) / (2 * step) for each in moved], dtype=u.dtype)


def dense_loss(
    problem: Problem, task: FittingTask, kind: str, layout: Layout, c: Tensor, batches: Sequence[Any]
) -> Tensor:
    """The task's loss with the weights W + Σ c_i·Δ_i written out, the mean over the micro-batches."""
    weights = {}
    for path in problem.paths:
        updates = [make(path) for make in problem.updates.values()]
        A = torch.cat([each.A for each in updates if isinstance(each, LowRank)])
        B = torch.cat([each.scale * each.B for each in updates if isinstance(each, LowRank)], dim=1)
        base = task.model.get_submodule(path).weight
        weights[f"{path}.weight"] = base + B @ torch.diag(c[layout.directions(path)]) @ A
    found = []
    for batch in batches:
        logits = torch.func.functional_call(task.model, weights, (), batch.inputs).logits
        p = logits.softmax(dim=-1)
        found.append(-(p * p.log()).sum(dim=-1).mean() if kind == "entropy" else F.cross_entropy(logits, batch.labels))
    return torch.stack(found).mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_regret_agrees_with_autograd_through_the_logsumexp(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = planted.net_problem()

    def check(objective: Objective, descent: Descent, start: Tensor, batches: StepBatches) -> None:
        layout = objective.losses.mounted.layout
        u = (start + 0.3 * torch.cos(torch.arange(len(start), dtype=torch.float64))).requires_grad_()
        firsts = [feeding.first_batches(task, descent, 3) for task in objective.tasks]
        regrets = []
        for task, own, first in zip(objective.tasks, batches, firsts, strict=True):

            def loss(c: Tensor, batches: Sequence[Any], task: FittingTask = task) -> Tensor:
                return dense_loss(problem, task, "cross_entropy", layout, c.double(), batches)

            single = examples_mean(loss, layout.one_hot(task.name), first).detach()
            base = examples_mean(loss, layout.uniform(0.0), first).detach()
            regrets.append((loss(objective.coefficients(u), own) - single) / (base - single + 1e-4))
        whole = 0.1 * torch.logsumexp(torch.stack(regrets) / 0.1, dim=0)
        (expected,) = torch.autograd.grad(whole, u)
        found = gradients.backprop(objective, u, batches, step=0)
        assert found.value == pytest.approx(whole.item(), rel=1e-12)
        torch.testing.assert_close(found.gradient, expected, rtol=1e-10, atol=1e-12)

    caught("regret_smoothmax", settings("regret_smoothmax", {}, variant=variant), problem, monkeypatch, check)


def examples_mean(loss: Callable[[Tensor, Sequence[Any]], Tensor], c: Tensor, batches: Sequence[Any]) -> Tensor:
    """Of batches of unequal size the mean over their examples."""
    sizes = torch.tensor([len(batch.labels) for batch in batches], dtype=torch.float64)
    return torch.stack([loss(c, [batch]) for batch in batches]) @ sizes / sizes.sum()


@pytest.mark.parametrize("variant", ["task_wise", "direction_wise"])
def test_forward_gradient_and_spsa_are_the_gradient_s_part_along_their_directions(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(objective: Objective, descent: Descent, start: Tensor, batches: StepBatches) -> None:
        exact = gradients.backprop(objective, start, batches, step=4)
        forward = gradients.ForwardGradient(num_directions=3, seed=1)(objective, start, batches, step=4)
        probed = gradients.Spsa(1e-4, num_directions=3, seed=1)(objective, start, batches, step=4)
        z = torch.stack([gradients._direction(1, 4, direction, start) for direction in range(3)])
        expected = (z @ exact.gradient) @ z / 3
        torch.testing.assert_close(forward.gradient, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(probed.gradient, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(forward.losses, exact.losses, rtol=1e-12, atol=0)
        assert probed.value == pytest.approx(exact.value, rel=1e-5)

    params = settings("supermerge", {}, variant=variant)
    caught("supermerge", params, planted.net_problem(), monkeypatch, check)


@pytest.mark.parametrize("merge_impl", ["streaming_parametrize", "fused_linear", "functional_clone_legacy"])
@pytest.mark.parametrize("estimator", ["backprop", "spsa"])
def test_every_way_to_run_a_merge_gives_the_same_estimate(
    merge_impl: str, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def check(objective: Objective, descent: Descent, start: Tensor, batches: StepBatches) -> None:
        found.append(gradients.estimator(descent)(objective, start, batches, 2))

    for impl in ("fused_lora_linear", merge_impl):
        params = settings("supermerge", {}, merge_impl=impl, estimator=estimator, variant="layer_wise")
        caught("supermerge", params, planted.net_problem(), monkeypatch, check)
    torch.testing.assert_close(found[0].gradient, found[1].gradient, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[0].losses, found[1].losses, rtol=1e-10, atol=0)


def test_gradient_s_weights_are_one_over_the_own_adapters_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = planted.planted({"a": 0.6, "b": 0.35})

    def check(objective: Objective, descent: Descent, start: Tensor, batches: StepBatches) -> None:
        _, shares = gradients.weighed(objective.total, torch.ones(2, dtype=torch.float64))
        layout = objective.losses.mounted.layout
        own = [
            float(objective.losses.measured(task, layout.one_hot(task.name), [task.collate(task.rows)]).loss)
            for task in problem.tasks
        ]
        expected = torch.tensor([1 / loss for loss in own], dtype=torch.float64)
        torch.testing.assert_close(shares, expected / expected.sum(), rtol=1e-12, atol=0)

    caught("gradient", {"num_baseline_batches": 1}, problem, monkeypatch, check)


def test_a_floor_bounds_the_weight_of_a_task_that_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = planted.table_problem(
        [0.0, 0.0],
        {"a": [60.0, 0.0], "b": [0.0, 1.0]},
        {"a": planted.answers(0, (0, 4)), "b": planted.answers(1, (1, 3))},
    )

    def check(objective: Objective, descent: Descent, start: Tensor, batches: StepBatches) -> None:
        _, shares = gradients.weighed(objective.total, torch.ones(2, dtype=torch.float64))
        own = (math.log1p(math.exp(-1.0)) * 3 + math.log1p(math.e)) / 4
        assert float(shares[0] / shares[1]) == pytest.approx(own / 1e-3, rel=1e-9)

    caught("gradient", {"floor": 1e-3}, problem, monkeypatch, check)


def test_weights_that_do_not_go_with_the_weighting_are_refused() -> None:
    problem = planted.net_problem()
    for params, message in [
        ({"weights": {"a": 1.0}}, "weighting=manual"),
        ({"weighting": "manual"}, "weights are given"),
        ({"weighting": "manual", "weights": {"a": 1.0}}, "no b"),
        ({"weighting": "manual", "weights": {"a": 1.0, "b": 1.0, "cc": 1.0}}, "did you mean c"),
    ]:
        with pytest.raises(ConfigError, match=message):
            loading.load("gradient", params)(problem)
