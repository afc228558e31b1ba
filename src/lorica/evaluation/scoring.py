"""Scores of many examples: batched by length, in the examples' own order again at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lorica.progress import tracked
from lorica.tasks.batching import Batch, evaluation_order
from lorica.tasks.objectives import scores
from lorica.tasks.prompting import Encoded

Collate = Callable[[Sequence[Encoded]], Batch]


@torch.no_grad()
def score_all(
    model: nn.Module,
    rows: Sequence[Encoded],
    collate: Collate,
    *,
    batch_size: int,
    description: str = "evaluating",
) -> Tensor:
    """(n, options) float32 on the CPU, row i the scores of `rows[i]`. The model is in eval mode meanwhile."""
    order = evaluation_order([row.length for row in rows], batch_size)
    with in_eval_mode(model):
        parts = [
            scores(model, collate([rows[index] for index in batch])).cpu()
            for batch in tracked(order, len(order), description)
        ]
    found = torch.cat(parts)  # (n, options), longest first
    back = torch.tensor([index for batch in order for index in batch]).argsort()
    return found[back]


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
