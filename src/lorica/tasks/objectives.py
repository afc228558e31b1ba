"""The scores of a batch's options or classes, and the loss of its examples (MATH section 4)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.adapters.branches import branched
from lorica.tasks import output_embedding
from lorica.tasks.batching import Batch, ChoiceBatch, HeadBatch, repeated

TrainAs = Literal["classification", "lm"]
RepeatAt = Literal["inputs", "blocks"]  # where a pass of several branches parts from that of one
MetricName = Literal["accuracy", "macro_f1"]


def scores(model: nn.Module, batch: Batch) -> Tensor:
    """(b, options) float32 or more: a head's logits, or the mean log-probability of each option's tokens."""
    if isinstance(batch, HeadBatch):
        return _at_least_float32(model(**batch.inputs).logits)
    log_p = _target_log_p(model, batch)  # (rows, options) or (rows, L)
    if batch.one_token:
        return log_p
    answer = batch.targets != -100
    return (log_p.sum(dim=1) / answer.sum(dim=1)).view(-1, batch.num_options)


def decisive_scores(model: nn.Module, batch: Batch) -> Tensor:
    """(b, options): the scores, but for a number that each row has in common, which no softmax and no argmax sees.

    Where every option is one token, that number is the log-partition over the vocabulary, and without it the output
    embedding is needed at the options' tokens alone.
    """
    if isinstance(batch, ChoiceBatch) and batch.one_token:
        output = output_embedding.plain_output(model)
        if output is not None and batch.targets.numel() < output.out_features:
            with output_embedding.at_tokens(output, batch.targets):
                return _last_logits(model, batch, 1)[:, 0]
    return scores(model, batch)


def losses(model: nn.Module, batch: Batch, train_as: TrainAs) -> Tensor:
    """(b,) in the scores' dtype, one loss an example.

    `classification`: cross-entropy over the options' scores or the head's logits. `lm`: the mean negative
    log-likelihood of the gold answer's tokens; the batch must hold the gold options alone.
    """
    if train_as == "classification":
        return F.cross_entropy(decisive_scores(model, batch), batch.labels, reduction="none")
    return -scores(model, batch).squeeze(1)


def entropies(model: nn.Module, batch: Batch, train_as: TrainAs) -> tuple[Tensor, Tensor]:
    """(b,) in nats, how undecided the model is of each example, and (b, n), what it takes its answer to be.

    `classification`: of the distribution over the options or classes. `lm`: of that over the vocabulary, in the mean
    over the positions that predict the answer's tokens; which tokens these are plays no part.
    """
    if train_as == "lm":
        assert isinstance(batch, ChoiceBatch)
        return _token_entropies(model, batch)
    log_p = decisive_scores(model, batch).log_softmax(dim=-1)  # (b, n)
    return -(log_p.exp() * log_p).sum(dim=-1), log_p.exp()


def _token_entropies(model: nn.Module, batch: ChoiceBatch) -> tuple[Tensor, Tensor]:
    log_p = _last_logits(model, batch, batch.targets.shape[1]).log_softmax(dim=-1)  # (b, L, vocabulary)
    answer = (batch.targets != -100).to(log_p.dtype)
    share = answer / answer.sum(dim=1, keepdim=True)  # (b, L)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return (entropy * share).sum(dim=1), (log_p.exp() * share.unsqueeze(2)).sum(dim=1)


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
    """(rows, count, vocabulary): the last positions' logits; the others are not computed where that can be."""
    accepted = _accepted(model)
    inputs: dict[str, Any] = {name: value for name, value in batch.inputs.items() if name in accepted}
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = count
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    with output_embedding.contiguous_input(model.get_output_embeddings()):  # type: ignore[operator]
        return _at_least_float32(model(**inputs).logits[:, -count:])


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _accepted(model: nn.Module) -> set[str]:
    """The names of the arguments that the model's forward takes."""
    return set(inspect.signature(model.forward).parameters)


def mean_loss(model: nn.Module, batch: Batch, train_as: TrainAs) -> Tensor:
    """The batch's loss: the mean over its examples."""
    return losses(model, batch, train_as).mean()


def shortfall(found: Tensor, labels: Tensor, metric: MetricName) -> Tensor:
    """(..., b, options) scores, (b,) labels -> (...,): 1 minus the metric of the best options, over this batch alone.

    `macro_f1` is the mean over the classes that occur, as in `evaluation.metrics`.
    """
    best = found.argmax(dim=-1)  # (..., b)
    if metric == "accuracy":
        return 1.0 - (best == labels).float().mean(dim=-1)
    predicted = F.one_hot(best, found.shape[-1])  # (..., b, options)
    gold = F.one_hot(labels, found.shape[-1])
    total = (predicted + gold).sum(dim=-2)
    f1 = 2.0 * (predicted * gold).sum(dim=-2) / total.clamp(min=1)
    return 1.0 - f1.sum(dim=-1) / (total > 0).sum(dim=-1)


class LossModule(nn.Module):
    """Model and loss as one module, so that `torch.func.functional_call` can ask for the loss at other parameters.

    With a `metric`, what the metric falls short of 1 stands in for the loss; it has no gradient.
    """

    def __init__(self, model: nn.Module, train_as: TrainAs, metric: MetricName | None = None) -> None:
        super().__init__()
        self.model = model
        self.train_as: TrainAs = train_as
        self.metric = metric

    def forward(self, batch: Batch, num_branches: int | None = None) -> Tensor:
        """The loss of the batch; or of each branch, where the batch holds the rows of several (num_branches,)."""
        if self.metric is None:
            each = losses(self.model, batch, self.train_as)  # (b,)
            return each.mean() if num_branches is None else each.view(num_branches, -1).mean(dim=1)
        found, labels = decisive_scores(self.model, batch), batch.labels  # (b, options), (b,)
        if num_branches is not None:
            labels = labels.view(num_branches, -1)[0]
            found = found.view(num_branches, len(labels), -1)
        return shortfall(found, labels, self.metric)

    def loss_at(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The loss where the model's parameters of these names have these values; the model itself is not written."""
        return torch.func.functional_call(self, _of_model(parameters), (batch,))  # type: ignore[no-any-return]

    def losses_at(self, parameters: Mapping[str, Tensor], batch: Batch, *, repeat_at: RepeatAt = "inputs") -> Tensor:
        """(G,): the losses at G points in one forward pass; each parameter is (G, *shape), a value for each point.

        The batch's rows are repeated for the points as they go in, or, exactly as well, where the first block that
        holds one of the parameters begins.
        """
        num_branches = len(next(iter(parameters.values())))
        whole, num_rows = repeated(batch, num_branches), None
        if repeat_at == "blocks":
            whole, num_rows = replace(whole, inputs=batch.inputs), len(next(iter(batch.inputs.values())))
        with branched(self.model, list(parameters), num_branches=num_branches, num_rows=num_rows):
            # Parameters that take branches are tied to none, and to look for such takes milliseconds.
            return torch.func.functional_call(  # type: ignore[no-any-return]
                self, _of_model(parameters), (whole, num_branches), tie_weights=False
            )


def _of_model(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that the model's parameters have in a LossModule."""
    return {f"model.{name}": value for name, value in parameters.items()}
