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
    """What came of filling the gradients: the loss, and how many forward passes it took.

    Of a zeroth-order estimate also, for each direction, the measured slope (NaN where its loss was not finite) and the
    float32 weight that the direction has in the gradient, and how many directions were left out.
    """

    loss: float
    num_forwards: int
    projected: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    num_left_out: int = 0


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
