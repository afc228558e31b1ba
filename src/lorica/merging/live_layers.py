"""Four ways to run one linear module with Σ c_i·Δ_i on it, c being what is learned (MATH section 6.3).

Each reads its shares from a Slot, and while that is empty the module is the base's own. The shares c of a module stand
in the order of its updates: one for each direction of a low-rank update, one for a dense update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorica.adapters import delta
from lorica.adapters.delta import LowRank
from lorica.adapters.lora import is_transposed
from lorica.errors import ShapeError
from lorica.merging.method import Update

Forward = Callable[[Tensor], Tensor]
Undo = Callable[[], None]


@dataclass
class Slot:
    """Where a live layer finds its shares: (W,), or (G, W) for G branches; None while the base runs alone."""

    shares: Tensor | None = None


def fused_lora_linear(module: nn.Module, updates: Sequence[LowRank], slot: Slot, dtype: torch.dtype) -> Undo:
    """base(x) + ((x·Aᵀ) ⊙ c)·Bᵀ with the factors of all updates side by side: two thin products, however many.

    For the gradient of c, x·Aᵀ (n, R) is kept and nothing else. With c (G, R), the first dimension of x holds the rows
    of G branches one after the other.
    """
    base = module.forward
    is_plain = type(module) is nn.Linear and module.weight.dtype == dtype and "forward" not in module.__dict__
    whole = delta.combination([each.to(dtype, device_of(module)) for each in updates], [1.0] * len(updates))
    A, B = whole.A, whole.B  # (R, in), (out, R)

    def forward(x: Tensor) -> Tensor:
        if slot.shares is None:
            return base(x)  # type: ignore[no-any-return]
        c = slot.shares.to(A)
        if c.dim() == 2 and x.shape[0] % len(c):
            raise ShapeError(f"{x.shape[0]} rows cannot be shared out to {len(c)} branches")
        if is_plain:
            y, _ = _FusedLinear.apply(x, c, module.weight, module.bias, A, B)  # type: ignore[no-untyped-call]
            return y  # type: ignore[no-any-return]
        low = _rows(x, dtype) @ A.T  # (n, R)
        return _plus_product(base(x), _shared_out(low, c), B.T)

    return _override_forward(module, forward)


def fused_linear(module: nn.Module, updates: Sequence[Update], slot: Slot, dtype: torch.dtype) -> Undo:
    """base(x) + Σ (x·c_i)·Δ_iᵀ, one update after the other, dense ones too."""
    base = module.forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = base(x)
        if slot.shares is None:
            return y
        rows = _rows(x, dtype)
        for update, c in _with_shares(updates, slot.shares.to(rows)):
            if isinstance(update, LowRank):
                moved = update.to(dtype, rows.device)
                y = _plus_product(y, (rows @ moved.A.T) * c, moved.scaled_B().T)
            else:
                product = _DenseProduct.apply(rows, c, update)  # type: ignore[no-untyped-call]
                y = y + product.to(y.dtype).view_as(y)
        return y

    return _override_forward(module, forward)


def streaming_parametrize(module: nn.Module, updates: Sequence[Update], slot: Slot, dtype: torch.dtype) -> Undo:
    """W' = cast(W + Σ c_i·Δ_i) as a parametrization: summed anew, update by update, when the weight is looked at."""
    parameters = dict(module._parameters)  # in their order, which register and remove would change
    parametrize.register_parametrization(
        module, "weight", _StreamingWeight(updates, slot, dtype, is_transposed(module)), unsafe=True
    )

    def undo() -> None:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        module._parameters.clear()
        module._parameters.update(parameters)

    return undo


def functional_clone_legacy(module: nn.Module, updates: Sequence[Update], slot: Slot, dtype: torch.dtype) -> Undo:
    """The module called as a function of W' = W + Σ c_i·Δ_i, nothing spared: what the others are held against."""
    bound = _Bound(module)
    transposed = is_transposed(module)

    def forward(x: Tensor) -> Tensor:
        if slot.shares is None:
            return bound(x)  # type: ignore[no-any-return]
        weight: Tensor = module.weight  # type: ignore[assignment]
        total = (weight.T if transposed else weight).to(dtype)  # (out, in)
        for update, c in _with_shares(updates, slot.shares.to(total)):
            moved = update.to(dtype=dtype, device=total.device)
            total = total + ((moved.scaled_B() * c) @ moved.A if isinstance(moved, LowRank) else moved * c)
        weights = {"module.weight": (total.T if transposed else total).to(weight.dtype)}
        return torch.func.functional_call(bound, weights, (x,))  # type: ignore[no-any-return]

    return _override_forward(module, forward)


def device_of(module: nn.Module) -> torch.device:
    """Where the module's weight lies; a quantised one may be a buffer."""
    return next(tensor for tensors in (module.parameters(), module.buffers()) for tensor in tensors).device


