"""`lorica sweep`: a merge's parameters chosen by what it keeps of every task, on examples that do not judge it later.

A sweep's folder holds its config, what it was made of (identity.json), one line for each trial in trials.jsonl, and at
the end summary.json, a picture, and the winner as `lorica merge` writes it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorica import config, files, progress, results
from lorica.config import SweepConfig
from lorica.errors import ConfigError, MissingPathError, ResumeError
from lorica.results import RunFolder
from lorica.runs.merging.merge import merge
from lorica.runs.studying.sweep_bench import Bench, merge_at, open_bench, search_of
from lorica.runs.studying.sweep_workers import colleagues
from lorica.runs.studying.warm_start import IDENTITY, WarmStart, trial, warm_start
from lorica.runs.training.resuming import differing
from lorica.studies.figures import draw_history
from lorica.studies.ledger import Ledger
from lorica.studies.search import Search, Trial, ranked
from lorica.studies.space import Point

SUMMARY, WARM_START, HISTORY, BEST = "summary.json", "warm_start.json", "history.png", "best"
CHOSEN_BY = ("search", "split", "allow_test_selection", "eval_subset", "constraint_nonnegative")
Record = dict[str, Any]


@dataclass(frozen=True)
class Swept:
    """What a sweep left: its folder, and the summary that stands there."""

    folder: Path
    summary: Record


def sweep(given: SweepConfig, say: Console) -> Swept:
    """Try the points that the search proposes, rank them, and save the winner.

    Points are ranked by the least interference delta of all tasks with headroom, equal ones by the mean (MATH section
    6.2). With `resume` a sweep goes on behind its finished trials, beside whoever is at work on it already; a finished
    one is left as it is.
    """
    if given.resume is not None:
        return _resumed(given, say)
    if given.output_dir is not None:
        results.check_free(given.output_dir)
    search = search_of(given)
    bench = open_bench(given, say)
    assert given.search is not None
    warm = warm_start(given.search, bench.identity())
    run = RunFolder(_folder(given, bench))
    with files.locked_folder(run.path):
        files.write_json(run.path / IDENTITY, bench.identity())
        files.write_json(run.path / WARM_START, warm.as_record())
        files.write_json(run.origin, _origin(given))
        files.write_atomic(run.config, config.dump(given))  # last: a folder with a config can be resumed
    for line in warm.lines():
        say.print(line, highlight=False, markup=False, soft_wrap=True)
    with colleagues(run.path, given.workers - 1, given.device, say):
        return _completed(bench, search, warm, run, say)


def _resumed(given: SweepConfig, say: Console) -> Swept:
    """The sweep of a folder's own config; of the words given only `device` and `workers` count beside it."""
    extra = sorted(given.model_fields_set - {"resume", "device", "workers"})
    if extra:
        raise ConfigError(f"resume={given.resume} takes its config from the sweep: drop {', '.join(extra)}")
    assert given.resume is not None
    run = results.open_run(given.resume)
    if not (run.path / IDENTITY).is_file():
        raise MissingPathError(f"{given.resume!r} is not a sweep's folder: it has no {IDENTITY}")
    if (run.path / SUMMARY).exists():
        say.print(f"{run.path} is finished: nothing to resume", highlight=False, markup=False, soft_wrap=True)
        return Swept(run.path, files.read_json(run.path / SUMMARY))
    cfg = config.check(SweepConfig, config.read_yaml(run.config))
    if "device" in given.model_fields_set:
        cfg = cfg.model_copy(update={"device": given.device})
    bench = open_bench(cfg, say)
    others = list(differing(files.read_json(run.path / IDENTITY), bench.identity()))
    if others:
        raise ResumeError(f"{run.path} was begun with another {', '.join(others)}: put that back, or sweep anew")
    warm = WarmStart.of_record(files.read_json(run.path / WARM_START))
    with colleagues(run.path, given.workers - 1, cfg.device, say):
        return _completed(bench, search_of(cfg), warm, run, say)


