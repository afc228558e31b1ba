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
    (null where the answer was written), `prediction`, `golds` (every right answer) and `truncated`.
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
            "truncated": row.truncated,
        }


def _golds(example: Example, options: Sequence[str]) -> list[str]:
    return [", ".join(gold) for gold in example.golds] or [options[example.label]]


def read_values(path: Path, metric: str) -> Array | None:
    """(n,) what each example of a file that `write_predictions` wrote adds to the mean that `metric` is.

    None for a metric that is no mean over examples.
    """
    import pyarrow.parquet

    if metric != "accuracy" and metric not in ANSWER_METRICS:
        return None
    rows = pyarrow.parquet.read_table(path, columns=["prediction", "golds"]).to_pylist()
    if metric == "accuracy":
        return np.array([row["prediction"] in row["golds"] for row in rows], dtype=float)
    return np.array([ANSWER_METRICS[metric](row["prediction"], [(gold,) for gold in row["golds"]]) for row in rows])
