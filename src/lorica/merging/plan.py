"""What a merge will read, hold, take, lose and write, before anything runs.

It is told by the adapters' configs and headers, and by what the method makes of small stand-ins (see `rehearsal`). What
a compression will lose is in no header: for that a few modules are read and merged.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorica.adapters.adapter import Adapter, MergeMode, aligned
from lorica.adapters.compression import Spectrum, rank_for_energy
from lorica.adapters.outline import Outline, outline
from lorica.errors import ConfigError
from lorica.merging import cost
from lorica.merging.coefficients import LambdaPolicy
from lorica.merging.coordinates import BLOCK_ENTRIES
from lorica.merging.cost import Work
from lorica.merging.merge import BUDGET_SLACK, Grams, Merge, Size, Weights, prepare
from lorica.merging.method import Method
from lorica.merging.parallel import default_num_workers
from lorica.merging.rehearsal import Outcome, ranks_at, rehearse, spectra
from lorica.merging.transform import Transform

NUM_SAMPLED = 8
BASES_OF_SURVEY = 3  # a threshold over all modules is counted, bracketed and picked, each from new bases
NUM_BUFFERS = 6  # an elementwise rule's block of each adapter, what it makes of it, and its votes


@dataclass(frozen=True)
class Source:
    """One adapter's weights, as they will be read."""

    name: str
    file: str
    num_bytes: int
    num_modules: int
    ranks: tuple[int, ...]  # nominal, each once


@dataclass(frozen=True)
class Planned:
    """One module of the merge."""

    path: str
    shape: tuple[int, int]  # (out, in)
    ranks: tuple[int, ...]  # of each adapter; 0 where it has no such module
    full_rank: int | None  # of what the method makes, at most; None: dense
    rank: int | None  # of what is kept of that; None: dense
    is_concatenation: bool  # of the adapters' factors, with nothing to compute

    @property
    def num_bytes(self) -> int:
        """Of what is kept, in float32."""
        return _num_bytes(self.shape, self.rank)


@dataclass(frozen=True)
class Memory:
    """At the peak: the files, mapped; the work of all workers at the largest modules; and the merged updates."""

    inputs_bytes: int
    work_bytes: int
    kept_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.inputs_bytes + self.work_bytes + self.kept_bytes


@dataclass(frozen=True)
class MergePlan:
    """A merge by what it costs."""

    method: str
    sources: tuple[Source, ...]
    modules: tuple[Planned, ...]
    dropped: tuple[str, ...]  # modules that not every adapter has, under merge_mode=common
    needs: tuple[str, ...]  # beside the adapters
    ranks_are_exact: bool  # an energy or a rank budget gives ranks that only all singular values tell
    error: float | None  # ‖kept - made‖ / ‖made‖ over the sampled modules; None: dense, only the merge tells
    num_sampled: int  # modules that were merged to tell the error and inexact ranks
    memory: Memory
    num_workers: int
    seconds: float  # of work, with the files in the page cache; the disk's time is not in it
    written_bytes: int  # of the merged updates, without heads and headers

    @property
    def read_bytes(self) -> int:
        return sum(each.num_bytes for each in self.sources)

    def as_record(self) -> dict[str, Any]:
        return asdict(self) | {"read_bytes": self.read_bytes, "peak_bytes": self.memory.total_bytes}


