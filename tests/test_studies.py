"""What a study plans, and what it makes of its runs: budgets, arms, rates, intervals and verdicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica import config
from lorica.config import LEARNING_RATE_SEARCH, AblateConfig, CompareConfig
from lorica.demo import language
from lorica.errors import ConfigError, LoricaError, MissingPathError, UnknownNameError
from lorica.evaluation.predictions import read_values
from lorica.runs.studying.plan import StudyPlan, forwards_per_step, planned
from lorica.runs.studying.study import looked_ahead
from lorica.studies import curves
from lorica.studies.comparison import Interval, interval

T975 = {2: 12.706205, 3: 4.302653, 4: 3.182446, 10: 2.262157}  # of num − 1 degrees of freedom, from printed tables
SHIPPED = Path(__file__).parents[1] / "configs" / "lora_learning_rate.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder


@pytest.fixture
def compared(data: Path) -> Any:
    """The plan of `lorica compare WORDS` on a demo task."""

    def plan(*words: str) -> StudyPlan:
        return planned(config.read(CompareConfig, [f"task.path={data / 'topic'}", *words]))

    return plan


def finals(plan: StudyPlan) -> dict[str, Any]:
    """Arm -> the config of its first run."""
    return {each.arm: each.cfg for each in reversed(plan.finals(plan.every_choice()[0]))}


def test_an_arm_may_have_a_grid_of_its_own(compared: Any) -> None:
    own, told = "{name: full, learning_rates: [1e-5, 1e-4]}", "{name: told, overrides: {learning_rate: 1}}"
    plan = compared(f"arms=[lora, {own}, linear_probe, {told}]", "learning_rates=[1e-4, 1e-3]")
    assert [(each.arm, each.learning_rate) for each in plan.tuning()] == [
        *(("lora", rate) for rate in (1e-4, 1e-3)),
        *(("full", rate) for rate in (1e-5, 1e-4)),
    ]


def test_every_arm_is_tuned_from_one_grid_on_dev_and_told_of_test(compared: Any) -> None:
    plan = compared("arms=[lora, full]", "learning_rates=[1e-4, 1e-3]", "max_steps=7", "batch_size=3", "seeds=[0, 1]")
    tuning = plan.tuning()
    assert [(each.arm, each.learning_rate, each.seed) for each in tuning] == [
        (arm, rate, 100) for arm in ("lora", "full") for rate in (1e-4, 1e-3)
    ]
    assert {(each.cfg.eval_split, each.cfg.max_steps, each.cfg.batch_size) for each in tuning} == {("dev", 7, 3)}
    runs = plan.finals({("lora", "topic"): 1e-3, ("full", "topic"): None})  # no rate of full has finished
    assert [(each.arm, each.seed, each.cfg.learning_rate) for each in runs] == [("lora", 0, 1e-3), ("lora", 1, 1e-3)]
    assert {each.cfg.eval_split for each in runs} == {"test"}
    assert str(runs[0].folder) == "runs/lora/topic/seed0-lr0.001"
    assert len({each.hash for each in [*tuning, *runs]}) == 6


def test_shared_keys_go_to_the_arms_that_have_them(compared: Any) -> None:
    words = ("--lora_rank", "2", "--lora_alpha", "16", "--xgblora_steps_per_iteration", "5", "adapter.targets=extended")
    arms = finals(compared(*words, "arms=[lora, xgblora, full, prefix, linear_probe]", "prefix.num_tokens=3"))
    assert (arms["lora"].adapter.rank, arms["lora"].adapter.alpha) == (2, 16)
    assert (arms["xgblora"].adapter.rank, arms["xgblora"].boosting.steps_per_iteration) == (1, 5)
    assert {arms[name].adapter.targets for name in ("lora", "xgblora")} == {"extended"}
    assert {name: arms[name].adapter.kind for name in arms} == {name: name for name in arms}
    assert arms["prefix"].prefix.num_tokens == 3
    assert arms["linear_probe"].max_steps == 0 and arms["full"].max_steps == 1000


def test_a_zeroth_order_key_means_zeroth_order(compared: Any) -> None:
    arms = finals(compared("--zo_eps", "1e-2", "--learning_rate", "1e-5"))
    assert {each.trainer for each in arms.values()} == {"zo"}
    assert {each.learning_rate for each in arms.values()} == {1e-5}
    arms = finals(compared("arms=[lora, {name: by zo, overrides: {trainer: zo, zo.epsilon: 0.1}}]", "learning_rate=1"))
    assert (arms["lora"].trainer, arms["by zo"].trainer, arms["by zo"].zo.epsilon) == ("backprop", "zo", 0.1)


def test_arms_may_be_any_overrides(compared: Any) -> None:
    arms = finals(compared("arms=[lora, {adapter.rank: 2, schedule: cosine}, {name: full, overrides: {warmup: 0.1}}]"))
    assert list(arms) == ["full", "rank=2 schedule=cosine", "lora"]
    assert (arms["rank=2 schedule=cosine"].adapter.rank, arms["rank=2 schedule=cosine"].schedule) == (2, "cosine")
    assert (arms["full"].adapter.kind, arms["full"].warmup) == ("full", 0.1)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["max_steps=40"], {"lora": 40, "zo": 40}),
        (["max_forwards=400"], {"lora": 400, "zo": 44}),  # and a warm start of 17 batches
        (["max_forwards=400", "gradient_accumulation_steps=2"], {"lora": 200, "zo": 22}),
        ([], {"lora": 1000, "zo": 1000}),
    ],
)
def test_a_budget_is_the_same_for_every_arm(compared: Any, words: list[str], steps: dict[str, int]) -> None:
    arms = finals(compared("arms=[lora, {name: zo, overrides: {trainer: zo}}]", "learning_rate=1e-3", *words))
    assert {name: cfg.max_steps for name, cfg in arms.items()} == steps


def test_a_budget_in_seconds_or_epochs(compared: Any) -> None:
    lora = finals(compared("max_seconds=60"))["lora"]
    assert (lora.max_seconds, lora.schedule) == (60, "constant")
    assert config.check(config.TrainConfig, lora.model_dump(mode="json")) == lora
    assert finals(compared("num_epochs=2"))["lora"].num_epochs == 2


@pytest.mark.parametrize(("estimator", "probes"), [("spsa", 2), ("one_sided", 1), ("forward_gradient", 2)])
def test_forwards_of_a_step(estimator: str, probes: int) -> None:
    words = ["trainer=zo", f"zo.estimator={estimator}", "zo.num_directions=3"]
    cfg = config.read(config.TrainConfig, words).resolved()
    assert forwards_per_step(cfg) == 3 * probes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arms=[lora, lroa]"], "unknown arm 'lroa': did you mean lora"),
        (
            ["arms=[{name: a/b, overrides: {warmup: 1}}, {name: a b, overrides: {warmup: 1}}]"],
            "two arms are called",
        ),
        (["boosting.patience=3", "arms=[lora, full]"], "boosting.patience=3 is set, and no arm takes it"),
        (["lora.rank=3", "arms=[full]"], "lora.rank is set, and no arm is of kind lora"),
        (["adapter.rank=4", "arms=[{adapter.rank: 2}]"], "adapter.rank=4 is set, and no arm takes it as it is"),
        (["adapter.kind=full"], "adapter.kind=full is what arms differ in"),
        (["arms=[{adapter.rnak: 2}]"], "arm 'rnak=2' on topic: unknown key 'adapter.rnak': did you mean adapter.rank"),
        (["max_steps=3", "max_seconds=3"], "max_steps and max_seconds are both given"),
        (
            ["max_forwards=3", "trainer=zo"],
            "arm 'lora' on topic: max_forwards=3 is less than one step takes, which is 8",
        ),
        (["seed=3"], "seed is no key of a study: a study takes seeds"),
        (["learning_rate=1e-3", "tune=true"], "learning_rate=0.001 is every arm's rate, and tune=true"),
        (["tune=false", "learning_rates=[1]"], "learning_rates is set, and tune=false"),
        (["arms=[lora, {name: full, learning_rates: [1]}]"], "4 of lora, 1 of full; for a fair comparison"),
        (["arms=[{name: full, learning_rates: [1]}]", "tune=false"], "arm 'full' has learning_rates, and tune=false"),
        (["max_seconds=3", "schedule=linear"], "arm 'lora' on topic: schedule=linear is laid over a run's steps"),
        (["arms=[{name: lora, overrides: {seed: 3}}]"], "arm 'lora' sets seed, which is the same for every arm"),
        (["arms=[{max_steps: 3}]"], "arm 'max_steps=3' sets max_steps, which is the same for every arm"),
        (["tasks=[topic, sentiment]"], "is one folder, and tasks names several"),
        (["no_such_key=1"], "unknown key 'no_such_key'"),
        (["seeds=[0, 0]"], "two runs would lie in runs/lora/topic/seed0-lr3e-05: give each"),
        (["learning_rates=[1e-3, 1.0000001e-3]"], "two runs would lie in runs/lora/topic/tuning/seed100-lr0.001"),
    ],
)
def test_what_is_refused_before_anything_runs(compared: Any, words: list[str], message: str) -> None:
    with pytest.raises(LoricaError) as caught:
        compared(*words)
    assert message in str(caught.value)


def test_several_tasks_from_one_place(data: Path) -> None:
    plan = planned(config.read(CompareConfig, ["--tasks", "topic", "sentiment", f"task.path={data}/{{task}}"]))
    assert {each.cfg.task.path for each in plan.tuning()} == {str(data / "topic"), str(data / "sentiment")}
    with pytest.raises(MissingPathError, match="did you mean topic"):
        planned(config.read(CompareConfig, ["--tasks", "topci", f"task.path={data}/{{task}}"]))
    with pytest.raises(UnknownNameError, match=r"arm 'lora' on sst3x: .*did you mean sst5 or sst2"):
        looked_ahead(config.read(CompareConfig, ["task=sst3x"]))
    with pytest.raises(ConfigError, match="a study needs a task"):
        planned(config.read(CompareConfig, []))


def test_ablations() -> None:
    def arms(*words: str) -> list[dict[str, Any]]:
        return [each.overrides for each in config.read(AblateConfig, list(words)).arms]

    assert arms("type=rank") == [{"adapter.rank": rank, "adapter.alpha": 2 * rank} for rank in (4, 8, 16)]
    assert arms("--ablation-type", "alpha") == [{"adapter.alpha": alpha, "adapter.rank": 8} for alpha in (8, 16, 32)]
    assert [each["adapter.targets"] for each in arms("type=modules")] == ["standard", "extended", "all-linear"]
    grid = arms("--grid", '{"adapter.rank": [4, 8], "learning_rate": [1e-4, 1e-3]}')
    assert grid == [{"adapter.rank": rank, "learning_rate": rate} for rank in (4, 8) for rate in (1e-4, 1e-3)]
    for words in (["type=rank", 'grid={"warmup": [1]}'], ["type=grid"], []):
        with pytest.raises(ConfigError, match=r"both given|an ablation needs"):
            config.read(AblateConfig, words)
    with pytest.raises(UnknownNameError):
        config.read(AblateConfig, ["type=rank", "arms=[lora]"])


def test_an_ablation_varies_one_thing(data: Path) -> None:
    plan = planned(config.read(AblateConfig, ["type=rank", f"task.path={data / 'topic'}"]))
    assert plan.tuning() == [] and {each.learning_rate for each in finals(plan).values()} == {1e-3}
    tuned = planned(config.read(AblateConfig, ["type=rank", f"task.path={data / 'topic'}", "learning_rates=[1e-4]"]))
    assert len(tuned.tuning()) == 3


def test_the_shipped_search_is_the_one_of_the_verb() -> None:
    shipped = config.read(CompareConfig, [str(SHIPPED)])
    assert shipped == config.read(CompareConfig, ["--task", "mrpc"], LEARNING_RATE_SEARCH)
    assert (shipped.seeds, shipped.learning_rates, shipped.run["warmup"]) == ([42, 1337, 2024], [1e-4, 3e-4], 0.06)


def test_a_written_study_reads_back_the_same(tmp_path: Path) -> None:
    compared = ["--zo_eps", "1e-3", "--lora_r", "2", "task=sst2", "arms=[lora, {warmup: 3}]"]
    for kind, words in ((CompareConfig, compared), (AblateConfig, ["type=alpha"])):
        cfg = config.read(kind, words)
        file = tmp_path / "study.yaml"
        file.write_text(config.dump(cfg))
        assert config.read(kind, [str(file)]) == cfg
    changed = config.read(AblateConfig, [str(file), "batch_size=3", "task=sst2", "task.num_eval=5"])
    assert changed.run == {"batch_size": 3, "task": {"name": "sst2", "num_eval": 5}}
    file.write_text(config.dump(changed))
    again = config.read(AblateConfig, [str(file), "batch_size=4", "task.num_eval=6"])
    assert again.run == {"batch_size": 4, "task": {"name": "sst2", "num_eval": 6}}


values = st.lists(st.floats(-1, 1), min_size=2, max_size=4)


@given(values)
def test_an_interval_over_seeds_is_students(means: list[float]) -> None:
    found = interval(means)
    mean, half = np.mean(means), T975[len(means)] * np.std(means, ddof=1) / math.sqrt(len(means))
    np.testing.assert_allclose([found.mean, found.low, found.high], [mean, mean - half, mean + half], atol=1e-5)
    assert found.num_seeds == len(means)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_both_samples_widen_an_interval_and_swapping_arms_flips_it(seeds: int, tasks: int, draw: int) -> None:
    generator = np.random.default_rng(draw)
    examples = [generator.integers(-1, 2, (seeds, 10)).astype(float) for _ in range(tasks)]
    means = [float(np.mean([task[seed].mean() for task in examples])) for seed in range(seeds)]
    found = interval(means, examples)
    variance = sum(task.mean(axis=0).var(ddof=1) / 10 for task in examples) / tasks**2
    over_seeds = T975[seeds] ** 2 * np.var(means, ddof=1) / seeds if seeds > 1 else 0.0
    half = math.sqrt(T975[10] ** 2 * variance + over_seeds)
    np.testing.assert_allclose([found.low, found.high], [np.mean(means) - half, np.mean(means) + half], atol=1e-5)
    swapped = interval([-each for each in means], [-each for each in examples])
    assert (swapped.mean, swapped.low, swapped.high) == (-found.mean, -found.high, -found.low)
    flips = {"better": "worse", "worse": "better", "no difference shown": "no difference shown"}
    assert swapped.verdict() == flips[found.verdict()] == found.verdict(higher_is_better=False)


def test_verdicts() -> None:
    assert Interval(0.2, 0.1, 0.3, 3).verdict() == "better"
    assert Interval(-0.2, -0.3, -0.1, 3).verdict() == Interval(0.2, 0.1, 0.3, 3).verdict(False) == "worse"
    assert Interval(0.2, 0.0, 0.4, 3).verdict() == "no difference shown"
    assert interval([0.5]).verdict() == "no difference shown" and interval([0.5]).low is None
    assert interval([]) == Interval()
    one = interval([0.5], [np.array([[1.0, 0.0, 1.0, 0.0]])])  # a single seed: the examples alone
    assert one.low == pytest.approx(0.5 - T975[4] * np.std([1, 0, 1, 0], ddof=1) / 2, abs=1e-5)


def test_what_each_example_adds_to_a_score(tmp_path: Path) -> None:
    rows = {"prediction": ["a cat", "dog"], "golds": [["the cat", "a mouse"], ["a big dog"]]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "p.parquet")
    np.testing.assert_allclose(read_values(tmp_path / "p.parquet", "f1"), [1.0, 2 / 3])
    np.testing.assert_allclose(read_values(tmp_path / "p.parquet", "accuracy"), [0.0, 0.0])
    assert read_values(tmp_path / "p.parquet", "macro_f1") is None


def test_losses_are_smoothed_and_their_median_drawn(tmp_path: Path) -> None:
    loss = np.array([4.0, 2.0, 2.0])
    np.testing.assert_allclose(curves.smoothed(loss, 0.5), [4.0, 3.0, 2.5])
    steps = [{"step": at + 1, "loss": loss, "applied": True} for at, loss in enumerate([4, 2, 2])]
    spoilt = {"step": 4, "loss": None, "applied": False}
    others = [{**each, "loss": 2} for each in steps[:2]]
    drawn = [curves.Curve("=lora", "_t$x$😀", each) for each in ([*steps, spoilt], others)]
    curves.draw_losses(drawn, tmp_path / "loss.png", unit="steps", smoothing=0.0)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "loss.svg").read_text()
    assert (tmp_path / "loss.csv").read_text() == (
        "task,arm,step,loss\n_t$x$😀,'=lora,1.0,3.0\n_t$x$😀,'=lora,2.0,2.0\n"
    )
    svg = (tmp_path / "loss.svg").read_bytes()
    curves.draw_losses(drawn, tmp_path / "loss.png", unit="steps", smoothing=0.0)
    assert (tmp_path / "loss.svg").read_bytes() == svg
