"""`lorica inspect`: what adapters are made of, by themselves, booster by booster, and against each other."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lorica import files, models, results
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter, aligned
from lorica.adapters.delta import zero
from lorica.analysis.conflict import Pair, measure, pairs
from lorica.analysis.portrait import ModuleFigures, Portrait, portrait
from lorica.config import InspectConfig, ModelConfig
from lorica.config.contradictions import LOW_RANK
from lorica.errors import ConfigError, LoricaError
from lorica.merging.layers import layer_of
from lorica.runs.inspecting.states import FOLDER as STATES
from lorica.runs.inspecting.states import Stage, stages
from lorica.runs.sources import Place, locate
from lorica.runs.training.lora import factors
from lorica.training.ledger import Ledger

LEDGER = "ledger.jsonl"
JSON, CSV = "inspect.json", "inspect.csv"
NUM_CUMULATIVE = 32  # of a long chain: so many of its sums are measured, evenly spread, the last among them
ALL_LAYERS = "all"


@dataclass(frozen=True)
class Share:
    """How much of its base model an adapter trains; None, with the reason, where the base is not at hand."""

    num_trainable: int
    num_parameters: int | None = None  # of the base model
    reason: str | None = None

    @property
    def trainable_share(self) -> float | None:
        return None if self.num_parameters is None else self.num_trainable / self.num_parameters


@dataclass(frozen=True)
class BoosterFigures:
    """One round of a boosted run, and the chain up to it; the chain's figures are None where they were not measured."""

    round: int
    accepted: bool
    weight: float
    rank: int
    norm: float  # of what the round adds, its weight in it
    effective_rank: float  # mean over modules
    chain_rank: int
    chain_norm: float | None
    chain_effective_rank: float | None


@dataclass(frozen=True)
class Inspected:
    """One adapter."""

    name: str
    folder: str
    base_model: str | None
    portrait: Portrait
    share: Share
    boosters: tuple[BoosterFigures, ...] = ()


@dataclass(frozen=True)
class LayerPairs:
    """Every two adapters over the modules of one layer, or over all modules."""

    layer: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Inspection:
    """Adapters by themselves and between each other; `folder` is where the figures were saved, if they were."""

    adapters: tuple[Inspected, ...]
    layers: tuple[LayerPairs, ...]  # the first is over all modules; none of a single adapter
    stages: tuple[Stage, ...] = ()  # of a run whose representations were asked for
    folder: Path | None = None

    def as_record(self) -> dict[str, Any]:
        adapters = [asdict(each) for each in self.adapters]
        for line, each in zip(adapters, self.adapters, strict=True):
            line["share"]["trainable_share"] = each.share.trainable_share
        layers, moved = [asdict(each) for each in self.layers], [asdict(each) for each in self.stages]
        return {"adapters": adapters, "layers": layers, "stages": moved}

    def as_csv(self) -> str:
        """One line for each module of each adapter; singular values and energies are in the JSON alone."""
        columns = [each.name for each in fields(ModuleFigures) if each.name not in ("shape", "sigma", "energy")]
        written = io.StringIO()
        writer = csv.writer(written, lineterminator="\n")
        writer.writerow(["adapter", "out", "in", *columns])
        for each in self.adapters:
            for module in each.portrait.modules:
                writer.writerow([each.name, *module.shape, *(getattr(module, name) for name in columns)])
        return written.getvalue()


def inspect(words: Sequence[str], given: InspectConfig) -> Inspection:
    """Measure the adapters that `words` name (folders, runs, tasks of runs), and save the figures if asked to.

    Raises ConfigError for a run that left no low-rank adapter and no head, and without words.
    """
    if not words:
        raise ConfigError("nothing to inspect: lorica inspect RUN_OR_ADAPTER ... key=value")
    if given.output_dir is not None:
        results.check_free(given.output_dir)
    places = locate(words, Path(given.runs_dir))
    adapters = {place.name: _read(place) for place in places}
    if given.representations and (len(places) > 1 or places[0].run is None):
        raise ConfigError("representations=true looks at the stages of one run on its own task: name one run folder")
    single = tuple(_inspected(place, adapters[place.name], given.model) for place in places)
    found = Inspection(single, tuple(_between(adapters)))
    folder = files.claim_folder(Path(given.output_dir)) if given.output_dir is not None else None
    if given.representations:
        found = replace(found, stages=tuple(_stages(places[0], given, folder)))
    return found if folder is None else _saved(found, folder)


