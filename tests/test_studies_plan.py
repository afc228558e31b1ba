"""What a study says it will take is what it takes; what can be refused is refused before there is a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from command_line import lorica
from lorica import config, files, planning, runs
from lorica.config import AblateConfig, CompareConfig
from lorica.demo import language
from lorica.errors import LoricaError, ResumeError
from lorica.runs import Forecast, ready
from lorica.runs.studying.plan import forwards_of
from lorica.runs.studying.study import looked_ahead

TINY = (
    *("model=demo", "launcher=inline", "batch_size=2", "task.num_train=8", "task.num_dev=6", "task.num_eval=6"),
    *("device=cpu", "seeds=[0]"),
)
BY_HEAD = (
    "arms=[lora, full, linear_probe, {name: boosted, overrides: {adapter.kind: xgblora, boosting.judge: probe, "
    "boosting.probe_size: 8, boosting.ranks: [2, 1], boosting.layer_fraction: 0.3}}]",
    *("task.kind=classification", "num_epochs=1", "learning_rate=1e-3"),
)
BY_PROMPT = (
    "arms=[prefix, {name: zo, overrides: {trainer: zo}}, {name: both, overrides: {trainer: zo, zo.train: both}}]",
    *("max_steps=2", "gradient_accumulation_steps=2", "learning_rates=[1e-3]"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder


@pytest.fixture
def words(data: Path, tmp_path: Path) -> tuple[str, ...]:
    """Of a tiny study on a demo task, in the folder `study`."""
    return (*TINY, f"task.path={data / 'topic'}", f"output_dir={tmp_path / 'study'}")


def foreseen(*words: str) -> Forecast:
    return runs.plan_study(config.read(CompareConfig, words))


@pytest.mark.parametrize("arms", [BY_HEAD, BY_PROMPT])
def test_a_study_takes_what_its_plan_says(words: tuple[str, ...], arms: tuple[str, ...], tmp_path: Path) -> None:
    before = foreseen(*words, *arms)
    assert not (tmp_path / "study").exists()
    lorica("compare", *words, *arms)
    for arm in before.arms:
        records = [files.read_json(path) for path in (tmp_path / "study/runs" / arm.arm).rglob("record.json")]
        assert (len(records), arm.num_finished, arm.num_left) == (arm.num_runs, 0, arm.num_runs)
        for record in records:
            assert record["efficiency"]["num_trainable"] == arm.num_trainable
            assert record["efficiency"]["forwards"] == arm.num_forwards
        for path in (tmp_path / "study/runs" / arm.arm).rglob("trainer_state.json"):
            assert files.read_json(path)["step"] == arm.num_steps
    after = foreseen(*words, *arms)
    assert [each.num_finished for each in after.arms] == [each.num_runs for each in before.arms]
    assert (after.num_left, after.num_timed, after.seconds_left, after.num_runs) == (0, 0, 0.0, before.num_runs)


def test_what_is_left_takes_as_long_as_what_is_done(words: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    lorica("compare", *words, "arms=[lora]", "max_steps=1", "learning_rate=1e-3")
    snapshot = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    seconds = files.read_json(tmp_path / "study/runs/lora/topic/seed0/record.json")["timing"]["seconds"]
    kept = [each for each in words if not each.startswith(("seeds", "launcher"))]
    grown = (*kept, "seeds=[0, 1, 2, 3]", "arms=[lora, full]", "max_steps=1", "learning_rate=1e-3", "num_workers=2")
    found = foreseen(*grown)
    lora, full = found.arms
    assert (lora.num_finished, lora.num_left, lora.seconds) == (1, 3, seconds)
    assert (full.num_finished, full.num_left, full.seconds) == (0, 4, None)
    assert (found.num_left, found.num_timed, found.seconds_left) == (7, 3, pytest.approx(3 * seconds / 2))
    printed = " ".join(lorica("compare", *grown, "--plan").split())
    assert "7 runs are left, of 8; about" in printed and "hours by 2 workers" in printed
    assert "4 of them have none to go by" in printed
    resumed = " ".join(lorica("compare", f"resume={tmp_path / 'study'}", "--plan").split())
    assert "0 runs are left, of 1" in resumed and "about" not in resumed
    with pytest.raises(ResumeError, match=r"max_steps \(1, now 2\)"):
        foreseen(*words, "arms=[lora]", "max_steps=2", "learning_rate=1e-3")
    cache = tmp_path / "cache"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if cache not in path.parents} == {
        path: time for path, time in snapshot.items() if cache not in path.parents
    }


def test_memory_is_as_lorica_plan_finds_it(words: tuple[str, ...]) -> None:
    zo, told = "{name: zo, overrides: {trainer: zo}}", "{name: full zo, overrides: {adapter.kind: full, trainer: zo}}"
    given = config.read(CompareConfig, [*words, f"arms=[lora, full, {zo}, {told}, prefix]", "prefix.num_tokens=3"])
    _, known = looked_ahead(given)
    asked = {"targets": "standard", "rank": 8, "optimizer": "adamw", "batch_size": 2, "dtype": "float32"}
    ways = planning.plan("demo", **asked, length=known["lora", "topic"].length, num_prefix=3).ways  # type: ignore[arg-type]
    memory = {each.arm: each.memory_bytes for each in runs.plan_study(given).arms}
    assert [memory[arm] for arm in ("lora", "zo", "full", "full zo", "prefix")] == [way.total_bytes for way in ways[:5]]
    printed = lorica("compare", *words, "arms=[lora, linear_probe]", "task.kind=classification", "plan=true")
    assert "– where it knows none: linear probes" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("arm", "looked"),
    [
        ("{trainer: zo}", 4),
        ("{trainer: zo, adapter.kind: xgblora, boosting.merge_frequency: 1}", 4),
        ("{trainer: zo, adapter.kind: xgblora, boosting.use_adaptive_merge: true}", 4),
        ("{trainer: zo, zo.train: both}", 0),
        ("{trainer: backprop}", 0),
    ],
)
def test_a_budget_of_forwards_holds_what_goes_before_the_steps(words: tuple[str, ...], arm: str, looked: int) -> None:
    """And a step more would be beyond it."""
    given = (*words, "max_forwards=100", "learning_rate=1e-3", f"arms=[{{name: x, overrides: {arm}}}]")
    plan, known = looked_ahead(config.read(CompareConfig, given))
    (run,), before = plan.finals({}), known["x", "topic"].before
    assert (before.num_rows, before.num_forwards) == (8, looked) and run.cfg.max_steps
    assert forwards_of(run.cfg, run.cfg.max_steps, before) <= 100 < forwards_of(run.cfg, run.cfg.max_steps + 1, before)
    if looked:
        counted = files.read_records(runs.train(run.cfg, Console(quiet=True)).run.training_loss)[-1]["forwards"]
        assert counted == forwards_of(run.cfg, run.cfg.max_steps, before) == known["x", "topic"].num_forwards


def test_a_budget_of_forwards_that_cannot_be_held_is_refused(words: tuple[str, ...]) -> None:
    given = config.read(CompareConfig, [*words, "trainer=zo", "learning_rate=1", "arms=[lora]", "max_forwards=11"])
    with pytest.raises(LoricaError, match=r"max_forwards=11 .* step takes with the first look at 8 rows, which is 12"):
        looked_ahead(given)


def test_a_budget_in_seconds_leaves_the_steps_to_the_clock(words: tuple[str, ...]) -> None:
    found = foreseen(*words, "arms=[lora]", "max_seconds=5").arms[0]
    assert (found.num_steps, found.num_forwards, found.num_tuning, found.num_finals) == (None, None, 4, 1)


def test_ablations_and_searches_have_plans_too(words: tuple[str, ...], tmp_path: Path) -> None:
    found = runs.plan_study(config.read(AblateConfig, [*words, "type=rank"]))
    one, two, four = (each.num_trainable for each in found.arms)
    assert four == 2 * two == 4 * one and found.num_runs == 3
    assert "3 runs are left, of 3" in lorica("ablate", *words, "--type", "rank", "--plan")
    assert "7 runs are left, of 7" in lorica("sweep", "--mode", "sweep", *words, "--plan")
    assert not (tmp_path / "study").exists()


def test_a_task_is_read_once_for_all_arms(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    load = ready.load_task
    monkeypatch.setattr(ready, "load_task", lambda *args, **more: (read.append(more["path"]), load(*args, **more))[1])
    arms = "arms=[lora, full, {name: few, overrides: {task.num_train: 4}}]"
    looked_ahead(config.read(CompareConfig, [*TINY, "tasks=[topic, sentiment]", f"task.path={data}/{{task}}", arms]))
    assert read == [str(data / "topic"), str(data / "sentiment")]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("{task.num_train: 99999}", "99999 examples of topic's train split were asked for"),
        ("{adapter.targets: [nothing]}", "adapter.targets='nothing' matches no module"),
        ("{adapter.rank: 1000}", "adapter.rank=1000 is larger than"),
        ("{adapter.kind: xgblora, boosting.ranks: [1, 1000]}", "adapter.rank=1000 is larger than"),
        ("{adapter.profile: portable, task.kind: classification}", "portable cannot carry a head"),
        ("{train_as: lm, task.kind: classification}", "train_as=lm trains the words of an answer"),
        ("{adapter.kind: prefix, task.kind: classification}", "before the prompt of a causal model"),
        ("{trainer: zo, base_dropout: true}", "base_dropout=true under trainer=zo"),
        ("{boosting.patience: 3}", "adapter.kind=lora does not boost"),
        (
            "{task.template: 'What is it about? What is it about? {text}', task.max_length: 8}",
            "finds no room",
        ),
        ("{task.template: '{text} {nobody}'}", "nobody"),
        ("{trackers: [nobody]}", "unknown tracker 'nobody'"),
        ("{device: 'cuda:99'}", "device='cuda:99' cannot be used"),
    ],
)
def test_an_arm_is_refused_before_any_folder(words: tuple[str, ...], tmp_path: Path, arm: str, message: str) -> None:
    shared = [each for each in words if not each.startswith("device")]
    with pytest.raises(LoricaError, match=r"^arm 'wrong' on topic: ") as caught:
        lorica("compare", *shared, f"arms=[lora, {{name: wrong, overrides: {arm}}}]", "max_steps=1")
    assert message in str(caught.value)
    assert not (tmp_path / "study").exists()


def test_a_plan_is_refused_as_the_study_is(words: tuple[str, ...]) -> None:
    with pytest.raises(LoricaError, match=r"^arm 'lora' on topic: .* matches no module"):
        lorica("compare", *words, "arms=[lora]", "adapter.targets=[nothing]", "--plan")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": 1, "test": 3}, "the dev split is empty"),
        ({"train": 9, "dev": 3, "test": 0}, "the test split is empty"),
        ({"train": 1, "dev": 3, "test": 3}, "no training example has label number"),
    ],
)
def test_a_split_that_is_too_small_is_found_before_the_first_run(
    data: Path, tmp_path: Path, splits: dict[str, int], message: str
) -> None:
    """The second task's, which the runs of the first would have come before."""
    for task in ("topic", "short"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "meta.json").write_text((data / "topic/meta.json").read_text())
        for split in ("train", "dev", "test"):
            lines = (data / "topic" / f"{split}.jsonl").read_text().splitlines()
            num_lines = len(lines) if task == "topic" else splits.get(split)
            if num_lines is not None:
                (tmp_path / task / f"{split}.jsonl").write_text("".join(f"{each}\n" for each in lines[:num_lines]))
    words = ["arms=[linear_probe]", "tasks=[topic, short]", f"task.path={tmp_path}/{{task}}"]
    with pytest.raises(LoricaError, match=rf"^arm 'linear_probe' on short: .*{message}"):
        lorica("compare", *words, f"output_dir={tmp_path / 'study'}")
    assert not (tmp_path / "study").exists()
