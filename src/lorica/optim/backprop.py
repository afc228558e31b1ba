"""The gradient by reverse-mode differentiation, in one process or in several together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lorica.errors import ConfigError
from lorica.processes import Processes
from lorica.tasks.batching import Batch, share
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


@dataclass(frozen=True)
class BackpropTogether:
    """Backprop over several processes: each takes its share of every batch, and all get the whole batches' gradient.

    `wrapped` is the objective with gradients averaged in its backward (`averaged`); without it they are averaged after.
    """

    processes: Processes
    wrapped: Any = None

    def __call__(
        self, objective: LossModule, trainable: Mapping[str, nn.Parameter], batches: Sequence[Batch], step: int
    ) -> Estimate:
        for parameter in trainable.values():
            parameter.grad = None
        total, num = torch.zeros(1, dtype=torch.float64), self.processes.num
        for number, batch in enumerate(batches, 1):
            mine = share(batch, self.processes.rank, num)
            with contextlib.nullcontext() if self.wrapped is None or number == len(batches) else self.wrapped.no_sync():
                loss = (self.wrapped or objective)(mine.batch) * (mine.weight / len(batches))
                (loss * num).backward()  # the average over the processes divides by it
            total += float(loss.detach())
        if self.wrapped is None:
            self.processes.average([parameter.grad for parameter in trainable.values() if parameter.grad is not None])
        return Estimate(float(self.processes.summed(total)), num_forwards=len(batches))


def averaged(objective: LossModule) -> Any:
    """The objective in accelerate's DistributedDataParallel: backward leaves the processes' mean gradient in each."""
    return accelerator(next(objective.parameters()).device.type).prepare_model(objective)


def accelerator(device: str) -> Any:
    """accelerate as its environment and config set it up; ConfigError where that is neither DDP nor FSDP."""
    from accelerate import Accelerator, DistributedType

    made = Accelerator(cpu=device == "cpu")
    if made.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"accelerate is set up for {made.distributed_type.value}, which lorica does not train by: start with "
            "torchrun, set accelerate up for FSDP, or use trainer=zo"
        )
    return made
