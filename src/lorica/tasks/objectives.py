"""The scores of a batch's options or classes, and the loss of its examples (MATH section 4)."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.tasks.batching import Batch, ChoiceBatch, HeadBatch

TrainAs = Literal["classification", "lm"]


def scores(model: nn.Module, batch: Batch) -> Tensor:
    """(b, options) float32: a head's logits, or the mean log-probability of each option's tokens."""
    if isinstance(batch, HeadBatch):
        logits: Tensor = model(**batch.inputs).logits
        return logits.float()
    log_p = _target_log_p(model, batch)  # (rows, options) or (rows, L)
    if batch.one_token:
        return log_p
    answer = batch.targets != -100
    return (log_p.sum(dim=1) / answer.sum(dim=1)).view(-1, batch.num_options)


def losses(model: nn.Module, batch: Batch, train_as: TrainAs) -> Tensor:
    """(b,) float32, one loss an example.

    `classification`: cross-entropy over the options' scores or the head's logits. `lm`: the mean negative
    log-likelihood of the gold answer's tokens; the batch must hold the gold options alone.
    """
    if train_as == "classification":
        return F.cross_entropy(scores(model, batch), batch.labels, reduction="none")
    return -scores(model, batch).squeeze(1)


def _target_log_p(model: nn.Module, batch: ChoiceBatch) -> Tensor:
    """The log-probability of every target token; 0 where there is none."""
    if batch.one_token:
        logits = _last_logits(model, batch, 1)[:, 0]  # (b, vocabulary)
        return logits.log_softmax(dim=-1).gather(1, batch.targets)
    logits = _last_logits(model, batch, batch.targets.shape[1])  # (rows, L, vocabulary)
    targets = batch.targets.clamp(min=0)
    log_p = logits.log_softmax(dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2)
    return log_p.masked_fill(batch.targets == -100, 0.0)


def _last_logits(model: nn.Module, batch: ChoiceBatch, count: int) -> Tensor:
    """(rows, count, vocabulary) float32: the last positions' logits; the others are not computed where that can be."""
    accepted = _accepted(model)
    inputs: dict[str, Any] = {name: value for name, value in batch.inputs.items() if name in accepted}
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = count
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    logits: Tensor = model(**inputs).logits[:, -count:]
    return logits.float()


def _accepted(model: nn.Module) -> set[str]:
    """The names of the arguments that the model's forward takes."""
    return set(inspect.signature(model.forward).parameters)


def mean_loss(model: nn.Module, batch: Batch, train_as: TrainAs) -> Tensor:
    """The batch's loss: the mean over its examples."""
    return losses(model, batch, train_as).mean()


class LossModule(nn.Module):
    """Model and loss as one module, so that `torch.func.functional_call` can ask for the loss at other parameters."""

    def __init__(self, model: nn.Module, train_as: TrainAs) -> None:
        super().__init__()
        self.model = model
        self.train_as: TrainAs = train_as

    def forward(self, batch: Batch) -> Tensor:
        return mean_loss(self.model, batch, self.train_as)

    def loss_at(self, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
        """The loss where the model's parameters of these names have these values; the model itself is not written."""
        renamed = {f"model.{name}": value for name, value in parameters.items()}
        return torch.func.functional_call(self, renamed, (batch,))  # type: ignore[no-any-return]