def _stages(place: Place, given: InspectConfig, folder: Path | None) -> list[Stage]:
    assert place.run is not None
    output = folder / STATES if folder is not None else None
    run = results.RunFolder(place.folder.parent)
    return stages(run, place.run, num_examples=given.num_examples, device=given.device, output=output)


def _saved(found: Inspection, folder: Path) -> Inspection:
    files.write_json(folder / JSON, found.as_record())
    files.write_atomic(folder / CSV, found.as_csv())
    return replace(found, folder=folder)


def _read(place: Place) -> Adapter:
    kind = place.run.adapter.kind if place.run else "lora"
    if kind not in (*LOW_RANK, "linear_probe"):
        raise ConfigError(
            f"{place.folder.parent} trained by adapter.kind={kind}, which leaves neither low-rank updates nor a head "
            "to inspect: name a run by lora, xgblora or linear_probe, or look at lorica evaluate"
        )
    return peft_format.read(place.folder)


def _inspected(place: Place, adapter: Adapter, model: ModelConfig | None) -> Inspected:
    return Inspected(
        name=place.name,
        folder=str(place.folder),
        base_model=adapter.base_model,
        portrait=portrait(adapter),
        share=_share(place, adapter, model),
        boosters=tuple(_boosters(place)),
    )


def _share(place: Place, adapter: Adapter, model: ModelConfig | None) -> Share:
    """What is trained over what there is; the base's own head, if it has one, is counted as the adapter has it."""
    drawn = sum(update.A.numel() for update in adapter.updates.values())
    count = adapter.num_parameters() - (drawn if place.run is not None and factors(place.run) == "B" else 0)
    named = model or (place.run.model if place.run else None)
    if named is None and not adapter.base_model:
        return Share(count, reason="the adapter does not name its base model: give model=NAME")
    named = named or ModelConfig(name=str(adapter.base_model))
    kind = named.kind if named.kind != "auto" else "classification" if adapter.heads else None
    try:
        base = models.on_meta(named.name, kind=kind, revision=named.revision, trust_remote_code=named.trust_remote_code)
    except LoricaError as error:
        return Share(count, reason=str(error))
    heads = sum(value.numel() for head in adapter.heads.values() for value in head.values())
    inside = tuple(f"{path}." for path in adapter.heads)
    body = sum(each.numel() for name, each in base.model.named_parameters() if not name.startswith(inside))
    return Share(count, body + heads)


def _boosters(place: Place) -> Iterator[BoosterFigures]:
    """The rounds of a boosted run; of a long chain some sums alone are measured, the last among them."""
    run = results.RunFolder(place.folder.parent)
    if place.run is None or not (run.path / LEDGER).exists():
        return
    ledger = Ledger.open(run.path)
    count = len(ledger.boosters)
    step = max(1, -(-count // NUM_CUMULATIVE))
    chain_rank = 0
    for number, booster in enumerate(ledger.boosters, 1):
        added = Adapter(booster.updates) * booster.entry.weight
        rank = max((update.rank for update in added.updates.values()), default=0)
        chain_rank += rank if booster.entry.weight else 0
        is_measured = (count - number) % step == 0
        chain = portrait(Adapter(ledger.truncated(number).chain().updates)) if is_measured else None
        yield BoosterFigures(
            round=booster.entry.round,
            accepted=booster.entry.accepted,
            weight=booster.entry.weight,
            rank=rank,
            norm=added.norm(),
            effective_rank=_mean_effective_rank(portrait(Adapter(booster.updates))),
            chain_rank=chain_rank,
            chain_norm=chain.norm if chain else None,
            chain_effective_rank=_mean_effective_rank(chain) if chain else None,
        )


def _mean_effective_rank(found: Portrait) -> float:
    ranks = [each.effective_rank for each in found.modules]
    return sum(ranks) / len(ranks) if ranks else 0.0


def _between(adapters: Mapping[str, Adapter]) -> Iterator[LayerPairs]:
    """Over all modules, then layer by layer; a module that an adapter does not have is zero there."""
    if len(adapters) < 2:
        return
    aligned(list(adapters.values()), "union")  # which refuses a module of different shapes
    shapes = {path: update.shape for adapter in adapters.values() for path, update in adapter.updates.items()}
    modules = {
        path: measure([each.updates.get(path) or zero(shapes[path]) for each in adapters.values()]) for path in shapes
    }
    names = list(adapters)
    yield LayerPairs(ALL_LAYERS, tuple(pairs(names, list(modules.values()))))
    for layer, paths in _by_layer(modules).items():
        yield LayerPairs(layer, tuple(pairs(names, [modules[path] for path in paths])))


def _by_layer(paths: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(str(layer_of(path) or path), []).append(path)
    return found
