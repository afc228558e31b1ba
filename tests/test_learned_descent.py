"""The loop that all learners share: it resumes bit for bit, stops where it should, and heeds every option."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
from lorica import files
from lorica.errors import ConfigError, InterruptedRunError, NonFiniteLossError
from lorica.merging.fitting import descent, feeding, loading
from lorica.merging.fitting.descent import Learned
from lorica.merging.fitting.losses import Losses
from lorica.merging.fitting.problem import Problem, mounted
from lorica.merging.runtime import mount

SHORT = {"steps": 12, "logging_steps": 3, "eval_steps": 4, "learning_rate": 0.02, "batch_size": 4}
LEARNERS = [
    ("adamerging", SHORT),
    ("supermerge", {**SHORT, "variant": "layer"}),
    ("supermerge", {**SHORT, "variant": "direction", "estimator": "spsa"}),
    ("supermerge", {**SHORT, "estimator": "forward_gradient"}),
    ("supermerge", {**SHORT, "hierarchical": True, "variant": "direction"}),
    ("gradient", {**SHORT, "gradient_accumulation_steps": 2, "sampling": {"default": {"strategy": "balanced"}}}),
    ("regret_smoothmax", SHORT),
    ("bayes", {"budget": 8, "init_points": 6}),
]


def learned(problem: Problem, name: str = "supermerge", **params: Any) -> Learned:
    return loading.load(name, params)(problem)


def with_collate(problem: Problem, seen: Callable[[], None]) -> Problem:
    """The problem, `seen` being called before each batch."""

    def collate(rows: Sequence[Any]) -> Any:
        seen()
        return planted.COLLATE(rows)

    return dataclasses.replace(problem, tasks=[dataclasses.replace(task, collate=collate) for task in problem.tasks])


def with_model_calls(problem: Problem, seen: Callable[[], None]) -> list[Any]:
    return [task.model.register_forward_pre_hook(lambda *_: seen()) for task in problem.tasks]


class Killed(BaseException):
    """As sudden as a kill, but for the test that goes on."""


@pytest.mark.parametrize(("name", "params"), LEARNERS)
def test_a_killed_fitting_goes_on_to_the_same_last_bit(name: str, params: dict[str, Any], tmp_path: Path) -> None:
    if name != "bayes":
        params = {**params, "restore_best_checkpoint": False}  # the last ones, which every step has made
    whole = planted.net_problem(state=tmp_path / "whole.json")
    passes = []
    hooks = with_model_calls(whole, lambda: passes.append(1))
    expected = learned(whole, name, **params)
    for hook in hooks:
        hook.remove()

    for share in (0.2, 0.55, 0.9):
        problem = planted.net_problem(state=tmp_path / f"killed-{share}.json")
        left = [int(share * len(passes))]
        hooks = with_model_calls(problem, lambda left=left: tick(left))
        with pytest.raises(Killed):
            learned(problem, name, **params)
        for hook in hooks:
            hook.remove()
        lines: list[str] = []
        found = learned(dataclasses.replace(problem, say=lines.append), name, **params)
        assert torch.equal(found.c, expected.c)
        assert list(found.history) == list(expected.history)
        assert (found.best_step, found.stopped) == (expected.best_step, expected.stopped)


def tick(left: list[int]) -> None:
    left[0] -= 1
    if left[0] < 0:
        raise Killed


def test_a_signal_ends_the_step_and_leaves_the_state(tmp_path: Path) -> None:
    expected = learned(planted.net_problem(), **SHORT)
    problem = planted.net_problem(state=tmp_path / "state.json")
    batches: list[int] = []

    def seen() -> None:
        batches.append(1)
        if len(batches) == 3 * 3 + 5 * 3:  # validation, then three tasks a step
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match=r"after step \d+: the same command goes on") as caught:
        learned(with_collate(problem, seen), **SHORT)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert 0 < files.read_json(tmp_path / "state.json")["step"] < 12
    assert torch.equal(learned(problem, **SHORT).c, expected.c)


def test_a_finished_fitting_is_not_repeated_and_another_one_starts_over(tmp_path: Path) -> None:
    lines: list[str] = []
    problem = planted.net_problem(state=tmp_path / "state.json", say=lines.append)
    params = {**SHORT, "restore_best_checkpoint": False}
    first, again = learned(problem, **params), learned(problem, **params)
    assert torch.equal(first.c, again.c) and first.history == again.history
    assert any("fitted before" in line for line in lines)
    other = learned(problem, **{**params, "seed": 1})
    assert any("another fitting" in line for line in lines)
    assert not torch.equal(other.c, first.c)


def test_what_is_kept_is_where_the_value_was_measured() -> None:
    """A learning rate that overshoots: the best evaluation is not the last."""
    problem = planted.planted({"a": 0.6, "b": 0.35})
    params = {"steps": 40, "eval_steps": 1, "learning_rate": 0.15}
    best = learned(problem, **params)
    last = learned(problem, **params, restore_best_checkpoint=False)
    values = {entry["step"]: entry for entry in best.history if "validation" in entry}
    assert best.best_step == min(values, key=lambda step: values[step]["validation"]) < 40
    assert values[best.best_step]["coefficients"] == dict(zip("ab", best.c.tolist(), strict=True))
    assert last.best_step is None
    assert values[40]["coefficients"] == dict(zip("ab", last.c.tolist(), strict=True))


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({}, 5 + 2),  # the best is measured at step 5
        ({"early_stopping_warmup_steps": 8}, 8 + 2),
        ({"min_optimizer_steps_before_early_stop": 15}, 15),
        ({"early_stopping_threshold": 1e9}, 2),  # nothing is better by so much, but for the first
        ({"early_stopping_patience": None}, 30),
    ],
)
def test_when_fitting_stops_early(options: dict[str, Any], end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([5.0, 4.0, 3.0, 2.0, 1.0, 0.5, *[2.0] * 100])

    def compared(self: Any, state: Any, value: float, c: Any, real: Any = descent._Run._compared) -> Any:
        return real(self, state, next(values), c)

    monkeypatch.setattr(descent._Run, "_compared", compared)
    patience = {"early_stopping_patience": 2, "early_stopping_warmup_steps": 0}
    steps = {"steps": 30, "eval_steps": 1, "min_optimizer_steps_before_early_stop": 0}
    found = learned(planted.planted({"a": 0.6, "b": 0.3}), **{**patience, **steps, **options})
    evaluated = [entry["step"] for entry in found.history if "validation" in entry]
    assert evaluated[-1] == end
    assert ("in a row" in found.stopped) == (end < 30)
    assert found.best_step == min(5, end)


def test_validation_is_of_all_tasks_or_none() -> None:
    problem = planted.net_problem()
    some = [dataclasses.replace(problem.tasks[0], validation=()), *problem.tasks[1:]]
    with pytest.raises(ConfigError, match="no validation rows for a, and others"):
        learned(dataclasses.replace(problem, tasks=some))
    none = dataclasses.replace(problem, tasks=[dataclasses.replace(task, validation=()) for task in problem.tasks])
    assert learned(none, **SHORT).best_step is None
    with pytest.raises(ConfigError, match="early_stopping_patience is set"):
        learned(none, early_stopping_patience=2)


def test_a_loss_that_is_not_finite_is_named() -> None:
    problem = planted.table_problem([float("nan"), 0.0], {"a": [1.0, 1.0]}, {"a": planted.answers(0, (1, 1))})
    with pytest.raises(NonFiniteLossError, match="the loss of a is NaN or infinite at step 0: lower learning_rate"):
        learned(problem)


def test_a_task_whose_adapter_is_no_better_than_the_base_is_left_out() -> None:
    rows = {"a": planted.answers(0, (0, 4)), "b": planted.answers(1, (0, 4))}
    problem = planted.table_problem([0.0, 0.0], {"a": [2.0, 0.5], "b": [0.0, -1.0]}, rows)
    with pytest.warns(UserWarning, match="left out, their own adapters being no better than the base: b$"):
        found = learned(problem, "regret_smoothmax", **{**SHORT, "learning_rate": 0.1})
    assert float(found.c[0]) > 0.6, "nothing speaks for b"
    hopeless = planted.table_problem([0.0], {"a": [-1.0]}, {"a": planted.answers(0, (0, 4))})
    with pytest.raises(ConfigError, match="nothing to recover"):
        learned(hopeless, "regret_smoothmax")


def test_a_tree_s_coefficients_are_those_of_the_merge_that_it_made() -> None:
    """The flat coefficients give the loss that the root measured, at every granularity and with an odd one out."""
    problem = planted.net_problem()
    for variant in ("task", "layer", "module", "direction"):
        found = learned(problem, hierarchical=True, variant=variant, **SHORT)
        root = [entry for entry in found.history if entry["node"] == "a+b+c" and entry["step"] == found.best_step]
        options = loading.load("supermerge", {"variant": variant, **SHORT}).descent
        with mounted(problem, options) as live:
            assert live.layout.keys == found.layout.keys
            losses = Losses(problem, live, "cross_entropy")
            again = {
                task.name: losses.measured(task, found.c, feeding.fixed_batches(task, options)).loss
                for task in problem.tasks
            }
        assert again == pytest.approx(root[-1]["validation_losses"], rel=1e-9)


def test_groups_compressed_say_what_they_lose() -> None:
    found = learned(planted.net_problem(), hierarchical=True, group_rank=2, **SHORT)
    told = [entry for entry in found.history if "error" in entry]
    assert [entry["node"] for entry in told] == ["a+b"] and 0.01 < told[0]["error"] < 1
    exact = learned(planted.net_problem(), hierarchical=True, group_rank=5, **SHORT)
    assert max(entry["error"] for entry in exact.history if "error" in entry) < 1e-6
    for params, message in (({"variant": "direction"}, "directions are lost"), ({"hierarchical": False}, "no groups")):
        with pytest.raises(ConfigError, match=message):
            learned(planted.net_problem(), **{"hierarchical": True, "group_rank": 2, **params})


def test_low_rank_groups_are_joined_so_the_root_holds_all_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they are compressed: then as many as its groups have."""
    held: list[int] = []

    def counted(model: Any, updates: Mapping[str, Any], *rest: Any, **more: Any) -> Any:
        held.append(max(sum(each.rank for each in of_adapters) for of_adapters in updates.values()))
        return mount(model, updates, *rest, **more)

    monkeypatch.setattr("lorica.merging.fitting.problem.mount", counted)
    for params, expected in (({}, [5, 6]), ({"group_rank": 2}, [5, 3])):
        held.clear()
        learned(planted.net_problem(), hierarchical=True, **SHORT, **params)
        assert held == expected  # ranks 2 and 3, then those with 1
