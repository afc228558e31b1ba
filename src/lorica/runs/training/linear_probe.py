"""adapter.kind=linear_probe: the head alone, fitted to the end on features that the frozen body makes once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lorica import card
from lorica.adapters import bypass, injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.card import About
from lorica.evaluation.probing import fit_probe
from lorica.evaluation.scoring import score_all
from lorica.models import TASK_TYPES
from lorica.results import RunFolder
from lorica.runs.ready import Ready
from lorica.runs.training.tuning import RunUnderWay
from lorica.tasks.base import Split
from lorica.training.ledger import Entry
from lorica.training.stretch import TrainStretch

Heads = Mapping[str, Mapping[str, Tensor]]


@dataclass
class LinearProbe:
    """The linear layer that gives the logits, fitted on what comes in to it; whatever comes before it stays."""

    learning: RunUnderWay
    path: str = field(init=False)
    outcome: ProbeOutcome | None = None

    def __post_init__(self) -> None:
        base = self.learning.ready.base
        self.path = bypass.last_linear(base.model, base.heads, len(self.learning.ready.task.labels))

    def told(self) -> list[str]:
        layer = self.learning.ready.base.model.get_submodule(self.path)
        return [
            f"linear_probe: {self.path} on {layer.in_features} frozen features; "
            f"{self.num_trainable():,} parameters are fitted"
        ]

    def num_trainable(self) -> int:
        layer = self.learning.ready.base.model.get_submodule(self.path)
        return sum(parameter.numel() for parameter in layer.parameters())

    def train(self, run: RunFolder, train_stretch: TrainStretch) -> ProbeOutcome:
        """Fit; no steps are taken. The head is left on the model."""
        base, num_classes = self.learning.ready.base, len(self.learning.ready.task.labels)
        (features, labels), (dev_features, dev_labels) = self._features("train"), self._features("dev")
        intercept = base.model.get_submodule(self.path).bias is not None
        fitted = fit_probe(features, labels, dev_features, dev_labels, num_classes=num_classes, intercept=intercept)
        self.learning.say.print(f"C = {fitted.strength:g}: dev loss {fitted.dev_loss:.4f}", highlight=False)
        heads = injection.create(base.model, [], rank=1, alpha=1, heads=base.heads).heads
        adapter = Adapter({}, heads_with(heads, fitted.at(self.path)), self.learning.cfg.model.name)
        injection.inject(base.model, adapter)
        self.outcome = ProbeOutcome(adapter, self.path, fitted.strength, self.learning.ready)
        return self.outcome

    def as_it_stands(self) -> ProbeOutcome:
        assert self.outcome is not None
        return self.outcome

    def rounds(self) -> Sequence[Entry]:
        return ()

    def _features(self, split: Split) -> tuple[Tensor, Tensor]:
        """(n, d) what comes in to the layer for each example of a split, and (n,) the labels."""
        ready, rows = self.learning.ready, self.learning.rows[split]
        with bypass.bypassed(ready.base.model, self.path):
            features = score_all(
                ready.base.model,
                rows,
                ready.collate(),
                batch_size=self.learning.cfg.eval_batch_size,
                description=f"features of {split}",
            )
        return features, torch.tensor([row.label for row in rows])


def heads_with(heads: Heads, fitted: Mapping[str, Tensor]) -> Heads:
    """The heads with the values of those of their parameters that were fitted, by their names in the model."""
    return {
        head: {name: fitted.get(f"{head}.{name}", value) for name, value in parts.items()}
        for head, parts in heads.items()
    }


@dataclass(frozen=True)
class ProbeOutcome:
    """A fitted head for a base model, as an adapter without updates."""

    adapter: Adapter
    path: str
    strength: float
    ready: Ready
    place: Literal["adapter"] = "adapter"

    def write(self, folder: Path) -> None:
        peft_format.write(self.adapter, folder, task_type=TASK_TYPES[self.ready.base.kind])

    def about(self) -> About:
        layer = self.ready.base.model.get_submodule(self.path)
        return card.linear_probe(
            layer=self.path,
            num_features=layer.in_features,
            strength=self.strength,
            num_parameters=sum(parameter.numel() for parameter in layer.parameters()),
        )
