"""Modules of a loaded model that give way to the same functions computed faster; parameters, names, config stay."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

TILE, NARROW = 16, 32  # on a CPU, heads up to so narrow are attended to faster with keys filled up to a multiple of 16
SLOPE, CUBIC = 1.5957691216057308, 0.044715  # gelu's tanh form is x · sigmoid(SLOPE · (x + CUBIC · x³)), exactly


def swap_slow_modules(model: nn.Module, *, attention: bool = True) -> None:
    """Let what transformers computes in many passes over memory be computed in few, to float32 rounding.

    These are GELUs written out in Python, and GPT-Neo's attention on a CPU, which then has no weights to show
    (`output_attentions`). Without `attention` that one stays, for a user who chose an implementation.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in (NewGELUActivation, FastGELUActivation):
                setattr(module, name, TanhGelu().train(child.training))
        if attention and type(module) is GPTNeoSelfAttention:
            module._attn = MethodType(_attended, module)  # type: ignore[assignment]


class TanhGelu(nn.Module):
    """GELU by its tanh form."""

    def forward(self, x: Tensor) -> Tensor:
        # torch's kernel is quick to differentiate, but on a CPU takes nearly twice the time of five passes in place.
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
            return F.gelu(x, approximate="tanh")
        return x.square().mul_(SLOPE * CUBIC).add_(SLOPE).mul_(x).sigmoid_().mul_(x)


def _attended(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """GPTNeoSelfAttention._attn: (b, heads, n, d) of queries (b, heads, n, d), keys and values (b, heads, m, d)."""
    if query.device.type != "cpu":
        return GPTNeoSelfAttention._attn(module, query, key, value, attention_mask)  # type: ignore[no-any-return]
    num_queries, num_keys, width = query.shape[2], key.shape[2], query.shape[3]
    seen = module.bias[:, :, num_keys - num_queries : num_keys, :num_keys]  # (1, 1, n, m): no later key, none too far
    shown = torch.zeros(()) if attention_mask is None else attention_mask.float()
    mask = torch.where(seen, shown, -torch.inf)  # (b or 1, 1, n, m)
    if width <= NARROW and (missing := -num_keys % TILE):
        mask = F.pad(mask, (0, missing), value=-torch.inf)
        key, value = F.pad(key, (0, 0, 0, missing)), F.pad(value, (0, 0, 0, missing))
    dropout = module.attn_dropout.p if module.training else 0.0
    # The scores are not scaled, and overflow half precision.
    found = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), mask, dropout_p=dropout, scale=1.0
    )  # (b, heads, n, d)
    return found.to(value.dtype), None
