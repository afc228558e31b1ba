"""Spectra and conflicts from factors, against dense float64 matrices (MATH section 1)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from lorica.adapters.delta import LowRank, zero
from lorica.analysis import conflict, spectrum
from lorica.analysis.portrait import RankFigures, ranks

Matrix = npt.NDArray[np.float64]


def dense(update: LowRank) -> Matrix:
    """The independent reference: s·B·A, formed in float64."""
    return update.scale * (update.B.double().numpy() @ update.A.double().numpy())


@st.composite
def updates(draw: st.DrawFn) -> LowRank:
    """A random float32 update, some of them of a rank above their matrix's, at scales far from 1."""
    rows, columns, rank = draw(st.integers(2, 24)), draw(st.integers(2, 24)), draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return tiny.update((rows, columns), rank, draw(st.floats(1e-3, 1e3)), generator)


@given(updates(), st.integers(0, 12))
def test_every_figure_is_that_of_the_dense_spectrum(update: LowRank, k: int) -> None:
    sigma = np.linalg.svd(dense(update), compute_uv=False)
    share = sigma[: update.rank] / sigma.sum()
    entropy = -sum(p * math.log(p) for p in share if p > 0)
    found = spectrum.of_update(update)
    assert found.norm == pytest.approx(np.linalg.norm(dense(update)), rel=1e-9)
    assert found.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-6)
    assert found.effective_rank == pytest.approx(math.exp(entropy), rel=1e-6)
    assert found.rank_utilisation == pytest.approx(math.exp(entropy) / update.rank, rel=1e-6)
    assert found.energy(k) == pytest.approx((sigma[:k] ** 2).sum() / (sigma**2).sum(), abs=1e-6)
    np.testing.assert_allclose(found.sigma, sigma[: len(found.sigma)], atol=1e-9 * sigma[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rank_8_adapter_of_true_rank_3_reports_3(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    three = tiny.update((40, 30), 3, 1.0, generator)
    mixing = torch.randn(3, 8, generator=generator)
    A = torch.linalg.pinv(mixing) @ three.A + 0.5 * torch.randn(8, 30, generator=generator)
    update = LowRank(A.to(dtype), (three.B @ mixing).to(dtype), 2.0)
    found = spectrum.of_update(update)
    assert (found.nominal_rank, found.numerical_rank) == (8, 3)
    assert found.effective_rank < 3.01
    assert found.energy(3) == pytest.approx(1.0, abs=1e-9)
    assert found.energy(2) < 1.0


@pytest.mark.parametrize("nothing", [zero((4, 3)), zero((4, 3), rank=2)])
def test_the_zero_update_has_no_rank(nothing: LowRank) -> None:
    found = spectrum.of_update(nothing)
    assert (found.norm, found.stable_rank, found.effective_rank, found.rank_utilisation) == (0.0, 0.0, 0.0, 0.0)
    assert (found.numerical_rank, found.energy(1)) == (0, 0.0)


def test_equal_singular_values_fill_the_rank() -> None:
    found = spectrum.of_update(LowRank(torch.eye(4, 9), torch.eye(7, 4), 3.0))
    assert found.stable_rank == pytest.approx(4)
    assert found.effective_rank == pytest.approx(4)
    assert found.rank_utilisation == pytest.approx(1)
    assert [found.energy(k) for k in range(6)] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])


@given(updates())
def test_refactoring_changes_no_figure(update: LowRank) -> None:
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(update.rank, update.rank, generator=generator, dtype=torch.float64))[0]
    other = LowRank(turn @ update.A.double(), update.B.double() @ turn.T * 4, update.scale / 4)
    one, two = spectrum.of_update(update), spectrum.of_update(other)
    assert two.effective_rank == pytest.approx(one.effective_rank, rel=1e-9)
    assert two.stable_rank == pytest.approx(one.stable_rank, rel=1e-9)


def test_pairs_against_dense_matrices_over_two_modules_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conflict, "BLOCK_ENTRIES", 64)  # a few rows at a time, the last block shorter
    generator = torch.Generator().manual_seed(2)
    modules = [
        [tiny.update(shape, rank, scale, generator) for rank, scale in ((3, 2.0), (2, 0.5))]
        for shape in ((17, 12), (9, 20))
    ]
    (found,) = conflict.pairs(["a", "b"], [conflict.measure(each) for each in modules])
    first, second = (np.concatenate([dense(each[at]).ravel() for each in modules]) for at in (0, 1))
    assert found.cosine == pytest.approx(first @ second / np.linalg.norm(first) / np.linalg.norm(second), abs=1e-9)
    assert found.sign_conflict == pytest.approx((first * second < 0).mean(), abs=1e-9)
    assert (found.left_overlap, found.right_overlap) == pytest.approx(shared(modules), abs=1e-9)
    lengths = conflict.norms([conflict.measure(each) for each in modules], 2)
    assert lengths.tolist() == pytest.approx([np.linalg.norm(first), np.linalg.norm(second)])


def shared(modules: list[list[LowRank]]) -> tuple[float, float]:
    """‖U1ᵀU2‖²_F / min(r1, r2) of the column spaces and of the row spaces, each the mean over the modules."""
    means = []
    for side in (0, 2):
        found = []
        for one, two in modules:
            U = [np.linalg.svd(dense(each))[side] for each in (one, two)]
            bases = [u.T if side == 2 else u for u in U]
            overlap = np.linalg.norm(bases[0][:, : one.rank].T @ bases[1][:, : two.rank]) ** 2
            found.append(overlap / min(one.rank, two.rank))
        means.append(float(np.mean(found)))
    return means[0], means[1]


def test_an_update_against_itself_its_opposite_and_nothing() -> None:
    update = tiny.update((8, 6), 2, 1.0, torch.Generator().manual_seed(3))
    found = list(conflict.pairs(["a", "b", "c"], [conflict.measure([update, -update, zero((8, 6))])]))
    assert [each.cosine for each in found] == pytest.approx([-1.0, 0.0, 0.0])
    assert [each.sign_conflict for each in found] == pytest.approx([1.0, 0.0, 0.0])
    assert [each.overlap for each in found] == pytest.approx([1.0, 0.0, 0.0])


def test_ranks_over_modules_are_means_and_a_weight_counts_in_norms_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    updates = {path: tiny.update((9, 7), rank, 0.5, generator) for path, rank in (("a", 1), ("b", 3))}
    found, halved = ranks(updates, 2), ranks(updates, 2, weight=-0.5)
    one, two = (np.linalg.svd(dense(each), compute_uv=False) ** 2 for each in updates.values())
    assert found.overall.rank == 3
    assert found.overall.norm == pytest.approx((one.sum() + two.sum()) ** 0.5)
    assert found.overall.energy == pytest.approx((1 + two[:2].sum() / two.sum()) / 2)
    assert found.overall.stable_rank == pytest.approx((1 + two.sum() / two[0]) / 2)
    assert halved.overall == dataclasses.replace(found.overall, norm=pytest.approx(found.overall.norm / 2))
    assert halved.modules["b"] == dataclasses.replace(found.modules["b"], norm=pytest.approx(two.sum() ** 0.5 / 2))
    assert ranks({}, 2).overall == RankFigures(0, 0.0, 0.0, 0.0, 0.0, 0.0)
