"""Scores of many examples: batched by length, in the examples' own order again at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.progress import tracked
from lorica.tasks.batching import Batch, most_tokens
from lorica.tasks.objectives import scores
from lorica.tasks.prompting import Choice, Classified, Encoded

Collate = Callable[[Sequence[Encoded]], Batch]
MANY_OPTIONS = 8  # as many of a batch's examples may have each, before it has fewer examples


def score_all(
    model: nn.Module,
    rows: Sequence[Encoded],
    collate: Collate,
    *,
    batch_size: int,
    description: str = "evaluating",
) -> Tensor:
    """(n, options) float32 on the CPU, row i the scores of `rows[i]`. The model is in eval mode meanwhile.

    An example that has fewer options than another scores minus infinity for those that it lacks.
    """
    return score_batches(model, rows, collate, partial(scores, model), batch_size=batch_size, description=description)


@torch.no_grad()
def score_batches(
    model: nn.Module,
    rows: Sequence[Encoded],
    collate: Collate,
    score: Callable[[Batch], Tensor],
    *,
    batch_size: int,
    num_branches: int = 1,
    description: str,
) -> Tensor:
    """(..., n, options): as `score_all`, by what `score` makes (..., b, options) of each batch.

    Where it runs a batch's rows in several branches at once, a pass has no more rows and tokens for that.
    """
    order = _order(rows, max(1, batch_size // num_branches), most_tokens(model) / num_branches)
    with in_eval_mode(model):
        parts = [
            score(collate([rows[index] for index in batch])).cpu() for batch in tracked(order, len(order), description)
        ]
    width = max(part.shape[-1] for part in parts)
    found = torch.cat([F.pad(part, (0, width - part.shape[-1]), value=-torch.inf) for part in parts], dim=-2)
    return found[..., way_back(order), :]


def calibrated(model: nn.Module, rows: Sequence[Choice], found: Tensor, collate: Collate, *, batch_size: int) -> Tensor:
    """(n, options) from the scores (n, options) that were found: what each prompt adds to its options.

    That is the sum of an option's log-probabilities minus their sum behind the content-free prompt (surface-form
    calibration, MATH section 4).
    """
    distinct = list({id(row.content_free): row.content_free for row in rows if row.content_free is not None}.values())
    free = score_all(model, distinct, collate, batch_size=batch_size, description="calibrating")
    free = (free * _num_tokens(distinct)).masked_fill(free == -torch.inf, 0.0)
    places = {id(row): place for place, row in enumerate(distinct)}
    return found * _num_tokens(rows) - free[[places[id(row.content_free)] for row in rows]]


def _num_tokens(rows: Sequence[Choice]) -> Tensor:
    """(n, options) of each option; 1 for one that is not there."""
    width = max(len(row.options) for row in rows)
    return torch.tensor([[*map(len, row.options), *[1] * (width - len(row.options))] for row in rows])


def way_back(order: Sequence[Sequence[int]]) -> Tensor:
    """(n,) where each row is found in what was done batch after batch."""
    return torch.tensor([index for batch in order for index in batch]).argsort()


def _order(rows: Sequence[Encoded], batch_size: int, num_tokens: float) -> list[list[int]]:
    """Batches of rows with similar numbers of options, and of those with similar lengths: at most `num_tokens` in each.

    Where the options are more than `MANY_OPTIONS`, a batch has as many fewer examples. The longest option of a batch
    behind its longest prompt is no longer than the longest row is, so that every option can go on from its prompt.
    """
    sizes = [(_num_read(row), row.length, _longest_option(row)) for row in rows]
    num_read, limit = max(size[0] for size in sizes), max(row.length for row in rows)
    size = max(1, batch_size * MANY_OPTIONS // max(MANY_OPTIONS, num_read))
    batches: list[list[int]] = []
    prompt = option = 0  # the longest of the last batch
    for index in sorted(range(len(rows)), key=lambda index: (sizes[index], -index), reverse=True):
        _, length, more = sizes[index]
        prompt, option = max(prompt, length - more), max(option, more)
        room = min(size, num_tokens // (prompt + option))  # of a batch with this row in it
        if not batches or len(batches[-1]) >= room or prompt + option > limit:
            batches.append([])
            prompt, option = length - more, more
        batches[-1].append(index)
    return batches


def _num_read(row: Encoded) -> int:
    """How many options the model reads itself: none but one where one pass over the prompt scores them all."""
    return 1 if isinstance(row, Classified) or row.is_one_token else len(row.options)


def _longest_option(row: Encoded) -> int:
    return 0 if isinstance(row, Classified) else max(map(len, row.options))


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
