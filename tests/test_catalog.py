"""Every task of the catalog on made-up rows as the hub has them: read, asked as MATH.md says, trained on, evaluated."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from torch import nn

import tiny
from catalog_cases import CASES, RIGHT
from lorica import config, models, runs
from lorica.adapters import injection
from lorica.config import EvaluateConfig, TrainConfig
from lorica.errors import ConfigError, DataError, UnknownNameError
from lorica.evaluation.evaluate import Evaluation, evaluate
from lorica.evaluation.predictions import read_values, write_predictions
from lorica.models import Base
from lorica.optim.backprop import backprop
from lorica.runs.ready import train_as_of
from lorica.tasks.base import Example, Prompt, Task, TrainAs
from lorica.tasks.batching import Batch, collate
from lorica.tasks.objectives import LossModule
from lorica.tasks.prompting import Choice, ask, encode
from lorica.tasks.sources import CATALOG, load_task
from lorica.tasks.templates import fields_of
from lorica.training.fit import MAX_STEPS, fit

MAX_LENGTH = 300


every_task = pytest.mark.parametrize("name", sorted(CASES))
Loader = Callable[..., Task]


@pytest.fixture
def from_hub(monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Loads a task from the hub, where a repository stands that holds the case's rows, in each split five times."""
    import datasets

    def load(name: str, **options: Any) -> Task:
        case = CASES[name]
        hub = CATALOG.load(name, "TASK").hub

        def stored(repository: str, configuration: str | None) -> Any:
            assert (repository, configuration) == (hub.repository, hub.config)
            rows = datasets.Dataset.from_list(list(case.rows) * 5)
            if case.names is not None:
                rows = rows.cast_column(case.of_names, datasets.ClassLabel(names=list(case.names)))
            return datasets.DatasetDict(dict.fromkeys(case.splits, rows))

        monkeypatch.setattr(datasets, "load_dataset", stored)
        return load_task(name, **{"kind": "choice", **options})

    return load


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny model that reads long prompts."""
    folder = tmp_path_factory.mktemp("long")
    words = tiny.tokenizer("causal")
    words.save_pretrained(folder)
    long = tiny.config("opt", len(words))
    long.max_position_embeddings = MAX_LENGTH
    tiny.CLASSES["causal"].from_config(long).save_pretrained(folder)
    return models.load(str(folder), kind="causal")


def test_every_task_has_a_case() -> None:
    assert sorted(CASES) == CATALOG.names()


@every_task
def test_a_task_is_asked_as_the_field_asks_it(from_hub: Loader, name: str) -> None:
    case, task = CASES[name], from_hub(name)
    first = task.splits["train"][0]
    asked = ask(task, first)
    assert asked.prompt == case.prompt
    expected = case.options or [f" {word}" for word in case.names_of_options]
    assert set(expected) <= set(asked.options)
    assert not case.options or list(asked.options) == list(case.options)
    assert asked.options[first.label] == RIGHT[name]


@every_task
def test_a_task_is_read_trained_on_and_evaluated(
    from_hub: Loader, base: Base, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    task = from_hub(name)
    unlabelled = sum(row.get("label") == -1 or row.get("intent") == 150 for row in CASES[name].rows)
    num_rows = 5 * (len(CASES[name].rows) - unlabelled)
    assert len(task.splits["test"]) == num_rows
    rows = encode(task, task.splits["test"], base.tokenizer, max_length=MAX_LENGTH)
    make_batch = partial(collate, pad_token_id=base.tokenizer.pad_token_id, max_length=MAX_LENGTH)
    train_as = train_as_of("auto", "loss", task)
    live = injection.inject(base.model, tiny.adapter(base.model, models.target_modules(base, "standard")))
    request.addfinalizer(lambda: injection.remove(live))
    _assert_a_step_lowers_the_loss(base, live.trainable(), make_batch(rows[:2], gold_only=train_as == "lm"), train_as)
    found = evaluate(base.model, task, "test", rows, make_batch, batch_size=4, tokenizer=base.tokenizer)
    assert tuple(found.metrics) == task.metrics and {score.n for score in found.metrics.values()} == {num_rows}
    assert math.isfinite(found.loss) and found.num_truncated == 0
    write_predictions(tmp_path / "predictions.parquet", task, rows, found)
    table = pyarrow.parquet.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert [row["prediction"] for row in table] == list(found.answers or ())
    assert all(row["golds"] and row["prompt"] for row in table)
    for metric, score in found.metrics.items():
        values = read_values(tmp_path / "predictions.parquet", metric)
        assert values is None if metric in ("macro_f1", "f1a") else values.mean() == pytest.approx(score.value)


def _assert_a_step_lowers_the_loss(
    base: Base, trainable: Mapping[str, nn.Parameter], batch: Batch, train_as: TrainAs
) -> None:
    objective, steps = LossModule(base.model, train_as), []
    reason = fit(
        objective,
        trainable,
        itertools.repeat(batch),
        estimator=backprop,
        optimizer=torch.optim.SGD(trainable.values()),
        learning_rate=lambda step: 0.03,  # or what falls on the task with least to learn is float32's rounding
        num_steps=1,
        on_step=steps.append,
    )
    with torch.no_grad():
        assert reason == MAX_STEPS and 0 < float(objective(batch)) < steps[0].loss


@every_task
def test_every_prompt_version_names_fields_that_there_are(from_hub: Loader, name: str) -> None:
    for version, prompt in CATALOG.load(name, "TASK").prompts.items():
        task = from_hub(name, prompt=version)
        assert {*fields_of(prompt.template)} <= {*task.splits["train"][0].fields}


def test_a_pair_has_a_plainer_version_that_asks(from_hub: Loader) -> None:
    task = from_hub("mnli", prompt="instruction")
    asked = ask(task, task.splits["train"][0])
    assert asked.prompt == 'A dog runs.\nDoes this mean that "An animal moves." is true? Yes, No, or Maybe?\n'
    assert asked.options == ("Yes", "Maybe", "No")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("SST-2", "sst2"),
        ("SST2", "sst2"),
        ("BoolQ", "boolq"),
        ("AGNews", "ag_news"),
        ("topic", "ag_news"),
        ("CoLA", "cola"),
    ],
)
def test_a_name_is_matched_without_case_and_hyphens(from_hub: Loader, written: str, name: str) -> None:
    from_hub(name)  # puts the rows in place
    assert load_task(written, kind="choice").name == name


def test_a_name_of_two_tasks_is_refused_with_both() -> None:
    with pytest.raises(UnknownNameError, match="clinc150 or banking77"):
        load_task("intent", kind="choice")


LOCAL = {
    "multirc": (
        ["false", "true"],
        {"paragraph": "P.", "questions": [{"question": "Q?", "answers": [["one", 1], ["two", 0]]}]},
        [("one", 1), ("two", 0)],
    ),
    "squad_v2": (
        None,
        {"title": "T", "context": "C", "question": "Q?", "answers": [], "is_impossible": True},
        [((("",),), 0)],
    ),
    "squad": (
        None,
        {"title": "T", "context": "C", "question": "Q?", "answers": [{"text": "x", "start": 1}, {"text": "y"}]},
        [((("x",), ("y",)), 0)],
    ),
    "drop": (None, {"passage": "P", "question": "Q?", "answers": ["3-yard", "2-yard"]}, [((("3-yard", "2-yard"),), 0)]),
}


@pytest.mark.parametrize("name", LOCAL)
def test_a_folders_layout_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    labels, row, expected = LOCAL[name]
    (tmp_path / "meta.json").write_text(json.dumps({"name": name, "labels": labels}))
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 4)
    examples = load_task(name, kind="choice", path=str(tmp_path)).splits["test"]
    assert len(examples) == 4 * len(expected)
    found = [(example.golds or example.fields["answer"], example.label) for example in examples[: len(expected)]]
    assert found == expected


def test_an_answer_of_several_spans_is_written_with_commas(tmp_path: Path) -> None:
    row = {"passage": "P", "question": "Q?", "answers": ["3-yard", "2-yard"]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    task = load_task("drop", kind="choice", more_files={"train": str(tmp_path / "rows.jsonl")}, num_dev=2, num_eval=2)
    assert task.kind == "generation" and ask(task, task.splits["train"][0]).options == (" 3-yard, 2-yard\n",)


def test_an_answer_of_several_spans_keeps_its_value(tmp_path: Path) -> None:
    """As one text "c, a b" is not "a b, c"; as spans it is."""
    example, metrics = Example({"text": "x"}, 0, golds=(("a b", "c"), ("d",))), ("drop_f1", "drop_exact_match")
    task = Task("tiny", "generation", (), ("text",), Prompt("{text}"), metrics, {"test": [example]}, "lm")
    found = Evaluation("tiny", "test", 1.0, {}, 0, torch.zeros(1, 1), ("c, a b",))
    write_predictions(tmp_path / "p.parquet", task, [Choice(((1,),), ((2,),), 0, example=example)], found)
    values = [read_values(tmp_path / "p.parquet", metric) for metric in metrics]
    assert values[0] == [1.0] and values[1] == [1.0]


@pytest.mark.parametrize("name", ["copa", "record", "squad"])
def test_a_task_without_labels_is_no_heads(name: str) -> None:
    with pytest.raises(ConfigError, match="it goes by prompt"):
        load_task(name, kind="classification")


STORY = {"passage": "P", "query": "@placeholder ate", "entities": ["Ann"], "answers": ["Ann"]}
COPA = {"premise": "P.", "choice1": "A.", "choice2": "B.", "question": "effect", "label": 0}
SUM = {"passage": "P", "question": "Q?"}


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("record", {**STORY, "answers": ["Bob"]}, "none of its 1 options"),
        ("record", {**STORY, "query": "who ate?"}, "no @placeholder"),
        ("record", {**STORY, "entities": "Ann"}, "entities must be a list"),
        ("copa", {**COPA, "question": "why"}, "'why', and must be effect or cause"),
        ("copa", {**COPA, "premise": None}, "no column 'premise'"),
        ("winogrande", {"sentence": "Ann ate.", "option1": "A", "option2": "B", "label": "1"}, "no gap"),
        ("multirc", {"paragraph": "P", "questions": [{"question": "Q?", "answers": ["one"]}]}, "cannot be read"),
        ("multirc", {"questions": [{"question": "Q?", "answers": [["one", 1]]}]}, "no column 'paragraph'"),
        ("drop", {**SUM, "answers": []}, "no right answer"),
        ("drop", {**SUM, "answers_spans": {"spans": []}}, "no right answer"),
        ("drop", {**SUM, "answers": "12"}, "answers must be a list"),
        ("drop", {**SUM, "answers": [["3", "4"]]}, "answers must be a list"),
        ("squad", {**SUM, "title": "T", "context": "C", "answers": "12"}, "cannot be read"),
        ("squad", {**SUM, "title": "T", "context": "C", "answers": {"text": "12"}}, "text must be a list"),
    ],
)
def test_a_row_that_makes_no_question_is_named(tmp_path: Path, name: str, row: Any, told: str) -> None:
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    with pytest.raises(DataError) as caught:
        load_task(name, kind="choice", more_files={"train": str(tmp_path / "rows.jsonl")})
    message = str(caught.value)
    assert message.count("rows.jsonl, line 1: ") == 1 and told in message and "\n" not in message


@pytest.mark.parametrize(
    ("asked", "objective", "name", "expected"),
    [
        ("auto", "loss", "sst2", "classification"),
        ("auto", "loss", "copa", "lm"),
        ("auto", "accuracy", "copa", "classification"),
        ("lm", "loss", "sst2", "lm"),
        ("classification", "loss", "record", "classification"),
        ("auto", "loss", "squad", "lm"),
        ("classification", "loss", "squad", None),
        ("auto", "accuracy", "squad", None),
    ],
)
def test_a_task_is_trained_as_its_users_do(
    from_hub: Loader, asked: Any, objective: str, name: str, expected: str | None
) -> None:
    if expected is not None:
        assert train_as_of(asked, objective, from_hub(name)) == expected
        return
    with pytest.raises(ConfigError, match="squad"):
        train_as_of(asked, objective, from_hub(name))


@pytest.mark.parametrize("name", ["squad", "record"])
def test_a_whole_run_leaves_its_predictions(tmp_path: Path, base: Base, name: str) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CASES[name].rows) * 8)
    words = [f"model={base.name}", f"task={name}", f"task.files.train={tmp_path / 'rows.jsonl'}", "max_steps=2"]
    small = ["task.num_dev=4", "task.num_eval=4", "eval_steps=2", "batch_size=2", f"output_dir={tmp_path / 'run'}"]
    trained = runs.train(config.read(TrainConfig, [*words, *small]), Console(quiet=True))
    kept = pyarrow.parquet.read_table(trained.run.predictions("test")).to_pylist()
    assert [row["prediction"] for row in kept] == list(trained.evaluation.answers or ())
    trained.run.predictions("test").unlink()
    again = runs.evaluate_target(str(trained.run.path), config.read(EvaluateConfig, []))
    assert again.as_record() == trained.evaluation.as_record()
    assert pyarrow.parquet.read_table(trained.run.predictions("test")).to_pylist() == kept


BAD = {"negative": "bad", "positive": "good"}


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("sst2", {"kind": "classification", "template": "{text} so"}, "task.template is of a prompt"),
        ("sst2", {"kind": "classification", "prompt": "default"}, "task.prompt is of a prompt"),
        ("sst2", {"kind": "classification", "verbalizer": BAD}, "task.verbalizer is of a prompt"),
        ("sst2", {"verbalizer": {**BAD, "negativ": "x"}}, "'negativ': did you mean negative"),
        ("sst2", {"verbalizer": {**BAD, "positive": "bad"}}, "'bad' for 'negative' and for 'positive'"),
        ("sst2", {"verbalizer": {**BAD, "positive": " "}}, "no word for the label 'positive'"),
        ("copa", {"verbalizer": {"choice1": "a", "choice2": "b"}}, "copa's answers are its examples' own"),
        ("squad", {"template": "{context} {label} so"}, "task.template has {label}"),
        ("squad", {"labels": ["a", "b"]}, "task.labels names labels"),
    ],
)
def test_what_a_task_would_not_use_is_refused(from_hub: Loader, name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_hub(name, **options)
    assert told in str(caught.value)


def test_every_labels_word_is_its_own() -> None:
    for name in CATALOG.names():
        for prompt in CATALOG.load(name, "TASK").prompts.values():
            assert len({*prompt.verbalizer.values()}) == len(prompt.verbalizer), name


def test_a_template_of_ones_own_says_nothing_in_what_ends_it(from_hub: Loader) -> None:
    own = from_hub("sst2", template="{text} The {{film}} is {label} !", sfc=True).prompt
    assert own is not None and own.content_free == " The {film} is"
    assert from_hub("sst2", template="{text}", sfc=True).prompt.content_free == ""  # type: ignore[union-attr]
    assert from_hub("sst2", sfc=True).prompt.content_free == " It was"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "fields", "label", "out"),
    [
        ("snli", {"a": "A", "b": "B"}, 1, -1),
        ("snli", {"a": "A", "b": "B"}, "neutral", "-"),
        ("clinc150", {"text": "T"}, "alarm", "oos"),
    ],
)
def test_rows_that_are_none_of_the_tasks_are_left_out_of_files_too(
    tmp_path: Path, name: str, fields: dict[str, str], label: Any, out: Any
) -> None:
    rows = [{**fields, "label": each} for each in (label, out, label, out) * 4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(name, kind="choice", more_files={"train": str(tmp_path / "rows.jsonl")}, num_dev=2, num_eval=2)
    assert sum(map(len, task.splits.values())) == 8


def test_the_docs_table_is_the_catalogs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text("utf-8")
    found = [line for line in page.splitlines() if line.startswith("|")][2:]
    assert found == [in_the_docs(name) for name in CATALOG.names()]


def in_the_docs(name: str) -> str:
    spec = CATALOG.load(name, "TASK")
    version, *others = spec.prompts
    prompt = spec.prompts[version]
    words = list(prompt.verbalizer.values())
    chosen = ", ".join(words) if len(words) <= 8 else f"{len(words)} label words"
    answer = "written, to the end of the line" if spec.kind == "generation" else chosen or "the example's own"
    template = prompt.template.replace("\n", "\\n")
    cells = [
        name,
        f"`{template}`" + (f" (also: {', '.join(others)})" if others else ""),
        answer,
        spec.train_as,
        ", ".join(spec.metrics),
        f"`{spec.hub.repository}`",
    ]
    return f"| {' | '.join(cells)} |"
