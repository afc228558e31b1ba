"""`lorica export`: what a run trained, or a part of its chain of boosters, in the form that another program reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorica import card, config, files, results
from lorica.adapters import injection, peft_format
from lorica.adapters import prefix as prefixes
from lorica.adapters.adapter import Adapter
from lorica.config import ExportConfig, TrainConfig
from lorica.errors import ConfigError
from lorica.results import RunFolder
from lorica.runs.ready import kinds, prepare
from lorica.runs.sources import task_name
from lorica.training.ledger import Ledger


@dataclass(frozen=True)
class Exported:
    """What was written, and what compressing an adapter lost: the relative error of its worst module and in all."""

    folder: Path
    what: str
    rank: int = 0
    num_boosters: int = 0
    worst_error: float = 0.0
    total_error: float = 0.0

    def told(self) -> str:
        """What was written, in a line."""
        boosters = f", {self.num_boosters} boosters" if self.num_boosters else ""
        lost = f"; relative error {self.total_error:.4f} in all, {self.worst_error:.4f} in the worst module"
        return f"{self.what}{boosters}{lost if self.worst_error else ', exact'}"


def export(target: str, given: ExportConfig) -> Exported:
    """Write what a run trained to `output_dir`: an adapter, or a whole model with the adapter fused in; with a card.

    A boosted run may be cut to its first `rounds`, and rounds may be dropped; `rank` or `energy` compress, the error
    stated. Raises ConfigError for what the run's kind does not have: rounds, ranks, weights to fuse.
    """
    run = results.open_run(target)
    cfg = config.check(TrainConfig, config.read_yaml(run.config))
    results.check_free(given.output_dir)
    done = _exported(run, cfg, given, Path(given.output_dir))
    text = card.export_card(
        base_model=cfg.model.name,
        kind=kinds(cfg.model, cfg.task)[0],
        task=task_name(cfg.task),
        told=done.told(),
        run=str(run.path),
        folder=str(done.folder),
        is_model=given.fuse or cfg.adapter.kind == "full",
    )
    files.write_atomic(done.folder / "README.md", text)
    return done


def _exported(run: RunFolder, cfg: TrainConfig, given: ExportConfig, folder: Path) -> Exported:
    if cfg.adapter.kind == "full":
        _refuse_adapter_options(given, "a whole model", ("rounds", "drop", "rank", "energy", "profile"))
        trained = cfg.model.model_copy(update={"name": str(run.model), "revision": None})
        prepare(trained, cfg.task, "cpu", cfg.seed).write_model(folder)
        return Exported(folder, "the whole model")
    if cfg.adapter.kind == "prefix":
        _refuse_adapter_options(given, "a prefix", ("rounds", "drop", "rank", "energy", "profile", "fuse"))
        prefixes.write(prefixes.read(run.adapter), folder)
        return Exported(folder, "the prefix")
    if cfg.adapter.kind == "linear_probe":
        _refuse_adapter_options(given, "a head alone", ("rounds", "drop", "rank", "energy"))
    return _adapter_exported(run, cfg, given, folder)


def _refuse_adapter_options(given: ExportConfig, what: str, keys: Sequence[str]) -> None:
    for key in keys:
        if getattr(given, key) != type(given).model_fields[key].default:
            raise ConfigError(f"{key} is of low-rank adapters, and this run trained {what}: drop it")


def _adapter_exported(run: RunFolder, cfg: TrainConfig, given: ExportConfig, folder: Path) -> Exported:
    whole, num_boosters = _asked_for(run, cfg, given)
    adapter, worst, total = _compressed(whole, given)
    ready = prepare(cfg.model, cfg.task, "cpu", cfg.seed)
    if given.fuse:
        injection.fuse_whole(ready.base.model, adapter)
        ready.write_model(folder)
    else:
        ready.write(adapter, folder, profile=given.profile, dropout=cfg.adapter.dropout)
    rank = max((update.rank for update in adapter.updates.values()), default=0)
    what = f"rank {rank}" if rank else f"the head {', '.join(adapter.heads)}"
    return Exported(folder, what, rank, num_boosters, worst, total)


def _asked_for(run: RunFolder, cfg: TrainConfig, given: ExportConfig) -> tuple[Adapter, int]:
    if not (run.path / "ledger.jsonl").exists():
        if given.rounds is not None or given.drop:
            raise ConfigError(f"{run.path} is no boosted run: it has no rounds to cut or drop")
        return peft_format.read(run.adapter), 0
    ledger = Ledger.open(run.path)
    if given.rounds is not None:
        ledger = ledger.truncated(given.rounds)
    for round in given.drop:
        ledger = ledger.reweighted(round, 0.0)
    adapter = ledger.chain(cfg.model.name)
    if not adapter.updates:
        raise ConfigError("nothing is left to export: every booster was dropped or rejected")
    return adapter, sum(booster.entry.weight != 0 for booster in ledger.boosters)


def _compressed(adapter: Adapter, given: ExportConfig) -> tuple[Adapter, float, float]:
    """(adapter, relative error of the worst module, relative error of the whole)"""
    if given.rank is None and given.energy is None:
        return adapter, 0.0, 0.0
    smaller, errors = adapter.compress(given.rank, given.energy)
    lost = sum((errors[path] * update.norm()) ** 2 for path, update in adapter.updates.items()) ** 0.5
    return smaller, max(errors.values()), lost / adapter.norm()
