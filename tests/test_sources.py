"""Tasks from folders, files and hub repositories; every fault in the data is named by its row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorica import config
from lorica.errors import ConfigError, DataError, LoricaError, MissingPathError, UnknownNameError
from lorica.runs.training.learning import warn_of_fewer
from lorica.tasks import base
from lorica.tasks.base import SPLITS, Prompt, draw, subset
from lorica.tasks.sources import CATALOG, load_task
from lorica.tasks.templates import option_texts, render

ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(40)]


def write_folder(folder: Path, rows: list[dict[str, Any]] = ROWS, **meta: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "meta.json").write_text(json.dumps({"name": "mine", "labels": ["bad", "good"], **meta}))
    return folder


def write_csv(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", CATALOG.names())
def test_a_catalog_task_asks_about_all_its_labels(name: str) -> None:
    spec = CATALOG.load(name, "TASK")
    for prompt in spec.prompts.values() if spec.has_label_words else ():
        assert set(prompt.verbalizer) == set(spec.labels)
        words = option_texts(prompt, spec.labels, dict.fromkeys(spec.texts, "x"))
        assert len(set(words)) == len(words)
    assert "(" in CATALOG.summary(name)


@pytest.mark.parametrize(
    ("name", "fields", "prompt", "options"),
    [
        ("sst2", {"text": "a film"}, "a film It was", [" terrible", " great"]),
        ("rte", {"a": "P.", "b": "H."}, 'P.\nDoes this mean that "H." is true? Yes or No?\n', ["Yes", "No"]),
        ("cb", {"a": "P.", "b": "H"}, 'Suppose P. Can we infer that "H"? Yes, No, or Maybe?\n', ["Yes", "No", "Maybe"]),
        ("boolq", {"passage": "P.", "question": "is it so?"}, "P. Is it so?\n", ["No", "Yes"]),
    ],
)
def test_prompts_are_the_fields_own(name: str, fields: dict[str, str], prompt: str, options: list[str]) -> None:
    spec = CATALOG.load(name, "TASK")
    asked = spec.prompts["default"]
    assert render(asked.template, spec.prepare(fields) if spec.prepare else fields) == prompt
    assert option_texts(asked, spec.labels) == options


def test_a_folder_is_read_by_its_own_description(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", prompt="{text} ?", verbalizer={"bad": "no", "good": "yes"})
    task = load_task(None, kind="choice", path=str(folder))
    assert (task.name, task.labels, task.prompt) == (
        "mine",
        ("bad", "good"),
        Prompt("{text} ?", {"bad": "no", "good": "yes"}),
    )
    assert [len(task.splits[split]) for split in SPLITS] == [20, 20, 40]


def test_labels_are_matched_by_name_not_by_number(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", labels=["positive", "negative"])
    task = load_task("sst2", kind="choice", path=str(folder))
    assert task.labels == ("negative", "positive")
    assert [example.label for example in task.splits["test"]][:2] == [1, 0]


@pytest.mark.parametrize("write", [write_csv, write_parquet, write_jsonl])
def test_a_file_of_any_format_gives_the_same_task(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / f"rows.{write.__name__.removeprefix('write_')}")
    task = load_task(f"file:{path}", kind="classification", num_dev=5, num_eval=10)
    assert [len(task.splits[split]) for split in SPLITS] == [25, 5, 10]
    texts = [example.fields["text"] for split in SPLITS for example in task.splits[split]]
    assert sorted(texts) == sorted(row["text"] for row in ROWS)


def test_a_hub_data_set_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def stored(repository: str, config: str | None) -> Any:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
        )
        rows = datasets.Dataset.from_list(ROWS, features=features)
        return datasets.DatasetDict({"train": rows, "validation": rows})

    monkeypatch.setattr(datasets, "load_dataset", stored)
    task = load_task("hub:someone/reviews", kind="classification")
    assert task.labels == ("bad", "good") and len(task.splits["test"]) == 40


@pytest.mark.parametrize(("label", "size"), [(-1, 40), (1, 3)])
def test_a_hub_test_split_is_the_test_split_unless_its_labels_are_withheld(
    monkeypatch: pytest.MonkeyPatch, label: int, size: int
) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    tested = datasets.Dataset.from_list([{"text": "x", "label": label}] * 3)
    found = datasets.DatasetDict({"train": rows, "validation": rows, "test": tested})
    monkeypatch.setattr(datasets, "load_dataset", lambda repository, config: found)
    task = load_task("hub:someone/reviews:some", kind="classification", labels=["bad", "good"])
    assert (len(task.splits["test"]), len(task.splits["dev"])) == (size, 20 if label == -1 else 40)


def test_missing_splits_are_cut_from_train_without_overlap(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl")
    first, second = (load_task(f"file:{path}", kind="classification", num_dev=5, num_eval=10) for _ in range(2))
    assert first.splits == second.splits
    texts = [{example.fields["text"] for example in first.splits[split]} for split in SPLITS]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        ([{"txt": "a", "label": 0}] * 4, {}, ["line 1", "'text'", "txt", "task.columns.text"]),
        ([*ROWS, {"label": 0}], {}, ["line 41", "'text'"]),
        ([{"text": "a", "labl": 0}] * 4, {}, ["line 1", "'label'", "task.label_column"]),
        ([*ROWS, {"text": "a", "label": 7}], {}, ["line 41", "unknown label 7", "bad, good"]),
        ([*ROWS, {"text": "a", "label": "ugly"}], {}, ["line 41", "'ugly'", "bad, good"]),
        ([{"text": None, "label": 0}], {}, ["line 1", "'text'"]),
        (ROWS, {"columns": {"text": "review"}}, ["'review'", "task.columns.text"]),
        (ROWS, {"template": "{text.__class__}"}, ["text.__class__", "plain field name"]),
        (ROWS, {"template": "{body} ?"}, ["'body'"]),
        (ROWS, {"template": "{text"}, ["task.template"]),
        (ROWS, {"verbalizer": {"bad": "no"}, "template": "{text}"}, ["'good'", "task.verbalizer"]),
        ([], {}, ["empty"]),
    ],
)
def test_a_fault_in_the_data_is_named(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], told: list[str]
) -> None:
    folder = write_folder(tmp_path / "t", rows, prompt="{text} It was", verbalizer={"bad": "bad", "good": "good"})
    with pytest.raises((DataError, ConfigError)) as caught:
        load_task(None, kind="choice", path=str(folder), **options)
    assert all(part in str(caught.value) for part in told), caught.value


@pytest.mark.parametrize(
    ("name", "options", "kind", "told"),
    [
        ("sst3", {}, UnknownNameError, "sst2"),
        (None, {}, ConfigError, "task.name"),
        ("sst2", {"path": "nowhere"}, MissingPathError, "nowhere"),
        ("file:nowhere.csv", {}, MissingPathError, "nowhere.csv"),
        ("sst2", {"path": "t", "more_files": {"dev": "dev.csv"}}, ConfigError, "task.files"),
        ("file:rows.txt", {}, ConfigError, ".jsonl, .csv, .parquet"),
        ("sst2", {"prompt": "fancy", "path": "t"}, UnknownNameError, "fancy"),
    ],
)
def test_a_task_that_is_not_there_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str | None,
    options: dict[str, Any],
    kind: type[LoricaError],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "t", labels=["negative", "positive"])
    with pytest.raises(kind, match=told):
        load_task(name, kind="choice", **options)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_broken_file_is_a_data_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text('text,label\n"a",0,3\n' if suffix == "csv" else "{broken")
    with pytest.raises(DataError, match="rows"):
        load_task(f"file:{path}", kind="classification")


def test_a_stratified_subset_keeps_every_share() -> None:
    labels = [0] * 60 + [1] * 30 + [2] * 10
    for seed in range(5):
        picked = [labels[i] for i in draw(labels, 20, base.randomness.python_generator(seed), stratified=True)]
        assert [picked.count(label) for label in range(3)] == [12, 6, 2]


def test_a_subset_is_cached_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(None, kind="classification", path=str(write_folder(tmp_path / "t")))
    first = subset(task, "test", 7, seed=1, stratified=True)
    monkeypatch.setattr(base, "draw", lambda *_: pytest.fail("drawn again"))
    assert subset(task, "test", 7, seed=1, stratified=True) == first
    assert subset(task, "test", None, seed=1, stratified=True) == list(task.splits["test"])


def test_fewer_examples_than_were_asked_for_are_all_taken_and_told(tmp_path: Path) -> None:
    """As mezo.sh's EVAL=1000 takes RTE's 277."""
    task = load_task(None, kind="classification", path=str(write_folder(tmp_path / "t")))
    everything = list(task.splits["test"])
    assert subset(task, "test", len(everything) + 1, seed=1, stratified=False) == everything
    told = io.StringIO()
    rows: Any = {"train": everything, "test": everything}
    warn_of_fewer(
        rows, config.TaskConfig(num_train=len(everything), num_eval=len(everything) + 1), Console(file=told, width=200)
    )
    assert told.getvalue() == "warning: 41 test examples were asked for, and there are 40: all are taken\n"
