"""`lorica inspect`: what adapters are made of, by themselves, booster by booster, and against each other."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lorica import files, results
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter, aligned
from lorica.adapters.delta import zero
from lorica.analysis.conflict import Pair, measure, pairs
from lorica.analysis.portrait import ModuleFigures, Portrait, portrait
from lorica.config import InspectConfig
from lorica.config.contradictions import LOW_RANK
from lorica.errors import ConfigError
from lorica.merging.layers import layer_of
from lorica.progress import tracked
from lorica.runs.inspecting.boosters import BoosterFigures, booster_figures, ledger_of
from lorica.runs.inspecting.share import Share, share_of
from lorica.runs.inspecting.states import FOLDER as STATES
from lorica.runs.inspecting.states import Stage, stages
from lorica.runs.sources import Place, locate

JSON, CSV = "inspect.json", "inspect.csv"
ALL_LAYERS = "all"


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

    energy_at: int  # directions, of which the rounds' energies are
    adapters: tuple[Inspected, ...]
    layers: tuple[LayerPairs, ...]  # the first is over all modules; none of a single adapter
    stages: tuple[Stage, ...] = ()  # of a run whose representations were asked for
    folder: Path | None = None

    def as_record(self) -> dict[str, Any]:
        adapters = [asdict(each) | {"share": each.share.as_record()} for each in self.adapters]
        layers, moved = [asdict(each) for each in self.layers], [asdict(each) for each in self.stages]
        return {"energy_at": self.energy_at, "adapters": adapters, "layers": layers, "stages": moved}

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
    measured = tracked(places, len(places), "measuring adapters")
    single = tuple(_inspected(place, adapters[place.name], given) for place in measured)
    found = Inspection(given.energy_at, single, tuple(_between(adapters)))
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


def _inspected(place: Place, adapter: Adapter, given: InspectConfig) -> Inspected:
    ledger = ledger_of(results.RunFolder(place.folder.parent)) if place.run is not None else None
    return Inspected(
        name=place.name,
        folder=str(place.folder),
        base_model=adapter.base_model,
        portrait=portrait(adapter),
        share=share_of(adapter, place.run, ledger.boosters if ledger else (), given.model),
        boosters=tuple(booster_figures(ledger, given.energy_at)) if ledger else (),
    )


def _between(adapters: Mapping[str, Adapter]) -> Iterator[LayerPairs]:
    """Over all modules, then layer by layer; a module that an adapter does not have is zero there."""
    if len(adapters) < 2:
        return
    aligned(list(adapters.values()), "union")  # which refuses a module of different shapes
    shapes = {path: update.shape for adapter in adapters.values() for path, update in adapter.updates.items()}
    modules = {
        path: measure([each.updates.get(path) or zero(shapes[path]) for each in adapters.values()])
        for path in tracked(shapes, len(shapes), "comparing modules")
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
