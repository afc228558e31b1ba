"""The embedded default: a language that never changes, tasks that teach, a base that knows none of the answers."""

from __future__ import annotations

import hashlib
import itertools
import json
from functools import reduce
from operator import add
from pathlib import Path

import pytest
from rich.console import Console

from lorica import config, models, runs
from lorica.adapters import peft_format
from lorica.demo import language
from lorica.models import DEMO_BASE

CHANCE = {"sentiment": 1 / 2, "emotion": 1 / 6, "intent": 1 / 7, "topic": 1 / 4}


def test_the_language_is_the_one_that_the_base_was_made_from() -> None:
    """An edit that changes a draw makes the shipped base stale: remake it with `python -m lorica.demo.make_base`."""
    digest = hashlib.sha256()
    for task, split in itertools.product(language.TASKS, language.SPLIT_ROWS):
        digest.update(json.dumps(language.examples(task, split)).encode())
    assert digest.hexdigest().startswith("03169793b9386dae")


@pytest.mark.parametrize("task", list(language.TASKS))
def test_a_task_is_large_balanced_and_disjoint(task: str) -> None:
    splits = {split: language.examples(task, split) for split in ("train", "dev", "test")}
    assert [len(rows) >= least for rows, least in zip(splits.values(), (600, 200, 400), strict=True)] == [True] * 3
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts)
    for rows in splits.values():
        counts = [sum(row["label"] == label for row in rows) for label in range(len(language.TASKS[task].labels))]
        assert max(counts) - min(counts) <= 1


def test_the_base_is_small_and_every_label_word_is_one_token() -> None:
    assert (DEMO_BASE / "model.safetensors").stat().st_size <= 3_000_000
    base = models.load("demo", kind="causal")
    assert 0.5e6 < sum(parameter.numel() for parameter in base.model.parameters()) < 2e6
    for word in language.label_words():
        assert len(base.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1


def test_adapters_learn_what_the_base_does_not_know_and_averaging_loses_some(tmp_path: Path) -> None:
    language.write_tasks(tmp_path / "data")
    adapters, single, zero_shot = [], {}, {}
    for task in language.TASKS:
        words = ["model=demo", f"task.path={tmp_path / 'data' / task}", "task.num_eval=200", "max_steps=100"]
        words += ["batch_size=8", "learning_rate=1e-2", f"output_dir={tmp_path / task}"]
        cfg = config.read(config.TrainConfig, words)
        trained = runs.train(cfg, Console(quiet=True))
        adapters.append(peft_format.read(trained.run.adapter))
        single[task] = trained.evaluation.metrics["accuracy"].value
        zero_shot[task] = accuracy(tmp_path, task, None)
        assert single[task] >= 0.90
        assert zero_shot[task] <= CHANCE[task] + 0.15
    peft_format.write(reduce(add, adapters) * (1 / len(adapters)), tmp_path / "average")
    averaged = {task: accuracy(tmp_path, task, tmp_path / "average") for task in language.TASKS}
    assert sum(single[task] - averaged[task] > 0.1 for task in language.TASKS) >= 2
    assert sum(averaged.values()) > sum(zero_shot.values())


def accuracy(folder: Path, task: str, adapter: Path | None) -> float:
    words = ["model=demo", f"task.path={folder / 'data' / task}", "task.num_eval=200"]
    found = runs.evaluate_target(str(adapter) if adapter else None, config.read(config.EvaluateConfig, words))
    return found.metrics["accuracy"].value
