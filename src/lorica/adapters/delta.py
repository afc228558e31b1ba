"""The update of one matrix, ΔW = scale · B·A, and its exact algebra on the factors (MATH section 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.errors import ShapeError


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = scale · B·A with A (r, in) and B (out, r), as a value: every operation returns a new one.

    Sums are exact and keep the factors apart (rank r1 + r2); nothing here forms the (out, in) matrix but `dense`.
    Raises ShapeError if the factors do not fit.
    """

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.A.dim() != 2 or self.B.dim() != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ShapeError(
                f"factors do not fit: A {tuple(self.A.shape)} must be (r, in) and B {tuple(self.B.shape)} (out, r)"
            )

    @property
    def rank(self) -> int:
        """The nominal rank r; the true one may be smaller."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of the matrix that this updates."""
        return self.B.shape[0], self.A.shape[1]

    def __add__(self, other: LowRank) -> LowRank:
        """[s1·B1  s2·B2]·[A1; A2], exact up to the rounding of s·B, at scale 1. A common scale is kept unrounded."""
        self._must_fit(other)
        A = torch.cat([self.A, other.A])  # (r1 + r2, in)
        if self.scale == other.scale:
            return LowRank(A, torch.cat([self.B, other.B], dim=1), self.scale)
        return LowRank(A, torch.cat([self.scaled_B(), other.scaled_B()], dim=1))

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.A, self.B, self.scale * factor)

    __rmul__ = __mul__

    def __neg__(self) -> LowRank:
        return self * -1.0

    def __sub__(self, other: LowRank) -> LowRank:
        return self + LowRank(other.A, -other.B, other.scale)

    def inner(self, other: LowRank) -> float:
        """<Δ1, Δ2> = s1·s2·tr((A2·A1ᵀ)(B1ᵀ·B2)), accumulated in float64; the work is r1·r2·(in + out)."""
        self._must_fit(other)
        gram_A = self.A.double() @ other.A.double().T  # (r1, r2)
        gram_B = self.B.double().T @ other.B.double()  # (r1, r2)
        return self.scale * other.scale * float((gram_A * gram_B).sum())

    def norm(self) -> float:
        """The Frobenius norm ‖ΔW‖, from the singular values: the difference of equal updates comes out as zero."""
        return float(torch.linalg.vector_norm(self.singular_values()))

    def singular_values(self) -> Tensor:
        """(min(r, in, out),) float64, falling: QR of both factors, then the SVD of the r × r core between them."""
        return torch.linalg.svdvals(self._core()[1])

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, k), σ (k,) falling, V (in, k), all float64, with ΔW = U·diag(σ)·Vᵀ and k = min(r, in, out)."""
        Q_B, core, Q_A = self._core()
        U, sigma, Vh = torch.linalg.svd(core, full_matrices=False)
        return Q_B @ U, sigma, Q_A @ Vh.T

    def dense(self) -> Tensor:
        """ΔW itself, (out, in), in the factors' dtype. The only place that forms it."""
        return self.scaled_B() @ self.A

    def scaled_B(self) -> Tensor:
        """scale · B, (out, r)."""
        return self.B if self.scale == 1.0 else self.B * self.scale

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LowRank:
        """The same update with its factors in another dtype or on another device."""
        A, B = self.A.to(device, dtype), self.B.to(device, dtype)
        return self if A is self.A and B is self.B else LowRank(A, B, self.scale)

    def is_finite(self) -> bool:
        """Whether no entry of the factors nor the scale is NaN or infinite."""
        return _is_finite(self.A) and _is_finite(self.B) and math.isfinite(self.scale)

    def _core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q_B (out, m), core (m, n), Q_A (in, n) with ΔW = Q_B·core·Q_Aᵀ and orthonormal Q; m, n ≤ r."""
        Q_B, R_B = torch.linalg.qr(self.B.double())
        Q_A, R_A = torch.linalg.qr(self.A.double().T)
        return Q_B, self.scale * (R_B @ R_A.T), Q_A

    def _must_fit(self, other: LowRank) -> None:
        if self.shape != other.shape:
            raise ShapeError(f"updates of different matrices: {self.shape} and {other.shape}")


def combination(updates: Sequence[LowRank], coefficients: Sequence[float]) -> LowRank:
    """Σ c_i·Δ_i = [c_i·s_i·B_i]·[A_i], exact, of rank Σ r_i and scale 1, each factor copied once.

    Raises ShapeError if the updates are of different matrices, or none is given.
    """
    if not updates or len(updates) != len(coefficients):
        raise ShapeError(f"a combination of {len(updates)} updates with {len(coefficients)} coefficients")
    for other in updates[1:]:
        updates[0]._must_fit(other)
    A = torch.cat([update.A for update in updates])  # (R, in)
    B = torch.cat([update.B for update in updates], dim=1)  # (out, R)
    factors = [c * update.scale for update, c in zip(updates, coefficients, strict=True) for _ in range(update.rank)]
    return LowRank(A, B.mul_(torch.tensor(factors, dtype=torch.promote_types(B.dtype, torch.float32), device=B.device)))


def zero(shape: tuple[int, int], rank: int = 0, dtype: torch.dtype = torch.float32) -> LowRank:
    """The update that changes nothing, for a matrix of `shape` (out, in)."""
    return LowRank(torch.zeros(rank, shape[1], dtype=dtype), torch.zeros(shape[0], rank, dtype=dtype))


def _is_finite(factor: Tensor) -> bool:
    # A sum over NaN or infinity is never finite, and many times cheaper than a look at each entry; one of large entries
    # may overflow all the same.
    return math.isfinite(factor.sum().item()) or bool(torch.isfinite(factor).all())
