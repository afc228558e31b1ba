"""Compression is the best there is, and what it says it lost is what it lost (Eckart–Young, MATH section 1)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.adapters.compression import compress, dense_spectrum, rank_for_energy, spectrum
from lorica.adapters.delta import LowRank, zero
from lorica.errors import ConfigError


@st.composite
def updates(draw: st.DrawFn) -> LowRank:
    """A random float64 update of rank 1 to 6, with singular values spread over two orders of magnitude."""
    rows, columns, rank = draw(st.integers(2, 10)), draw(st.integers(2, 10)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    B = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return LowRank(A * torch.logspace(0, -2, rank, dtype=torch.float64)[:, None], B, draw(st.floats(0.1, 4)))


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The independent reference: the dense SVD cut off behind `rank`."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank]


@given(updates(), st.integers(1, 8))
def test_compression_is_as_near_as_the_dense_truncation(update: LowRank, rank: int) -> None:
    kept, _ = compress(update, rank=rank)
    matrix = update.dense()
    best = torch.linalg.norm(matrix - truncated(matrix, rank))
    assert kept.rank == min(rank, update.rank, *update.shape)
    assert torch.linalg.norm(matrix - kept.dense()) <= best + 1e-10 * torch.linalg.norm(matrix)


@given(updates(), st.integers(0, 8))
def test_stated_error_is_the_measured_one(update: LowRank, rank: int) -> None:
    kept, stated = compress(update, rank=rank)
    measured = torch.linalg.norm(update.dense() - kept.dense()) / torch.linalg.norm(update.dense())
    assert stated == pytest.approx(float(measured), abs=1e-7)
    assert 0.0 <= stated <= 1.0


@given(updates(), st.floats(0.01, 1.0))
def test_energy_is_kept_with_the_least_rank(update: LowRank, energy: float) -> None:
    kept, stated = compress(update, energy=energy)
    assert 1 - stated**2 >= energy - 1e-12
    if kept.rank:
        less = spectrum(update).error(kept.rank - 1)
        assert 1 - less**2 < energy


@given(updates())
def test_full_rank_loses_nothing(update: LowRank) -> None:
    kept, stated = compress(update, rank=100)
    assert stated <= 1e-12
    assert torch.linalg.norm(update.dense() - kept.dense()) <= 1e-12 * torch.linalg.norm(update.dense()) * 10


def test_a_sum_is_brought_back_to_its_true_rank() -> None:
    update = LowRank(torch.eye(2, 5), torch.eye(4, 2), 3.0)
    kept, stated = compress(update + update - update, energy=1.0)
    assert kept.rank == 2
    assert stated < 1e-7
    torch.testing.assert_close(kept.dense(), update.dense())


@pytest.mark.parametrize("nothing", [zero((4, 3)), zero((4, 3), rank=2)])
def test_zero_compresses_to_zero(nothing: LowRank) -> None:
    kept, stated = compress(nothing, energy=0.9)
    assert (kept.rank, stated) == (0, 0.0)
    assert compress(nothing, rank=1)[1] == 0.0
    assert torch.equal(kept.dense(), torch.zeros(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_keep_their_dtype_and_share_the_singular_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    update = LowRank(torch.randn(3, 6, generator=generator), torch.randn(5, 3, generator=generator), 2.0).to(dtype)
    kept, _ = compress(update, rank=2)
    assert (kept.A.dtype, kept.B.dtype, kept.scale) == (dtype, dtype, 1.0)
    torch.testing.assert_close(kept.A.float().norm(dim=1), kept.B.float().norm(dim=0), rtol=2e-2, atol=0)


@pytest.mark.parametrize("options", [{}, {"rank": 1, "energy": 0.5}])
def test_exactly_one_of_rank_and_energy(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="one of them"):
        compress(zero((2, 2), 1), **options)


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.1, float("nan")])
def test_energy_is_a_share(energy: float) -> None:
    with pytest.raises(ConfigError, match="energy"):
        compress(LowRank(torch.ones(1, 2), torch.ones(2, 1)), energy=energy)


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank"):
        compress(LowRank(torch.eye(2), torch.eye(2)), rank=-1)


def test_rank_for_energy_counts_squares() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0])
    assert [rank_for_energy(sigma, share) for share in (9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 2, 2, 3, 3]


@given(updates(), st.integers(0, 8))
def test_grams_of_float32_factors_do_as_well_as_qr(update: LowRank, rank: int) -> None:
    coarse = update.to(torch.float32)
    kept, stated = compress(coarse, rank=rank)
    _, best = compress(coarse.to(torch.float64), rank=rank)
    assert torch.linalg.norm(kept.dense().double() - coarse.to(torch.float64).dense()) <= (best + 1e-6) * update.norm()
    assert stated == pytest.approx(best, abs=1e-6)
    assert kept.A.dtype == torch.float32


def test_a_duplicate_direction_does_not_disturb_the_grams() -> None:
    generator = torch.Generator().manual_seed(0)
    one = LowRank(torch.randn(3, 40, generator=generator), torch.randn(30, 3, generator=generator))
    kept, error = compress(one + one, rank=3)
    assert error < 1e-6
    assert torch.linalg.norm(kept.dense() - 2 * one.dense()) < 1e-5 * torch.linalg.norm(2 * one.dense())


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (20, 20)])
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_a_dense_update_is_compressed_to_nearly_the_optimum(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    found = dense_spectrum(matrix, rank)
    kept = found.truncated(rank)
    measured = float(torch.linalg.norm(matrix - kept.dense()) / torch.linalg.norm(matrix))
    best = float(torch.linalg.norm(matrix - truncated(matrix, rank)) / torch.linalg.norm(matrix))
    assert found.error(rank) == pytest.approx(measured, abs=2e-4)
    assert measured <= best * 1.005 + 1e-5


def test_all_singular_values_of_a_dense_update() -> None:
    matrix = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    found = dense_spectrum(matrix, None)
    assert torch.allclose(found.sigma, torch.linalg.svdvals(matrix.double()), rtol=1e-5)
    assert torch.allclose(found.truncated(9).dense(), matrix, atol=1e-5)
