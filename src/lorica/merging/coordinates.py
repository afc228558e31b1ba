"""The entries that an elementwise rule sees: of the updates themselves, or of their coordinates in a shared basis.

`full` are the entries of ΔW, in blocks of whole rows, so that no rule holds more than one block of each adapter.
`knots` (arXiv 2410.19735) writes [Δ_1 … Δ_T] = U·Σ·[V_1ᵀ … V_Tᵀ] and sees the V_i. `core` (arXiv 2509.17786) sees the
R × R matrices U_BᵀΔ_iV_A. Both bases are singular vectors of the stacked updates, found from r × r Grams: they depend
on the updates alone, not on how an adapter happens to be factored (MATH section 6.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lorica.adapters.delta import LowRank
from lorica.analysis.spectrum import NEGLIGIBLE
from lorica.errors import ShapeError
from lorica.merging.method import Update

Space = Literal["full", "knots", "core"]
Rule = Callable[[Tensor, int], Tensor]  # (T, rows, columns), number of the block -> (rows, columns)
BLOCK_ENTRIES = 1 << 17  # of one adapter: a few of these fit into a core's cache
SAMPLED_PARTS = 32


class Coordinates(Protocol):
    """T updates of one module as blocks of entries, and the way back from the merged blocks to an update."""

    @property
    def num_entries(self) -> int:
        """Of each update."""

    def blocks(self) -> Iterator[Tensor]:
        """(T, rows, columns) each, float32, in the same order every time; a block is overwritten by the next."""

    def sample(self, stride: int) -> Tensor:
        """(T, n): about every `stride`-th entry of each update."""

    def assembled(self, blocks: Iterator[Tensor]) -> Update:
        """The update whose coordinates are the merged blocks, (rows, columns) each, in the order of `blocks`."""


def coordinates(updates: Sequence[Update], space: Space) -> Coordinates:
    """How `space` sees the updates of one module. The spaces but `full` need low-rank updates (ShapeError)."""
    if space == "full":
        return _Entries(updates)
    low_rank = factors(updates, f"space={space}")
    return _knots(low_rank) if space == "knots" else _core(low_rank)


def mapped(rule: Rule, updates: Sequence[Update], space: Space) -> Update:
    """The update that `rule` makes of the updates' coordinates, block by block."""
    seen = coordinates(updates, space)
    return seen.assembled(rule(block, number) for number, block in enumerate(seen.blocks()))


def mapped_each(rule: Callable[[Tensor, int], Sequence[Tensor]], updates: Sequence[Update]) -> list[Update]:
    """The T dense updates (out, in) that `rule` makes of T updates' entries, block by block."""
    made = [torch.empty(each.shape) for each in updates]
    start = 0
    for number, block in enumerate(coordinates(updates, "full").blocks()):
        stop = start + block.shape[1]
        for whole, part in zip(made, rule(block, number), strict=True):
            whole[start:stop] = part
        start = stop
    return list(made)


