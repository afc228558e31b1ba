"""What a task's examples get without a merge, by the base model and by the task's own adapter: computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lorica
from lorica.evaluation.evaluate import Evaluation
from lorica.evaluation.metrics import Array
from lorica.runs.remembered import remembered


@dataclass(frozen=True)
class Baseline:
    """What a model predicts of every example, and its mean loss."""

    predictions: Array  # (n,) class numbers
    loss: float


def baseline(
    folder: Path,
    key: Mapping[str, Any],
    evaluated: Callable[[], Evaluation],
    *,
    num_examples: int,
    num_classes: int,
) -> Baseline:
    """The baseline kept in `folder` for this version of lorica and `key`; evaluated, and kept, where there is none.

    A file that is corrupt, or of other examples or classes, is not believed, and replaced.
    """

    def made() -> dict[str, Any]:
        found = evaluated()
        loss = found.loss if math.isfinite(found.loss) else None  # JSON has no word for others: they are not kept
        return {"loss": loss, "predictions": predictions(found).tolist()}

    def is_whole(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and isinstance(value.get("loss"), float)
            and _are_classes(value.get("predictions"), num_examples, num_classes)
        )

    kept = remembered(folder, {"lorica": lorica.__version__, **key}, made, is_whole)
    return Baseline(np.array(kept["predictions"]), math.nan if kept["loss"] is None else kept["loss"])


def predictions(found: Evaluation) -> Array:
    """(n,) the class of the highest score."""
    assert found.scores is not None
    return found.scores.argmax(dim=1).numpy()


def _are_classes(value: Any, num_examples: int, num_classes: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == num_examples
        and all(type(each) is int and 0 <= each < num_classes for each in value)
    )
