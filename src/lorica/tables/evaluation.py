"""Evaluations, one by one and as a matrix, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from lorica.evaluation.evaluate import Evaluation
    from lorica.evaluation.matrix import Cell, Matrix

EMPTY = "–"
CUT = "examples that were cut to what the model reads"
ANY_WIDTH = 10_000  # characters: more than any table needs


def evaluations(found: Sequence[tuple[str, Evaluation]]) -> Table:
    """One row for each evaluation: metrics with their 95 % intervals."""
    metrics = list(dict.fromkeys(name for _, evaluation in found for name in evaluation.metrics))
    table = Table("adapter", "task", "split", "n", *metrics, "loss")
    for name, evaluation in found:
        cells = []
        for metric in metrics:
            score = evaluation.metrics.get(metric)
            cells.append(f"{score.value:.4f} [{score.low:.3f}, {score.high:.3f}]" if score else "")
        table.add_row(
            *(
                escape(name),
                escape(evaluation.task),
                evaluation.split,
                str(max(each.n for each in evaluation.metrics.values())),
            ),
            *(escape(cell) for cell in cells),
            f"{evaluation.loss:.4f}",
        )
    cut = [f"{run.num_truncated} of {escape(run.task)} ({escape(name)})" for name, run in found if run.num_truncated]
    if cut:
        table.caption = f"{CUT}: {', '.join(cut)}"
    return table


def matrix(found: Matrix, width: int) -> list[Table | str]:
    """A row for each target, a column for each task: the first metric, the best in bold, and why a cell is empty.

    The 95 % intervals are shown where the table then stays within `width` characters. Below it stands of how many
    examples a part was cut off.
    """
    whole = _matrix(found, with_intervals=True)
    fits = Console(width=ANY_WIDTH).measure(whole).maximum <= width
    return [whole if fits else _matrix(found, with_intervals=False), *_cut(found), *_reasons(found)]


def _matrix(found: Matrix, *, with_intervals: bool) -> Table:
    table = Table("", *(_head(found, column) for column in found.columns))
    best = {column: found.best(column) for column in found.columns}
    for row in found.rows:
        table.add_row(escape(row), *(_cell(cell, best[cell.column], with_intervals) for cell in found.row(row)))
    return table


def _head(found: Matrix, column: str) -> str:
    """The task's name, its metric and the number of examples."""
    evaluations = (cell.evaluation for cell in found.cells if cell.column == column)
    evaluation = next((each for each in evaluations if each is not None), None)
    if evaluation is None:
        return escape(column)
    name, score = next(iter(evaluation.metrics.items()))
    return escape(f"{column}, {evaluation.split}\n{name}, n={score.n}")


def _cell(cell: Cell, best: float | None, with_interval: bool) -> str:
    score = cell.score
    if score is None:
        return EMPTY
    value = f"{score.value:.4f}"
    interval = escape(f" [{score.low:.3f}, {score.high:.3f}]") if with_interval else ""
    return f"[bold]{value}[/]{interval}" if score.value == best else f"{value}{interval}"


def _cut(found: Matrix) -> list[str]:
    """A line on all tasks that lost something, with the targets that did where others did not, or lost less."""
    rows: dict[tuple[str, int], list[str]] = {}
    asked: dict[str, int] = {}
    for cell in found.cells:
        if cell.evaluation is not None:
            rows.setdefault((cell.column, cell.evaluation.num_truncated), []).append(cell.row)
            asked[cell.column] = asked.get(cell.column, 0) + 1
    told = [
        f"{count} of {column}" + ("" if len(names) == asked[column] else f" ({', '.join(names)})")
        for (column, count), names in rows.items()
        if count
    ]
    return [escape(f"{CUT}: {', '.join(told)}")] if told else []


def _reasons(found: Matrix) -> list[str]:
    """A line for each target and reason, with all the tasks that it keeps from being asked."""
    columns: dict[tuple[str, str], list[str]] = {}
    for cell in found.cells:
        if cell.reason is not None:
            columns.setdefault((cell.row, cell.reason), []).append(cell.column)
    return [escape(f"{EMPTY} {row} on {', '.join(names)}: {reason}") for (row, reason), names in columns.items()]
