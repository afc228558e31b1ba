"""What a run would need, found without weights: the model is built on the meta device, its tensors counted there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorica import models
from lorica.adapters import injection
from lorica.adapters import prefix as prefixes
from lorica.adapters.prefix import Prefix
from lorica.errors import ModelError
from lorica.models import Base, Kind
from lorica.optim.streamed import CHUNK_ELSEWHERE

Made = TypeVar("Made")
Trained = Literal["adapter", "full", "prefix"]
STATES = {"adamw": 2, "momentum": 1, "sgd": 0}  # numbers kept for each trainable one
HELD_BY_SPSA = 3  # numbers for each trainable one while a probe runs: a direction's, its own, and the probe's


@dataclass(frozen=True)
class Way:
    """One way to train, in bytes: weights with what is trained, what is kept from step to step, peak of a step's work.

    Gradients are alive at the peak, so they are in it. Zeroth order keeps nothing, and holds some vectors of what it
    trains while a probe runs: `state_bytes` is those.
    """

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
    num_prefix: int
    ways: tuple[Way, ...]
    without: str | None = None  # why the base takes no prefix


def plan(
    name: str,
    *,
    dtype: str,
    targets: str | Sequence[str],
    rank: int,
    optimizer: str,
    batch_size: int,
    length: int,
    num_prefix: int = 5,
    reparameterize: bool | None = None,
    kinds: Collection[Trained] = ("adapter", "full", "prefix"),
    kind: Kind | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """The memory of backprop and zeroth order through each of `kinds`, at one batch of `length` tokens.

    Nothing is loaded or computed: a forward and a backward pass run on the meta device, where the sizes of the tensors
    alive at once are added up. Kernels' own workspaces and the allocator's rounding are not counted. A prefix is made
    by a network under backprop alone, unless `reparameterize` says; a base that takes none is told, not refused.
    Zeroth order is SPSA along one direction, one probe in a pass.
    """
    base = models.on_meta(name, kind=kind, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    num_parameters = _count(base.model.parameters())
    inputs = _inputs(base, batch_size, length)
    paths = models.target_modules(base, targets)
    full = _full_tuning(base, inputs, optimizer) if "full" in kinds else []
    prefix, without = _prefix_tuning(base, inputs, optimizer, num_prefix, reparameterize, "prefix" in kinds)
    adapter = _adapter_ways(base, paths, rank, inputs, optimizer) if "adapter" in kinds else []
    return Plan(
        *(name, dtype, num_parameters, batch_size, length, rank, len(paths), num_prefix),
        ways=(*adapter, *full, *prefix),
        without=without,
    )


def _inputs(base: Base, batch_size: int, length: int) -> dict[str, Any]:
    tokens = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": tokens}
    if base.kind == "seq2seq":
        inputs["decoder_input_ids"] = tokens[:, :1]
    if base.kind == "causal":
        inputs |= {"logits_to_keep": 1, "use_cache": False}
    return inputs


def _adapter_ways(base: Base, paths: Sequence[str], rank: int, inputs: Mapping[str, Any], optimizer: str) -> list[Way]:
    with torch.device("meta"):
        adapter = injection.create(base.model, paths, rank=rank, alpha=1.0, heads=base.heads)
    live = injection.inject(base.model, adapter)
    trainable = _count(live.trainable().values())
    weights = _bytes(base.model.parameters())
    by_backprop, by_spsa = (_peak_of_pass(base, inputs, backward) for backward in (True, False))
    return [
        Way("adapter, backprop", trainable, weights, 4 * trainable * STATES[optimizer], by_backprop),
        Way("adapter, spsa", trainable, weights, 4 * trainable * HELD_BY_SPSA, by_spsa),
    ]


def _full_tuning(base: Base, inputs: Mapping[str, Any], optimizer: str) -> list[Way]:
    base.model.requires_grad_(True)
    trainable, weights = _count(base.model.parameters()), _bytes(base.model.parameters())
    by_backprop = _peak_of_pass(base, inputs, backward=True)
    base.model.requires_grad_(False)
    with _MadeByRows():
        by_spsa = _peak_of_pass(base, inputs, backward=False)
    return [
        Way("full, backprop", trainable, weights, weights * STATES[optimizer], by_backprop),
        Way("full, spsa", trainable, weights, 0, by_spsa),
    ]


def _prefix_tuning(
    base: Base, inputs: Mapping[str, Any], optimizer: str, num_tokens: int, reparameterize: bool | None, asked: bool
) -> tuple[list[Way], str | None]:
    """The ways, or why there are none."""
    if not asked:
        return [], None
    try:
        values = made(lambda: models.past(base, torch.zeros(num_tokens, dtype=torch.long)))
    except ModelError as error:
        return [], str(error)
    inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    ways = []
    for name, backward in (("prefix, backprop", True), ("prefix, spsa", False)):
        by_network = backward if reparameterize is None else reparameterize
        with torch.device("meta"):
            live = prefixes.lay_on(base.model, Prefix(values), partial(models.cache, base), reparameterize=by_network)
        trainable = _count(live.module.parameters())
        weights = _bytes(base.model.parameters()) + _bytes(live.module.buffers())
        held = STATES[optimizer] if backward else HELD_BY_SPSA
        ways.append(Way(name, trainable, weights, 4 * trainable * held, _peak_of_pass(base, inputs, backward)))
        prefixes.remove(live)
    return ways, None


def _peak_of_pass(base: Base, inputs: Mapping[str, Any], backward: bool) -> int:
    """The most bytes alive in a pass, the gradients of what is trained among them; they are dropped at the end.

    Raises ModelError for a model that cannot be run without numbers.
    """
    try:
        with models.quiet(), _FusedAttention():
            peak = peak_bytes(lambda: _pass(base.model, inputs, backward))
    except NotImplementedError as error:
        reason = str(error).partition(": ")[0]
        raise ModelError(
            f"{base.name} as a {base.kind} model cannot be planned: its pass asks for numbers ({reason})"
        ) from None
    for parameter in base.model.parameters():
        parameter.grad = None
    return peak


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


class _MadeByRows(TorchFunctionMode):
    """Beside every operation that is handed a parameter, what `optim.streamed` makes for it: some of its rows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = [_bytes_drawn(each, CHUNK_ELSEWHERE) for each in args if isinstance(each, nn.Parameter)]
        if func is F.embedding:
            tokens, weight = args[:2]
            drawn = [_bytes_drawn(weight, tokens.numel() * weight.shape[1])]
        held = [torch.empty(size, dtype=torch.uint8, device="meta") for size in drawn]
        found = func(*args, **(kwargs or {}))
        del held
        return found


def _bytes_drawn(parameter: Tensor, most: int) -> int:
    """Of the signs of so many numbers: float32, a row in steps of 256, and the 32 bits by which 8 are looked up."""
    width = parameter.numel() if parameter.dim() < 2 else parameter.numel() // len(parameter)
    num_rows = max(1, min(most, parameter.numel()) // width)
    return num_rows * -(-width // 256) * 256 * (4 * 8 + 4) // 8


class _FusedAttention(TorchFunctionMode):
    """Attention by a fused kernel, as every device has it; the meta device alone would hold all scores at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> Tensor:
    mask = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=query.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=mask)[0]
    return found


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
