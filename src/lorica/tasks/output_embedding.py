"""A language model's output embedding, made to compute no more than is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def plain_output(model: Any) -> nn.Linear | None:
    """The output embedding where it is a linear layer with nothing laid on it; else None.

    Nor may the model add to its logits what differs from token to token, as BART does: that is for whole rows only.
    """
    output = model.get_output_embeddings()
    if type(output) is not nn.Linear or "forward" in vars(output):
        return None
    whole_rows = any(buffer.shape[-1:] == (output.out_features,) for buffer in model.buffers(recurse=False))
    return None if whole_rows else output


@contextmanager
def at_tokens(output: nn.Linear, tokens: Tensor) -> Iterator[None]:
    """Within the block `output` maps (rows, t, d) to (rows, 1, n): the last position's logits of `tokens` (rows, n).

    They are float32 at least.
    """
    output.forward = partial(_logits_of, output, tokens)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del output.forward


def _logits_of(output: nn.Linear, tokens: Tensor, hidden: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)  # half precision would round away what a probe changes
    weights = output.weight[tokens].to(dtype)  # (rows, n, d)
    logits = weights @ hidden[:, -1].to(dtype).unsqueeze(2)  # (rows, n, 1)
    if output.bias is not None:
        logits = logits + output.bias[tokens].to(dtype).unsqueeze(2)
    return logits.transpose(1, 2)


@contextmanager
def contiguous_input(output: nn.Module) -> Iterator[None]:
    """Within the block `output` gets its input in one piece: of a slice torch takes many small products, and slowly."""
    hook = output.register_forward_pre_hook(_in_one_piece)
    try:
        yield
    finally:
        hook.remove()


def _in_one_piece(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.contiguous() for each in inputs)
