"""The slope of the loss along each of K directions: three ways to it, from forward passes alone (MATH section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorica.errors import ModelError
from lorica.optim.directions import sliced
from lorica.optim.probes import Probing
from lorica.tasks.batching import Batch
from lorica.tasks.objectives import LossModule

SlopesName = Literal["spsa", "one_sided", "forward_gradient"]


@dataclass(frozen=True)
class Around:
    """The loss around the parameters as they stand: the mean over the batches, and what can be asked of it."""

    objective: LossModule
    trainable: Mapping[str, nn.Parameter]
    batches: Sequence[Batch]
    probing: Probing

    def losses(self, offsets: Tensor) -> list[float]:
        """The losses at θ + offsets (G, n)."""
        return self.probing.losses(self.objective, self.trainable, self.batches, offsets).tolist()


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


Measure = Callable[[Around, Tensor, float], Slopes]


def spsa(around: Around, moves: Tensor, epsilon: float) -> Slopes:
    """Two-sided SPSA (Spall 1992; MeZO, arXiv 2305.17333): (L(θ+εz) − L(θ−εz)) / 2ε, two forwards a direction."""
    offsets = torch.stack([moves, -moves], dim=1).mul_(epsilon).flatten(0, 1)  # (2K, n): + and − side by side
    losses = around.losses(offsets)
    slopes = [(plus - minus) / (2 * epsilon) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
    return Slopes(slopes, losses, len(offsets) * len(around.batches))


def one_sided(around: Around, moves: Tensor, epsilon: float) -> Slopes:
    """(L_i − the mean of the other probes' losses) / ε: one forward a direction, and at least two directions.

    The baseline leaves the direction's own loss out, so the estimate is unbiased up to O(ε).
    """
    losses = around.losses(moves * epsilon)
    finite = [loss for loss in losses if math.isfinite(loss)]
    total, others = math.fsum(finite), len(finite) - 1
    slopes = [(loss - (total - loss) / others) / epsilon if others > 0 else math.nan for loss in losses]
    return Slopes(slopes, losses, len(moves) * len(around.batches))


def forward_gradient(around: Around, moves: Tensor, epsilon: float) -> Slopes:
    """⟨∇L, z⟩ exactly, by forward-mode differentiation (Baydin et al. 2022); `epsilon` plays no part.

    A pass carries the loss and its slope, which costs as much as two forwards and is counted so.
    """
    pairs = [_along(around, move) for move in moves]
    losses = [loss for loss, _ in pairs]
    slopes = [slope if math.isfinite(loss) else math.nan for loss, slope in pairs]
    return Slopes(slopes, losses, 2 * len(moves) * len(around.batches))


MEASURES: dict[SlopesName, Measure] = {"spsa": spsa, "one_sided": one_sided, "forward_gradient": forward_gradient}


@torch.no_grad()
def _along(around: Around, move: Tensor) -> tuple[float, float]:
    """The loss at θ and its slope along `move` (n,)."""
    tangents = sliced(move, around.trainable)
    loss, slope = 0.0, 0.0
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():  # the fused attention kernels have no forward mode
        duals = {
            name: forward_ad.make_dual(parameter.detach(), tangent)  # type: ignore[no-untyped-call]
            for (name, parameter), tangent in zip(around.trainable.items(), tangents, strict=True)
        }
        for batch in around.batches:
            found = _loss(around.objective, duals, batch)
            value, derivative = forward_ad.unpack_dual(found)  # type: ignore[no-untyped-call]
            loss += float(value) / len(around.batches)
            slope += (0.0 if derivative is None else float(derivative)) / len(around.batches)
    return loss, slope


def _loss(objective: LossModule, duals: dict[str, Tensor], batch: Batch) -> Tensor:
    try:
        return objective.loss_at(duals, batch)
    except NotImplementedError as error:
        raise ModelError(
            "zo.estimator=forward_gradient: this model uses an operation without forward-mode differentiation "
            f"({str(error).splitlines()[0]}): try model.attention=eager, or take zo.estimator=spsa"
        ) from None
