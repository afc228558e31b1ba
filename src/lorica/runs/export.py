"""`lorica export`: a run's adapter, or a part of its chain of boosters, in the form that another program reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorica import config, files, results
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.config import ExportConfig, TrainConfig
from lorica.errors import ConfigError
from lorica.results import RunFolder
from lorica.runs.ready import prepare
from lorica.training.ledger import Ledger


@dataclass(frozen=True)
class Exported:
    """What was written, and what compressing lost: the relative error of the worst module and of the whole."""

    folder: Path
    rank: int
    num_boosters: int
    worst_error: float = 0.0
    total_error: float = 0.0


def export(target: str, given: ExportConfig) -> Exported:
    """Write a run's adapter to `output_dir` as a PEFT folder, or as a whole model with the adapter fused in.

    A boosted run may be cut to its first `rounds`, and rounds may be dropped; `rank` or `energy` compress, the error
    stated. Raises ConfigError where a plain run is asked for rounds.
    """
    run = results.open_run(target)
    cfg = config.check(TrainConfig, config.read_yaml(run.config))
    results.check_free(given.output_dir)
    whole, num_boosters = _asked_for(run, cfg, given)
    adapter, worst, total = _compressed(whole, given)
    ready = prepare(cfg.model, cfg.task, "cpu", cfg.seed)
    folder = Path(given.output_dir)
    if given.fuse:
        injection.fuse_whole(ready.base.model, adapter)
        with files.staged_folder(folder) as staging:
            ready.base.model.save_pretrained(staging)
            ready.base.tokenizer.save_pretrained(staging)
    else:
        ready.write(adapter, folder, profile=given.profile, dropout=cfg.adapter.dropout)
    rank = max(update.rank for update in adapter.updates.values())
    return Exported(folder, rank, num_boosters, worst, total)


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
