"""An update brought to a smaller rank, optimal in the Frobenius norm, and what that loses (MATH section 1).

Low-rank updates are compressed in their factors (Eckart–Young). A dense one, the product of an elementwise merge, is
compressed by block Krylov iteration (Musco & Musco 2015, arXiv 1504.05477), which needs a few products with it instead
of its whole SVD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.delta import LowRank
from lorica.errors import ConfigError

RESOLVED = 3e-8  # of the largest singular value: smaller ones are rounding in a float64 Gram
EVEN_PIVOTS = 0.1  # least over largest, from which on a Gram in float32 loses nothing
OVERSAMPLING = 8
NUM_ITERATIONS = 3
STRETCH_ENTRIES = 1 << 16  # of a factor, half a megabyte in float64


@dataclass(frozen=True)
class Spectrum:
    """An update's leading singular values, and what is needed to cut it off behind any of them.

    `truncated(k)` is the update of the first k: A = √σ·Vᵀ, B = U·√σ, scale 1, in the dtype of the factors.
    """

    sigma: Tensor  # (n,) float64, falling
    truncated: Callable[[int], LowRank]
    rest: float = 0.0  # Σσ² of the singular values that `sigma` does not hold

    @property
    def norm(self) -> float:
        """‖ΔW‖, in the Frobenius norm."""
        return (self._energy(0) + self.rest) ** 0.5

    def error(self, k: int) -> float:
        """sqrt(Σ_{i>k} σ² / Σ σ²), what keeping the first k singular values loses; 0 for the zero update."""
        lost = self._energy(k) + self.rest
        return lost**0.5 / self.norm if lost > 0 else 0.0

    def _energy(self, start: int) -> float:
        """Σ σ² from `start` on."""
        tail = self.sigma[start:]
        return float(tail.dot(tail))


def compress(update: LowRank, rank: int | None = None, energy: float | None = None) -> tuple[LowRank, float]:
    """The nearest update of at most `rank`, or of the least rank that keeps `energy`, and its relative error.

    `energy` in (0, 1] is the kept share Σ_{i≤k} σ² / Σ σ². The factors share σ evenly: A = √σ·Vᵀ, B = U·√σ, scale 1.
    Raises ConfigError unless exactly one of the two is given.
    """
    if (rank is None) == (energy is None):
        raise ConfigError(f"compress by rank or by energy: one of them, not rank={rank} and energy={energy}")
    if rank is not None and rank < 0:
        raise ConfigError(f"rank={rank}: give a rank of 0 or more")
    found = spectrum(update)
    k = rank_for_energy(found.sigma, energy) if energy is not None else min(rank or 0, len(found.sigma))
    return found.truncated(k), found.error(k)


def spectrum(update: LowRank) -> Spectrum:
    """All singular values of a low-rank update: from its Grams, or by QR where float64 factors deserve it."""
    by_grams = _by_grams(update) if update.A.dtype != torch.float64 else None
    return by_grams or _by_qr(update)


def dense_spectrum(matrix: Tensor, rank: int | None) -> Spectrum:
    """The first `rank` singular values of a dense update (out, in), all of them with None; float32.

    Cut off at `rank`, the error is at most a few thousandths above the optimum, and what is stated is the error of what
    is returned, ‖M‖² - ‖QᵀM‖².
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned = dense_spectrum(matrix.T, rank)
        return Spectrum(turned.sigma, lambda k: _transposed(turned.truncated(k)), turned.rest)
    if rank is None:
        U = torch.linalg.eigh((matrix @ matrix.T).double()).eigenvectors.flip(1).to(matrix.dtype)
        seen = U.T @ matrix  # (k, in): row i is σ_i·v_iᵀ
    else:
        U, seen = _leading_directions(matrix, min(rank, len(matrix)))  # (out, k), (k, in)
    sigma = torch.linalg.vector_norm(seen.double(), dim=1)
    total = float(torch.linalg.vector_norm(matrix).double().square())
    rest = max(0.0, total - float(sigma.square().sum())) if len(sigma) < len(matrix) else 0.0
    dtype = matrix.dtype  # the matrix itself must not live on with the spectrum

    def truncated(k: int) -> LowRank:
        root = sigma[:k].sqrt().to(dtype)
        keep = root.where(root > 0, torch.inf)
        return LowRank(seen[:k] / keep[:, None], U[:, :k] * root)

    return Spectrum(sigma, truncated, rest)


def rank_for_energy(sigma: Tensor, energy: float) -> int:
    """The least k whose first k singular values hold `energy` of Σ σ²; 0 for the zero update."""
    if not 0 < energy <= 1:
        raise ConfigError(f"energy={energy}: give a share in (0, 1]")
    squares = sigma.double().square()
    if not squares.any():
        return 0
    reached = squares.cumsum(0) >= energy * squares.sum() * (1 - 1e-15)
    return int(torch.nonzero(reached)[0]) + 1


