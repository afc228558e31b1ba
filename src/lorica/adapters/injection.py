"""An adapter laid on a live model: choose targets, create, inject, extract, remove, fuse, unfuse.

This is the only room that changes a model, and each function that does says so by its verb.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorica import plugins, randomness
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.adapters.lora import LoraLinear, features, is_transposed
from lorica.errors import AdapterFormatError, ModelError, ShapeError, TargetError

Init = Literal["kaiming", "gaussian", "orthogonal"]


def create(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    init: Init = "kaiming",
    init_std: float | None = None,
    seed: int = 0,
    round: int = 0,
    heads: Sequence[str] = (),
    base_model: str | None = None,
) -> Adapter:
    """A new adapter for the modules at `targets`: A drawn, B zero, so that it starts as no change; heads as they stand.

    A's draw depends on (seed, round, module path) alone. Inits are those of MATH section 1. Raises ShapeError if `rank`
    is larger than one of the matrices.
    """
    updates = {}
    for path in targets:
        out_in = features(model.get_submodule(path))
        if out_in is None:
            raise TargetError(f"{path} is not a linear module")
        if rank > min(out_in):
            raise ShapeError(f"adapter.rank={rank} is larger than {path} {out_in}: at most {min(out_in)}")
        generator = randomness.torch_generator(seed, "init", round, path)
        A = initial_A(rank, out_in[1], init, init_std, generator)
        updates[path] = LowRank(A, torch.zeros(out_in[0], rank), alpha / rank)
    values = {path: _state(model.get_submodule(path)) for path in heads}
    return Adapter(updates, values, base_model)


def initial_A(rank: int, width: int, init: Init, std: float | None, generator: torch.Generator) -> Tensor:
    """A (rank, width): kaiming U(-1/√in, 1/√in); gaussian N(0, std²); orthogonal, with orthonormal rows."""
    if init == "kaiming":
        bound = 1 / math.sqrt(width)
        return torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
    drawn = torch.empty(rank, width).normal_(generator=generator)
    if init == "gaussian":
        if std is None:
            raise ShapeError("init=gaussian needs its standard deviation: give init_std")
        return drawn * std
    return torch.linalg.qr(drawn.T)[0].T.contiguous()


def orthogonal_to(new: Adapter, chain: Adapter) -> Adapter:
    """`new` with its A's rows made orthogonal to the rows of the chain's A, at their old length.

    A module whose input space the chain already fills keeps its draw.
    """
    updates = {}
    for path, update in new.updates.items():
        A = update.A
        if path in chain.updates and chain.updates[path].rank + update.rank <= A.shape[1]:
            Q = torch.linalg.qr(chain.updates[path].A.double().T)[0]  # (in, K)
            left = A.double() - (A.double() @ Q) @ Q.T
            A = (left * (A.double().norm(dim=1) / left.norm(dim=1)).unsqueeze(1)).to(A.dtype)
        updates[path] = LowRank(A, update.B, update.scale)
    return Adapter(updates, new.heads, new.base_model)


@dataclass(frozen=True)
class Live:
    """An adapter on a model: its live layers and heads, and what stood in their place."""

    model: nn.Module
    layers: Mapping[str, LoraLinear]
    heads: Mapping[str, nn.Module]
    replaced_heads: Mapping[str, nn.Module]
    frozen: Mapping[str, bool]
    base_model: str | None

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter, for the factors and the heads; all fp32."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def set_training(self, training: bool) -> None:
        """Switch the adapter's own dropout; the base model's mode is left as it is."""
        for layer in self.layers.values():
            layer.training = layer.dropout.training = training

    def train_only(self, factors: str) -> None:
        """Freeze A where `factors` is B: at B = 0 no gradient reaches A anyway. `both` trains both."""
        for layer in self.layers.values():
            layer.A.requires_grad_(factors == "both")

    def put(self, adapter: Adapter) -> None:
        """Write an adapter's factors and heads into the live parameters; it must have the same modules and ranks."""
        factors = {f"{path}.{name}": getattr(each, name) for path, each in adapter.updates.items() for name in "AB"}
        heads = {f"{path}.{name}": value for path, head in adapter.heads.items() for name, value in head.items()}
        self.restore(factors | heads)

    def state(self) -> dict[str, Tensor]:
        """Name in the model -> value of every factor and of everything in the heads, copied."""
        factors = {f"{path}.{name}": getattr(layer, name) for path, layer in self.layers.items() for name in "AB"}
        heads = {f"{path}.{name}": value for path, head in self.heads.items() for name, value in _state(head).items()}
        return {name: value.detach().clone() for name, value in factors.items()} | heads

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Write a state into the live factors and heads."""
        for path, layer in self.layers.items():
            layer.A.copy_(state[f"{path}.A"])
            layer.B.copy_(state[f"{path}.B"])
        for path, head in self.heads.items():
            head.load_state_dict({name: state[f"{path}.{name}"] for name in head.state_dict()})

    def set_dropout_generator(self, generator: torch.Generator) -> None:
        """Let every layer's dropout draw from `generator`."""
        for layer in self.layers.values():
            layer.dropout.generator = generator