def plan(
    folders: Mapping[str, Path],
    method: Method,
    *,
    mode: MergeMode = "common",
    weights: Weights | None = None,
    transforms: Sequence[Transform] = (),
    policy: LambdaPolicy | None = None,
    size: Size | None = None,
    as_factors: bool = False,
    num_workers: int | None = None,
    force: bool = False,
) -> MergePlan:
    """The plan of what `prepare` would settle with these arguments, of the PEFT folders by their adapters' names.

    Raises what reading the folders and `prepare` would raise, but for NaN and infinity: the numbers are not read.
    """

    def settle(adapters: Mapping[str, Adapter], grams: Grams) -> Merge:
        settings: dict[str, Any] = {"weights": weights, "transforms": transforms, "policy": policy, "force": force}
        return prepare(adapters, method, mode=mode, grams=grams, num_workers=workers, **settings)

    if not folders:
        raise ConfigError("no adapters to merge: name at least one")
    size, workers = size or Size(), default_num_workers() if num_workers is None else num_workers
    outlines = {name: outline(folder) for name, folder in folders.items()}
    cut, dropped = aligned([each.adapter for each in outlines.values()], mode)
    adapters = dict(zip(outlines, cut, strict=True))
    paths = list(dict.fromkeys(path for each in cut for path in each.updates))
    outcomes = zip(paths, rehearse(paths, adapters, settle, method.needs_grams), strict=True)
    told = [_planned(path, adapters, outcome, size, as_factors, len(paths)) for path, outcome in outcomes]
    sampled = [] if method.needs_grams else _sampled(told, size)
    found = spectra([each.path for each in sampled], outlines, adapters, settle) if sampled else []
    kept = _kept(found, size, len(found) / max(1, len(told)))
    modules = _informed(told, sampled, kept, size)
    surveys = [each.name for each in transforms if each.survey] + ([method.name] if method.survey else [])
    return MergePlan(
        method=method.name,
        sources=tuple(_source(name, each) for name, each in outlines.items()),
        modules=tuple(modules),
        dropped=tuple(dropped),
        needs=_needs(method, surveys),
        ranks_are_exact=size.energy is None and size.rank_budget is None,
        error=_error(modules, found, kept),
        num_sampled=len(sampled),
        memory=_memory(modules, outlines, size, workers),
        num_workers=workers,
        seconds=_seconds(modules, outlines, size, len(surveys), workers),
        written_bytes=sum(each.num_bytes for each in modules),
    )


def _source(name: str, found: Outline) -> Source:
    updates = found.adapter.updates
    ranks = tuple(sorted({each.rank for each in updates.values()}))
    return Source(name, str(found.contents.path), found.num_bytes, len(updates), ranks)


