"""Gradients from forward passes alone (MATH section 3). A probe never writes to the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorica.optim.backprop import Estimate
from lorica.optim.directions import Directions, flat_size, sliced
from lorica.optim.probes import Probing
from lorica.optim.scaling import Scaling
from lorica.optim.slopes import MEASURES, Flat, Slopes, SlopesName
from lorica.tasks.batching import Batch
from lorica.tasks.objectives import LossModule


@dataclass
class ZerothOrder:
    """The estimator that weighs random directions by the slope of the loss along them: ∇̂ = mean of g_i·z_i.

    A direction whose loss is not finite is left out of the mean; where all are, the loss is NaN and so the step is not
    applied. The loss of a step is the mean of its finite probes'. `scales` (n,) lays coordinates over the parameters
    (`coordinates.update_scales`): probes are taken at θ ± ε·scales·z, and plain SGD then steps in the coordinates.
    """

    estimator: SlopesName = "spsa"
    epsilon: float = 1e-3
    directions: Directions = field(default_factory=Directions)
    scaling: Scaling = field(default_factory=Scaling)
    scales: Tensor | None = None
    probing: Probing = field(default_factory=Probing)

    def __call__(
        self,
        objective: LossModule,
        trainable: Mapping[str, nn.Parameter],
        batches: Sequence[Batch],
        step: int,
    ) -> Estimate:
        moves = self._moves(step, trainable)  # (K, n)
        found = MEASURES[self.estimator](Flat(objective, trainable, batches, self.probing, moves), self.epsilon)
        estimate = estimated(found, self.scaling, self.epsilon)
        _set_gradient(trainable, estimate.weights, moves)
        return estimate

    def set_gradient(self, trainable: Mapping[str, nn.Parameter], step: int, weights: Sequence[float]) -> None:
        """The gradient of a step as it was, from the weights that its directions had; no loss is asked for."""
        _set_gradient(trainable, weights, self._moves(step, trainable))

    def _moves(self, step: int, trainable: Mapping[str, nn.Parameter]) -> Tensor:
        """(K, n): where each direction leads, in the parameters' own units."""
        moves = self.directions(step, flat_size(trainable)).to(next(iter(trainable.values())).device)
        return moves if self.scales is None else moves.mul_(self.scales)

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must keep, as JSON takes it."""
        return {"scaling": self.scaling.state(), "probing": self.probing.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Put a kept state back."""
        self.scaling.restore(state["scaling"])
        self.probing.restore(state["probing"])


def estimated(found: Slopes, scaling: Scaling, epsilon: float) -> Estimate:
    """What a step's slopes come to: the loss, and the weight of each direction; one without a finite slope has none."""
    weights = torch.zeros(len(found.slopes))  # float32, as they are applied
    if found.usable:
        scaled = scaling([found.slopes[place] for place in found.usable], found.finite_losses, epsilon)
        weights[found.usable] = torch.tensor([slope / len(scaled) for slope in scaled])
    loss = math.fsum(found.finite_losses) / len(found.finite_losses) if found.usable else math.nan
    num_left_out = len(found.slopes) - len(found.usable)
    return Estimate(loss, found.num_forwards, tuple(found.slopes), tuple(weights.tolist()), num_left_out)


def _set_gradient(trainable: Mapping[str, nn.Parameter], weights: Sequence[float], moves: Tensor) -> None:
    for parameter, part in zip(trainable.values(), sliced(weighed(weights, moves), trainable), strict=True):
        parameter.grad = part


def weighed(weights: Sequence[float], moves: Tensor) -> Tensor:
    """(n,) the sum of weights times moves (K, n), added up in order: the same bits whatever the threads."""
    gradient = torch.zeros_like(moves[0])
    for weight, move in zip(weights, moves, strict=True):
        gradient.add_(move, alpha=weight)
    return gradient
