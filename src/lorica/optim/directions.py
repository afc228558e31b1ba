"""Random directions in the space of the trainable parameters, each one flat draw that its key alone decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorica import randomness

Distribution = Literal["gaussian", "rademacher"]


@dataclass(frozen=True)
class Directions:
    """`num` directions for each step. Entries have mean 0 and variance 1: N(0, 1), or ±1 under `rademacher`.

    Direction i of a step is keyed by (seed, "perturbation", step, i) and drawn on the CPU, so it is the same whatever
    device the model is on, and whatever was drawn before it.
    """

    num: int = 1
    distribution: Distribution = "gaussian"
    seed: int = 0

    def __call__(self, step: int, size: int) -> Tensor:
        """(num, size) float32 on the CPU."""
        draw = randomness.normals if self.distribution == "gaussian" else randomness.signs
        drawn = torch.empty(self.num, size)
        for index, direction in enumerate(drawn):
            direction.copy_(draw(self.seed, "perturbation", step, index, size=size))
        return drawn

    def of_rows(
        self, step: int, index: int, name: str, rows: Sequence[int], width: int, device: str | torch.device = "cpu"
    ) -> Tensor:
        """(len(rows), width) float32: some rows of the part of direction `index` that belongs to a parameter.

        Keyed by the parameter's name besides, for models whose directions are never held whole; these are other numbers
        than those of the flat draw.
        """
        draw = randomness.normal_rows if self.distribution == "gaussian" else randomness.sign_rows
        return draw(self.seed, "perturbation", step, index, name, rows=rows, width=width, device=device)


def flat_size(parameters: Mapping[str, nn.Parameter]) -> int:
    """How many numbers the parameters hold together."""
    return sum(parameter.numel() for parameter in parameters.values())


def sliced(flat: Tensor, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """The parts of a flat (n,) tensor that belong to each parameter, in its shape and on its device."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    parts = torch.split(flat, sizes)
    return [
        part.view_as(parameter).to(parameter.device) for part, parameter in zip(parts, parameters.values(), strict=True)
    ]