def _planned(
    path: str, adapters: Mapping[str, Adapter], outcome: Outcome, size: Size, as_factors: bool, num_modules: int
) -> Planned:
    """The module as far as headers tell: of an energy its upper bound, of a budget an even share."""
    shape = next(each.updates[path].shape for each in adapters.values() if path in each.updates)
    ranks = ranks_at(path, adapters)
    if size.rank is not None:
        wanted: int | None = size.rank
    elif size.rank_budget is not None:
        wanted = -(-size.rank_budget // num_modules)
    elif size.energy is not None:
        wanted = min(shape)
    else:
        wanted = sum(ranks) if outcome.rank is None and as_factors else None
    if wanted is None:
        return Planned(path, shape, ranks, outcome.rank, outcome.rank, outcome.is_concatenation)
    most = min(shape) if outcome.rank is None else min(outcome.rank, *shape)
    return Planned(path, shape, ranks, outcome.rank, min(wanted, most), outcome.is_concatenation)


def _sampled(modules: Sequence[Planned], size: Size) -> list[Planned]:
    """The modules to look into, evenly chosen, where factors are cut; dense ones are too dear to try."""
    if all(each.rank == each.full_rank for each in modules) and size.energy is None:
        return []
    exact = [each for each in modules if each.full_rank is not None]
    number = min(NUM_SAMPLED, len(exact))
    return [exact[(2 * index + 1) * len(exact) // (2 * number)] for index in range(number)]


def _kept(found: Sequence[Spectrum], size: Size, share: float) -> list[int]:
    """The rank that each of these modules would keep, given that they are this share of all of them."""
    if size.energy is not None:
        return [rank_for_energy(each.sigma, size.energy) for each in found]
    if size.rank_budget is None:
        return [min(size.rank or 0, len(each.sigma)) for each in found]
    ranks = [0] * len(found)
    values = ((float(value), at) for at, each in enumerate(found) for value in each.sigma)
    for _, at in heapq.nlargest(round(size.rank_budget * share), values):
        ranks[at] += 1
    return ranks


def _informed(modules: Sequence[Planned], sampled: Sequence[Planned], kept: Sequence[int], size: Size) -> list[Planned]:
    """The modules with the ranks that the sampled ones have shown, where headers do not tell them."""
    if size.rank is not None or not sampled:
        return list(modules)
    own = {each.path: rank for each, rank in zip(sampled, kept, strict=True)}
    share = sum(kept) / sum(each.full_rank or 0 for each in sampled)
    return [
        replace(each, rank=own.get(each.path, round(share * each.full_rank))) if each.full_rank is not None else each
        for each in modules
    ]


def _error(modules: Sequence[Planned], found: Sequence[Spectrum], kept: Sequence[int]) -> float | None:
    if found:
        total = math.fsum(each.norm**2 for each in found)
        lost = math.fsum((each.error(rank) * each.norm) ** 2 for each, rank in zip(found, kept, strict=True))
        return (lost / total) ** 0.5 if total > 0 else 0.0
    return 0.0 if all(each.rank == each.full_rank for each in modules) else None


def _needs(method: Method, surveys: Sequence[str]) -> tuple[str, ...]:
    calibration = ["the inputs of every module under each adapter, from its task's data"] if method.needs_grams else []
    return (*calibration, *(f"a look at all modules before the first, for {name}" for name in surveys))


def _memory(modules: Sequence[Planned], outlines: Mapping[str, Outline], size: Size, num_workers: int) -> Memory:
    kept = [each.num_bytes for each in modules]
    if size.rank_budget is not None:  # what is no concatenation waits, decomposed, for the last singular value
        cap = BUDGET_SLACK * -(-size.rank_budget // len(modules))
        waiting = [each for each in modules if not each.is_concatenation]
        kept += [_num_bytes(each.shape, min(each.full_rank or cap, *each.shape)) for each in waiting]
    largest = heapq.nlargest(num_workers, (_working_bytes(each) for each in modules))
    return Memory(sum(each.num_bytes for each in outlines.values()), sum(largest), sum(kept))


def _working_bytes(module: Planned) -> int:
    """The inputs in float32 and what is made of them; a rule's and a Krylov space's blocks, or factors in float64.

    A method that is no concatenation is taken to see each adapter in the basis of all, as knots does.
    """
    inputs, made = _num_bytes(module.shape, sum(module.ranks)), _num_bytes(module.shape, module.full_rank)
    if module.full_rank is None:
        block = 4 * min(BLOCK_ENTRIES, math.prod(module.shape))
        krylov = 0 if module.rank is None else cost.krylov_width(module.shape, module.rank)
        return inputs + made + NUM_BUFFERS * (len(module.ranks) * block + 4 * krylov * max(module.shape))
    num_doubles = (0 if module.is_concatenation else len(module.ranks)) + (module.rank != module.full_rank)
    return inputs + made + num_doubles * 2 * inputs


def _seconds(
    modules: Sequence[Planned],
    outlines: Mapping[str, Outline],
    size: Size,
    num_surveys: int,
    num_workers: int,
) -> float:
    """Each module's work over the workers, and every byte of the files looked at and written."""
    works = [_work(each, size, num_surveys) for each in modules]
    moved = sum(each.num_bytes for each in outlines.values()) + sum(each.num_bytes for each in modules)
    speed = cost.calibrate()
    merging = speed.seconds(sum(works, Work())) / max(1, min(num_workers, len(modules)))
    return merging + speed.seconds(Work(copied_bytes=2 * moved))


def _work(module: Planned, size: Size, num_surveys: int) -> Work:
    shape, input_rank = module.shape, sum(module.ranks)
    work = cost.concatenating(shape, input_rank)
    if module.full_rank is None:
        work += cost.electing(shape, input_rank, len(module.ranks), num_passes=1 + num_surveys)
        if module.rank is not None:
            work += cost.compressing_dense(shape, None if size.energy is not None else module.rank)
        return work
    if not module.is_concatenation:
        work += cost.sharing_bases(shape, input_rank, len(module.ranks), 1 + BASES_OF_SURVEY * num_surveys)
    if module.rank != module.full_rank or size.energy is not None:
        work += cost.compressing(shape, module.full_rank, module.rank or 0)
    return work


def _num_bytes(shape: tuple[int, int], rank: int | None) -> int:
    """Of a float32 update: dense, or in factors."""
    return 4 * (math.prod(shape) if rank is None else rank * sum(shape))