def _override_forward(module: nn.Module, forward: Forward) -> Undo:
    """Let the module's calls run `forward`, its hooks as ever; the module stays the very one that it is."""
    outer = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]

    def undo() -> None:
        del module.forward
        if outer is not None:
            module.forward = outer  # type: ignore[method-assign]

    return undo


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., in) -> (n, in) in the dtype of the thin products."""
    return x.to(dtype).reshape(-1, x.shape[-1])


def _plus_product(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y (..., out) + left (n, r)·right (r, out), in y's dtype."""
    flat = y.reshape(-1, y.shape[-1])
    if y.dtype == left.dtype:
        return torch.addmm(flat, left, right).view_as(y)
    return (flat + (left @ right).to(y.dtype)).view_as(y)


def _shared_out(low: Tensor, c: Tensor) -> Tensor:
    """low (n, R) ⊙ c: every row by c (R,), or the rows of each branch by its own row of c (G, R)."""
    return low * c if c.dim() == 1 else (low.view(len(c), -1, c.shape[1]) * c.unsqueeze(1)).view_as(low)


def _with_shares(updates: Sequence[Update], c: Tensor) -> Iterator[tuple[Update, Tensor]]:
    """Each update with its shares of c (W,)."""
    return zip(updates, torch.split(c, [width(each) for each in updates]), strict=True)


def width(update: Update) -> int:
    """How many shares an update has."""
    return update.rank if isinstance(update, LowRank) else 1


class _FusedLinear(torch.autograd.Function):
    """x·Wᵀ + b + ((x·Aᵀ) ⊙ c)·Bᵀ and x·Aᵀ, with a gradient for x and c alone.

    The thin products are added in place: left to autograd, the sum and the gradient of x, both large, would each be
    passed over once more.
    """

    @staticmethod
    def forward(
        x: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        low = rows @ A.T  # (n, R)
        y = nn.functional.linear(rows, weight, bias).addmm_(_shared_out(low, c), B.T)
        return y.view(*x.shape[:-1], -1), low

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, c, weight, _, A, B = inputs
        _, low = output
        ctx.mark_non_differentiable(low)
        ctx.save_for_backward(low, c, weight, A, B)
        ctx.save_for_forward(low, c, weight, A, B)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        low, c, weight, A, B = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])  # (n, out)
        through = rows @ B  # (n, R)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ weight).addmm_(_shared_out(through, c), A).view(*gradient.shape[:-1], -1)
        terms = through * low
        dc = terms.sum(dim=0) if c.dim() == 1 else terms.view(len(c), -1, c.shape[1]).sum(dim=1)
        return dx, dc, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dc: Tensor, *_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        low, c, weight, A, B = ctx.saved_tensors
        rows = dx.reshape(-1, dx.shape[-1])  # (n, in)
        moved = _shared_out(rows @ A.T, c) + _shared_out(low, dc)  # (n, R)
        return (rows @ weight.T).addmm_(moved, B.T).view(*dx.shape[:-1], -1), None


class _DenseProduct(torch.autograd.Function):
    """(x·c)·Δᵀ, where Δ is brought to x's device for each pass and let go again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, update: Tensor) -> Tensor:
        ctx.save_for_backward(x, c)
        ctx.update = update
        return (x * c) @ update.to(x).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, c = ctx.saved_tensors
        through = gradient @ ctx.update.to(gradient)  # (n, in)
        return through * c, (through * x).sum().view(1), None


class _StreamingWeight(nn.Module):
    """weight -> cast(weight + Σ c_i·Δ_i)."""

    def __init__(self, updates: Sequence[Update], slot: Slot, dtype: torch.dtype, transposed: bool) -> None:
        super().__init__()
        self.updates, self.slot, self.dtype, self.transposed = updates, slot, dtype, transposed

    def forward(self, weight: Tensor) -> Tensor:
        if self.slot.shares is None:
            return weight
        c = self.slot.shares.to(weight.device, self.dtype)
        upright = weight.T if self.transposed else weight  # (out, in)
        total: Tensor = _WeightSum.apply(c, upright, self.updates)  # type: ignore[no-untyped-call]
        return total.T if self.transposed else total


class _WeightSum(torch.autograd.Function):
    """cast(W + Σ c_i·Δ_i), with dc_i = <gW', Δ_i>; no Δ is kept for it but where it came from."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, weight: Tensor, updates: Sequence[Update]) -> Tensor:
        ctx.updates, ctx.dtype = updates, c.dtype
        total = weight.to(c.dtype, copy=True)  # (out, in)
        for update, share in _with_shares(updates, c):
            moved = update.to(dtype=c.dtype, device=total.device)
            if isinstance(moved, LowRank):
                total.addmm_(moved.B * (share * moved.scale), moved.A)
            else:
                total.addcmul_(moved, share)
        return total.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        G = gradient.to(ctx.dtype)  # (out, in)
        return torch.cat([_inner(G, each.to(dtype=G.dtype, device=G.device)) for each in ctx.updates]), None, None


def _inner(G: Tensor, update: Update) -> Tensor:
    """<G, Δ>, direction by direction where Δ is low-rank."""
    if isinstance(update, LowRank):
        return ((G @ update.A.T) * update.B).sum(dim=0) * update.scale
    return (G * update).sum().view(1)


class _Bound(nn.Module):
    """A module run by the forward that it had before a live layer was laid on it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.base = module, module.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)  # type: ignore[no-any-return]