@dataclass(frozen=True)
class _Entries:
    updates: Sequence[Update]

    @property
    def num_entries(self) -> int:
        return self.updates[0].shape[0] * self.updates[0].shape[1]

    def blocks(self) -> Iterator[Tensor]:
        rows, width = self.updates[0].shape
        height = max(1, BLOCK_ENTRIES // max(1, width))
        buffer = torch.empty(len(self.updates), min(height, rows), width)
        pairs = [_factored(each) for each in self.updates]
        for start in range(0, rows, height):
            block = buffer[:, : min(height, rows - start)]
            for part, (left, right) in zip(block, pairs, strict=True):
                _multiply(left[start : start + height], right, part)
            yield block

    def sample(self, stride: int) -> Tensor:
        # Rows and columns differ in size, so a few of them would not stand for all: each part looks at other ones.
        num_parts = min(stride, SAMPLED_PARTS)
        across = math.isqrt(stride * num_parts)
        down = stride * num_parts // across
        sampled = []
        for left, right in map(_factored, self.updates):
            for part in range(num_parts):
                rows = left[part * down // num_parts :: down]
                columns = slice(part * across // num_parts, None, across)
                sampled.append((rows[:, columns] if right is None else rows @ right[:, columns]).flatten())
        return torch.cat(sampled).view(len(self.updates), -1)

    def assembled(self, blocks: Iterator[Tensor]) -> Tensor:
        merged = torch.empty(self.updates[0].shape)
        start = 0
        for block in blocks:
            merged[start : start + len(block)] = block
            start += len(block)
        return merged


def _factored(update: Update) -> tuple[Tensor, Tensor | None]:
    """(left, right) in float32, the update being left·right, or left alone."""
    if isinstance(update, Tensor):
        return update.float(), None
    single = update.to(torch.float32)
    return single.scaled_B(), single.A


def _multiply(left: Tensor, right: Tensor | None, out: Tensor) -> None:
    if right is None:
        out.copy_(left)
    else:
        torch.mm(left, right, out=out)


@dataclass(frozen=True)
class _InBasis:
    """ΔW_i = left·parts[i]·right."""

    left: Tensor  # (out, p)
    parts: Tensor  # (T, p, q)
    right: Tensor | None  # (q, in); None: the parts' columns are the module's inputs

    @property
    def num_entries(self) -> int:
        return self.parts[0].numel()

    def blocks(self) -> Iterator[Tensor]:
        yield self.parts.clone()

    def sample(self, stride: int) -> Tensor:
        return self.parts.flatten(1)[:, ::stride]

    def assembled(self, blocks: Iterator[Tensor]) -> LowRank:
        (merged,) = blocks  # (p, q)
        return LowRank(merged if self.right is None else merged @ self.right, self.left)


def _knots(updates: Sequence[LowRank]) -> _InBasis:
    U, sigma = shared_directions(updates)  # (out, R), (R,)
    V = [(U.T @ each.B.double() * each.scale / sigma[:, None]) @ each.A.double() for each in updates]
    return _InBasis((U * sigma).float(), torch.stack(V).float(), None)


def _core(updates: Sequence[LowRank]) -> _InBasis:
    U, _ = shared_directions(updates)  # (out, p)
    V, _ = shared_directions([LowRank(each.B.T, each.A.T, each.scale) for each in updates])  # (in, q)
    cores = [(U.T @ each.B.double() * each.scale) @ (each.A.double() @ V) for each in updates]
    return _InBasis(U.float(), torch.stack(cores).float(), V.T.contiguous().float())


def shared_directions(updates: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """U (out, p) and σ (p,) falling, float64: the left singular vectors and values of [Δ_1 … Δ_T], negligible ones cut.

    ΣΔ_iΔ_iᵀ = Q·R·diag(s_i²·A_iA_iᵀ)·Rᵀ·Qᵀ with [B_1 … B_T] = Q·R: the work is R × R.
    """
    Q, R = torch.linalg.qr(torch.cat([each.B.double() for each in updates], dim=1))
    inner = torch.block_diag(*(each.scale**2 * (each.A.double() @ each.A.double().T) for each in updates))  # type: ignore[no-untyped-call]
    squares, u = torch.linalg.eigh(R @ inner @ R.T)  # rising
    sigma = squares.clamp(min=0).sqrt().flip(0)
    kept = sigma > NEGLIGIBLE * sigma.max() if len(sigma) else sigma > 0
    return (Q @ u.flip(1))[:, kept], sigma[kept]


def factors(updates: Sequence[Update], what: str) -> list[LowRank]:
    """The updates, all of them low-rank. Raises ShapeError, naming `what` needs them, if a transform made one dense."""
    low_rank = [each for each in updates if isinstance(each, LowRank)]
    if len(low_rank) < len(updates):
        raise ShapeError(f"{what} works on low-rank factors, and a transform has made an update dense: leave it out")
    return low_rank
