"""Batches of what was tokenised once: rows of similar length together, padded on the side that the model reads from."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorica import randomness
from lorica.tasks.prompting import Choice, Classified, Encoded, Tokens

WORTH_GOING_ON = 0.8  # of the tokens, below which a second pass over the options pays
MAX_TOKENS = {"cpu": 512}  # of a pass without gradients: a larger one is no faster a token, and takes memory
POOL_BATCHES = 50  # rows are sorted by length inside pools of so many batches: little padding, and still shuffled


@dataclass(frozen=True)
class HeadBatch:
    """Input of a model with a classification head. Tensors are (b, t); labels (b,)."""

    inputs: dict[str, Tensor]
    labels: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.inputs["attention_mask"].sum())


@dataclass(frozen=True)
class ChoiceBatch:
    """Input of a language model whose options are to be scored.

    Rows are padded on the left, so what predicts the answers stands last. Where every option is one token, there is one
    row an example and `targets` (b, options) are the options' tokens. Otherwise `targets` (b · options, L) are each
    option's tokens, -100 where there is none, and the inputs are of one of two kinds. An example that has fewer options
    than another is filled up with some that have no token; they score minus infinity.

    - a row an option, its prompt and itself; the targets are right-aligned.
    - a row an example, its prompt, and what to go on with behind it: `continuation_ids` and `continuation_mask`
      (b · options, L - 1); the targets are left-aligned.

    An encoder-decoder's prompts are padded on the right, a row an example where its options share the prompt, and its
    `decoder_input_ids` have a row an option; the targets are left-aligned.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    labels: Tensor
    num_options: int
    one_token: bool

    @property
    def num_tokens(self) -> int:
        masks = [self.inputs[name] for name in ("attention_mask", "continuation_mask") if name in self.inputs]
        return sum(int(mask.sum()) for mask in masks)


Batch = HeadBatch | ChoiceBatch


def mapped(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with `function` of each of its tensors: on another device, in pinned memory, repeated for branches."""
    inputs = {name: function(tensor) for name, tensor in batch.inputs.items()}
    if isinstance(batch, HeadBatch):
        return HeadBatch(inputs, function(batch.labels))
    return replace(batch, inputs=inputs, targets=function(batch.targets), labels=function(batch.labels))


def repeated(batch: Batch, count: int) -> Batch:
    """The batch's rows `count` times one after the other, for as many branches of one forward pass."""
    return mapped(batch, lambda tensor: tensor.repeat(count, *(1,) * (tensor.dim() - 1)))


@dataclass(frozen=True)
class Share:
    """Some examples of a batch, and the weight of their mean in the whole batch's: 0 for a stand-in."""

    batch: Batch
    weight: float


def share(batch: Batch, rank: int, num: int) -> Share:
    """Every `num`-th example from number `rank` on, padded as the whole batch is; if there is none, the first for 0."""
    count = len(batch.labels)
    if num == 1:
        return Share(batch, 1.0)
    taken = slice(rank, None, num) if rank < count else slice(0, 1)
    part = mapped(batch, lambda tensor: tensor.view(count, -1, *tensor.shape[1:])[taken].flatten(0, 1))
    return Share(part, len(range(rank, count, num)) / count)


@dataclass(frozen=True)
class TrainingStream:
    """The endless, seeded order of a run's batches: batch k is a function of (seed, k), so a run resumes by number."""

    lengths: Sequence[int]
    batch_size: int
    seed: int
    bucketing: bool = True
    classes: Sequence[int] | None = None  # of each row: then every batch holds each class by its share

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def indices(self, start: int = 0) -> Iterator[list[int]]:
        """The rows of batch `start`, `start` + 1, and so on, epoch after epoch."""
        epoch, skip = divmod(start, self.batches_per_epoch)
        while True:
            yield from self._epoch(epoch)[skip:]
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int) -> list[list[int]]:
        generator = randomness.python_generator(self.seed, "data", epoch)
        order = generator.sample(range(len(self.lengths)), len(self.lengths))
        if not self.bucketing and self.classes is None:
            return _cut(order, self.batch_size)
        pools = _cut(order, self.batch_size * POOL_BATCHES)
        if self.bucketing:
            pools = [sorted(pool, key=self.lengths.__getitem__) for pool in pools]
        if self.classes is not None:
            pools = [_spread(pool, self.classes, generator) for pool in pools]
        batches = [batch for pool in pools for batch in _cut(pool, self.batch_size)]
        return generator.sample(batches, len(batches))


def most_tokens(model: nn.Module) -> float:
    """Tokens, with padding, that a pass without gradients should have at most on the model's device."""
    return MAX_TOKENS.get(next(model.parameters()).device.type, math.inf)


