"""Each adapter scaled so that every layer of it has the same norm.

Source: MATH section 6.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from lorica.merging.layers import Layer, layer_of
from lorica.merging.method import Module, Modules, Site, Update

Norms = Mapping[Layer | None, Tensor]  # (T,) float64 each


def transform(
    updates: Sequence[Update],
    site: Site,
    *,
    target_norm: Annotated[float, Gt(0)] = 1.0,
    eps: Annotated[float, Gt(0)] = 1e-12,
    include_non_layer_keys: bool = True,
) -> list[Update]:
    """Δ_i·target_norm / max(eps, N_i), where N_i is √Σ‖Δ_i‖² over the modules of the same layer, in factors.

    The modules that are in no layer count as one, or stay as they are without `include_non_layer_keys`.
    """
    layer = layer_of(site.path)
    if layer is None and not include_non_layer_keys:
        return list(updates)
    norms = site.found[layer].clamp(min=eps)
    return [update * (target_norm / float(norm)) for update, norm in zip(updates, norms, strict=True)]


def survey(modules: Modules, *, target_norm: float, eps: float, include_non_layer_keys: bool) -> Norms:
    """The norm of each layer of each adapter."""
    squares: dict[Layer | None, Tensor] = {}
    for layer, found in modules.map(_squares):
        squares[layer] = squares.get(layer, torch.zeros_like(found)) + found
    return {layer: total.sqrt() for layer, total in squares.items()}


def _squares(module: Module) -> tuple[Layer | None, Tensor]:
    """The module's layer, and each update's ‖Δ_i‖²."""
    norms = [float(each.double().norm()) if isinstance(each, Tensor) else each.norm() for each in module.updates]
    return layer_of(module.site.path), torch.tensor(norms, dtype=torch.float64).square()