def _by_qr(update: LowRank) -> Spectrum:
    U, sigma, V = update.svd()

    def truncated(k: int) -> LowRank:
        root = sigma[:k].sqrt()
        return LowRank((V[:, :k] * root).T.contiguous(), U[:, :k] * root).to(update.A.dtype)

    return Spectrum(sigma, truncated)


def _by_grams(update: LowRank) -> Spectrum | None:
    """The same from the r × r Grams in float64, several times cheaper; None where one is singular.

    With AAᵀ = L_A·L_Aᵀ and BᵀB = L_B·L_Bᵀ the core is s·L_BᵀL_A = u·σ·vᵀ, and U = s·B·L_A·v/σ, V = s·Aᵀ·L_B·u/σ: no
    inverse is taken. Squaring costs singular values below 1e-8 of the largest, which float32 factors do not hold.
    """
    L_A, L_B = (_triangle(rows) for rows in (update.A, update.B.T))
    if update.rank > min(update.shape) or L_A is None or L_B is None:
        return None
    core = L_B.T @ L_A  # (r, r), but for s
    squares, v = torch.linalg.eigh(core.T @ core)  # rising
    v = v.flip(1)
    sigma = squares.flip(0).clamp_(min=0).sqrt_().mul_(abs(update.scale))
    sigma = sigma.where(sigma > RESOLVED * sigma[:1], 0.0)

    def truncated(k: int) -> LowRank:
        keep = sigma[:k].where(sigma[:k] > 0, torch.inf)
        turned = v[:, :k] * (update.scale / keep.sqrt())  # (r, k): s·v/√σ
        left = L_A @ turned  # (r, k): B·left = U·√σ
        right = L_B @ (core @ turned * (update.scale / keep))  # (r, k): rightᵀ·A = √σ·Vᵀ
        dtype = torch.promote_types(update.A.dtype, torch.float32)
        kept_A = right.T.to(dtype) @ update.A.to(dtype)  # (k, in)
        return LowRank(kept_A, update.B.to(dtype) @ left.to(dtype)).to(update.A.dtype)

    return Spectrum(sigma, truncated)


def _triangle(rows: Tensor) -> Tensor | None:
    """L (r, r) float64 with rows·rowsᵀ = L·Lᵀ, of rows (r, n); None where they depend on one another.

    A Gram in float32 takes half the time. It serves where no row is short or near the span of those before it, as the
    pivots tell: then it is as exact as the rows themselves.
    """
    for dtype in (torch.float32, torch.float64):
        L, failed = torch.linalg.cholesky_ex(_gram(rows, dtype).double())
        if not failed and (dtype == torch.float64 or _are_even(L.diagonal())):
            return L
    return None


def _are_even(pivots: Tensor) -> bool:
    values = pivots.tolist()
    return not values or min(values) >= EVEN_PIVOTS * max(values)


def _gram(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(r, n) -> (r, r), a stretch of columns at a time: a float64 copy of them all would leave the cache."""
    if rows.dtype == dtype:
        return rows @ rows.T
    total = rows.new_zeros(len(rows), len(rows), dtype=dtype)
    width = max(1, STRETCH_ENTRIES // max(1, len(rows)))
    for start in range(0, rows.shape[1], width):
        exact = rows[:, start : start + width].to(dtype)
        total.addmm_(exact, exact.T)
    return total


def _leading_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (out, k) and UᵀM (k, in): U is orthonormal, nearly the top left singular vectors.

    They are the best of the block Krylov space of M·Mᵀ.
    """
    width = min(rank + OVERSAMPLING, len(matrix))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.dtype)
    Q = torch.linalg.qr(matrix @ drawn)[0]  # (out, w)
    inner = latest = Q.T @ matrix  # (w, in)
    for _ in range(NUM_ITERATIONS):
        widened = torch.linalg.qr(torch.cat([Q, matrix @ latest.T], dim=1))[0]
        block = widened[:, Q.shape[1] :]  # orthogonal to Q, of which the columns before are a copy but for signs
        latest = block.T @ matrix
        Q, inner = torch.cat([Q, block], dim=1), torch.cat([inner, latest])
    u = torch.linalg.eigh((inner @ inner.T).double()).eigenvectors.flip(1)[:, :rank].to(matrix.dtype)
    return Q @ u, u.T @ inner


def _transposed(update: LowRank) -> LowRank:
    return LowRank(update.B.T.contiguous(), update.A.T.contiguous(), update.scale)