def evaluation_order(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Every row once, longest first: the first batch shows whether the memory suffices."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return _cut(order, batch_size)


def collate(
    rows: Sequence[Encoded],
    *,
    pad_token_id: int,
    device: str = "cpu",
    gold_only: bool = False,
    decoder_start_token_id: int | None = None,
    max_length: int | None = None,
) -> Batch:
    """One batch of rows of one kind. `gold_only` keeps each example's gold option alone (language-model loss).

    No row is longer than `max_length`, padding included, if none of the examples is.
    """
    labels = torch.tensor([row.label for row in rows], device=device)
    first = rows[0]
    if isinstance(first, Classified):
        return _head_batch([row for row in rows if isinstance(row, Classified)], labels, pad_token_id, device)
    choices = [row for row in rows if isinstance(row, Choice)]
    return _choice_batch(choices, labels, pad_token_id, device, gold_only, decoder_start_token_id, max_length)


def _head_batch(rows: Sequence[Classified], labels: Tensor, pad_token_id: int, device: str) -> HeadBatch:
    tokens, mask = _padded([row.tokens for row in rows], pad_token_id, left=False)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if rows[0].types:
        inputs["token_type_ids"] = _padded([row.types for row in rows], 0, left=False)[0]
    return HeadBatch({name: tensor.to(device) for name, tensor in inputs.items()}, labels)


def _choice_batch(
    rows: Sequence[Choice],
    labels: Tensor,
    pad_token_id: int,
    device: str,
    gold_only: bool,
    decoder_start_token_id: int | None,
    max_length: int | None,
) -> ChoiceBatch:
    picked = [[row.label] if gold_only else range(len(row.options)) for row in rows]
    num_options = max(map(len, picked))
    # In the place of an option that an example lacks stands its prompt alone, for which there is no target.
    filled = [
        (row, number)
        for row, which in zip(rows, picked, strict=True)
        for number in (*which, *[None] * (num_options - len(which)))
    ]
    pairs = [
        (row.prompts[0], row.options[0][:1]) if number is None else (row.prompts[number], row.options[number])
        for row, number in filled
    ]
    answers = [() if number is None else row.options[number] for row, number in filled]
    shared = [row.prompts[0] for row in rows] if _share_prompts(rows, gold_only) else None
    one_token = not gold_only and all(row.is_one_token for row in rows)
    right_aligned = False
    if decoder_start_token_id is not None:
        inputs = _encoder_decoder_inputs(pairs, shared, one_token, pad_token_id, decoder_start_token_id)
    elif one_token:
        inputs = _prompts([row.prompts[0] for row in rows], pad_token_id)
    elif shared is not None and _worth_going_on(pairs, shared, max_length):
        inputs = _prompts(shared, pad_token_id) | _continuations(pairs, pad_token_id)
    else:
        inputs = _prompts([prompt + option[:-1] for prompt, option in pairs], pad_token_id)
        right_aligned = True
    if one_token:
        targets = _padded(answers, -100, left=False)[0].view(len(rows), num_options)  # (b, options)
    else:
        targets, _mask = _padded(answers, -100, left=right_aligned)  # (b · options, L)
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    return ChoiceBatch(on_device, targets.to(device), labels, num_options, one_token)


def _share_prompts(rows: Sequence[Choice], gold_only: bool) -> bool:
    """Whether each example's options stand behind one prompt."""
    several = not gold_only and any(len(row.options) > 1 for row in rows)
    return several and all(len(set(row.prompts)) == 1 for row in rows)


def _worth_going_on(pairs: Sequence[tuple[Tokens, Tokens]], prompts: Sequence[Tokens], max_length: int | None) -> bool:
    """Whether a pass over the prompts and one over what follows them take fewer tokens than a row for each option.

    The longest option then stands behind the longest prompt, whosesoever they are, and both must find room.
    """
    longest = max(len(prompt) for prompt in prompts)
    more = max(len(option) for _, option in pairs) - 1
    if max_length is not None and longest + more > max_length:
        return False
    return len(prompts) * longest + len(pairs) * more < WORTH_GOING_ON * len(pairs) * (longest + more)


def _prompts(rows: Sequence[Tokens], pad_token_id: int) -> dict[str, Tensor]:
    tokens, mask = _padded(rows, pad_token_id, left=True)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}


def _continuations(pairs: Sequence[tuple[Tokens, Tokens]], pad_token_id: int) -> dict[str, Tensor]:
    """Each option without its last token, which is only ever predicted."""
    tokens, mask = _padded([option[:-1] for _, option in pairs], pad_token_id, left=False)
    return {"continuation_ids": tokens, "continuation_mask": mask}


def _encoder_decoder_inputs(
    pairs: Sequence[tuple[Tokens, Tokens]],
    shared: Sequence[Tokens] | None,
    one_token: bool,
    pad_token_id: int,
    start: int,
) -> dict[str, Tensor]:
    prompts = shared if shared is not None else [prompt for prompt, _ in pairs]
    written = [(start,)] * len(prompts) if one_token else [(start, *option[:-1]) for _, option in pairs]
    tokens, mask = _padded(prompts, pad_token_id, left=False)
    into_decoder, shown = _padded(written, pad_token_id, left=False)
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "decoder_input_ids": into_decoder,
        "decoder_attention_mask": shown,
    }


def _padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """(values, mask), both (rows, longest)."""
    width = max(len(row) for row in rows)
    values = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        values[index, place] = torch.tensor(row, dtype=torch.long)
        mask[index, place] = 1
    return values, mask


def _spread(pool: Sequence[int], classes: Sequence[int], generator: random.Random) -> list[int]:
    """The rows of a pool with those of each class, in their order there, at even distances from a drawn first place."""
    members: dict[int, list[int]] = {}
    for row in pool:
        members.setdefault(classes[row], []).append(row)
    placed = []
    for label in sorted(members):
        first = generator.random()
        placed += [((at + first) / len(members[label]), row) for at, row in enumerate(members[label])]
    return [row for _, row in sorted(placed)]


def _cut(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]
