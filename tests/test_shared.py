"""Real data and small real models, where LORICA_SHARED names a folder that holds `models/` and `data/`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorica import config, models, runs
from lorica.config import EvaluateConfig
from lorica.tasks.sources import CATALOG, load_task

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif("LORICA_SHARED" not in os.environ, reason="LORICA_SHARED is not set"),
]
SHARED = Path(os.environ.get("LORICA_SHARED", "."))


@pytest.mark.parametrize("name", CATALOG.names())
def test_a_catalog_task_reads_its_real_data(name: str) -> None:
    for kind in ("choice", "classification"):
        task = load_task(name, kind=kind, path=str(SHARED / "data" / name))  # type: ignore[arg-type]
        assert min(len(rows) for rows in task.splits.values()) > 20
        assert {example.label for example in task.splits["train"]} == set(range(len(task.labels)))


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