def _completed(bench: Bench, search: Search, warm: WarmStart, run: RunFolder, say: Console) -> Swept:
    """Try what is left to try; the first that finds nothing left then settles the sweep, for all that work on it."""
    say.print(
        f"after a crash, or to help: lorica sweep resume={run.path}", highlight=False, markup=False, soft_wrap=True
    )
    known = [trial(place - len(warm.points), each) for place, each in enumerate(warm.points)]
    ledger = Ledger(run.path, trial)
    _try_all(bench, search, known, ledger)
    with files.locked_folder(run.path, wait=True):
        if not (run.path / SUMMARY).exists():
            _settle(bench, warm.points, known, ledger, run, say)
    return Swept(run.path, files.read_json(run.path / SUMMARY))


def _try_all(bench: Bench, search: Search, known: Sequence[Trial], ledger: Ledger) -> None:
    """Work on trials until all are finished, each written down as soon as it is known."""
    with progress.bar() as shown:
        task = shown.add_task(f"sweep of {bench.method}", total=search.total, note="")
        while True:
            with ledger.claimed(search, known) as claim:
                if claim is None:
                    return
                best = ranked(claim.finished)[:1]
                note = f"best so far {best[0].values[0]:.3f}" if best else ""
                shown.update(task, completed=len(claim.finished), note=note)
                ledger.finish(claim, bench.judged(claim.point))


def _settle(
    bench: Bench,
    points: Sequence[Mapping[str, Any]],
    known: Sequence[Trial],
    ledger: Ledger,
    run: RunFolder,
    say: Console,
) -> None:
    """Draw the picture, save the winner, and write the summary: with it the sweep is done."""
    records = ledger.records()
    trials = [*known, *(trial(each["number"], each) for each in records)]
    draw_history(trials, run.path / HISTORY, "least recovery of all tasks")
    by_number = dict(enumerate([*points, *records], -len(known)))
    order = [*ranked(trials), *(each for each in trials if not each.counts)]
    best = by_number[order[0].number] if order[0].counts else None
    summary = {
        "method": bench.method,
        "adapters": [each.name for each in bench.sources],
        **{key: bench.cfg.model_dump(mode="json")[key] for key in CHOSEN_BY},
        "num_trials": len(records),
        "num_warm_start": len(known),
        "left_out": bench.left_out,
        "best": best,
        "final": _winner(bench.cfg, best["params"], run.path / BEST, say) if best else None,
        "ranking": [_line(each.number, by_number[each.number]) for each in order],
        "origin": files.read_json(run.origin),
        "timing": {"trial_seconds": sum(each["seconds"] for each in records)},
    }
    ledger.close()
    files.write_json(run.path / SUMMARY, summary)


def _line(number: int, record: Mapping[str, Any]) -> Record:
    """A trial in the ranking; one of an earlier sweep has that sweep's folder for a number."""
    line = {name: record.get(name) for name in ("params", "minimum", "mean", "feasible", "reason")}
    return {"number": number if number >= 0 else None, "sweep": record.get("sweep"), **line}


def _winner(cfg: SweepConfig, point: Point, folder: Path, say: Console) -> Record | None:
    """The winner merged as `lorica merge` does it, and how it fares on the split that had no part in choosing it."""
    chosen = merge_at(cfg, point).model_copy(update={"output_dir": str(folder)})
    if cfg.final_split is None:
        chosen = chosen.model_copy(update={"eval_tasks": []})
    else:
        chosen = chosen.model_copy(update={"split": cfg.final_split})
    if (cfg.save_merged or cfg.final_split) and not folder.exists():  # it appears whole or not at all
        merge(chosen, say)
    if cfg.final_split is None:
        return None
    found = files.read_json(folder / SUMMARY)
    return {"split": cfg.final_split, "tasks": found["tasks"], "recovery": found["recovery"]}


def _folder(cfg: SweepConfig, bench: Bench) -> Path:
    if cfg.output_dir is not None:
        return files.claim_folder(Path(cfg.output_dir))
    combo = files.slug("_".join(source.name for source in bench.sources))
    return files.new_folder(Path(cfg.artifacts_dir) / "sweeps" / bench.method / combo, "sweep")


def _origin(cfg: SweepConfig) -> Record:
    origin = results.origin(cfg.seed, cfg.device)
    origin["libraries"]["optuna"] = importlib.metadata.version("optuna")
    return origin
