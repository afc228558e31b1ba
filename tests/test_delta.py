"""The algebra of one update, held against the dense matrix in float64 (MATH section 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from lorica.adapters.delta import LowRank, zero
from lorica.errors import ShapeError

SIZES = st.integers(1, 9)
RANKS = st.integers(0, 5)
SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.floats(-8, 8).filter(lambda scale: scale == 0 or abs(scale) > 1e-3)


def dense(update: LowRank) -> Tensor:
    """The independent reference: scale · B·A in float64."""
    return update.scale * (update.B.double() @ update.A.double())


def normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Pair:
    """Two random float64 updates of one matrix; their ranks may exceed its sides."""

    left: LowRank
    right: LowRank


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    rows, columns = draw(SIZES), draw(SIZES)
    generator = torch.Generator().manual_seed(draw(SEEDS))
    left, right = (
        LowRank(normal(rank, columns, generator), normal(rows, rank, generator), draw(SCALES))
        for rank in (draw(RANKS), draw(RANKS))
    )
    return Pair(left, right)


def assert_close(found: Tensor | float, expected: Tensor | float, size: float = 1.0) -> None:
    """Equal to 1e-10 of the larger of `size` and 1."""
    torch.testing.assert_close(
        *(torch.as_tensor(value, dtype=torch.float64) for value in (found, expected)),
        rtol=1e-10,
        atol=1e-10 * max(1.0, size),
    )


@given(pairs())
def test_sum_and_difference_are_the_dense_ones(pair: Pair) -> None:
    size = float(dense(pair.left).norm() + dense(pair.right).norm())
    assert_close((pair.left + pair.right).dense(), dense(pair.left) + dense(pair.right), size)
    assert_close((pair.left - pair.right).dense(), dense(pair.left) - dense(pair.right), size)
    assert (pair.left + pair.right).rank == pair.left.rank + pair.right.rank


@given(pairs(), SCALES)
def test_a_scalar_scales_and_minus_negates(pair: Pair, factor: float) -> None:
    size = float(dense(pair.left).norm()) * abs(factor)
    assert_close((pair.left * factor).dense(), factor * dense(pair.left), size)
    assert_close((factor * pair.left).dense(), factor * dense(pair.left), size)
    assert torch.equal((-pair.left).dense(), -pair.left.dense())


@given(pairs())
def test_inner_product_is_the_dense_one(pair: Pair) -> None:
    expected = float((dense(pair.left) * dense(pair.right)).sum())
    size = float(dense(pair.left).norm() * dense(pair.right).norm())
    factors = pair.left.rank * pair.right.rank * abs(pair.left.scale * pair.right.scale) * 1e3
    assert_close(pair.left.inner(pair.right), expected, size + factors)
    assert pair.left.inner(pair.right) == pytest.approx(pair.right.inner(pair.left), rel=1e-9, abs=1e-9 * (1 + factors))


@given(pairs())
def test_norm_and_singular_values_are_the_dense_ones(pair: Pair) -> None:
    update = pair.left
    reference = torch.linalg.svdvals(dense(update))
    found = update.singular_values()
    assert len(found) == min(update.rank, *update.shape)
    assert found.dtype == torch.float64
    assert_close(found, reference[: len(found)], float(reference.max()))
    assert float(reference[len(found) :].sum()) <= 1e-9 * max(1.0, float(reference.max()))
    assert_close(update.norm(), float(dense(update).norm()), float(reference.max()))


@given(pairs())
def test_svd_rebuilds_the_update_from_orthonormal_sides(pair: Pair) -> None:
    U, sigma, V = pair.left.svd()
    assert_close(U @ torch.diag(sigma) @ V.T, dense(pair.left), float(dense(pair.left).norm()))
    identity = torch.eye(len(sigma), dtype=torch.float64)
    assert_close(U.T @ U, identity)
    assert_close(V.T @ V, identity)
    assert torch.equal(sigma, sigma.sort(descending=True).values)


@given(pairs(), SEEDS)
def test_refactoring_changes_nothing(pair: Pair, seed: int) -> None:
    update, rank = pair.left, pair.left.rank
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(normal(rank, rank, generator))[0]
    G = rotation * torch.linspace(0.5, 2.0, rank, dtype=torch.float64)  # invertible, condition number 4
    refactored = LowRank(torch.linalg.solve(G, update.A), update.B @ G, update.scale)
    size = float(dense(update).norm())
    assert_close(refactored.dense(), dense(update), size)
    assert_close(refactored.norm(), update.norm(), size)
    assert_close(refactored.singular_values(), update.singular_values(), size)
    assert_close(refactored.inner(pair.right), update.inner(pair.right), size * (1 + pair.right.norm()) * 10)


@given(pairs())
def test_difference_with_itself_has_no_norm(pair: Pair) -> None:
    nothing = pair.left - pair.left
    assert nothing.norm() <= 1e-13 * max(pair.left.norm(), 1e-300) * (1 + pair.left.rank) * 10


def test_difference_with_itself_has_no_norm_in_float32_either() -> None:
    update = tiny.update((300, 200), 8, 2.0, torch.Generator().manual_seed(0))
    assert (update - update).norm() < 1e-12 * update.norm()


@pytest.mark.parametrize("shape", [(1, 1), (5, 3)])
def test_rank_zero_is_the_zero_of_the_algebra(shape: tuple[int, int]) -> None:
    nothing = zero(shape, dtype=torch.float64)
    update = LowRank(torch.ones(2, shape[1]).double(), torch.ones(shape[0], 2).double(), 0.5)
    assert nothing.rank == 0
    assert nothing.shape == shape
    assert torch.equal(nothing.dense(), torch.zeros(shape, dtype=torch.float64))
    assert nothing.norm() == 0.0
    assert nothing.singular_values().shape == (0,)
    assert nothing.inner(update) == 0.0
    assert torch.equal((nothing + update).dense(), update.dense())
    assert (nothing * 3.0 - nothing).norm() == 0.0


@pytest.mark.parametrize(("A", "B"), [((2, 3), (4, 3)), ((3,), (4, 3)), ((2, 3), (4, 2, 1)), ((2, 3, 1), (4, 2))])
def test_factors_that_do_not_fit_are_refused(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="factors do not fit"):
        LowRank(torch.zeros(A), torch.zeros(B))


@pytest.mark.parametrize("operation", [LowRank.__add__, LowRank.__sub__, LowRank.inner])
def test_updates_of_different_matrices_do_not_combine(operation: object) -> None:
    assert callable(operation)
    with pytest.raises(ShapeError, match=r"\(5, 3\) and \(3, 5\)"):
        operation(zero((5, 3), 1), zero((3, 5), 1))


def test_operations_leave_their_operands_alone() -> None:
    update = tiny.update((6, 5), 2, 2.0, torch.Generator().manual_seed(0))
    before = update.A.clone(), update.B.clone()
    _ = (update + update) * 2.0 - update, update.norm(), update.svd(), update.inner(update), -update
    assert torch.equal(update.A, before[0])
    assert torch.equal(update.B, before[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_is_finite_sees_factors_and_scale(bad: float) -> None:
    update = LowRank(torch.ones(1, 2), torch.ones(3, 1))
    assert update.is_finite()
    assert not (update * bad).is_finite()
    assert not LowRank(torch.full((1, 2), bad), update.B).is_finite()
    assert not LowRank(update.A, torch.full((3, 1), bad)).is_finite()


def test_to_changes_the_dtype_of_both_factors() -> None:
    update = LowRank(torch.ones(1, 2), torch.ones(3, 1), 0.5).to(torch.float16)
    assert (update.A.dtype, update.B.dtype, update.scale) == (torch.float16, torch.float16, 0.5)
