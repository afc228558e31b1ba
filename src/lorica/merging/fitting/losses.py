"""The tasks' losses as functions of the coefficients c: nothing is written to the model to have them elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lorica.merging.fitting.problem import FittingTask, Problem
from lorica.merging.runtime import Mounted
from lorica.tasks import objectives
from lorica.tasks.batching import Batch, mapped, repeated

LossKind = Literal["cross_entropy", "entropy"]


@dataclass(frozen=True)
class Measured:
    """A task on some batches: the mean loss over the examples; of `entropy` (n,), the mean of the answers given."""

    loss: float
    answers: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of a problem's tasks with its adapters mounted.

    cross_entropy needs labels (causal models' are aligned: a position predicts the token behind it); entropy is that of
    the predicted distribution over the options or, of `lm`, over the tokens at the answer's positions.
    """

    problem: Problem
    mounted: Mounted
    kind: LossKind
    non_blocking: bool = True

    def examples(self, task: FittingTask, c: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(b,) a loss for each example, and of `entropy` (b, n) what the model takes the answers to be."""
        there = mapped(batch, lambda tensor: tensor.to(self.problem.device, non_blocking=self.non_blocking))
        with self.mounted.at(self.ready(c)):
            if self.kind == "entropy":
                return objectives.entropies(task.model, there, task.train_as)
            return objectives.losses(task.model, there, task.train_as), None

    def mean(self, task: FittingTask, c: Tensor, batch: Batch) -> Tensor:
        """The batch's mean loss, float64 on the CPU."""
        return self.examples(task, c, batch)[0].mean().double().cpu()

    def of_candidates(self, task: FittingTask, candidates: Tensor, batch: Batch) -> Tensor:
        """(G,) the batch's mean loss at each of the candidates (G, K), in one forward pass where that can be."""
        if self.mounted.merge_impl != "fused_lora_linear":
            return torch.stack([self.mean(task, c, batch) for c in candidates])
        found = self.examples(task, candidates, repeated(batch, len(candidates)))[0]  # (G · b,)
        return found.view(len(candidates), -1).mean(dim=1).double().cpu()

    @torch.no_grad()
    def measured(self, task: FittingTask, c: Tensor, batches: Sequence[Batch]) -> Measured:
        """The task at c over all examples of the batches."""
        found = [self.examples(task, c, batch) for batch in batches]
        losses = torch.cat([losses.double() for losses, _ in found])
        answers = [each.double() for _, each in found if each is not None]
        return Measured(float(losses.mean()), torch.cat(answers).mean(dim=0).cpu() if answers else None)

    def ready(self, c: Tensor) -> Tensor:
        """c where the model is, in float32, or in float64 for a model in that."""
        return c.to(self.problem.device, self._dtype)

    @cached_property
    def _dtype(self) -> torch.dtype:
        dtypes = {parameter.dtype for parameter in self.problem.model.parameters()}
        return torch.float64 if torch.float64 in dtypes else torch.float32
