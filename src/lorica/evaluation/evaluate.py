"""A task's metrics for a model as it stands: scores, predictions, intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lorica.evaluation.metrics import Score, scored
from lorica.evaluation.scoring import Collate, score_all
from lorica.tasks.base import Split, Task
from lorica.tasks.prompting import Encoded


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: metrics with intervals, the mean loss over options, and each example's scores."""

    task: str
    split: Split
    loss: float
    metrics: dict[str, Score]
    num_truncated: int
    scores: Tensor | None = None  # (n, options)

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
    model: nn.Module, task: Task, split: Split, rows: Sequence[Encoded], collate: Collate, *, batch_size: int
) -> Evaluation:
    """Score every row and compare the best option with its label. The loss is the cross-entropy over the options."""
    found = score_all(model, rows, collate, batch_size=batch_size, description=f"evaluating {task.name} {split}")
    labels = found.new_tensor([row.label for row in rows]).long()
    return Evaluation(
        task=task.name,
        split=split,
        loss=float(F.cross_entropy(found, labels)),
        metrics=scored(task.metrics, labels.numpy(), found.argmax(dim=1).numpy(), len(task.labels)),
        scores=found,
        num_truncated=sum(row.truncated for row in rows),
    )
