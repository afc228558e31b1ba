"""`lorica evaluate` of many targets on many tasks: every cell what its own evaluation is, and nothing done twice."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import tiny
from lorica import card, cli, config, files, models, runs, tables
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.config import EvaluateConfig, ModelConfig, TrainConfig
from lorica.demo import language
from lorica.errors import ConfigError, LoricaError
from lorica.evaluation.branches import score_branches
from lorica.evaluation.evaluate import Evaluation
from lorica.evaluation.matrix import Cell, Matrix
from lorica.evaluation.metrics import Score
from lorica.evaluation.scoring import score_all
from lorica.models import Base
from lorica.runs import ready as ready_module
from lorica.runs.evaluating import matrix_bench
from lorica.runs.evaluating.asked_tasks import asked_tasks, told_apart_by
from lorica.runs.evaluating.targets import Target
from lorica.runs.ready import Ready
from lorica.tasks.base import Example, Prompt, Task

QUIET = Console(quiet=True)
TRAINED = {
    "topic": ("task.path={data}/topic", "adapter.rank=4", "task.num_train=40"),
    "sentiment": ("task.path={data}/sentiment", "adapter.rank=2", "adapter.targets=all-linear"),
    "again": ("task.path={data}/topic", "seed=1", "learning_rate=1e-2", "task.num_train=60", "eval_batch_size=16"),
    "prefix": ("task.path={data}/topic", "adapter.kind=prefix"),
    "head": ("task.path={data}/topic", "model.kind=classification", "adapter.rank=2"),
    "full": ("task.path={data}/sentiment", "adapter.kind=full"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short runs of several kinds on the embedded model, and merges of two of them, in two forms."""
    folder = tmp_path_factory.mktemp("matrix")
    language.write_tasks(folder / "data")
    for name, words in TRAINED.items():
        rest = ["max_steps=3", "batch_size=8", "task.num_eval=30", "save_steps=null", f"output_dir={folder / name}"]
        lorica("train", "model=demo", *(word.format(data=folder / "data") for word in words), *rest)
    sources = ("--adapters", folder / "topic", folder / "sentiment")
    lorica("merge", *sources, "merge_mode=union", f"output_dir={folder / 'merged'}")
    lorica("merge", *sources, "save=dense", f"output_dir={folder / 'dense'}")
    lorica("merge", "--adapters", folder / "head", f"output_dir={folder / 'merged-head'}")
    (folder / "begun").mkdir()  # a run that has not come to an adapter yet
    (folder / "begun" / "config.yaml").write_text((folder / "topic" / "config.yaml").read_text())
    return folder


