"""Examples as plain texts: the tokens that a model reads, without options and targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.models import Base
from lorica.tasks.prompting import Classified, Encoded

NUM_WRITTEN = 8  # tokens of a text that a decoder is given


def text_of(row: Encoded, max_length: int) -> Sequence[int]:
    """An example as the model reads it, its right answer behind it; what is too long keeps the end with the answer."""
    if isinstance(row, Classified):
        return row.tokens[:max_length]
    return (*row.prompts[row.label], *row.options[row.label])[-max_length:]


def padded(base: Base, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """(b, t) tokens, padded on the right, and their mask; a decoder is given the beginning of each row."""
    device, pad = base.model.device, base.tokenizer.pad_token_id
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)  # (b, t)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    found = {"input_ids": tokens, "attention_mask": mask}
    return found | ({"decoder_input_ids": tokens[:, :NUM_WRITTEN]} if base.kind == "seq2seq" else {})
