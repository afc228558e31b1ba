"""Adapters to one: align, transform, weigh, merge, compress, one module at a time.

Nothing is computed before it is asked for: a `Merge` knows how to make the merged update of any module. Making all of
them holds the inputs, the modules under work, and what the caller keeps.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter, MergeMode, aligned
from lorica.adapters.compression import Spectrum, dense_spectrum, rank_for_energy, spectrum
from lorica.adapters.delta import LowRank, zero
from lorica.errors import AdapterFormatError, ConfigError
from lorica.merging import method as methods
from lorica.merging.coefficients import LambdaPolicy, adapter_weights
from lorica.merging.linear import combination
from lorica.merging.method import Method, Module, Site, Update, check_equal_ranks
from lorica.merging.parallel import default_num_workers, ordered_map
from lorica.merging.transform import Transform

Result = TypeVar("Result")
Weights = Mapping[str, float] | Sequence[float]
Grams = Mapping[str, tuple[Tensor, ...]]  # module path -> (in, in) of each adapter
BUDGET_SLACK = 4  # of a dense update so many times the mean rank are looked at


@dataclass(frozen=True)
class Size:
    """How large a merged adapter may be: the rank of each module, a share of its energy, or Σ ranks of all modules."""

    rank: int | None = None
    energy: float | None = None
    rank_budget: int | None = None

    def __post_init__(self) -> None:
        given = [f"{name}={value}" for name, value in dataclasses.asdict(self).items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)}: a merge is compressed in one way, drop one")


WHOLE = Size()


@dataclass(frozen=True)
class Merged:
    """The merged update of one module, and how far it is from what the method made."""

    path: str
    update: Update
    full_rank: int | None  # of what the method made; None where that is dense
    error: float = 0.0  # ‖kept - made‖ / ‖made‖
    norm: float | None = None  # ‖made‖, known where it was compressed
    distance: float | None = None  # from the method that this one approximates, relative to that one's norm

    def as_record(self) -> dict[str, Any]:
        return {
            "rank": self.update.rank if isinstance(self.update, LowRank) else None,
            "full_rank": self.full_rank,
            "error": self.error,
            "norm": self.norm,
            "distance": self.distance,
        }


@dataclass(frozen=True)
class Merge:
    """A merge that is settled and not yet computed."""

    names: tuple[str, ...]
    adapters: Sequence[Adapter]
    method: Method
    paths: tuple[str, ...]
    dropped: tuple[str, ...]  # modules that not every adapter has, under merge_mode=common
    weights: tuple[float, ...]
    policy: LambdaPolicy | None = None
    size: Size = WHOLE
    grams: Grams = field(default_factory=dict)
    num_workers: int = 1
    as_factors: bool = False  # cut what is dense to Σ r_i where no size is given
    transforms: tuple[tuple[Transform, Any], ...] = ()  # each with what its survey found
    found: Any = None  # by the method's survey

    def module(self, path: str) -> Merged:
        """The merged update of one module at the size asked for, but for a rank budget, which concerns all of them."""
        made = self._made(self.inputs(path))
        rank = self.size.rank
        if self.size == WHOLE and self.as_factors and made.full_rank is None:
            rank = sum(self.ranks(path).values())
        if rank is None and self.size.energy is None:
            return made
        return _cut(made, _spectrum(made.update, rank), rank, self.size.energy)

    def modules(self) -> Iterator[Merged]:
        """All of them in order, several computed at a time, each by one thread."""
        if self.size.rank_budget is not None:
            return self._within_budget(self.size.rank_budget)
        return ordered_map(self.module, self.paths, self.num_workers)

    def map(self, function: Callable[[Module], Result]) -> list[Result]:
        """`function` of what the method sees of each module."""
        return list(ordered_map(lambda path: function(self.inputs(path)), self.paths, self.num_workers))

    def surveyed(self) -> Merge:
        """The same, behind the looks at all modules that its transforms and its method need before the first."""
        merge = dataclasses.replace(self, transforms=())
        for transform, _ in self.transforms:
            behind = (*merge.transforms, (transform, transform.surveyed(merge)))
            merge = dataclasses.replace(merge, transforms=behind)
        return dataclasses.replace(merge, found=self.method.surveyed(merge))

    def shape(self, path: str) -> tuple[int, int]:
        """(out, in) of a module."""
        return next(each.updates[path].shape for each in self.adapters if path in each.updates)

    def ranks(self, path: str) -> dict[str, int]:
        """Adapter -> rank of its update of a module; 0 where it has no such module."""
        pairs = zip(self.names, self.adapters, strict=True)
        return {name: each.updates[path].rank if path in each.updates else 0 for name, each in pairs}

    def inputs(self, path: str) -> Module:
        """What the method sees of a module: every adapter's update there, behind the transforms."""
        shape = self.shape(path)
        updates: list[Update] = [
            each.updates[path].to(torch.float32) if path in each.updates else zero(shape) for each in self.adapters
        ]
        grams = self.grams.get(path, ())
        for transform, found in self.transforms:
            updates = transform(Module(Site(path, self.names, found, grams), updates, self.weights))
        return Module(Site(path, self.names, self.found, grams), updates, self.weights)

    def _made(self, module: Module) -> Merged:
        path = module.site.path
        overrides = {} if self.policy is None else {"lambda_": self.policy.at(path)}
        update = self.method(module, **overrides)
        rank = update.rank if isinstance(update, LowRank) else None
        return Merged(path, update, rank, distance=self._distance(module, update, overrides))

    def _distance(self, module: Module, update: Update, overrides: Mapping[str, Any]) -> float | None:
        """‖made - reference‖ / ‖reference‖, for a method that approximates another."""
        if self.method.approximates is None:
            return None
        exact = methods.load(self.method.approximates, {}, len(self.names))
        reference = exact.merge(module.updates, module.weights, module.site, **{**self.method.options, **overrides})
        norm = _norm(reference)
        return _norm(combination([update, reference], [1, -1])) / norm if norm > 0 else 0.0

    def _within_budget(self, budget: int) -> Iterator[Merged]:
        """The `budget` largest singular values of all modules together are kept: looked for first, then cut to.

        Nothing waits between the two looks but what took work: a concatenation of factors is made again.
        """
        cap = BUDGET_SLACK * -(-budget // len(self.paths))

        def looked_at(path: str) -> tuple[Tensor, Callable[[int], Merged]]:
            module = self.inputs(path)
            made = self._made(module)
            found = _spectrum(made.update, cap)
            if _is_concatenation(made.update, module.updates):
                return found.sigma, partial(again, path)
            return found.sigma, partial(_cut, dataclasses.replace(made, update=zero(self.shape(path))), found)

        def again(path: str, rank: int) -> Merged:
            made = self._made(self.inputs(path))
            return _cut(made, _spectrum(made.update, cap), rank)

        looks = list(ordered_map(looked_at, self.paths, self.num_workers))
        largest = heapq.nlargest(budget, ((float(value), at) for at, (sigma, _) in enumerate(looks) for value in sigma))
        ranks = [0] * len(looks)
        for _, at in largest:
            ranks[at] += 1
        cuts = [partial(cut, rank) for (_, cut), rank in zip(looks, ranks, strict=True)]
        return ordered_map(lambda cut: cut(), cuts, self.num_workers)


def prepare(
    adapters: Mapping[str, Adapter],
    method: Method,
    *,
    mode: MergeMode = "common",
    weights: Weights | None = None,
    transforms: Sequence[Transform] = (),
    policy: LambdaPolicy | None = None,
    size: Size | None = None,
    grams: Grams | None = None,
    as_factors: bool = False,
    num_workers: int | None = None,
    force: bool = False,
    survey: bool = True,
) -> Merge:
    """Check that the adapters can be merged so, and survey them where a transform or the method needs it.

    Without `survey` that is left to `Merge.surveyed`. Raises ShapeError (modules that do not fit `mode`, ranks that do
    not fit the method), ConfigError (weights or a policy that the method has no use for, a lambda out of its bounds,
    adapters of different bases unless `force`), AdapterFormatError (NaN or infinity).
    """
    _check(adapters, method, weights, policy, force)
    cut, dropped = aligned(list(adapters.values()), mode)
    names = tuple(adapters)
    merge = Merge(
        names=names,
        adapters=cut,
        method=method,
        paths=tuple(dict.fromkeys(path for adapter in cut for path in adapter.updates)),
        dropped=tuple(dropped),
        weights=tuple(adapter_weights(weights, names)),
        policy=policy,
        size=size or WHOLE,
        grams=grams or {},
        as_factors=as_factors,
        num_workers=default_num_workers() if num_workers is None else num_workers,
        transforms=tuple((each, None) for each in transforms),
    )
    if policy is not None:
        policy.check_layers(merge.paths)
    if method.equal_ranks:
        for path in merge.paths:
            check_equal_ranks(method.name, method.approximates, path, merge.ranks(path))
    return merge.surveyed() if survey else merge


def total_error(modules: Sequence[tuple[float, float]]) -> float:
    """‖kept - made‖ / ‖made‖ over all modules together, from each one's (error, norm)."""
    total = math.fsum(norm**2 for _, norm in modules)
    lost = math.fsum((error * norm) ** 2 for error, norm in modules)
    return (lost / total) ** 0.5 if total > 0 else 0.0


def _check(
    adapters: Mapping[str, Adapter],
    method: Method,
    weights: Weights | None,
    policy: LambdaPolicy | None,
    force: bool,
) -> None:
    if not adapters:
        raise ConfigError("no adapters to merge: name at least one")
    bases = {adapter.base_model: name for name, adapter in adapters.items() if adapter.base_model}
    if len(bases) > 1 and not force:
        said = ", ".join(f"{name} of {base}" for base, name in bases.items())
        raise ConfigError(f"the adapters are of different base models: {said}; force=true merges them all the same")
    for name, adapter in adapters.items():
        if not adapter.is_finite():
            raise AdapterFormatError(f"adapter {name} holds NaN or infinity")
    if weights is not None and not method.uses_weights:
        raise ConfigError(f"method {method.name} has no use for weights: drop them, or take weighted_delta_n")
    if policy is not None:
        policy.check_values(method)


def _norm(update: Update) -> float:
    return update.norm() if isinstance(update, LowRank) else float(torch.linalg.vector_norm(update))


def _spectrum(update: Update, rank: int | None) -> Spectrum:
    return spectrum(update) if isinstance(update, LowRank) else dense_spectrum(update, rank)


def _is_concatenation(update: Update, inputs: Sequence[Update]) -> bool:
    """Whether an update is its inputs' factors, B scaled: there was nothing to compute."""
    if not isinstance(update, LowRank):
        return False
    factors = [each.A for each in inputs if isinstance(each, LowRank)]
    return len(factors) == len(inputs) and torch.equal(update.A, torch.cat(factors))


def _cut(made: Merged, found: Spectrum, rank: int | None, energy: float | None = None) -> Merged:
    k = rank_for_energy(found.sigma, energy) if energy is not None else min(rank or 0, len(found.sigma))
    cut = found.truncated(k)
    return Merged(made.path, cut, made.full_rank, found.error(k), found.norm, made.distance)
