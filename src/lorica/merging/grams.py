"""Grams of the inputs that modules get, XᵀX, from a live model under each adapter: what a regression mean asks for.

Nothing here knows of tasks: the caller runs an adapter's batches, and says where they are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.adapters.injection import inject, remove
from lorica.errors import ModelError

Grams = dict[str, tuple[Tensor, ...]]  # module path -> (in, in) float32 on the CPU, of each adapter
Mask = Callable[[], Tensor | None]


def collect(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    paths: Sequence[str],
    run_batches: Mapping[str, Callable[[], None]],
    mask: Mask | None = None,
) -> Grams:
    """XᵀX of every module at `paths` over the positions that each adapter's batches bring to it, that adapter live.

    `run_batches` has for each adapter what runs its batches through the model, without gradients; `mask` gives the
    attention mask (b, t) of the batch that is running, whose zeros are left out wherever an input has b·t positions.
    Modules that share their inputs share one Gram: it is not to be written to. The model is left as it was, come what
    may. Raises ModelError for a module that no batch reaches.
    """
    found = {name: _inputs_under(model, adapter, paths, run_batches[name], mask) for name, adapter in adapters.items()}
    for name, grams in found.items():
        missing = [path for path in paths if path not in grams]
        if missing:
            raise ModelError(f"no batch of {name} reaches {missing[0]}: its inputs are not known, merge without it")
    return {path: tuple(grams[path] for grams in found.values()) for path in paths}


def merge_sequentially(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    layers: Sequence[Sequence[str]],
    run_batches: Mapping[str, Callable[[], None]],
    merge_layer: Callable[[Sequence[str], Grams], Mapping[str, LowRank]],
    mask: Mask | None = None,
) -> dict[str, LowRank]:
    """The merged updates of `layers`, groups of module paths in the order of the forward pass (RegMean++).

    The Grams that `merge_layer` gets of a layer are of inputs behind the merged layers before it; the layer itself and
    those after it carry the task's own adapter. `adapters` hold no other modules. Otherwise as `collect`.
    """
    merged: dict[str, LowRank] = {}
    for paths in layers:
        live = {
            name: Adapter({**adapter.updates, **merged}, adapter.heads, adapter.base_model)
            for name, adapter in adapters.items()
        }
        merged |= merge_layer(paths, collect(model, live, paths, run_batches, mask))
    return merged


@torch.no_grad()
def _inputs_under(
    model: nn.Module, adapter: Adapter, paths: Sequence[str], run: Callable[[], None], mask: Mask | None
) -> dict[str, Tensor]:
    inputs = _Inputs(mask)
    with ExitStack() as undo:
        undo.callback(remove, inject(model, adapter))
        for path in paths:
            undo.enter_context(model.get_submodule(path).register_forward_pre_hook(partial(inputs.see, path)))
        run()
    return inputs.grams()


class _Inputs:
    """Sums of XᵀX, one for every group of modules that get the same tensor one after the other."""

    def __init__(self, mask: Mask | None) -> None:
        self._mask = mask
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._group: list[str] = []
        self._last: tuple[Tensor, int] | None = None  # held, lest another tensor gets its address
        self._product = torch.empty(0)

    def see(self, path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook of the module at `path`."""
        x = inputs[0]
        version = 0 if x.is_inference() else x._version  # counts the writes to it
        if self._last is None or x is not self._last[0] or version != self._last[1]:
            self._add_product()
            self._last, self._product = (x, version), self._gram(x)
        self._group.append(path)

    def grams(self) -> dict[str, Tensor]:
        """Path -> XᵀX of all that its module was given."""
        self._add_product()
        found: dict[str, Tensor] = {}
        for group, total in self._sums.items():
            total = total.cpu()
            for path in group:
                found[path] = found[path] + total if path in found else total
        return found

    def _add_product(self) -> None:
        group = tuple(self._group)
        if group:
            total = self._sums.get(group)
            # A new tensor, as what was made in inference mode is not to be written to outside of it.
            self._sums[group] = self._product if total is None else total + self._product
        self._group = []

    def _gram(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()  # (n, in)
        mask = self._mask() if self._mask is not None else None
        if mask is not None and mask.numel() == len(rows):
            rows = rows[mask.flatten().bool().to(rows.device)]
        return rows.T @ rows