def lorica(*words: object) -> str:
    """What `lorica WORDS` prints on stdout; its errors are raised as they are."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def matrix(home: Path, targets: Sequence[str], *words: object) -> Matrix:
    """A matrix of targets in `home`, by words of the command line."""
    found = [str(home / target) if (home / target).exists() else target for target in targets]
    given = config.read(EvaluateConfig, [str(word) for word in words], {"targets": found})
    return runs.evaluate_matrix(given, QUIET)


@functools.cache
def alone(home: Path, target: str, task: str) -> Evaluation:
    words = [f"task.path={home / 'data' / task}", "task.num_eval=30"]
    if target == "head":
        words.append("task.kind=classification")
    if target == "base":
        return runs.evaluate_target(None, config.read(EvaluateConfig, ["model=demo", *words]))
    return runs.evaluate_target(str(home / target), config.read(EvaluateConfig, words))


def by_cell(found: Matrix) -> dict[tuple[str, str], Cell]:
    return {(cell.row, cell.column): cell for cell in found.cells}


ON_BOTH = ("topic", "sentiment", "again", "prefix", "full", "merged", "dense", "base")


def test_every_cell_is_its_own_evaluation_bit_for_bit(home: Path) -> None:
    found = by_cell(matrix(home, ON_BOTH, "branches=1"))
    found["head", "topic"] = by_cell(matrix(home, ("sentiment", "head"), "branches=1"))["head", "topic"]
    assert len(found) == len(ON_BOTH) * 2 + 1
    for (row, column), cell in found.items():
        assert cell.evaluation is not None and cell.reason is None
        assert cell.evaluation.as_record() == alone(home, row, column).as_record(), (row, column)


def test_a_run_is_asked_as_it_is_alone(home: Path) -> None:
    """With its own batch size, split and task, whatever stands beside it."""
    found = by_cell(matrix(home, ("topic", "again"), "branches=1"))
    own = runs.evaluate_target(str(home / "again"), EvaluateConfig())
    cell = found["again", "topic"].evaluation
    assert cell is not None and cell.as_record() == own.as_record()


def test_adapters_in_one_pass_are_what_they_are_alone(home: Path) -> None:
    """`again` has a batch size of its own, so three go in one pass and it goes alone."""
    together = matrix(home, ("topic", "sentiment", "merged", "again"), "branches=4")
    for cell in together.cells:
        expected, found = alone(home, cell.row, cell.column), cell.evaluation
        assert found is not None and found.scores is not None and expected.scores is not None
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
        assert found.answers == expected.answers


def test_a_pass_takes_as_many_adapters_as_asked_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def noted(model: object, adapters: Sequence[Adapter], *rest: object, **options: object) -> object:
        taken.append(len(adapters))
        return score_branches(model, adapters, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(matrix_bench, "score_branches", noted)
    task = (f"task.path={home / 'data' / 'topic'}", "task.num_eval=30")
    matrix(home, ("topic", "sentiment", "merged", "base"), "branches=2", *task)
    assert taken == [2]  # the third goes alone, as does the base
    matrix(home, ("topic", "sentiment"), "branches=1", *task)
    assert taken == [2]


@pytest.mark.parametrize("words", [("good", "bad", "great"), ("good", "rather bad", "as great as it was")])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "t5"])
def test_branches_score_what_each_adapter_scores(load: Callable[..., Base], family: str, words: Sequence[str]) -> None:
    """Of other ranks, scales and modules, one of them empty, with options of one token and of several."""
    base = load(family)
    targets = models.target_modules(base, "all-linear")
    adapters = [
        tiny.adapter(base.model, targets, rank=3, alpha=6, seed=1),
        tiny.adapter(base.model, targets[-2:], rank=1, alpha=1, seed=2),
        Adapter({}),
    ]
    ready = asked(base, words)
    rows, bare = ready.encoded(ready.task.splits["test"]), models.fingerprint(base)
    together = score_branches(base.model, adapters, rows, ready.collate(), batch_size=3)
    assert models.fingerprint(base) == bare and not any(each.requires_grad for each in base.model.parameters())
    for found, adapter in zip(together, adapters, strict=True):
        live = injection.inject(base.model, adapter)
        torch.testing.assert_close(found, score_all(base.model, rows, ready.collate(), batch_size=3), rtol=0, atol=1e-5)
        injection.remove(live)
    assert ((together[:2] - together[2]).abs().amax(dim=(1, 2)) > torch.tensor([0.1, 5e-4])).all()


def asked(base: Base, words: Sequence[str]) -> Ready:
    prompt = Prompt("{text} was", dict(zip("abc", words, strict=True)))
    examples = [Example({"text": "the film " * number + "i saw"}, number % 3) for number in range(7)]
    return Ready(
        base, Task("tiny", "choice", tuple("abc"), ("text",), prompt, ("accuracy",), {"test": examples}), "cpu", 100
    )


def test_each_base_is_loaded_once_and_each_task_is_read_and_tokenised_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def counted(module: object, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *words, **options: done.append(name) or function(*words, **options))

    for module, name in ((models, "load"), (ready_module, "load_task"), (ready_module, "encode")):
        counted(module, name)
    matrix(home, ("topic", "sentiment", "again", "merged", "dense", "base"))
    assert sorted(done) == ["encode"] * 2 + ["load"] + ["load_task"] * 2
    done.clear()
    matrix(home, ("topic", "full", "prefix"))  # a trained model is a base of its own; a prefix leaves less room
    assert done.count("load") == 2 and done.count("load_task") == 2 and done.count("encode") == 6


def test_runs_bring_their_tasks_and_two_of_one_task_bring_it_once(home: Path) -> None:
    found = matrix(home, ("topic", "again", "merged"))
    assert found.columns == ("topic",)
    assert {cell.evaluation.split for cell in found.cells if cell.evaluation} == {"test"}
    assert [cell.score.n for cell in found.cells if cell.score] == [30] * 3
    assert matrix(home, ("topic", "base"), "task.num_eval=12").cells[0].score.n == 12  # type: ignore[union-attr]


def test_a_named_task_is_a_runs_own_or_read_from_its_folder(home: Path) -> None:
    own = by_cell(matrix(home, ("topic", "sentiment"), "--tasks", "Sentiment"))
    assert [cell.score.n for cell in own.values() if cell.score] == [30, 30]
    path = f"task.path={home / 'data'}/{{task}}"
    read = matrix(home, ("topic",), "--tasks", "emotion", "topic", path, "task.num_eval=20", "split=dev")
    assert read.columns == ("emotion", "topic")
    assert [cell.evaluation.split for cell in read.cells if cell.evaluation] == ["dev", "dev"]


def test_a_task_is_one_however_it_is_written() -> None:
    def trained(*words: str) -> Target:
        return Target(ModelConfig(name="demo"), cfg=config.read(TrainConfig, ["model=demo", *words]))

    sets = trained("task=SST-2", "task.path=x"), trained("task=sst_2", "task.path=x"), trained("task.path=y/topic")
    (sst2,) = asked_tasks(sets, EvaluateConfig(tasks=["sst2"]))
    assert (sst2.name, sst2.task.name, sst2.task.path) == ("sst2", "sst2", "x")
    assert [each.name for each in asked_tasks(sets, EvaluateConfig())] == ["sst2", "topic"]
    asked = asked_tasks(sets, EvaluateConfig(tasks=["Topic", "ag_news", "AG-News"]))
    assert [each.task.path for each in asked] == ["y/topic", None]  # a folder is what it is called, and no alias
    assert told_apart_by(sets[0].cfg.task) == told_apart_by(sst2.task) != told_apart_by(asked[0].task)  # type: ignore[union-attr]


def test_a_run_alone_may_be_asked_less_of_its_own_task(home: Path) -> None:
    kept = (home / "topic" / "predictions_test.parquet").read_bytes()
    found = runs.evaluate_target(str(home / "topic"), config.read(EvaluateConfig, ["task.num_eval=7"]))
    assert (found.task, found.metrics["accuracy"].n) == ("topic", 7)
    assert (home / "topic" / "predictions_test.parquet").read_bytes() == kept
    assert pyarrow.parquet.read_metadata(home / "topic" / "predictions_topic_test.parquet").num_rows == 7


def test_a_head_alone_is_asked_no_task_of_other_labels(home: Path) -> None:
    words = [f"task.path={home / 'data' / 'topic'}", "task.name=other", "task.kind=classification", "task.num_eval=5"]
    found = runs.evaluate_target(str(home / "head"), config.read(EvaluateConfig, words))
    assert (found.task, found.metrics["accuracy"].n) == ("other", 5)
    with pytest.raises(ConfigError, match="its head is of topic, which has the labels world"):
        runs.evaluate_target(
            str(home / "head"), config.read(EvaluateConfig, [*words, "task.labels=[sports, world, business, science]"])
        )


@pytest.mark.parametrize("words", [["task.num_train=5"], ["task.demonstrations=per_example", "split=train"]])
def test_an_evaluation_that_would_show_demonstrations_is_refused(home: Path, words: list[str]) -> None:
    path = f"task.path={home / 'data' / 'topic'}"
    with pytest.raises(ConfigError, match="trainer=none"):
        runs.evaluate_target(str(home / "topic"), config.read(EvaluateConfig, [path, *words]))
    with pytest.raises(ConfigError, match="trainer=none"):
        matrix(home, ("topic", "base"), path, *words)


def test_a_matrix_of_train_looks_at_what_each_run_trained_on(home: Path) -> None:
    found = matrix(home, ("topic", "again"), "split=train")
    assert found.columns == ("topic", "topic-2")
    assert [cell.score.n for cell in found.row("topic") if cell.score] == [40, 60]


def test_a_head_is_asked_its_own_task_alone_and_the_other_cells_say_why(home: Path) -> None:
    found = matrix(home, ("head", "merged-head", "head/adapter", "base", "sentiment"))
    reasons = {(cell.row, cell.column): cell.reason for cell in found.cells}
    assert found.rows == ("head", "merged-head", "head-2", "base-demo-classification", "base-demo", "sentiment")
    assert reasons["head", "topic"] is None and reasons["sentiment", "topic"] is None
    assert reasons["head", "sentiment"] == "its head is of topic"
    assert all(cell.evaluation is None for cell in found.cells if cell.reason)


def test_an_adapter_without_a_run_is_asked_as_far_as_its_head_fits(home: Path) -> None:
    words = ("model=demo", "model.kind=classification", f"task.path={home / 'data'}/{{task}}", "task.num_eval=20")
    found = by_cell(matrix(home, ("head/adapter", "topic/adapter", "base"), "--tasks", "topic", "sentiment", *words))
    assert found["head", "topic"].score is not None
    assert "(2, 64)" in str(found["head", "sentiment"].reason) or "head" in str(found["head", "sentiment"].reason)
    assert found["topic", "topic"].reason == "it has no head for topic"
    assert found["base", "sentiment"].reason == "it has no head for sentiment"


def test_a_task_that_a_kind_of_model_cannot_be_asked_leaves_its_cells_empty(home: Path, tmp_path: Path) -> None:
    rows = [{"title": "a", "context": "the film", "question": "what", "answers": [{"text": "film"}]}] * 4
    for split in ("train", "dev"):
        path = tmp_path / "squad" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "squad" / "meta.json").write_text('{"name": "squad"}')
    found = by_cell(matrix(home, ("head", "topic"), "--tasks", "squad", f"task.path={tmp_path}/{{task}}"))
    assert "goes by prompt" in str(found["head", "squad"].reason)
    written = found["topic", "squad"].evaluation
    assert written is not None and set(written.metrics) == {"f1", "exact_match"}


def test_a_matrix_leaves_its_folder(home: Path, tmp_path: Path) -> None:
    found = matrix(home, ("topic", "head", "base"))
    assert found.folder.parent == Path("artifacts/evaluations")
    (line,) = files.read_records(found.folder.parent / "index.jsonl")
    assert line["folder"] == str(found.folder) and set(line["matrix"]["topic"]) == {"topic"}
    record = files.read_json(found.folder / "matrix.json")
    assert [each["name"] for each in record["rows"]] == ["topic", "head", "base-demo", "base-demo-classification"]
    assert record["columns"][0]["task"]["path"] == str(home / "data" / "topic")
    (cell,) = [each for each in record["cells"] if each["row"] == "topic"]
    assert cell["metrics"]["accuracy"].keys() == {"value", "low", "high", "n", "higher_is_better"}
    assert cell["reason"] is None and cell["seconds"] > 0
    lines = list(csv.DictReader((found.folder / "matrix.csv").read_text().splitlines()))
    assert [line["metric"] for line in lines] == ["accuracy", "macro_f1"] * 3 + [""]
    assert float(lines[0]["value"]) == cell["metrics"]["accuracy"]["value"]
    kept = pyarrow.parquet.read_table(found.folder / "cells" / "topic" / "topic.parquet")
    assert kept.num_rows == 30 and config.check(EvaluateConfig, config.read_yaml(found.folder / "config.yaml"))
    named = matrix(home, ("topic", "base"), f"output_dir={tmp_path / 'out'}")
    assert named.folder == tmp_path / "out" and len(files.read_records(Path("artifacts/evaluations/index.jsonl"))) == 1


def test_an_interrupted_matrix_goes_on_behind_its_finished_cells(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = tmp_path / "out", []
    evaluate = ready_module.evaluate

    def stopped(model: object, task: object, *rest: object, **options: object) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task)
        return evaluate(model, task, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ready_module, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        matrix(home, ("topic", "sentiment"), "branches=1", f"output_dir={out}")
    assert not (out / "matrix.json").exists() and len(list(out.glob("cells/*/*.json"))) == 2
    monkeypatch.setattr(
        ready_module, "evaluate", lambda *words, **options: done.append(0) or evaluate(*words, **options)
    )
    resumed = runs.evaluate_matrix(EvaluateConfig(resume=str(out)), QUIET)
    assert len(done) == 4
    monkeypatch.setattr(ready_module, "evaluate", evaluate)
    whole = matrix(home, ("topic", "sentiment"), "branches=1")
    for one, other in zip(resumed.cells, whole.cells, strict=True):
        assert {**one.as_record(), "seconds": 0} == {**other.as_record(), "seconds": 0}
    again = runs.evaluate_matrix(EvaluateConfig(resume=str(out)), QUIET)
    assert [cell.as_record() for cell in again.cells] == [cell.as_record() for cell in resumed.cells]


def test_a_finished_cell_of_another_adapter_is_not_believed(home: Path, tmp_path: Path) -> None:
    adapter = peft_format.read(home / "topic" / "adapter")
    for name in ("one", "other"):
        peft_format.write(adapter, tmp_path / name)
    path, out = home / "data" / "topic", tmp_path / "out"
    words = ("task.num_eval=30", f"task.path={path}", "model=demo", f"output_dir={out}")
    before = matrix(tmp_path, ("one", "other"), *words)
    (out / "matrix.json").unlink()
    changed = {key: LowRank(each.A, each.B + 0.5, each.scale) for key, each in adapter.updates.items()}
    peft_format.write(Adapter(changed), tmp_path / "one")
    after = runs.evaluate_matrix(EvaluateConfig(resume=str(out)), QUIET)
    losses = [[cell.evaluation.loss for cell in each.cells if cell.evaluation] for each in (before, after)]
    assert losses[0][0] != losses[1][0] and losses[0][1] == losses[1][1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{home}/topci", "{home}/topic"], ["topci", "did you mean", "topic"]),
        (["{home}/data", "base"], ["neither a run folder"]),
        (["{home}/topic", "--tasks", "sst3"], ["sst3", "sst5 or sst2"]),
        (["{home}/topic", "--tasks", "topci", "task.path={home}/data/{task}"], ["topci", "did you mean topic"]),
        (["{home}/merged", "{home}/dense"], ["give --tasks"]),
        (["--tasks", "sst2"], ["base model", "model=M"]),
        (["{home}/topic", "--tasks", "a", "task=b"], ["--tasks", "task.name=b"]),
        (["{home}/topic", "--tasks", "a", "task.path={home}/data"], ["FOLDER/{task}"]),
        (["{home}/topic", "output_dir=out"], ["output_dir", "matrix"]),
        (["{home}/topic", "base", "output_dir={home}/data"], ["output_dir", "nothing is written over"]),
        (["{home}/full", "base", "model=demo"], ["whole model", "drop model=demo"]),
        (["demo", "base", "model=demo"], ["drop model=demo"]),
        (["resume={home}/topic", "split=dev"], ["drop split"]),
        (["resume={home}/topic"], ["not a matrix's folder"]),
        (["{home}/begun", "base"], ["no adapter folder", "begun"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(home: Path, words: list[str], told: list[str]) -> None:
    with pytest.raises(LoricaError) as caught:
        lorica("evaluate", *(word.replace("{home}", str(home)) for word in words))
    message = str(caught.value)
    assert all(part in message for part in told), message
    assert "\n" not in message and caught.value.exit_code == 2
    assert not Path("artifacts").exists() and not Path("out").exists()


def cell(row: str, column: str, value: float | None, higher: bool = True, cut: int = 0) -> Cell:
    if value is None:
        return Cell(row, column, reason=f"no head for [{column}]")
    score = Score(value, value - 0.1, value + 0.1, 50, higher)
    return Cell(row, column, Evaluation(column, "dev", 1.0, {"accuracy": score}, cut), 0.5)


def test_the_table_says_how_many_examples_were_cut() -> None:
    cells = (cell("a", "x", 0.5, cut=6), cell("a", "y", 0.3), cell("b", "x", 0.7, cut=6), cell("b", "y", 0.4, cut=2))
    _, *lines = tables.matrix(Matrix(Path(), ("a", "b"), ("x", "y"), cells), 120)
    assert lines == ["examples that were cut to what the model reads: 6 of x, 2 of y (b)"]


def test_the_table_marks_the_best_and_shows_intervals_where_there_is_room() -> None:
    cells = (
        *(cell("a", "x", 0.5), cell("a", "y", 0.3, False), cell("a", "z", None)),
        *(cell("b", "x", 0.7), cell("b", "y", 0.4, False), cell("b", "z", None)),
    )
    found = Matrix(Path(), ("a", "b"), ("x", "y", "z"), cells)
    for width, interval in ((120, " [0.600, 0.800]"), (50, "")):
        table, *reasons = tables.matrix(found, width)
        shown = [list(column.cells) for column in table.columns]  # type: ignore[union-attr]
        assert shown[1][1] == f"[bold]0.7000[/]{interval}" and not shown[1][0].startswith("[bold]")
        assert shown[2][0].startswith("[bold]0.3000[/]")  # the least is the best
        assert shown[3] == ["–", "–"]
        assert reasons == [r"– a on z: no head for \[z]", r"– b on z: no head for \[z]"]
        console = Console(width=width, no_color=True)
        with console.capture() as printed:
            console.print(table)
        assert "accuracy, n=50" in printed.get()


def test_a_card_says_how_lm_eval_takes_what_is_causal(home: Path, tmp_path: Path) -> None:
    about = {"num_parameters": 1, "modules": ["a.q"], "rank": 1, "alpha": 1.0, "heads": [], "num_labels": 2}
    causal = card.adapter(base_model="facebook/opt-350m", kind="causal", **about)  # type: ignore[arg-type]
    assert causal.lm_eval == "pretrained=facebook/opt-350m,peft=FOLDER/adapter"
    assert not card.adapter(base_model="bert", kind="classification", **about).lm_eval  # type: ignore[arg-type]
    export = {"base_model": "facebook/opt-350m", "told": "rank 1, exact", "run": "runs/a", "folder": "out"}
    line = "lm_eval --model hf --model_args pretrained=facebook/opt-350m,peft=out --tasks squadv2"
    text = card.export_card(kind="causal", task="SQuAD_v2", is_model=False, **export)
    assert f"\n{line}\n" in text and "put one of" not in text
    assert "--model_args pretrained=out --tasks TASK" in card.export_card(
        kind="causal", task="emotion", is_model=True, **export
    )
    assert "lm_eval" not in card.export_card(kind="seq2seq", task="sst2", is_model=False, **export)
    lorica("export", home / "topic", f"output_dir={tmp_path / 'out'}")
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"lorica evaluate {tmp_path / 'out'} task=NAME" in text and "{" not in text
