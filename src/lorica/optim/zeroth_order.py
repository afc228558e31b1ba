"""Gradients from forward passes alone (MATH section 3). A probe never writes to the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorica import randomness
from lorica.optim.backprop import Estimate
from lorica.tasks.batching import Batch
from lorica.tasks.objectives import LossModule


@dataclass(frozen=True)
class Spsa:
    """Two-sided SPSA (Spall 1992; MeZO, arXiv 2305.17333): g = (L(θ+εz) − L(θ−εz)) / 2ε, gradient g·z.

    With several directions the gradient is the mean of g_i·z_i. z of (step, direction) is one flat Gaussian draw keyed
    by (seed, step, direction), and a parameter's part is a slice of it. The losses are taken at θ ± εz by a functional
    call: the parameters themselves are only read. The loss of a step is the mean of its probes'.
    """

    epsilon: float
    num_directions: int = 1
    seed: int = 0

    def __call__(
        self,
        objective: LossModule,
        trainable: Mapping[str, nn.Parameter],
        batches: Sequence[Batch],
        step: int,
    ) -> Estimate:
        size = sum(parameter.numel() for parameter in trainable.values())
        gradient = torch.zeros(size)
        losses, projected = [], []
        for direction in range(self.num_directions):
            z = randomness.normals(self.seed, "perturbation", step, direction, size=size)
            plus = self._loss(objective, trainable, batches, z, self.epsilon)
            minus = self._loss(objective, trainable, batches, z, -self.epsilon)
            projected.append((plus - minus) / (2 * self.epsilon))
            losses += [plus, minus]
            gradient += z * (projected[-1] / self.num_directions)
        for parameter, part in zip(trainable.values(), sliced(gradient, trainable), strict=True):
            parameter.grad = part
        num_forwards = 2 * self.num_directions * len(batches)
        return Estimate(math.fsum(losses) / len(losses), num_forwards, tuple(projected))

    @torch.no_grad()
    def _loss(
        self,
        objective: LossModule,
        trainable: Mapping[str, nn.Parameter],
        batches: Sequence[Batch],
        z: Tensor,
        step_size: float,
    ) -> float:
        """The mean loss over the batches at θ + step_size·z."""
        moved = {
            name: torch.add(parameter, part, alpha=step_size)
            for (name, parameter), part in zip(trainable.items(), sliced(z, trainable), strict=True)
        }
        return math.fsum(float(objective.loss_at(moved, batch)) for batch in batches) / len(batches)


def sliced(flat: Tensor, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """The parts of a flat (n,) tensor that belong to each parameter, in its shape and on its device."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    parts = torch.split(flat, sizes)
    return [
        part.view_as(parameter).to(parameter.device) for part, parameter in zip(parts, parameters.values(), strict=True)
    ]
