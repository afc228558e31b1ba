"""Many adapters live on one model, under coefficients that gradients reach (MATH section 6.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lorica import plugins
from lorica.adapters import injection
from lorica.adapters.delta import LowRank
from lorica.adapters.lora import LoraLinear
from lorica.errors import ConfigError, ModelError, ShapeError
from lorica.merging import live_layers
from lorica.merging.fitting.layout import Layout
from lorica.merging.live_layers import Slot
from lorica.merging.method import Update

MergeImpl = Literal["fused_lora_linear", "streaming_parametrize", "fused_linear", "functional_clone_legacy"]
Residency = Literal["cpu_stream", "gpu_cache"]
Compute = Literal["auto", "float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, eq=False)
class Mounted:
    """Adapters on a model whose own weights are frozen and never written.

    After `remove`, or the `with` block, each module and parameter is the very one before, trainable where it was.
    """

    layout: Layout
    merge_impl: MergeImpl
    slots: Sequence[Slot]
    places: Tensor  # (ΣW,) the place in c of each share of each slot
    widths: Sequence[int]  # number of shares of each slot
    device: torch.device
    undo: ExitStack

    def __call__(self, module: nn.Module, *args: Any, coefficients: Tensor, **kwargs: Any) -> Any:
        """module(*args, **kwargs), where `module` is, holds or shares the model, under `coefficients` as in `at`.

        A model that computes its layers anew in the backward pass (gradient checkpointing) is run within `at`, up to
        the gradient.
        """
        with self.at(coefficients):
            return module(*args, **kwargs)

    @contextmanager
    def at(self, coefficients: Tensor) -> Iterator[None]:
        """Within the block the model is the merge at c (K,), which gets a gradient if it wants one.

        c (G, K) are G candidates in one forward pass: the first dimension of the inputs holds their rows one after the
        other. Raises ShapeError for another shape, ConfigError for candidates if `merge_impl` cannot run them.
        """
        self._check(coefficients)
        # On the CPU, because the sum behind a coefficient's gradient is in no certain order on other devices.
        shares = coefficients.cpu().index_select(-1, self.places).to(self.device)
        before = [slot.shares for slot in self.slots]
        try:
            self._fill(torch.split(shares, list(self.widths), dim=-1))
            yield
        finally:
            self._fill(before)

    def _fill(self, shares: Sequence[Tensor | None]) -> None:
        for slot, share in zip(self.slots, shares, strict=True):
            slot.shares = share

    def _check(self, coefficients: Tensor) -> None:
        if coefficients.dim() not in (1, 2) or coefficients.shape[-1] != self.layout.size:
            size = self.layout.size
            raise ShapeError(f"coefficients of shape {tuple(coefficients.shape)}: give ({size},), or (G, {size})")
        if coefficients.dim() == 2 and self.merge_impl != "fused_lora_linear":
            raise ConfigError(
                f"merge_impl={self.merge_impl} runs one set of coefficients at a time, and was given "
                f"{len(coefficients)}: use merge_impl=fused_lora_linear"
            )

    def remove(self) -> None:
        self.undo.close()

    def __enter__(self) -> Mounted:
        return self

    def __exit__(self, *failure: Any) -> None:
        self.remove()


def mount(
    model: nn.Module,
    updates: Mapping[str, Sequence[Update]],
    layout: Layout,
    *,
    merge_impl: MergeImpl = "fused_lora_linear",
    delta_residency: Residency = "cpu_stream",
    dtype_compute: Compute = "float32",
) -> Mounted:
    """Lay `updates`, module path -> update of each of the layout's adapters, on the model, and freeze the model.

    `fused_lora_linear` holds the factors on the model's device; the others bring each update over when it is needed
    (`cpu_stream`), or hold all of them there, and dense where a coefficient is not of a single direction (`gpu_cache`).
    `dtype_compute` is that of the products with the updates, and no narrower than the module's weight; `auto` is the
    weight's own.

    Raises AdapterFormatError (a module that is missing or of another shape), ShapeError (updates that are not the
    layout's), ConfigError (a dense update where it cannot be run), ModelError (a live adapter on the model; a quantised
    weight, but for the two fused ways); the model is as it was then.
    """
    _check_options(merge_impl=merge_impl, delta_residency=delta_residency, dtype_compute=dtype_compute)
    _check_modules(updates, layout)
    for path, of_adapters in updates.items():
        _check_updates(model, path, of_adapters, layout, merge_impl)
    slots, places, device = [], [], torch.device("cpu")
    with ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        model.requires_grad_(False)
        for path, of_adapters in updates.items():
            module = model.get_submodule(path)
            dtype = _dtype(module, dtype_compute)
            device = live_layers.device_of(module)
            if delta_residency == "gpu_cache" and merge_impl != "fused_lora_linear":
                of_adapters = _cached(of_adapters, layout, device, dtype)
            slots.append(Slot())
            places.append(_places(path, of_adapters, layout))
            undo.callback(getattr(live_layers, merge_impl)(module, of_adapters, slots[-1], dtype))
        widths = [len(each) for each in places]
        return Mounted(layout, merge_impl, slots, torch.cat(places), widths, device, undo.pop_all())


def _check_options(**options: str) -> None:
    known = {"merge_impl": MergeImpl, "delta_residency": Residency, "dtype_compute": Compute}
    for key, value in options.items():
        if value not in get_args(known[key]):
            raise ConfigError(plugins.unknown(key, value, get_args(known[key])))


def _check_modules(updates: Mapping[str, Sequence[Update]], layout: Layout) -> None:
    if missing := updates.keys() ^ layout.index.keys():
        path = min(missing)
        where, other = ("updates", "layout") if path in updates else ("layout", "updates")
        raise ShapeError(f"{path} is in the {where} and not in the {other}: make the layout of these updates")


def _check_updates(
    model: nn.Module, path: str, updates: Sequence[Update], layout: Layout, merge_impl: MergeImpl
) -> None:
    for update in updates:
        injection.check_fits(model, path, update)
    ranks = [each.rank if isinstance(each, LowRank) else None for each in updates]
    expected = layout.ranks[path]
    if len(ranks) != len(expected) or any(rank not in (None, r) for rank, r in zip(ranks, expected, strict=True)):
        raise ShapeError(f"{path} has updates of ranks {ranks}, and the layout has {list(expected)} there")
    module = model.get_submodule(path)
    if isinstance(module, LoraLinear):
        raise ModelError(f"{path} carries a live adapter: remove it before others are mounted")
    if merge_impl in ("streaming_parametrize", "functional_clone_legacy") and _float_dtype(module) is None:
        raise ModelError(
            f"{path} is not a float matrix (quantised base?): merge_impl={merge_impl} needs one, fused_lora_linear none"
        )
    if None in ranks:
        _check_dense(layout.names[ranks.index(None)], path, layout, merge_impl)


def _check_dense(name: str, path: str, layout: Layout, merge_impl: MergeImpl) -> None:
    if layout.granularity == "direction":
        raise ConfigError(f"the update of {path} by {name} is dense and has no directions: use granularity=module")
    if merge_impl == "fused_lora_linear":
        raise ConfigError(
            f"the update of {path} by {name} is dense, and merge_impl=fused_lora_linear runs low-rank ones: use "
            f"merge_impl=streaming_parametrize or fused_linear"
        )


def _float_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the module's weight; None where that is quantised."""
    weight = getattr(module, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None


def _dtype(module: nn.Module, dtype_compute: Compute) -> torch.dtype:
    own = _float_dtype(module)
    if dtype_compute == "auto":
        return own or torch.float32
    asked: torch.dtype = getattr(torch, dtype_compute)
    return torch.promote_types(asked, own or asked)


def _cached(updates: Sequence[Update], layout: Layout, device: torch.device, dtype: torch.dtype) -> list[Update]:
    """The updates on the model's device, dense unless their directions have coefficients of their own."""
    moved = [each.to(dtype=dtype, device=device) for each in updates]
    if layout.granularity == "direction":
        return moved
    return [each.dense() if isinstance(each, LowRank) else each for each in moved]


def _places(path: str, updates: Sequence[Update], layout: Layout) -> Tensor:
    """(W,) the place in c of each share of the module's updates."""
    if layout.granularity == "direction":
        return layout.index[path]
    widths = torch.tensor([live_layers.width(each) for each in updates])
    return layout.index[path].repeat_interleave(widths)
