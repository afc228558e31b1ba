"""Answers that a model writes: the likeliest token after the likeliest token, many prompts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorica.evaluation.scoring import Collate, in_eval_mode, way_back
from lorica.progress import tracked
from lorica.tasks.batching import ChoiceBatch, evaluation_order
from lorica.tasks.objectives import called, encoded_once, keeps_a_cache
from lorica.tasks.prompting import TERMINATOR, Choice


@torch.no_grad()
def answer_all(
    model: nn.Module,
    rows: Sequence[Choice],
    collate: Collate,
    tokenizer: Any,
    *,
    batch_size: int,
    max_new_tokens: int,
    description: str = "answering",
) -> list[str]:
    """The model's own answer to each row's prompt: up to the end of its line, or `max_new_tokens` tokens.

    The model is in eval mode meanwhile.
    """
    order = evaluation_order([row.length for row in rows], batch_size)
    ends = torch.tensor(ends_of(tokenizer))
    parts: list[str] = []
    with in_eval_mode(model):
        for batch in tracked(order, len(order), description):
            asked = collate([replace(rows[index], options=((0,),), prompts=rows[index].prompts[:1]) for index in batch])
            assert isinstance(asked, ChoiceBatch) and asked.one_token  # so the inputs are the prompts alone
            written = torch.stack([*greedy(model, asked.inputs, ends, max_new_tokens)], dim=1)  # (b, t)
            parts += [_first_line(text) for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    return [parts[place] for place in way_back(order).tolist()]


def greedy(model: nn.Module, inputs: Mapping[str, Tensor], ends: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
    """(b,) tokens, one position after the other, each the likeliest, until every row has ended.

    It goes on from the cache that the model returns, as scoring does: transformers' own `generate` begins with an empty
    one, which a prefix would take for a prompt that has been read.
    """
    step = encoded_once(model, inputs) if "decoder_input_ids" in inputs else dict(inputs)
    ends = ends.to(inputs["input_ids"].device)
    ended = torch.zeros(len(inputs["input_ids"]), dtype=torch.bool, device=ends.device)
    for _ in range(max_new_tokens):
        found = called(model, step, 1, use_cache=True)
        token = torch.where(ended, ends[0], found.logits[:, -1].argmax(dim=-1))  # (b,)
        yield token.cpu()
        ended |= torch.isin(token, ends)
        if ended.all():
            return
        step = _after(step, token, found.past_key_values if keeps_a_cache(model) else None)


def ends_of(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the end of the text, and whatever holds the end of a line."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    lines = [token for token, text in enumerate(texts) if TERMINATOR in text]
    return list(dict.fromkeys([*([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *lines]))


def _after(step: Mapping[str, Any], token: Tensor, cache: Any) -> dict[str, Any]:
    """The inputs for the token behind `token` (b,): the cache and it alone, or all so far where nothing is cached."""
    reads = "decoder_input_ids" if "decoder_input_ids" in step else "input_ids"
    tokens = token[:, None] if cache is not None else torch.cat([step[reads], token[:, None]], dim=1)
    following = {**step, reads: tokens, "past_key_values": cache}
    following.pop("decoder_attention_mask", None)  # nothing that is written is padded
    if reads == "input_ids":
        mask = torch.cat([step["attention_mask"], torch.ones_like(token[:, None])], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        following |= {"attention_mask": mask, "position_ids": positions[:, -tokens.shape[1] :]}
    return following


def _first_line(text: str) -> str:
    return text.partition(TERMINATOR)[0].strip()