def inject(model: nn.Module, adapter: Adapter, dropout: float = 0.0) -> Live:
    """Lay the adapter on the model: freeze everything else, put live layers and fp32 heads in place.

    Raises AdapterFormatError if the adapter names a module that the model lacks or whose shape differs; the model is
    changed only after every module was checked.
    """
    for path, update in adapter.updates.items():
        check_fits(model, path, update)
    for path, head in adapter.heads.items():
        _check_head_fits(model, path, head)
    for path in adapter.updates:
        if _inside(path, tuple(adapter.heads)):
            raise AdapterFormatError(f"the adapter updates {path}, which lies in a head that it replaces whole")
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    layers = {path: LoraLinear(model.get_submodule(path), update, dropout) for path, update in adapter.updates.items()}
    heads = {path: _live_head(model.get_submodule(path), head) for path, head in adapter.heads.items()}
    replaced = {path: model.get_submodule(path) for path in heads}
    model.requires_grad_(False)
    for path, module in {**layers, **heads}.items():
        _replace(model, path, module)
    return Live(model, layers, heads, replaced, frozen, adapter.base_model)


def extract(live: Live) -> Adapter:
    """The adapter as it stands on the model now, copied off the live parameters."""
    updates = {path: layer.update for path, layer in live.layers.items()}
    return Adapter(updates, {path: _state(head) for path, head in live.heads.items()}, live.base_model)


def remove(live: Live) -> None:
    """Take the adapter off: every module that was replaced is back, with its own bits and requires_grad flags."""
    for path, layer in live.layers.items():
        _replace(live.model, path, layer.base)
    for path, head in live.replaced_heads.items():
        _replace(live.model, path, head)
    for name, parameter in live.model.named_parameters():
        parameter.requires_grad_(live.frozen[name])


def restore(live: Live) -> None:
    """Put an adapter that was removed back on its model: the very same layers, heads and parameters."""
    live.model.requires_grad_(False)
    for path, module in {**live.layers, **live.heads}.items():
        _replace(live.model, path, module)


