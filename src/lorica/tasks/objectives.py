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
from lorica.tasks import base, output_embedding
from lorica.tasks.batching import Batch, ChoiceBatch, HeadBatch, repeated

TrainAs = base.TrainAs
RepeatAt = Literal["inputs", "blocks"]  # where a pass of several branches parts from that of one
MetricName = Literal["accuracy", "macro_f1"]


def scores(model: nn.Module, batch: Batch) -> Tensor:
    """(b, options) float32 or more: a head's logits, or the mean log-probability of each option's tokens."""
    if isinstance(batch, HeadBatch):
        return _at_least_float32(model(**batch.inputs).logits)
    log_p = _target_log_p(model, batch)  # (rows, options) or (rows, L)
    if batch.one_token:
        return log_p
    num_tokens = (batch.targets != -100).sum(dim=1)
    mean = log_p.sum(dim=1) / num_tokens.clamp(min=1)
    return mean.masked_fill(num_tokens == 0, -torch.inf).view(-1, batch.num_options)


def decisive_scores(model: nn.Module, batch: Batch) -> Tensor:
    """(b, options): the scores, but for a number that each row has in common, which no softmax and no argmax sees.

    Where every option is one token, that number is the log-partition over the vocabulary, and without it the output
    embedding is needed at the options' tokens alone.
    """
    if isinstance(batch, ChoiceBatch) and batch.one_token:
        output = output_embedding.plain_output(model)
        if output is not None and batch.targets.numel() < output.out_features:
            with output_embedding.at_tokens(output, batch.targets.clamp(min=0)):
                found = _last_logits(model, batch, 1)[:, 0]
            return found.masked_fill(batch.targets == -100, -torch.inf)
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
    log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min)  # of an option that there is not: 0 · -inf has no value
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
        log_p = logits.log_softmax(dim=-1).gather(1, batch.targets.clamp(min=0))
        return log_p.masked_fill(batch.targets == -100, -torch.inf)
    if "continuation_ids" in batch.inputs:
        return _continued_log_p(model, batch)
    return _gathered(_last_logits(model, batch, batch.targets.shape[1]), batch.targets)


def _continued_log_p(model: nn.Module, batch: ChoiceBatch) -> Tensor:
    """(b · options, L): the prompts are read once, and every option goes on from what the model keeps of its own."""
    inputs, count = batch.inputs, batch.num_options
    more = inputs["continuation_ids"]  # (b · options, L - 1)
    mask = torch.cat([inputs["attention_mask"].repeat_interleave(count, dim=0), inputs["continuation_mask"]], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if not keeps_a_cache(model):
        rows = torch.cat([inputs["input_ids"].repeat_interleave(count, dim=0), more], dim=1)
        whole = {"input_ids": rows, "attention_mask": mask, "position_ids": positions}
        return _gathered(_logits(model, whole, batch.targets.shape[1]), batch.targets)
    prompts = called(model, inputs, 1, use_cache=True)
    first = _at_least_float32(prompts.logits[:, -1]).log_softmax(dim=-1)  # (b, vocabulary)
    openings = batch.targets[:, 0].view(len(first), -1)  # (b, options)
    log_p = first.gather(1, openings.clamp(min=0)).masked_fill(openings == -100, 0.0).view(-1, 1)  # (b · options, 1)
    cache = prompts.past_key_values
    cache.batch_repeat_interleave(count)
    behind = {"input_ids": more, "attention_mask": mask, "position_ids": positions[:, -more.shape[1] :]}
    logits = _logits(model, {**behind, "past_key_values": cache}, more.shape[1], use_cache=True)
    return torch.cat([log_p, _gathered(logits, batch.targets[:, 1:])], dim=1)


def _gathered(logits: Tensor, targets: Tensor) -> Tensor:
    """(rows, L) log-probabilities of the targets (rows, L) by logits (rows, L, vocabulary); 0 where there is none."""
    log_p = logits.log_softmax(dim=-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return log_p.masked_fill(targets == -100, 0.0)


def _last_logits(model: nn.Module, batch: ChoiceBatch, count: int) -> Tensor:
    """(rows, count, vocabulary): the last positions' logits; the others are not computed where that can be."""
    tokens, written = batch.inputs["input_ids"], batch.inputs.get("decoder_input_ids")
    shares = written is not None and len(written) > len(tokens)
    return _logits(model, encoded_once(model, batch.inputs) if shares else batch.inputs, count)


def encoded_once(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """An encoder-decoder's inputs with what its encoder makes of each prompt, repeated for the options behind it."""
    tokens, mask, written = inputs["input_ids"], inputs["attention_mask"], inputs["decoder_input_ids"]
    count = len(written) // len(tokens)
    hidden = model.get_encoder()(input_ids=tokens, attention_mask=mask).last_hidden_state  # type: ignore[operator]
    found = {name: value for name, value in inputs.items() if name != "input_ids"}
    repeated_mask = mask.repeat_interleave(count, dim=0)
    return found | {"encoder_outputs": (hidden.repeat_interleave(count, dim=0),), "attention_mask": repeated_mask}


def _logits(model: nn.Module, inputs: Mapping[str, Any], count: int, *, use_cache: bool = False) -> Tensor:
    return _at_least_float32(called(model, inputs, count, use_cache=use_cache).logits[:, -count:])


def called(model: nn.Module, inputs: Mapping[str, Any], count: int, *, use_cache: bool = False) -> Any:
    """What the model makes of those inputs that it takes, with the logits of the last `count` positions at least."""
    accepted = _accepted(model)
    options = {"logits_to_keep": count, "use_cache": use_cache}
    taken = {name: value for name, value in {**inputs, **options}.items() if name in accepted}
    with output_embedding.contiguous_input(model.get_output_embeddings()):  # type: ignore[operator]
        return model(**taken)


def keeps_a_cache(model: nn.Module) -> bool:
    """Whether the model can go on from what it has read."""
    return "past_key_values" in _accepted(model)


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
        whole = repeated(batch, num_branches)
        if repeat_at == "blocks":
            whole = replace(whole, inputs=batch.inputs)
        with branched(self.model, list(parameters), num_branches=num_branches, at_blocks=repeat_at == "blocks"):
            # Parameters that take branches are tied to none, and to look for such takes milliseconds.
            return torch.func.functional_call(  # type: ignore[no-any-return]
                self, _of_model(parameters), (whole, num_branches), tie_weights=False
            )


def _of_model(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that the model's parameters have in a LossModule."""
    return {f"model.{name}": value for name, value in parameters.items()}
