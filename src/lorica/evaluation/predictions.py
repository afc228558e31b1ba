"""What a model made of each example, as a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorica import files
from lorica.evaluation.answers import ANSWER_METRICS
from lorica.evaluation.evaluate import Evaluation, examples_of
from lorica.evaluation.metrics import Array
from lorica.tasks.base import Example, Task
from lorica.tasks.prompting import Encoded, ask


def write_predictions(path: Path, task: Task, rows: Sequence[Encoded], found: Evaluation) -> None:
    """One row an example, in the split's order, replacing `path`.

    Columns: `fields` (a struct of the example's texts), `prompt` (null under a head), `options` with their `scores`
    (null where the answer was written), `prediction`, `golds` (every right answer), `values` (a struct: what the
    example adds to each metric that is a mean over examples) and `truncated`.
    """
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(_rows(task, rows, found)))
    with files.replacing(path) as file:
        pyarrow.parquet.write_table(table, file)


def _rows(task: Task, rows: Sequence[Encoded], found: Evaluation) -> Iterator[dict[str, Any]]:
    assert found.scores is not None and found.answers is not None
    columns = (rows, examples_of(rows), found.scores.tolist(), found.answers)
    for row, example, scores, answer in zip(*columns, strict=True):
        chosen = task.kind != "generation"
        options = [option.answer for option in example.options] or list(task.labels)
        yield {
            "fields": dict(example.fields),
            "prompt": None if task.prompt is None else ask(task, example).prompt,
            "options": options if chosen else None,
            "scores": scores[: len(options)] if chosen else None,
            "prediction": answer,
            "golds": _golds(example, options),
            "values": _values(task, example, answer, options),
            "truncated": row.truncated,
        }


def _golds(example: Example, options: Sequence[str]) -> list[str]:
    return [", ".join(gold) for gold in example.golds] or [options[example.label]]


def _values(task: Task, example: Example, answer: str, options: Sequence[str]) -> dict[str, float]:
    return {
        name: ANSWER_METRICS[name](answer, example.golds)
        if name in ANSWER_METRICS
        else float(answer in _golds(example, options))
        for name in task.metrics
        if _is_mean(name)
    }


def _is_mean(metric: str) -> bool:
    return metric == "accuracy" or metric in ANSWER_METRICS


def read_values(path: Path, metric: str) -> Array | None:
    """(n,) what each example of a file that `write_predictions` wrote adds to the mean that `metric` is.

    None for a metric that is no mean over examples.
    """
    import pyarrow.parquet

    if not _is_mean(metric):
        return None
    if "values" in pyarrow.parquet.read_schema(path).names:
        rows = pyarrow.parquet.read_table(path, columns=["values"]).to_pylist()
        return np.array([row["values"][metric] for row in rows])
    # A file from before there were values does not say where one span of an answer ends.
    rows = pyarrow.parquet.read_table(path, columns=["prediction", "golds"]).to_pylist()
    if metric == "accuracy":
        return np.array([row["prediction"] in row["golds"] for row in rows], dtype=float)
    return np.array([ANSWER_METRICS[metric](row["prediction"], [(gold,) for gold in row["golds"]]) for row in rows])
