"""Problems whose best coefficients are known: every learner finds them within 0.05."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import planted
from lorica.merging.fitting import loading
from lorica.merging.fitting.descent import Learned
from lorica.merging.fitting.problem import Problem

WITHIN = 0.05
EIGHT = dict(zip("abcdefgh", (0.6, 0.3, 0.8, -0.2, 0.5, 0.4, 0.7, 0.1), strict=True))
QUICK = {"steps": 100, "learning_rate": 0.03, "eval_steps": 20}


def learned(name: str, params: Mapping[str, Any], problem: Problem) -> Learned:
    return loading.load(name, params)(problem)


def by_name(found: Learned) -> dict[str, float]:
    """The coefficients of a task-wise layout."""
    return {name: value for (_, name), value in zip(found.layout.keys, found.c.tolist(), strict=True)}


def assert_found(found: Learned, truth: Mapping[str, float]) -> None:
    assert by_name(found) == pytest.approx(dict(truth), abs=WITHIN)


@pytest.mark.parametrize(
    ("name", "params", "truth"),
    [
        ("supermerge", {}, {"a": 0.6, "b": -0.35, "c": 0.2}),
        ("supermerge", {"hierarchical": True, "learning_rate": 0.06}, {"a": 0.6, "b": -0.35, "c": 0.2}),
        (
            "supermerge",
            {"coefficient_parameterization": "simplex_softmax_scaled", "learning_rate": 0.05},
            {"a": 0.9, "b": 0.35, "c": 0.5},
        ),
        ("gradient", {}, {"a": 0.6, "b": 0.35, "c": 0.9}),
        ("gradient", {"weighting": "equal", "coefficient_parameterization": "free"}, {"a": 1.3, "b": -0.5, "c": 0.2}),
        ("gradient", {"estimator": "spsa", "num_directions": 2}, {"a": 0.6, "b": 0.35, "c": 0.9}),
        ("gradient", {"estimator": "forward_gradient", "num_directions": 2}, {"a": 0.6, "b": 0.35, "c": 0.9}),
    ],
)
def test_losses_with_labels_find_what_made_the_labels(
    name: str, params: dict[str, Any], truth: dict[str, float]
) -> None:
    assert_found(learned(name, {**QUICK, **params}, planted.planted(truth)), truth)


@pytest.mark.parametrize("variant", ["layer_wise", "module_wise", "direction_wise"])
def test_each_granularity_finds_it_too(variant: str) -> None:
    truth = {"a": 0.6, "b": -0.35}
    assert_found(learned("supermerge", {**QUICK, "variant": variant}, planted.planted(truth)), truth)


def test_a_coefficient_stays_in_bounds_where_the_best_is_outside() -> None:
    found = learned("gradient", {**QUICK, "steps": 60}, planted.planted({"a": 1.4, "b": -0.5}))
    assert_found(found, {"a": 1.0, "b": 0.0})


@pytest.mark.parametrize("parameterization", ["clip", "sigmoid_alpha"])
def test_adamerging_finds_where_the_entropy_is_least(parameterization: str) -> None:
    """Adapter i pushes one token's margin up from 4 and the other's down: h is convex there, so the sum is least where
    the two are equal, at c_i; and the entropy falls on either side without end only beyond [0, 1]."""
    truth = {"a": 0.7, "b": 0.15}
    base, moves, rows = [], {}, {}
    for at, (name, best) in enumerate(truth.items()):
        base += [4 - 2 * best, 4 + 2 * best]
        moves[name] = [0.0] * 4
        moves[name][2 * at : 2 * at + 2] = [2.0, -2.0]
        rows[name] = planted.answers(2 * at, (1, 1)) + planted.answers(2 * at + 1, (1, 1))
    params = {**QUICK, "coefficient_parameterization": parameterization}
    if parameterization == "sigmoid_alpha":
        params["learning_rate"] = 0.05
    assert_found(learned("adamerging", params, planted.table_problem(base, moves, rows)), truth)


def test_regret_finds_the_mixture_of_the_least_worst_task() -> None:
    """Each task has a token whose label is always 1 and whose margin grows with the own adapter's share alone."""
    base, gains = (0.3, -0.5, 0.0), (1.0, 4.0, 8.0)
    names = ("a", "b", "c")
    moves = {
        name: [gain if at == own else 0.0 for at in range(3)]
        for own, (name, gain) in enumerate(zip(names, gains, strict=True))
    }
    rows = {name: planted.answers(at, (0, 4)) for at, name in enumerate(names)}
    problem = planted.table_problem(base, moves, rows)
    found = learned("regret_smoothmax", {**QUICK, "steps": 150}, problem)
    best = least_regret(np.array(base), np.array(gains))
    assert max(abs(best - 1 / 3)) > 3 * WITHIN, "the start would do"
    assert_found(found, dict(zip(names, best, strict=True)))
    assert float(found.c.sum()) == pytest.approx(1)


