"""One model on one task's split: scores or answers, metrics, intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.evaluation.answers import ANSWER_METRICS
from lorica.evaluation.generation import answer_all
from lorica.evaluation.metrics import Score, mean_score, scored
from lorica.evaluation.scoring import Collate, calibrated, score_all
from lorica.tasks.base import Example, Split, Task
from lorica.tasks.prompting import Choice, Encoded


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: metrics with intervals, the mean loss, and each example's scores and answer.

    The loss is the cross-entropy over the options, or the mean negative log-likelihood of the right answer's tokens
    where an answer is generated. `answers` are the texts that were chosen or written.
    """

    task: str
    split: Split
    loss: float
    metrics: dict[str, Score]
    num_truncated: int
    scores: Tensor | None = None  # (n, options)
    answers: tuple[str, ...] | None = None

    def as_record(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "split": self.split,
            "loss": self.loss,
            "metrics": {name: score.as_record() for name, score in self.metrics.items()},
            "num_truncated": self.num_truncated,
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Evaluation:
        """An evaluation read back from its record, without the examples' scores."""
        metrics = {name: Score(**score) for name, score in record["metrics"].items()}
        return cls(record["task"], record["split"], record["loss"], metrics, record["num_truncated"])


def evaluate(
    model: nn.Module,
    task: Task,
    split: Split,
    rows: Sequence[Encoded],
    collate: Collate,
    *,
    batch_size: int,
    tokenizer: Any = None,
) -> Evaluation:
    """Score every row, and compare the best option, or what the model writes, with what is right.

    The `tokenizer` reads what a model writes; a task that chooses needs none.
    """
    found = score_all(model, rows, collate, batch_size=batch_size, description=f"evaluating {task.name} {split}")
    asked = [row for row in rows if isinstance(row, Choice)]
    if task.sfc:
        found = calibrated(model, asked, found, collate, batch_size=batch_size)
    if task.kind != "generation":
        return of_scores(task, split, rows, found)
    answers = answer_all(
        model,
        asked,
        collate,
        tokenizer,
        batch_size=batch_size,
        max_new_tokens=task.max_new_tokens,
        description=f"answering {task.name} {split}",
    )
    metrics = _of_answers(task, examples_of(rows), answers)
    return Evaluation(task.name, split, float(-found.mean()), metrics, _num_truncated(rows), found, tuple(answers))


def of_scores(task: Task, split: Split, rows: Sequence[Encoded], found: Tensor) -> Evaluation:
    """What the scores (n, options) that were found come to, for a task whose answers are chosen."""
    labels = found.new_tensor([row.label for row in rows]).long()
    answers, metrics = _of_choices(task, rows, labels, found.argmax(dim=1))
    loss = float(F.cross_entropy(found, labels))
    return Evaluation(task.name, split, loss, metrics, _num_truncated(rows), found, tuple(answers))


def _num_truncated(rows: Sequence[Encoded]) -> int:
    return sum(row.truncated for row in rows)


def examples_of(rows: Sequence[Encoded]) -> list[Example]:
    """The examples that rows were made of, as `encode` notes them."""
    return [row.example for row in rows if row.example is not None]


def _of_choices(
    task: Task, rows: Sequence[Encoded], labels: Tensor, best: Tensor
) -> tuple[list[str], dict[str, Score]]:
    """(what was chosen, the metrics) where the options of the numbers `best` (n,) are the best."""
    examples, chosen = examples_of(rows), best.tolist()
    if not any(example.options for example in examples):
        metrics = scored(task.metrics, labels.numpy(), best.numpy(), len(task.labels))
        return [task.labels[number] for number in chosen], metrics
    answers = [example.options[number].answer for example, number in zip(examples, chosen, strict=True)]
    right = [example.is_right(number) for example, number in zip(examples, chosen, strict=True)]
    return answers, _of_answers(task, examples, answers, right)


def _of_answers(
    task: Task, examples: Sequence[Example], answers: Sequence[str], right: Sequence[bool] = ()
) -> dict[str, Score]:
    """The task's metrics as means over examples: of options chosen right, or of answers' agreement with the golds."""
    values = {
        name: right
        if name == "accuracy"
        else [ANSWER_METRICS[name](answer, each.golds) for answer, each in zip(answers, examples, strict=True)]
        for name in task.metrics
    }
    return {name: mean_score(np.array(each, dtype=float)) for name, each in values.items()}
