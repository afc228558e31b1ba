"""Real data and small real models, where LORICA_SHARED names a folder that holds `models/` and `data/`."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import pyarrow.parquet
import pytest
from rich.console import Console

from lorica import config, models, runs
from lorica.config import EvaluateConfig, TrainConfig
from lorica.tasks.sources import CATALOG, load_task

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif("LORICA_SHARED" not in os.environ, reason="LORICA_SHARED is not set"),
]
SHARED = Path(os.environ.get("LORICA_SHARED", "."))


HERE = [name for name in CATALOG.names() if (SHARED / "data" / name).is_dir()]
MODELS = {"choice": "tinystories3m_chat", "classification": "minilm"}
WAYS = [
    (name, kind) for name in HERE for kind in MODELS if kind == "choice" or CATALOG.load(name, "TASK").has_label_words
]


@pytest.mark.parametrize("name", HERE)
def test_a_catalog_task_reads_its_real_data(name: str) -> None:
    spec = CATALOG.load(name, "TASK")
    for kind in ("choice", "classification") if spec.has_label_words else ("choice",):
        task = load_task(name, kind=kind, path=str(SHARED / "data" / name))  # type: ignore[arg-type]
        assert min(len(rows) for rows in task.splits.values()) > 15
        if spec.has_label_words:
            assert {example.label for example in task.splits["train"]} == set(range(len(task.labels)))


@pytest.mark.parametrize("name", HERE)
def test_a_catalog_task_is_evaluated_on_its_real_data(name: str) -> None:
    """Every example is scored, by prompt, with the small causal model, and no warning is raised."""
    words = [f"model={SHARED / 'models/tinystories3m_chat'}", f"task={name}", f"task.path={SHARED / 'data' / name}"]
    found = runs.evaluate_target(None, config.read(EvaluateConfig, [*words, "task.num_eval=4", "eval_batch_size=2"]))
    assert {score.n for score in found.metrics.values()} == {4}
    assert found.answers is not None and len(found.answers) == 4 and math.isfinite(found.loss)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_a_run_of_one_step_scores_every_row_of_the_real_data(name: str, kind: str, tmp_path: Path) -> None:
    """By prompt with the small causal model, by a head with the encoder: all of dev.jsonl, whichever split that is.

    No warning is raised, and none is printed but of examples that were cut, which the evaluation counts.
    """
    folder, said = SHARED / "data" / name, io.StringIO()
    split = "dev" if (folder / "test.jsonl").is_file() else "test"
    words = [f"model={SHARED / 'models' / MODELS[kind]}", f"task={name}", f"task.path={folder}", f"eval_split={split}"]
    small = ["max_steps=1", "batch_size=4", f"output_dir={tmp_path / 'run'}"]
    trained = runs.train(config.read(TrainConfig, [*words, *small]), Console(file=said, soft_wrap=True))
    found, num_rows = trained.evaluation, _num_examples(name, folder / "dev.jsonl")
    assert {score.n for score in found.metrics.values()} == {num_rows} and math.isfinite(found.loss)
    assert pyarrow.parquet.read_metadata(trained.run.predictions(split)).num_rows == num_rows
    warnings = [line for line in said.getvalue().splitlines() if line.startswith("warning")]
    assert all("examples were cut to" in line for line in warnings)
    assert any(f"{found.num_truncated} of {num_rows} {split}" in line for line in warnings) == bool(found.num_truncated)


def _num_examples(name: str, file: Path) -> int:
    """A line is an example; of MultiRC, an answer is."""
    with file.open(encoding="utf-8") as lines:  # str.splitlines would part a text at its own separators too
        rows = [json.loads(line) for line in lines]
    if name != "multirc":
        return len(rows)
    return sum(len(question["answers"]) for row in rows for question in row["questions"])


def test_a_tied_matrix_stored_once_under_its_second_name_loads() -> None:
    base = models.load(str(SHARED / "models/tinystories656k"), kind="causal")
    embedding = base.model.get_input_embeddings().weight
    assert embedding.data_ptr() == base.model.get_output_embeddings().weight.data_ptr()
    assert base.new == () and float(embedding.std()) > 0


def test_sst2_by_prompt_scores_zero_shot_what_an_independent_loop_scores() -> None:
    """0.598 on dev.jsonl, by MeZO's prompt, with the small causal model."""
    model = SHARED / "models/tinystories3m_chat"
    words = [f"model={model}", "task=sst2", f"task.path={SHARED / 'data/sst2'}", "split=dev"]
    found = runs.evaluate_target(None, config.read(EvaluateConfig, words))
    assert found.metrics["accuracy"].value == pytest.approx(0.598, abs=0.002)
