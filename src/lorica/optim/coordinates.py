"""Coordinates in which a random step is measured by what it does to the weights (MATH section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter


def update_scales(start: Adapter, trainable: Mapping[str, nn.Parameter]) -> Tensor:
    """(n,) float32: how far each trainable number moves where its coordinate in ΔW's units moves by 1.

    An update s·B·A that starts at A0 is written as B̂·Â with A = k·Â, B = B̂/(s·k), k = ‖A0‖/√in. A move of B̂ by N(0, 1)
    entries changes ΔW by entries of root mean square 1, so a rate and an ε in these coordinates are in ΔW's units, and
    neither alpha, nor the rank, nor the length of A's draw plays a part. Heads keep their own units.
    """
    scales: dict[str, float] = {}
    for path, update in start.updates.items():
        length = float(update.A.double().norm()) / math.sqrt(update.A.shape[1])
        scales |= {f"{path}.A": length, f"{path}.B": 1 / (update.scale * length)}
    return torch.cat(
        [
            torch.full((parameter.numel(),), scales.get(name, 1.0), device=parameter.device)
            for name, parameter in trainable.items()
        ]
    )
