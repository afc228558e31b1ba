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

from lorica.errors import ModelError
from lorica.optim.directions import sliced
from lorica.optim.probes import Probing
from lorica.tasks.batching import Batch, share
from lorica.tasks.objectives import LossModule

SlopesName = Literal["spsa", "one_sided", "forward_gradient"]


@dataclass(frozen=True)
class Probe:
    """A point to take the loss at: so far along a direction of the step."""

    direction: int
    distance: float


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
        offsets = torch.stack([self.moves[probe.direction] * probe.distance for probe in probes])  # (G, n)
        return self.probing.losses(self.objective, self.trainable, self.batches, offsets).tolist()

    def along(self) -> list[tuple[float, float]]:
        found = torch.tensor([self._along(move) for move in self.moves], dtype=torch.float64)  # (K, 2)
        losses, slopes = self.probing.processes.summed(found.T.flatten()).chunk(2)
        return list(zip(losses.tolist(), slopes.tolist(), strict=True))

    @torch.no_grad()
    def _along(self, move: Tensor) -> tuple[float, float]:
        """What this process's examples add to the loss at θ and to its slope along `move` (n,)."""
        processes, tangents = self.probing.processes, sliced(move, self.trainable)
        loss, slope = 0.0, 0.0
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():  # the fused attention kernels have no forward mode
            duals = {
                name: forward_ad.make_dual(parameter.detach(), tangent)  # type: ignore[no-untyped-call]
                for (name, parameter), tangent in zip(self.trainable.items(), tangents, strict=True)
            }
            for batch in self.batches:
                mine = share(batch, processes.rank, processes.num)
                if mine.weight == 0:
                    continue
                found = _loss(self.objective, duals, mine.batch) * mine.weight
                value, derivative = forward_ad.unpack_dual(found)  # type: ignore[no-untyped-call]
                loss += float(value) / self.num_batches
                slope += (0.0 if derivative is None else float(derivative)) / self.num_batches
        return loss, slope


def _loss(objective: LossModule, duals: dict[str, Tensor], batch: Batch) -> Tensor:
    try:
        return objective.loss_at(duals, batch)
    except NotImplementedError as error:
        raise ModelError(
            "zo.estimator=forward_gradient: this model uses an operation without forward-mode differentiation "
            f"({str(error).splitlines()[0]}): try model.attention=eager, or take zo.estimator=spsa"
        ) from None
