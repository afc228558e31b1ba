"""The slope of the loss along each of K directions: three ways to it, from forward passes alone (MATH section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorica.adapters.branches import unchanged_once
from lorica.errors import ModelError
from lorica.optim.directions import sliced
from lorica.optim.probes import Probe, Probing
from lorica.tasks.batching import Batch, share
from lorica.tasks.objectives import LossModule

SlopesName = Literal["spsa", "one_sided", "forward_gradient"]


class Around(Protocol):
    """The loss around the parameters as they stand, along the K directions of a step: the mean over its batches."""

    @property
    def num_directions(self) -> int: ...

    @property
    def num_batches(self) -> int: ...

    def losses(self, probes: Sequence[Probe]) -> list[float]:
        """The losses at θ + distance · z of each probe."""

    def along(self) -> list[tuple[float, float]]:
        """The loss at θ and its exact slope, for each direction."""


@dataclass(frozen=True)
class Slopes:
    """What K directions have shown: K slopes, not finite where a loss of theirs was not, and every loss taken.

    `num_forwards` counts every candidate on every batch, however many of them one pass of the model took.
    """

    slopes: list[float]
    losses: list[float]
    num_forwards: int

    @property
    def usable(self) -> list[int]:
        """The directions whose slope is finite."""
        return [place for place, slope in enumerate(self.slopes) if math.isfinite(slope)]

    @property
    def finite_losses(self) -> list[float]:
        return [loss for loss in self.losses if math.isfinite(loss)]


Measure = Callable[[Around, float], Slopes]


def spsa(around: Around, epsilon: float) -> Slopes:
    """Two-sided SPSA (Spall 1992; MeZO, arXiv 2305.17333): (L(θ+εz) − L(θ−εz)) / 2ε, two forwards a direction."""
    probes = [Probe(at, distance) for at in range(around.num_directions) for distance in (epsilon, -epsilon)]
    losses = around.losses(probes)
    slopes = [(plus - minus) / (2 * epsilon) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
    return Slopes(slopes, losses, len(probes) * around.num_batches)


def one_sided(around: Around, epsilon: float) -> Slopes:
    """(L_i − the mean of the other probes' losses) / ε: one forward a direction, and at least two directions.

    The baseline leaves the direction's own loss out, so the estimate is unbiased up to O(ε).
    """
    losses = around.losses([Probe(at, epsilon) for at in range(around.num_directions)])
    finite = [loss for loss in losses if math.isfinite(loss)]
    total, others = math.fsum(finite), len(finite) - 1
    slopes = [(loss - (total - loss) / others) / epsilon if others > 0 else math.nan for loss in losses]
    return Slopes(slopes, losses, len(losses) * around.num_batches)


def forward_gradient(around: Around, epsilon: float) -> Slopes:
    """⟨∇L, z⟩ exactly, by forward-mode differentiation (Baydin et al. 2022); `epsilon` plays no part.

    A pass carries the loss and its slope, which costs as much as two forwards and is counted so.
    """
    pairs = around.along()
    losses = [loss for loss, _ in pairs]
    slopes = [slope if math.isfinite(loss) else math.nan for loss, slope in pairs]
    return Slopes(slopes, losses, 2 * len(losses) * around.num_batches)


MEASURES: dict[SlopesName, Measure] = {"spsa": spsa, "one_sided": one_sided, "forward_gradient": forward_gradient}


@dataclass(frozen=True)
class Flat:
    """`Around` where the directions are held whole: `moves` (K, n), laid on the flat parameters."""

    objective: LossModule
    trainable: Mapping[str, nn.Parameter]
    batches: Sequence[Batch]
    probing: Probing
    moves: Tensor

    @property
    def num_directions(self) -> int:
        return len(self.moves)

    @property
    def num_batches(self) -> int:
        return len(self.batches)

    def losses(self, probes: Sequence[Probe]) -> list[float]:
        return self.probing.losses(self.objective, self.trainable, self.batches, self.moves, probes).tolist()

    def along(self) -> list[tuple[float, float]]:
        found = torch.stack([self._along(batch) for batch in self.batches]).mean(dim=0)  # (2, K)
        losses, slopes = self.probing.processes.summed(found.flatten()).chunk(2)
        return list(zip(losses.tolist(), slopes.tolist(), strict=True))

    def _along(self, batch: Batch) -> Tensor:
        """(2, K) float64: what this process's examples add to the batch's loss at θ, and to its slopes."""
        mine = share(batch, self.probing.processes.rank, self.probing.processes.num)
        if mine.weight == 0:
            return torch.zeros(2, self.num_directions, dtype=torch.float64)
        with unchanged_once(self.objective.model, list(self.trainable)):
            found = [self._loss_and_slope(move, mine.batch) for move in self.moves]
        return torch.tensor(found, dtype=torch.float64).T * mine.weight

    @torch.no_grad()
    def _loss_and_slope(self, move: Tensor, batch: Batch) -> tuple[float, float]:
        """At θ, the slope along `move` (n,)."""
        tangents = sliced(move, self.trainable)
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():  # the fused attention kernels have no forward mode
            duals = {
                name: forward_ad.make_dual(parameter.detach(), tangent)  # type: ignore[no-untyped-call]
                for (name, parameter), tangent in zip(self.trainable.items(), tangents, strict=True)
            }
            loss = _loss(self.objective, duals, batch)
            value, slope = forward_ad.unpack_dual(loss)  # type: ignore[no-untyped-call]
            return float(value), 0.0 if slope is None else float(slope)


def _loss(objective: LossModule, duals: dict[str, Tensor], batch: Batch) -> Tensor:
    try:
        return objective.loss_at(duals, batch)
    except NotImplementedError as error:
        raise ModelError(
            "zo.estimator=forward_gradient: this model uses an operation without forward-mode differentiation "
            f"({str(error).splitlines()[0]}): try model.attention=eager, or take zo.estimator=spsa"
        ) from None
