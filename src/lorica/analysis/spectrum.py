"""The singular values of an update, and what they say of its rank (MATH section 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.adapters.delta import LowRank

NEGLIGIBLE = 1e-5  # of the largest singular value: below it a direction is the rounding of float32 factors


@dataclass(frozen=True, eq=False)
class Spectra:
    """The spectrum of one update, and the figures that follow from it; of the zero update all of them are 0."""

    sigma: Tensor  # (min(r, in, out),) float64, falling
    nominal_rank: int

    @property
    def norm(self) -> float:
        """‖Δ‖, in the Frobenius norm."""
        return float(torch.linalg.vector_norm(self.sigma))

    @property
    def stable_rank(self) -> float:
        """‖Δ‖²_F / ‖Δ‖²_2: how many directions as strong as the strongest would have this norm."""
        return (self.norm / float(self.sigma[0])) ** 2 if self._is_alive else 0.0

    @property
    def effective_rank(self) -> float:
        """exp(H(σ / Σσ)) (Roy & Vetterli 2007): over how many directions the singular values spread."""
        if not self._is_alive:
            return 0.0
        return float(torch.special.entr(self.sigma / self.sigma.sum()).sum().exp())

    @property
    def numerical_rank(self) -> int:
        """How many directions are no rounding of float32 factors."""
        return int(_are_directions(self.sigma).sum()) if self._is_alive else 0

    @property
    def rank_utilisation(self) -> float:
        """Effective rank over nominal rank: the share of the rank that was paid for and is used."""
        return self.effective_rank / self.nominal_rank if self.nominal_rank else 0.0

    def energy(self, k: int) -> float:
        """Σ_{i≤k} σ² / Σσ², the share of ‖Δ‖² in the first k directions."""
        squares = self.sigma.square()
        return float(squares[:k].sum() / squares.sum()) if self._is_alive else 0.0

    @property
    def _is_alive(self) -> bool:
        return len(self.sigma) > 0 and float(self.sigma[0]) > 0


def of_update(update: LowRank) -> Spectra:
    """The spectrum of an update, from its factors alone: QR of both, SVD of the r × r core, in float64."""
    return Spectra(update.singular_values(), update.rank)


def directions(update: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), σ (r,) and V (in, r), float64, without the directions that are float32 noise."""
    U, sigma, V = update.svd()
    kept = _are_directions(sigma)
    return U[:, kept], sigma[kept], V[:, kept]


def _are_directions(sigma: Tensor) -> Tensor:
    return sigma > NEGLIGIBLE * sigma[:1]
