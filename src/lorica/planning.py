"""What a run would need, found without weights: the model is built on the meta device, its tensors counted there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorica import models
from lorica.adapters import injection
from lorica.models import Base, Kind

Made = TypeVar("Made")
STATES = {"adamw": 2, "momentum": 1, "sgd": 0}  # numbers kept for each trainable one, beside its gradient


@dataclass(frozen=True)
class Way:
    """One way to train, in bytes: weights with the adapter, gradients and optimizer state, peak of a step's work."""

    name: str
    num_trainable: int
    weights_bytes: int
    state_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.state_bytes + self.activations_bytes


@dataclass(frozen=True)
class Plan:
    """What training this model would take, for each way."""

    model: str
    dtype: str
    num_parameters: int
    batch_size: int
    length: int
    rank: int
    num_targets: int
    ways: tuple[Way, ...]


def plan(
    name: str,
    *,
    dtype: str,
    targets: str | Sequence[str],
    rank: int,
    optimizer: str,
    batch_size: int,
    length: int,
    kind: Kind | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """The memory of backprop and zeroth order through an adapter, and of full tuning, at one batch of `length` tokens.

    Nothing is loaded or computed: a forward and a backward pass run on the meta device, where the sizes of the tensors
    alive at once are added up. Kernels' own workspaces and the allocator's rounding are not counted.
    """
    base = models.on_meta(name, kind=kind, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    num_parameters = _count(base.model.parameters())
    inputs = _inputs(base, batch_size, length)
    full = _full_tuning(base, inputs, optimizer)
    paths = models.target_modules(base, targets)
    with torch.device("meta"):
        adapter = injection.create(base.model, paths, rank=rank, alpha=1.0, heads=base.heads)
    live = injection.inject(base.model, adapter)
    ways = (*_adapter_ways(base, live, inputs, optimizer), full)
    return Plan(name, dtype, num_parameters, batch_size, length, rank, len(paths), ways)


def _inputs(base: Base, batch_size: int, length: int) -> dict[str, Any]:
    tokens = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": tokens}
    if base.kind == "seq2seq":
        inputs["decoder_input_ids"] = tokens[:, :1]
    if base.kind == "causal":
        inputs |= {"logits_to_keep": 1, "use_cache": False}
    return inputs


def _adapter_ways(base: Base, live: injection.Live, inputs: Mapping[str, Any], optimizer: str) -> list[Way]:
    trainable = _count(live.trainable().values())
    weights = _bytes(base.model.parameters())
    ways = []
    for name, state, backward in (
        ("adapter, backprop", 4 * trainable * (1 + STATES[optimizer]), True),
        # spsa holds the gradient, one direction and the moved parameters
        ("adapter, spsa", 4 * trainable * 3, False),
    ):
        peak = peak_bytes(lambda backward=backward: _pass(base.model, inputs, backward))  # type: ignore[misc]
        ways.append(Way(name, trainable, weights, state, peak))
    return ways


def _full_tuning(base: Base, inputs: Mapping[str, Any], optimizer: str) -> Way:
    base.model.requires_grad_(True)
    weights = _bytes(base.model.parameters())
    peak = peak_bytes(lambda: _pass(base.model, inputs, backward=True))
    for parameter in base.model.parameters():
        parameter.grad = None
    # The gradients are alive at the peak, so they are in it; the optimizer's state comes on top.
    return Way("full, backprop", _count(base.model.parameters()), weights, weights * STATES[optimizer], peak)


def _pass(model: nn.Module, inputs: Mapping[str, Any], backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        logits = model(**inputs).logits
        if backward:
            logits.float().sum().backward()


def peak_bytes(work: Callable[[], None]) -> int:
    """The most bytes of tensors made by `work` that were alive at one moment, on any device."""
    with _AliveBytes() as alive:
        work()
    return int(alive.peak)


def made(work: Callable[[], Made]) -> Made:
    """What `work` makes on the meta device."""
    with models.quiet(), _AliveBytes():
        return work()


class _AliveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storage of every tensor that an operation returns, until the storage dies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # a model asks its input a yes-or-no question (is nothing padded? is nothing packed?)
        result = func(*args, **(kwargs or {}))
        inputs = {_key(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and _key(each) not in inputs:
                self._count(each.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
