"""How updates of the same modules lie to each other: angles, shared directions, opposite signs (MATH section 1).

Norms, angles and directions come from the factors. Signs are entries' own: they are counted in blocks of rows, and no
update is whole at any time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.delta import LowRank
from lorica.analysis.spectrum import directions

BLOCK_ENTRIES = 1 << 17  # of one update: a few of these fit into a core's cache


@dataclass(frozen=True)
class Pair:
    """Two adapters: the cosine over all modules, the rest over the modules that both have."""

    first: str
    second: str
    cosine: float  # 0 if one is zero
    sign_conflict: float  # share of opposite signs among the entries where neither is zero; 0 if there is none
    left_overlap: float  # of the column spaces, where updates write; mean over modules
    right_overlap: float  # of the row spaces, what updates read

    @property
    def overlap(self) -> float:
        """Of the side where they share less: an update meets another only where it reads and writes the same."""
        return min(self.left_overlap, self.right_overlap)


@dataclass(frozen=True)
class Measured:
    """What one module says of T adapters; `both` and `opposite` count entries."""

    inner: Tensor  # (T, T)
    left: Tensor  # (T, T), NaN where one is zero
    right: Tensor  # (T, T), likewise
    both: Tensor  # (T, T)
    opposite: Tensor  # (T, T)


def measure(updates: Sequence[LowRank], row_stride: int = 1) -> Measured:
    """T updates of one module against each other; of the signs every `row_stride`-th row alone."""
    spaces = [directions(each) for each in updates]
    both, opposite = signs(updates, row_stride)
    return Measured(
        inner=inner_products(updates),
        left=overlaps([U for U, _, _ in spaces]),
        right=overlaps([V for _, _, V in spaces]),
        both=both,
        opposite=opposite,
    )


def norms(modules: Sequence[Measured], size: int) -> Tensor:
    """(T,) float64: the norms of `size` adapters over these modules."""
    return _total([each.inner for each in modules], size).diagonal().clamp(min=0).sqrt()


def pairs(names: Sequence[str], modules: Sequence[Measured]) -> Iterator[Pair]:
    """Every two of the adapters, over these modules: all of them, or those of one layer."""
    size = len(names)
    inner, lengths = _total([each.inner for each in modules], size), norms(modules, size)
    both, opposite = _total([each.both for each in modules], size), _total([each.opposite for each in modules], size)
    left, right = _mean([each.left for each in modules], size), _mean([each.right for each in modules], size)
    for i, j in itertools.combinations(range(size), 2):
        product = float(lengths[i] * lengths[j])
        yield Pair(
            first=names[i],
            second=names[j],
            cosine=max(-1.0, min(1.0, float(inner[i, j]) / product)) if product > 0 else 0.0,
            sign_conflict=float(opposite[i, j] / both[i, j]) if both[i, j] > 0 else 0.0,
            left_overlap=float(left[i, j]),
            right_overlap=float(right[i, j]),
        )


def inner_products(updates: Sequence[LowRank]) -> Tensor:
    """(T, T) float64: <Δ_i, Δ_j>, from the Grams of the stacked factors; the work is (Σr)²·(in + out)."""
    A = torch.cat([each.A.double() for each in updates])  # (R, in)
    B = torch.cat([each.B.double() * each.scale for each in updates], dim=1)  # (out, R)
    return _block_sums((A @ A.T) * (B.T @ B), [each.rank for each in updates])


def overlaps(bases: Sequence[Tensor]) -> Tensor:
    """(T, T): ‖U_iᵀU_j‖²_F / min(r_i, r_j) of orthonormal bases U_i (n, r_i); NaN where one has no direction.

    Source: Hu et al. 2021, arXiv 2106.09685, section 7.2: 1 where the smaller space lies in the larger one, 0 where
    they are orthogonal.
    """
    U = torch.cat(list(bases), dim=1)  # (n, R)
    ranks = [each.shape[1] for each in bases]
    least = torch.tensor(ranks, dtype=U.dtype)
    return _block_sums((U.T @ U).square(), ranks) / torch.minimum(least[:, None], least[None, :])


def signs(updates: Sequence[LowRank], row_stride: int = 1) -> tuple[Tensor, Tensor]:
    """(T, T) float64 each: in how many entries neither is zero, and in how many of those the signs are opposite.

    With a stride n only the n-th, 2n-th, ... rows are looked at, and at least one.
    """
    step = min(row_stride, max(1, updates[0].shape[0]))
    chosen = [(each.scaled_B()[step - 1 :: step].float(), each.A.float()) for each in updates]
    both, difference = torch.zeros(2, len(updates), len(updates), dtype=torch.float64)
    height = max(1, BLOCK_ENTRIES // max(1, updates[0].shape[1]))
    for start in range(0, len(chosen[0][0]), height):
        entries = torch.stack([(B[start : start + height] @ A).flatten() for B, A in chosen])  # (T, rows · in)
        found = entries.sign()
        present = found.abs()
        both += present @ present.T
        difference += found @ found.T
    return both, (both - difference) / 2


def _block_sums(matrix: Tensor, sizes: Sequence[int]) -> Tensor:
    """(R, R) -> (T, T): the sum of each block of rows and columns."""
    owner = torch.eye(len(sizes), dtype=matrix.dtype).repeat_interleave(torch.tensor(sizes), dim=0)  # (R, T)
    return owner.T @ matrix @ owner


def _total(found: Sequence[Tensor], size: int) -> Tensor:
    return torch.stack(list(found)).sum(dim=0) if found else torch.zeros(size, size, dtype=torch.float64)


def _mean(found: Sequence[Tensor], size: int) -> Tensor:
    """Over the modules where there is a value; 0 where there is none."""
    return torch.stack(list(found)).nanmean(dim=0).nan_to_num() if found else torch.zeros(size, size)