def least_regret(base: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """The best point of a fine grid on the simplex, by the definition."""
    shares = np.arange(0, 1.0001, 0.005)
    grid = np.array([(x, y, 1 - x - y) for x in shares for y in shares if x + y <= 1])
    single, none = np.log1p(np.exp(-base - gains)), np.log1p(np.exp(-base))
    regrets = (np.log1p(np.exp(-base - grid * gains)) - single) / (none - single + 1e-4)
    best: np.ndarray = grid[np.argmin(0.1 * np.log(np.exp(regrets / 0.1).sum(axis=1)))]
    return best


def test_bayes_finds_it_by_trial() -> None:
    truth = {"a": 0.7, "b": 0.6}
    found = learned("bayes", {}, planted.planted(truth))
    assert_found(found, truth)
    assert len(found.history) == 20


def test_bayes_goes_by_the_judges_where_there_are_some() -> None:
    """The judges' optimum is elsewhere than the losses', and is looked for between their own baselines."""
    problem = planted.planted({"a": 0.7, "b": 0.6})
    margin = problem.model.get_submodule(planted.PATH)

    def judge(best: float, token: int) -> float:
        moved = margin(torch.eye(4, dtype=torch.float64))[token] - margin.weight[:, token]  # by 2c ± 0.25·(other's c)
        return -((float(moved[1] - moved[0]) - 2 * best) ** 2)

    tasks = [
        dataclasses.replace(task, validation=(), judge=partial(judge, best, 2 * at))
        for at, (task, best) in enumerate(zip(problem.tasks, (0.8, 0.8), strict=True))
    ]
    found = learned("bayes", {}, dataclasses.replace(problem, tasks=tasks))
    expected = np.linalg.solve([[2, 0.25], [0.25, 2]], [1.6, 1.6])
    assert_found(found, dict(zip("ab", expected, strict=True)))


def test_none_leaves_the_coefficients_as_they_start() -> None:
    found = learned("none", {"init": 0.4}, planted.planted({"a": 0.6, "b": 0.3}))
    assert by_name(found) == {"a": 0.4, "b": 0.4}
    found = learned("none", {"normalize_coefficients": True}, planted.planted({"a": 0.6, "b": 0.3}))
    assert by_name(found) == {"a": 0.5, "b": 0.5}


def test_eight_adapters_by_a_tree_in_a_quarter_of_the_memory() -> None:
    """Dense updates: as good as flat within 1 %, with two of the eight mounted at a time.

    Beside them a module is there once more, while the tree sums it: what the bound allows.
    """
    flat, flat_bytes = fitted_and_measured({"merge_impl": "fused_linear"})
    tree, tree_bytes = fitted_and_measured({"merge_impl": "fused_linear", "hierarchical": True})
    assert tree == pytest.approx(flat, rel=0.01)
    assert flat_bytes["mounted"] == 8 * WIDE_BYTES
    assert tree_bytes["mounted"] <= flat_bytes["mounted"] / 4
    assert tree_bytes["at all"] <= flat_bytes["at all"] / 4 + WIDE_BYTES / NUM_WIDE


NUM_WIDE = 2  # modules
WIDE_BYTES = NUM_WIDE * 2 * 16 * 8  # of one adapter's dense updates: (2, 16) float64 in each module


def fitted_and_measured(params: Mapping[str, Any]) -> tuple[float, dict[str, int]]:
    """The loss at the learned coefficients, and the most bytes of updates that there were while fitting.

    Measured in a fit of its own: counting is slow, and one step needs the memory of the next.
    """
    options = {"learning_rate": 0.15, "batch_size": 8, **params}
    live, mounted = LiveMatrices((2, 16)), []

    def collate(rows: Sequence[Any]) -> Any:
        mounted.append(live.num_bytes())
        return planted.COLLATE(rows)

    problem = wide_problem(collate)
    with live:
        learned("supermerge", {**options, "steps": 3, "eval_steps": 2}, problem)
    found = learned("supermerge", {**options, "steps": 40, "eval_steps": 20}, wide_problem(planted.COLLATE))
    return found.history[-1]["validation"], {"mounted": max(mounted), "at all": live.most}


def wide_problem(collate: Any) -> Problem:
    """EIGHT, with dense updates that are spread over the modules of a Wide."""
    problem = planted.planted(EIGHT, overlap=0.1)
    wide = Wide(problem.model.get_submodule(planted.PATH).weight.data)

    def made(name: str, path: str) -> Tensor:
        return problem.updates[name](planted.PATH).dense().div_(NUM_WIDE)

    tasks = [dataclasses.replace(task, model=wide, collate=collate) for task in problem.tasks]
    updates = {name: partial(made, name) for name in EIGHT}
    return Problem(wide, tasks, [f"layers.{at}" for at in range(NUM_WIDE)], updates)


class LiveMatrices(TorchDispatchMode):
    """Counts the memory of the matrices of one shape that are alive."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.most = shape, 0
        self._made: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.shape == self.shape:
            self._made[id(made)] = weakref.ref(made)
            self.most = max(self.most, self.num_bytes())
        return made

    def num_bytes(self) -> int:
        self._made = {key: each for key, each in self._made.items() if each() is not None}
        alive = [tensor for each in self._made.values() if (tensor := each()) is not None]
        return sum({each.data_ptr(): each.nbytes for each in alive}.values())


class Wide(nn.Module):
    """A Table whose margins are the sum of several modules' shares of them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 2, bias=False).double() for _ in range(NUM_WIDE)])
        for layer in self.layers:
            layer.weight.data = weight / NUM_WIDE

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        tokens = nn.functional.one_hot(input_ids[:, 0], 16).double()
        return SimpleNamespace(logits=torch.stack([layer(tokens) for layer in self.layers]).sum(dim=0))