@torch.no_grad()
def fuse(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Write W = cast(W0 + ΔW) into the model's weights, summed in fp32, and return the pristine weights for `unfuse`.

    Raises ModelError if a weight is not a float matrix (a quantised base) or an update holds NaN; nothing is written
    then.
    """
    fused = {path: fused_weight(model, path, update) for path, update in adapter.updates.items()}
    pristine = {}
    for path, weight in fused.items():
        target: Tensor = model.get_submodule(path).weight  # type: ignore[assignment]
        pristine[path] = target.clone()
        target.copy_(weight)
    return pristine


@torch.no_grad()
def fused_weight(model: nn.Module, path: str, update: LowRank | Tensor) -> Tensor:
    """cast(W0 + ΔW) of one module, laid out as the module keeps its weight; the model stays as it is.

    Raises AdapterFormatError if the module is missing or of another shape, ModelError as `summed` does.
    """
    check_fits(model, path, update)
    module = model.get_submodule(path)
    if isinstance(module, LoraLinear):
        raise ModelError(f"{path} carries a live adapter: remove it before fusing")
    return summed(module.weight, update, path, transposed=is_transposed(module))  # type: ignore[arg-type]


def summed(weight: Tensor, update: LowRank | Tensor, path: str, *, transposed: bool) -> Tensor:
    """cast(W0 + ΔW), summed in fp32, of the weight of the module at `path`, (in, out) if `transposed`, else (out, in).

    Raises ModelError if the weight is no float matrix (a quantised base), the update holds NaN or infinity, or the sum
    overflows the weight's dtype.
    """
    if not weight.is_floating_point() or weight.dim() != 2:
        raise ModelError(
            f"{path} is not a float matrix (quantised base?): run the adapter live, or load in a float dtype"
        )
    if not (update.is_finite() if isinstance(update, LowRank) else bool(torch.isfinite(update).all())):
        raise ModelError(f"the update of {path} holds NaN or infinity: nothing was fused")
    update = update.to(device=weight.device, dtype=torch.float32)
    dense = update.dense() if isinstance(update, LowRank) else update  # (out, in)
    fused = (weight.float() + (dense.T if transposed else dense)).to(weight.dtype)
    if not torch.isfinite(fused).all():
        raise ModelError(f"the fused weight of {path} overflows {weight.dtype}: nothing was fused")
    return fused


@torch.no_grad()
def fuse_whole(model: nn.Module, adapter: Adapter) -> None:
    """Fuse the updates for good, and put the adapter's heads into the model's own, in the model's dtype."""
    for path, head in adapter.heads.items():
        _check_head_fits(model, path, head)
    fuse(model, adapter)
    for path, head in adapter.heads.items():
        model.get_submodule(path).load_state_dict(dict(head))


@torch.no_grad()
def unfuse(model: nn.Module, pristine: Mapping[str, Tensor]) -> None:
    """Put the pristine weights back, bit for bit: copied, never subtracted."""
    for path, weight in pristine.items():
        model.get_submodule(path).weight.copy_(weight)  # type: ignore[operator, union-attr]


def find_targets(model: nn.Module, targets: str | Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Paths of the linear modules that `targets` names: suffixes, full paths, or one regex over whole paths.

    `exclude` are modules whose insides are no targets (heads, output embedding). Raises TargetError, with near names,
    if an entry matches nothing or matches something that is not linear.
    """
    entries = [targets] if isinstance(targets, str) else list(targets)
    if not entries:
        raise TargetError("adapter.targets is empty: name modules, or a preset (standard, extended, all-linear)")
    bases = [f"{path}.base" for path, module in model.named_modules() if isinstance(module, LoraLinear)]
    paths = [path for path, _ in model.named_modules() if path and not _inside(path, (*exclude, *bases))]
    found: dict[str, None] = {}
    for entry in entries:
        matches = [path for path in paths if _matches(path, entry)]
        linear = [path for path in matches if features(model.get_submodule(path)) is not None]
        if not linear:
            raise TargetError(_no_match(model, entry, matches, exclude))
        found |= dict.fromkeys(linear)
    return [path for path in paths if path in found]


def linear_modules(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Path -> (out, in) of every linear module outside `exclude`."""
    shapes = {path: features(module) for path, module in model.named_modules() if not _inside(path, exclude)}
    return {path: shape for path, shape in shapes.items() if shape is not None and not path.endswith(".base")}


@dataclass(frozen=True)
class Placement:
    """How a base model keeps the weight of a linear module, live and in its checkpoint."""

    shape: tuple[int, int]  # (out, in)
    transposed: bool  # kept as (in, out), as GPT-2's Conv1D does
    keys: tuple[str, ...]  # the names that a checkpoint may give the weight
    tied_to: str | None = None  # another parameter that is the same tensor


def placements(model: nn.Module, prefix: str = "") -> dict[str, Placement]:
    """Of every linear module, by its path. A checkpoint of the body alone has its keys without the body's `prefix`."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    placed = {}
    for path, shape in linear_modules(model).items():
        module = model.get_submodule(path)
        weight = f"{path}.weight"
        others = [name for name in names.get(id(module.weight), []) if name != weight]
        bare = weight.removeprefix(f"{prefix}.")
        keys = (weight, bare if bare != weight else f"{prefix}.{weight}") if prefix else (weight,)
        placed[path] = Placement(shape, is_transposed(module), keys, others[0] if others else None)
    return placed


def _matches(path: str, entry: str) -> bool:
    if path == entry or path.endswith("." + entry):
        return True
    try:
        return re.fullmatch(entry, path) is not None
    except re.error as error:
        raise TargetError(f"adapter.targets={entry!r} is neither a module name nor a regex: {error}") from None


def _no_match(model: nn.Module, entry: str, matches: Sequence[str], exclude: Sequence[str]) -> str:
    if matches:
        kind = type(model.get_submodule(matches[0])).__name__
        return f"adapter.targets={entry!r} matches {matches[0]}, a {kind}: only linear modules are adapted"
    names = sorted({path.rpartition(".")[2] for path in linear_modules(model, exclude)})
    near = plugins.nearest(entry.rpartition(".")[2], names) or names
    return f"adapter.targets={entry!r} matches no module of the model: the nearest linear ones are {', '.join(near)}"


def _inside(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def check_fits(model: nn.Module, path: str, update: LowRank | Tensor) -> None:
    try:
        shape = features(model.get_submodule(path))
    except AttributeError:
        raise AdapterFormatError(f"the adapter updates {path!r}, which the model does not have") from None
    if shape != tuple(update.shape):
        raise AdapterFormatError(
            f"the adapter updates {path} as {tuple(update.shape)}, and the model has {shape} there"
        )


def _check_head_fits(model: nn.Module, path: str, head: Mapping[str, Tensor]) -> None:
    try:
        own = _state(model.get_submodule(path))
    except AttributeError:
        raise AdapterFormatError(f"the adapter has a head {path!r}, which the model does not have") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    given = {name: tuple(tensor.shape) for name, tensor in head.items()}
    if shapes != given:
        raise AdapterFormatError(f"the adapter's head {path} has {given}, and the model's {shapes}")


def _live_head(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A trainable fp32 copy of a head holding `values`; it takes inputs of any float dtype."""
    head = copy.deepcopy(module).float()
    head.load_state_dict({name: tensor.float() for name, tensor in values.items()})
    head.requires_grad_(True)
    if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
        head.register_forward_pre_hook(_inputs_as_float32)
    return head


def _inputs_as_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.float() if isinstance(each, Tensor) and each.is_floating_point() else each for each in inputs)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().float().clone() for name, tensor in module.state_dict().items()}


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
