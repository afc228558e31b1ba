"""Many targets on many tasks: a cell for each pair, with what was found or the reason why nothing could be asked."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.evaluation.evaluate import Evaluation
from lorica.evaluation.metrics import Score

CSV_HEAD = ("row", "column", "split", "metric", "value", "low", "high", "n", "higher_is_better", "seconds", "reason")


@dataclass(frozen=True)
class Cell:
    """What the target of a row made of the task of a column, in how many seconds; or else the reason."""

    row: str
    column: str
    evaluation: Evaluation | None = None
    seconds: float | None = None
    reason: str | None = None

    @property
    def score(self) -> Score | None:
        """By the task's first metric."""
        return next(iter(self.evaluation.metrics.values())) if self.evaluation else None

    def as_record(self) -> dict[str, Any]:
        found = self.evaluation.as_record() if self.evaluation else {}
        return {"row": self.row, "column": self.column, **found, "seconds": self.seconds, "reason": self.reason}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Cell:
        """A cell read back from its record, without the examples' scores."""
        found = Evaluation.of_record(record) if record["reason"] is None else None
        return cls(record["row"], record["column"], found, record["seconds"], record["reason"])


@dataclass(frozen=True)
class Matrix:
    """Every cell, row by row in the order of `rows` and `columns`, and the folder that they are kept in."""

    folder: Path
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]

    def row(self, name: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.row == name]

    def best(self, column: str) -> float | None:
        """The best value in a column, by the task's first metric and its direction; None if no cell has one."""
        scores = [cell.score for cell in self.cells if cell.column == column and cell.score is not None]
        if not scores:
            return None
        return (max if scores[0].higher_is_better else min)(score.value for score in scores)

    def as_csv(self) -> str:
        """One line for each metric of each cell, and one for a cell without any."""
        written = io.StringIO()
        writer = csv.writer(written, lineterminator="\n")
        writer.writerow(CSV_HEAD)
        writer.writerows(line for cell in self.cells for line in _lines(cell))
        return written.getvalue()


def _lines(cell: Cell) -> list[Sequence[Any]]:
    found = cell.evaluation
    if found is None:
        return [(cell.row, cell.column, *[""] * (len(CSV_HEAD) - 3), cell.reason)]
    return [
        (
            *(cell.row, cell.column, found.split, name),
            *(score.value, score.low, score.high, score.n, score.higher_is_better, cell.seconds, ""),
        )
        for name, score in found.metrics.items()
    ]
