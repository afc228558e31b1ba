"""adapter.kind=full: no adapter; all of the model's parameters are trained, and the run leaves a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorica import card
from lorica.adapters.whole import Whole
from lorica.card import About
from lorica.results import RunFolder
from lorica.runs.ready import Ready
from lorica.runs.training.tuning import RunUnderWay
from lorica.training.ledger import Entry
from lorica.training.stretch import INTERRUPTED, TrainStretch, Undivided


@dataclass
class Full:
    """The model itself. By backprop it has gradients and moments beside it; by zeroth order nothing of its size."""

    learning: RunUnderWay
    live: Whole = field(init=False)

    def __post_init__(self) -> None:
        self.live = Whole(self.learning.ready.base.model)

    def told(self) -> list[str]:
        return [f"full by {self.learning.cfg.trainer}: all {_count(self.live):,} parameters trainable"]

    def num_trainable(self) -> int:
        return _count(self.live)

    def train(self, run: RunFolder, train_stretch: TrainStretch) -> ModelOutcome | None:
        model = self.learning.ready.base.model
        model.requires_grad_(self.learning.cfg.trainer == "backprop")
        reason = train_stretch(Undivided(self.live))
        # A frozen model, as it is loaded to be evaluated: torch picks its matmul by requires_grad.
        model.requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = None
        return None if reason == INTERRUPTED else self.as_it_stands()

    def as_it_stands(self) -> ModelOutcome:
        return ModelOutcome(self.learning.ready)

    def rounds(self) -> Sequence[Entry]:
        return ()


@dataclass(frozen=True)
class ModelOutcome:
    """A whole model, trained."""

    ready: Ready
    place: Literal["model"] = "model"

    def write(self, folder: Path) -> None:
        self.ready.write_model(folder)

    def about(self) -> About:
        base = self.ready.base
        return card.model(
            kind=base.kind, num_labels=len(self.ready.task.labels), num_parameters=_count(Whole(base.model))
        )


def _count(whole: Whole) -> int:
    return sum(parameter.numel() for parameter in whole.trainable().values())
