"""The gradient by reverse-mode differentiation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from lorica.tasks.batching import Batch
from lorica.tasks.objectives import LossModule


@dataclass(frozen=True)
class Estimate:
    """What came of filling the gradients: the loss, how many forward passes it took, the projected gradients if any."""

    loss: float
    num_forwards: int
    projected: tuple[float, ...] = ()


class Estimator(Protocol):
    """Fills `.grad` of the trainable parameters for one step over `batches` (several: gradient accumulation)."""

    def __call__(
        self,
        objective: LossModule,
        trainable: Mapping[str, nn.Parameter],
        batches: Sequence[Batch],
        step: int,
    ) -> Estimate: ...


def backprop(
    objective: LossModule, trainable: Mapping[str, nn.Parameter], batches: Sequence[Batch], step: int
) -> Estimate:
    """The exact gradient of the mean loss over the batches. The loss returned is that mean."""
    for parameter in trainable.values():
        parameter.grad = None
    total = 0.0
    for batch in batches:
        loss = objective(batch) / len(batches)
        loss.backward()
        total += float(loss.detach())
    return Estimate(total, num_forwards=len(batches))
