"""What a learner moves, u, and the coefficients c that it stands for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.merging.fitting.layout import Layout

ParameterizationName = Literal["free", "clip", "sigmoid_alpha", "tanh_alpha", "simplex_softmax_scaled", "softmax"]
Map = Callable[[Tensor], Tensor]


def _unchanged(u: Tensor) -> Tensor:
    return u


@dataclass(frozen=True)
class Parameterization:
    """u (n,) float64 where fitting starts, c (K,) as a differentiable function of it, and what follows each step."""

    start: Tensor
    coefficients: Map = _unchanged
    projected: Map = _unchanged


def parameterization(
    name: ParameterizationName, layout: Layout, init: float, normalize: bool = False
) -> Parameterization:
    """The parameterization called `name`, with every coefficient `init` at the start; `softmax` starts at 1/T.

    free: c = u. clip: c = u, brought back into [0, 1] after each step. sigmoid_alpha: c = σ(u) in (0, 1). tanh_alpha:
    c = tanh(u) in (-1, 1). softmax: over the adapters of each group. simplex_softmax_scaled: that, times a positive
    scale of each group which is learned too. `normalize` divides c by its sum over the adapters of each group. Raises
    ConfigError for an init out of the parameterization's reach.
    """
    made = _made(name, layout, init)
    if not normalize:
        return made
    return Parameterization(made.start, lambda u: normalized(made.coefficients(u), layout), made.projected)


def normalized(c: Tensor, layout: Layout) -> Tensor:
    """c (K,) over its sum over the adapters of each group."""
    return _normalized(c, _groups(layout))


def _made(name: ParameterizationName, layout: Layout, init: float) -> Parameterization:
    low, high = _reach(name)
    if not low <= init <= high:
        raise ConfigError(f"init={init:g}: {name} starts between {low:g} and {high:g}, both out of reach themselves")
    uniform = torch.full((layout.size,), init, dtype=torch.float64)
    if name == "free":
        return Parameterization(uniform)
    if name == "clip":
        return Parameterization(uniform, projected=lambda u: u.clamp(0, 1))
    if name == "sigmoid_alpha":
        return Parameterization(uniform.logit(), torch.sigmoid)
    if name == "tanh_alpha":
        return Parameterization(uniform.atanh(), torch.tanh)
    groups = _groups(layout)
    if name == "softmax":
        return Parameterization(torch.zeros(layout.size, dtype=torch.float64), lambda u: _softmax(u, groups))
    return _scaled_simplex(groups, init)


def _reach(name: ParameterizationName) -> tuple[float, float]:
    return {
        "clip": (0.0, 1.0),
        "sigmoid_alpha": (math.ulp(0.0), 1 - 1e-12),
        "tanh_alpha": (-1 + 1e-12, 1 - 1e-12),
        "simplex_softmax_scaled": (math.ulp(0.0), math.inf),
    }.get(name, (-math.inf, math.inf))


def _groups(layout: Layout) -> Tensor:
    """(K,) the number of each coefficient's group."""
    number = {group: at for at, group in enumerate(dict.fromkeys(group for group, _ in layout.keys))}
    return torch.tensor([number[group] for group, _ in layout.keys], dtype=torch.long)


def _scaled_simplex(groups: Tensor, init: float) -> Parameterization:
    """u is the logits (K,), then the logarithm of each group's scale, which starts at init times its adapters."""
    scale = torch.bincount(groups).double() * init
    num_coefficients = len(groups)

    def coefficients(u: Tensor) -> Tensor:
        logits, log_scale = u[:num_coefficients], u[num_coefficients:]
        return _softmax(logits, groups) * log_scale.exp()[groups]

    return Parameterization(torch.cat([torch.zeros(num_coefficients, dtype=scale.dtype), scale.log()]), coefficients)


def _softmax(u: Tensor, groups: Tensor) -> Tensor:
    # One maximum for all groups would let a group that lies far below it vanish.
    highest = u.detach().new_full((int(groups.max()) + 1,), -math.inf).scatter_reduce(0, groups, u.detach(), "amax")
    return _normalized((u - highest[groups]).exp(), groups)


def _normalized(c: Tensor, groups: Tensor) -> Tensor:
    totals = c.new_zeros(int(groups.max()) + 1).index_add(0, groups, c)
    return c / totals[groups]
