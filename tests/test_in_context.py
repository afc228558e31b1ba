"""trainer=none: demonstrations before each prompt, whole or not at all, and nothing trained."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from rich.console import Console

from lorica import config, files, runs
from lorica.config import EvaluateConfig, TrainConfig
from lorica.demo import language
from lorica.errors import ConfigError, LoricaError
from lorica.runs import Trained
from lorica.runs.ready import prepare
from lorica.tasks.base import Example
from lorica.tasks.demonstrations import demonstrated, sets_of, solved

NUM = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder / "topic"


def shown(data: Path, *words: str) -> tuple[Trained, list[dict[str, Any]], str]:
    """The run, its predictions, and what was said."""
    heard = io.StringIO()
    given = ["--trainer", "none", "model=demo", f"task.path={data}", "task.num_eval=8", *words]
    trained = runs.train(config.read(TrainConfig, given), Console(file=heard))
    return trained, pyarrow.parquet.read_table(trained.run.predictions("test")).to_pylist(), heard.getvalue()


def test_without_demonstrations_it_is_the_base_zero_shot(data: Path) -> None:
    trained, kept, _ = shown(data)
    words = ["model=demo", f"task.path={data}", "task.num_eval=8"]
    base = runs.evaluate_target(None, config.read(EvaluateConfig, words))
    assert trained.evaluation.as_record() == base.as_record()
    assert files.read_json(trained.run.record)["metrics"] and len(kept) == 8


def test_one_set_stands_before_every_prompt(data: Path) -> None:
    bare = [row["prompt"] for row in shown(data)[1]]
    found = [row["prompt"] for row in shown(data, "--num_train", str(NUM), "task.max_length=2000")[1]]
    openings = {prompt.removesuffix(own) for prompt, own in zip(found, bare, strict=True)}
    assert len(openings) == 1
    assert openings.pop().count("\n\n") == NUM


def test_a_set_for_each_example_is_drawn_by_the_seed(data: Path) -> None:
    words = ("--num_train", str(NUM), "task.demonstrations=per_example", "task.max_length=2000")
    first, again, other = (
        [row["prompt"] for row in shown(data, *words, *more)[1]] for more in ((), (), ("task.train_set_seed=1",))
    )
    assert first == again and first != other
    assert len({prompt.rpartition("\n\n")[0] for prompt in first}) == len(first)


def test_a_set_for_each_example_holds_each_label_by_its_share() -> None:
    pool = [Example({"text": str(number)}, number % 2) for number in range(40)]
    for stratified in (True, False):
        sets = sets_of(pool, 4, 20, seed=0, stratified=stratified)
        assert {len({each.fields["text"] for each in shown}) for shown in sets} == {4}
        assert ({sum(each.label for each in shown) for shown in sets} == {2}) == stratified


@pytest.mark.parametrize("demonstrations", ["0", str(NUM)])
def test_a_head_of_random_numbers_is_asked_nothing(data: Path, demonstrations: str) -> None:
    words = ["model=demo", "model.kind=classification", f"task.path={data}"]
    with pytest.raises(ConfigError, match="demo has no head for topic"):
        runs.evaluate_target(None, config.read(EvaluateConfig, words))
    with pytest.raises(ConfigError, match="demo has no head for topic"):
        shown(data, "model.kind=classification", "--num_train", demonstrations)


def test_demonstrations_that_find_no_room_are_left_out_whole_and_counted(data: Path) -> None:
    cfg = config.read(TrainConfig, ["model=demo", f"task.path={data}"])
    ready = prepare(cfg.model, cfg.task, "cpu", 0)
    pool, asked = ready.task.splits["train"][:NUM], ready.task.splits["test"][:6]
    texts = [solved(ready.task, each) for each in pool]
    bare = max(row.length for row in ready.encoded(asked))
    all_of_them, dropped = put(ready, asked, pool, 10_000)
    assert dropped == 0 and all(each.opening == "".join(f"{text}\n\n" for text in texts) for each in all_of_them)
    limit = bare + 30
    some, dropped = put(ready, asked, pool, limit)
    assert 0 < dropped < NUM * len(asked)
    counts = [each.opening.count("\n\n") for each in some]
    assert sum(counts) == NUM * len(asked) - dropped
    for each, count in zip(some, counts, strict=True):
        assert each.opening == "".join(f"{text}\n\n" for text in texts[NUM - count :])
    rows = ready.encoded(some)
    assert max(row.length for row in rows) <= limit and not any(row.truncated for row in rows)
    one_more = [
        Example(each.fields, each.label, opening="".join(f"{text}\n\n" for text in texts[NUM - count - 1 :]))
        for each, count in zip(some, counts, strict=True)
    ]
    assert all(row.length > limit for row in ready.encoded(one_more))
    none, dropped = put(ready, asked, pool, bare)
    assert [each.opening for each in none].count("") >= 1 and dropped > 0


def test_a_demonstration_longer_than_the_model_reads_is_no_warning(data: Path) -> None:
    """transformers notes what it has warned of in the tokenizer; what is too long is left out, and told by us."""
    cfg = config.read(TrainConfig, ["model=demo", f"task.path={data}"])
    ready = prepare(cfg.model, cfg.task, "cpu", 0)
    ready.base.tokenizer.model_max_length = 4
    put(ready, ready.task.splits["test"][:2], ready.task.splits["train"][:NUM], 64)
    assert not any(ready.base.tokenizer.deprecation_warnings.values())
    ready.base.tokenizer("what is longer than it reads")
    assert any(ready.base.tokenizer.deprecation_warnings.values())


def put(ready: Any, asked: Any, pool: Any, max_length: int) -> tuple[list[Example], int]:
    return demonstrated(ready.task, asked, [pool] * len(asked), ready.base.tokenizer, max_length=max_length)


def test_what_found_no_room_is_told(data: Path) -> None:
    said = shown(data, "--num_train", "40", "task.max_length=64")[2]
    assert "demonstrations found no room" in said and "of 320" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer=none", "learning_rate=1e-3"], "learning_rate is set"),
        (["trainer=none", "--lora_r", "4"], "adapter is set"),
        (["trainer=none", "zo.epsilon=1e-2"], "takes no probes"),
        (["task.demonstrations=per_example"], "trainer=none"),
        (["task.num_train=0"], "nothing to train on"),
    ],
)
def test_what_would_do_nothing_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(LoricaError, match=told):
        config.read(TrainConfig, words)


def test_a_run_that_trained_nothing_is_not_evaluated_or_gone_on_with(data: Path) -> None:
    trained, _, _ = shown(data)
    with pytest.raises(ConfigError, match="trained nothing"):
        runs.evaluate_target(str(trained.run.path), config.read(EvaluateConfig, []))
    trained.run.record.unlink()
    with pytest.raises(ConfigError, match="trains nothing"):
        runs.train(config.read(TrainConfig, [f"resume={trained.run.path}"]), Console(quiet=True))
