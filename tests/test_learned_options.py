"""The options that learners share, and what they mean: sampling, parameterizations, other words, refusals."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import planted
from lorica.errors import ConfigError, UnknownNameError
from lorica.merging.fitting import feeding, loading, sampling
from lorica.merging.fitting.layout import Layout, layout
from lorica.merging.fitting.options import Descent, Strategy
from lorica.merging.fitting.parameterization import parameterization
from lorica.merging.fitting.problem import FittingTask


@pytest.mark.parametrize("strategy", ["uniform", "inverse", "sqrt_inverse", "balanced", "none"])
def test_how_often_each_label_is_drawn(strategy: Strategy) -> None:
    rows = [row for token, count in ((0, 64), (1, 16), (2, 4)) for row in planted.answers(token, (count, 0))]
    rows = [dataclasses.replace(row, label=row.tokens[0]) for row in rows]
    task = FittingTask("a", torch.nn.Identity(), rows, planted.COLLATE)
    shares = {
        "uniform": (64, 16, 4),
        "inverse": (1, 1, 1),
        "sqrt_inverse": (8, 4, 2),
        "balanced": (1, 1, 1),
        "none": (64, 16, 4),
    }[strategy]
    drawn = list(islice(sampling.batches(task, strategy, 12, seed=3), 400))
    counts = Counter(rows[index].label for batch in drawn for index in batch)
    total = sum(counts.values())
    assert [counts[label] / total for label in range(3)] == pytest.approx(
        [each / sum(shares) for each in shares], abs=0.025
    )
    if strategy == "balanced":
        assert all(Counter(rows[index].label for index in batch) == {0: 4, 1: 4, 2: 4} for batch in drawn)
    if strategy == "none":
        assert sorted(index for batch in drawn[:7] for index in batch) == list(range(84)), "a pass has each row once"
    assert list(islice(sampling.batches(task, strategy, 12, seed=3, start=17), 9)) == drawn[17:26]


def test_a_remainder_of_balanced_batches_goes_round() -> None:
    task = FittingTask("a", torch.nn.Identity(), planted.answers(0, (5, 9)), planted.COLLATE)
    drawn = list(islice(sampling.batches(task, "balanced", 3, seed=0), 10))
    assert Counter(task.rows[index].label for batch in drawn for index in batch) == {0: 15, 1: 15}


def test_sampling_is_of_each_task_or_its_own() -> None:
    plan = {"default": {"strategy": "inverse"}, "per_task": {"b": {"enabled": False, "strategy": "balanced"}}}
    found = loading.load("supermerge", {"sampling": plan}).descent.sampling
    assert (found.strategy("a"), found.strategy("b")) == ("inverse", "none")
    with pytest.raises(UnknownNameError, match=r"unknown task of sampling.per_task 'bb': did you mean b"):
        loading.load("supermerge", {"sampling": {"per_task": {"bb": {}}}})(planted.net_problem())
    with pytest.raises(ConfigError, match="sampling"):
        loading.load("supermerge", {"sampling": {"default": {"stratgy": "inverse"}}})


def test_batches_made_ahead_are_the_same() -> None:
    problem = planted.net_problem()
    here, ahead = (
        list(islice(feeding.step_batches(problem, Descent(dataloader_num_workers=workers), start=2), 5))
        for workers in (0, 2)
    )
    for left, right in zip(here, ahead, strict=True):
        for one, other in zip(left, right, strict=True):
            assert all(
                torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(one, other, strict=True)
            )


@pytest.mark.parametrize("granularity", ["task", "layer", "module", "direction"])
@pytest.mark.parametrize(
    ("name", "init"),
    [("free", -2.5), ("clip", 0.3), ("sigmoid_alpha", 0.3), ("tanh_alpha", -0.4), ("simplex_softmax_scaled", 0.3)],
)
def test_every_parameterization_starts_at_init(name: Any, init: float, granularity: Any) -> None:
    found = parameterization(name, some_layout(granularity), init)
    torch.testing.assert_close(
        found.coefficients(found.start),
        torch.full((len(some_layout(granularity).keys),), init).double(),
        rtol=1e-7,
        atol=0,
    )


@pytest.mark.parametrize("granularity", ["task", "layer", "module", "direction"])
def test_softmax_and_normalising_are_over_the_adapters_of_a_group(granularity: Any) -> None:
    layout = some_layout(granularity)
    for name, normalize in (("softmax", False), ("sigmoid_alpha", True)):
        made = parameterization(name, layout, 0.2, normalize)
        c = made.coefficients(made.start + torch.linspace(-1, 1, len(made.start), dtype=torch.float64))
        totals: dict[str, float] = {}
        for (group, _), value in zip(layout.keys, c.tolist(), strict=True):
            totals[group] = totals.get(group, 0.0) + value
        assert list(totals.values()) == pytest.approx([1.0] * len(totals))


def some_layout(granularity: Any) -> Layout:
    return layout(
        {"layers.0.q": (2, 3), "layers.0.v": (1, 1), "layers.1.q": (2, 2), "final": (1, 2)}, "ab", granularity
    )


def test_an_init_out_of_reach_is_refused() -> None:
    for params in ({"init": 1.0}, {"init": -0.1, "coefficient_parameterization": "simplex_softmax_scaled"}):
        with pytest.raises(ConfigError, match="out of reach"):
            loading.load("supermerge", params)(planted.net_problem())


@pytest.mark.parametrize(
    ("word", "option", "value"),
    [
        ("max_steps", "steps", 7),
        ("num_steps", "steps", 7),
        ("lr", "learning_rate", 0.5),
        ("gradient_estimator", "estimator", "spsa"),
        ("log_every", "logging_steps", 3),
        ("grad_accum_steps", "gradient_accumulation_steps", 2),
        ("early_stopping_min_delta", "early_stopping_threshold", 0.1),
    ],
)
def test_other_words_for_an_option(word: str, option: str, value: Any) -> None:
    assert getattr(loading.load("regret_smoothmax", {word: value}).descent, option) == value
    with pytest.raises(ConfigError, match="another word"):
        loading.load("regret_smoothmax", {word: value, option: value})


def test_no_option_is_silent() -> None:
    """Each is read somewhere in the package beside the place that states it."""
    package = Path(__file__).parents[1] / "src" / "lorica"
    read = "".join(path.read_text("utf-8") for path in package.rglob("*.py"))
    others = {"variant": "descent.granularity", "enforce_validation_only_selection": "self.enforce_validation"}
    words = {each.name: others.get(each.name, f"descent.{each.name}") for each in dataclasses.fields(Descent)}
    assert [name for name, word in words.items() if word not in read] == []


def test_what_options_stand_for_and_what_is_refused() -> None:
    assert loading.load("adamerging", {"granularity": "layer"}).descent.granularity == "layer"
    assert loading.load("adamerging", {"split": "validation"}).descent.split == "dev"
    assert loading.load("regret_smoothmax", {}).descent.learning_rate == 3e-4
    assert loading.load("adamerging", {}, seed=5).descent.seed == 5
    assert loading.load("adamerging", {"seed": 2}, seed=5).descent.seed == 2
    refused: list[tuple[str, Mapping[str, Any], str]] = [
        ("supermerge", {"learning_rat": 1}, "did you mean learning_rate"),
        ("supermerge", {"steps": -1}, "steps=-1"),
        ("supermerge", {"variant": "row_wise"}, "variant"),
        ("bayes", {"steps": 5}, "unknown option of optimizer bayes 'steps'"),
        ("supermerge", {"split": "test"}, "enforce_validation_only_selection=false"),
        ("supermerg", {}, "did you mean supermerge"),
    ]
    for name, params, message in refused:
        with pytest.raises(ConfigError, match=message):
            loading.load(name, params)
    given = {"split": "train", "enforce_validation_only_selection": False}
    assert loading.load("supermerge", given).descent.split == "train"
