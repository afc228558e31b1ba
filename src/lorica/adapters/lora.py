"""The live layer: base(x) + scale · B(A(x)), with fp32 factors over a base of any float dtype."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from lorica.adapters.delta import LowRank
from lorica.errors import ShapeError


class LoraLinear(nn.Module):
    """A module that maps (..., in) to (..., out), and the update laid beside it.

    A is (r, in) and B (out, r). Replaced by (G, r, in), (G, out, r) or both through `torch.func.functional_call`, they
    are G branches: the first dimension of x then holds the G branches' rows one after the other, the base's product is
    taken once over all of them, and each branch adds its own update. Nothing is written to do so.
    """

    def __init__(self, base: nn.Module, update: LowRank, dropout: float = 0.0) -> None:
        super().__init__()
        device = next(chain(base.parameters(), base.buffers())).device  # quantised weights may be buffers
        self.base = base
        self.A = nn.Parameter(update.A.to(device, torch.float32).clone())
        self.B = nn.Parameter(update.B.to(device, torch.float32).clone())
        self.scale = update.scale
        self.dropout = SeededDropout(dropout)
        self.training = self.dropout.training = base.training

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        rows = self.dropout(x.float()).reshape(-1, x.shape[-1])  # (n, in)
        if self.A.dim() == 3 or self.B.dim() == 3:
            return _added_per_branch(y, rows, self.A, self.B, self.scale)
        low = rows @ self.A.T  # (n, r)
        flat = y.reshape(-1, y.shape[-1])
        if y.dtype == torch.float32:
            return torch.addmm(flat, low, self.B.T, alpha=self.scale).view_as(y)
        return (flat + (low @ self.B.T * self.scale).to(y.dtype)).view_as(y)

    @property
    def update(self) -> LowRank:
        """The update as it stands, copied off the live parameters."""
        return LowRank(self.A.detach().clone(), self.B.detach().clone(), self.scale)

    # Some transformers modules look at their linears' weight (its dtype, its device) beside calling them.
    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]


class SeededDropout(nn.Module):
    """Inverted dropout that draws from its own `generator`; fit hands one generator to all layers of a run."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.probability, generator=self.generator)
        return x * keep.div_(1 - self.probability)


def features(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear module: nn.Linear, GPT-2's Conv1D, or anything that states both features; else None."""
    module = innermost(module)
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        in_features, out_features = module.weight.shape  # type: ignore[misc, union-attr]
        return out_features, in_features
    out_in = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return out_in if isinstance(out_in[0], int) and isinstance(out_in[1], int) else None  # type: ignore[return-value]


def is_transposed(module: nn.Module) -> bool:
    """Whether the module keeps its weight as (in, out), as GPT-2's Conv1D does (PEFT's fan_in_fan_out)."""
    return type(innermost(module)).__name__ == "Conv1D"


def innermost(module: nn.Module) -> nn.Module:
    """The base module under a live layer; the module itself where there is none."""
    return module.base if isinstance(module, LoraLinear) else module


def _added_per_branch(y: Tensor, rows: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    num_branches = len(A) if A.dim() == 3 else len(B)
    if y.shape[0] % num_branches or rows.shape[0] % num_branches:
        raise ShapeError(f"{y.shape[0]} rows cannot be shared out to {num_branches} branches")
    A, B = A.expand(num_branches, -1, -1), B.expand(num_branches, -1, -1)
    low = torch.bmm(rows.view(num_branches, -1, rows.shape[-1]), A.transpose(1, 2))  # (G, n/G, r)
    flat = y.reshape(num_branches, -1, y.shape[-1])
    if y.dtype == torch.float32:
        return torch.baddbmm(flat, low, B.transpose(1, 2), alpha=scale).view_as(y)
    return (flat + (torch.bmm(low, B.transpose(1, 2)) * scale).to(y.dtype)).view_as(y)
