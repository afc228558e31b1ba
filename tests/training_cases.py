"""A tiny encoder with an adapter to train, a batch for it, and gradients as one vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tiny
from lorica import models
from lorica.adapters import injection
from lorica.adapters.injection import Live
from lorica.models import Base
from lorica.tasks.batching import Batch, HeadBatch
from lorica.tasks.objectives import LossModule


@dataclass(frozen=True)
class Setup:
    """A tiny encoder with an adapter and a head to train."""

    objective: LossModule
    live: Live

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.live.trainable()


def setup(base: Base) -> Setup:
    adapter = tiny.adapter(base.model, models.target_modules(base, "standard"), heads=base.heads)
    return Setup(LossModule(base.model, "classification"), injection.inject(base.model, adapter))


def batch(model: nn.Module, rows: int = 4, seed: int = 0) -> HeadBatch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(tiny.NUM_LABELS, (rows,), generator=generator)
    return HeadBatch(tiny.inputs(model, rows=rows, seed=seed), labels)


def halves(whole: HeadBatch) -> list[Batch]:
    parts = [{name: value.chunk(2)[at] for name, value in whole.inputs.items()} for at in (0, 1)]
    return [HeadBatch(part, labels) for part, labels in zip(parts, whole.labels.chunk(2), strict=True)]


def gradients(trainable: dict[str, nn.Parameter]) -> Tensor:
    """Every gradient in one flat vector."""
    found = [parameter.grad for parameter in trainable.values()]
    return torch.cat([each.flatten() for each in found if each is not None])


def flat(trainable: dict[str, nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in trainable.values()])
