"""A task on a base model, and every target of a matrix asked it: alone, or several adapters in one pass."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lorica
from lorica import models
from lorica.config import EvaluateConfig
from lorica.errors import AdapterFormatError, ModelError
from lorica.evaluation.branches import score_branches
from lorica.evaluation.evaluate import Evaluation, of_scores
from lorica.evaluation.matrix import Cell
from lorica.evaluation.predictions import write_predictions
from lorica.runs.evaluating.asked_tasks import Asked, told_apart_by
from lorica.runs.evaluating.matrix_plan import Row
from lorica.runs.evaluating.targets import Target, lacks_head
from lorica.runs.ready import Ready
from lorica.runs.remembered import keep, recall
from lorica.runs.sources import task_name
from lorica.tasks.prompting import Encoded


@dataclass(frozen=True)
class Bench:
    """A task on a base model, tokenised, and the folder of the cells."""

    given: EvaluateConfig
    ready: Ready
    asked: Asked
    rows: Sequence[Encoded]
    folder: Path

    def cells(self, targets: Sequence[Row]) -> Iterator[Cell]:
        """A cell for each: kept from before, empty, or evaluated now, alone or beside others."""
        shared = self._shared_key()
        stacks: list[Sequence[Row]] = []
        waiting: dict[int, list[Row]] = {}
        for row in targets:
            cell = self._empty(row) or self._kept(row, shared)
            if cell is not None:
                yield cell
            elif self._goes_beside_others(row.target):
                waiting.setdefault(self._batch_size(row.target), []).append(row)
            else:
                stacks.append([row])
        for rows in waiting.values():
            stacks += _cut(rows, self.given.branches)
        for stack in stacks:
            yield from self._evaluated(stack, shared)

    def _evaluated(self, stack: Sequence[Row], shared: Mapping[str, Any]) -> Iterator[Cell]:
        begin = time.monotonic()
        try:
            found = self._beside(stack) if len(stack) > 1 else [self._alone(stack[0].target)]
        except (AdapterFormatError, ModelError) as error:
            if len(stack) == 1:
                yield Cell(stack[0].name, self.asked.name, reason=str(error))
                return
            for row in stack:  # one of them does not fit, and says so alone
                yield from self._evaluated([row], shared)
            return
        seconds = (time.monotonic() - begin) / len(stack)
        for row, each in zip(stack, found, strict=True):
            if not math.isfinite(each.loss):
                yield Cell(row.name, self.asked.name, reason="its loss is NaN or infinite")
                continue
            place = self._place(row)
            place.parent.mkdir(parents=True, exist_ok=True)
            write_predictions(place.with_suffix(".parquet"), self.ready.task, self.rows, each)
            keep(place, self._key(row, shared), {"evaluation": each.as_record(), "seconds": seconds})
            yield Cell(row.name, self.asked.name, each, seconds)

    def _alone(self, target: Target) -> Evaluation:
        with target.laid_on(self.ready):
            return self.ready.evaluated(self.asked.split, self.rows, self._batch_size(target))

    def _beside(self, stack: Sequence[Row]) -> list[Evaluation]:
        """Several adapters in one pass, of one batch size."""
        scores = score_branches(
            self.ready.base.model,
            [row.target.adapter for row in stack],
            self.rows,
            self.ready.collate(),
            batch_size=self._batch_size(stack[0].target),
            description=f"evaluating {self.asked.name} {self.asked.split}, {len(stack)} adapters",
        )
        return [of_scores(self.ready.task, self.asked.split, self.rows, each) for each in scores]

    def _goes_beside_others(self, target: Target) -> bool:
        """Only what is chosen by scores alone, and by updates alone."""
        task = self.ready.task
        return target.is_low_rank and self.ready.base.kind == "causal" and task.kind == "choice" and not task.sfc

    def _batch_size(self, target: Target) -> int:
        return self.given.eval_batch_size or target.eval_batch_size

    def _empty(self, row: Row) -> Cell | None:
        """The cell of a target whose head, if it has one at all, is of another task."""
        target = row.target
        if self.ready.base.kind != "classification":
            return None
        if target.cfg is not None and told_apart_by(target.cfg.task) != told_apart_by(self.asked.task):
            return Cell(row.name, self.asked.name, reason=f"its head is of {task_name(target.cfg.task)}")
        if lacks_head(self.ready, target):
            return Cell(row.name, self.asked.name, reason=f"it has no head for {self.asked.name}")
        return None

    def _kept(self, row: Row, shared: Mapping[str, Any]) -> Cell | None:
        value = recall(self._place(row), self._key(row, shared), lambda value: isinstance(value, dict))
        if value is None:
            return None
        return Cell(row.name, self.asked.name, Evaluation.of_record(value["evaluation"]), value["seconds"])

    def _place(self, row: Row) -> Path:
        return self.folder / row.name / f"{self.asked.name}.json"

    def _key(self, row: Row, shared: Mapping[str, Any]) -> dict[str, Any]:
        return {**shared, "target": row.target.sha256, "batch_size": self._batch_size(row.target)}

    def _shared_key(self) -> dict[str, Any]:
        """What all cells of the bench have in common; the base is bare."""
        seen = "\n".join(repr((row, row.example)) for row in self.rows)
        return {
            "lorica": lorica.__version__,
            "base": models.fingerprint(self.ready.base),
            "task": self.ready.task.name,
            "sfc": self.ready.task.sfc,
            "split": self.asked.split,
            "examples": hashlib.sha256(seen.encode()).hexdigest(),
            "device": self.ready.device,
        }


def _cut(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
