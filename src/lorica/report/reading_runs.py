"""Run folders and study folders, as the subjects of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lorica import config, results
from lorica.card import studies
from lorica.errors import DataError
from lorica.report import records
from lorica.report.subjects import Cell, Choice, Curve, Difference, Record, Round, Run, Score, Study, Tried


def read_run(folder: Path) -> Run:
    """A training run, finished or not; its arm is for `grouping` to tell."""
    run = results.RunFolder(folder)
    record = records.read_json_or(run.record, {})
    tree = record["config"] if record else records.clean(config.read_yaml(run.config))
    efficiency, timing = record.get("efficiency") or {}, record.get("timing") or {}
    return Run(
        folder=folder,
        arm="",
        task=_task(tree),
        seed=tree.get("seed"),
        config=records.flat(tree),
        origin=record.get("origin") or records.origin_of(folder),
        score=_score(run, tree) if record else None,
        curve=_curve(run),
        rounds=tuple(_round(each) for each in records.read_lines(folder / "ledger.jsonl")),
        seconds=records.number(timing.get("seconds")),
        peak_bytes=records.number(timing.get("peak_bytes")),
        num_trainable=efficiency.get("num_trainable"),
        num_parameters=efficiency.get("num_parameters"),
    )


def _task(tree: Record) -> str:
    """What the run's task is called: by its own name, or by its folder's."""
    task = tree.get("task") or {}
    return str(task.get("name") or Path(task.get("path") or "task").name)


def _score(run: results.RunFolder, tree: Record) -> Score | None:
    """The task's first metric on the split that the run was judged on."""
    found = records.read_json(run.evaluation(str(tree.get("eval_split", "test"))))
    for name, each in found["metrics"].items():
        return Score(name, each["value"], each["low"], each["high"], each["higher_is_better"], each["n"])
    return None


def _curve(run: results.RunFolder) -> Curve | None:
    lines = records.read_lines(run.training_loss)
    if not lines:
        return None
    columns = [[each[key] for each in lines] for key in ("step", "forwards", "seconds")]
    loss = [each["loss"] if each.get("applied", True) else np.nan for each in lines]
    return Curve(*(np.array(each, dtype=float) for each in (*columns, loss)))


def _round(record: Record) -> Round:
    return Round(record["round"], record["last_step"], record["accepted"], record["rolled_back"])


def read_study(folder: Path) -> Study:
    """A study as it stands: its outcome, and the final runs that there are."""
    if not (folder / "study.json").is_file():
        return _begun(folder)
    record = records.read_json(folder / "study.json")
    places = [(each, _place(folder, each)) for each in record["runs"]]
    name, tuning = records.text(folder.resolve().name), record["tuning"] or {"found": []}
    num_missing_choosing, num_missing = _num_missing(record)
    return Study(
        title=record["title"] or name,
        name=name,
        kind=record["kind"],
        is_finished=record["finished"],
        arms=tuple(each["name"] for each in record["arms"]),
        tasks=tuple(record["tasks"]),
        runs=tuple(
            _member(each, place) for each, place in places if (each["role"], each["state"]) == ("final", "finished")
        ),
        cells=tuple(_cell(each) for each in record["cells"] if records.number(each["mean"]) is not None),
        differences=tuple(map(_difference, record["differences"])),
        configs=_configs(places),
        failures=tuple(each for each in record["runs"] if each["state"] == "failed"),
        num_missing=num_missing,
        num_missing_choosing=num_missing_choosing,
        budget=f"{record['budget']['amount']:,} {record['budget']['unit']}",
        rates=studies.rates(record),
        choices=tuple(_choice(each, record["runs"]) for each in tuning["found"]),
        remarks=tuple(studies.remarks_on_rates(record)),
        origin=records.origin_of(folder),
    )


def _begun(folder: Path) -> Study:
    """A study of which no run has ended."""
    name = records.text(folder.resolve().name)
    return Study(name, name, "compare", False, (), (), (), (), origin=records.origin_of(folder))


def _place(folder: Path, record: Record) -> Path:
    """Where a run of a study lies."""
    path = folder / record["folder"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder / 'study.json'} names a run outside the study: {record['folder']}")
    return path


def _num_missing(record: Record) -> tuple[int, int]:
    """Runs to come, of those that choose rates and of those that are compared: among these what has no rate yet."""
    missing = [each for each in record["runs"] if each["state"] == "missing"]
    waiting = {(each["arm"], each["task"]) for each in missing if each["role"] == "tuning"}
    num_final = sum(each["role"] == "final" for each in missing)
    return len(missing) - num_final, num_final + len(waiting) * len(record["seeds"])


def _member(record: Record, place: Path) -> Run:
    """A run of a study, under the name that the study gives it."""
    return replace(read_run(place), arm=record["arm"], task=record["task"], seed=record["seed"])


def _configs(places: Sequence[tuple[Record, Path]]) -> dict[tuple[str, str], Record]:
    """(arm, task) -> the config of a run that is compared; while there is none, of one that chooses the rate."""
    found: dict[tuple[str, str], Record] = {}
    for record, place in sorted(places, key=lambda each: each[0]["role"] != "final"):
        key = record["arm"], record["task"]
        if key not in found and (given := _config(place)) is not None:
            own = ("eval_split",) if record["role"] == "final" else ("eval_split", "learning_rate")
            found[key] = {name: value for name, value in given.items() if name not in own}
    return found


def _config(place: Path) -> Record | None:
    """A run's config, as it was begun with or was to be; None before either."""
    paths = (results.RunFolder(place).config, place.with_name(f"{place.name}.yaml"))
    path = next((each for each in paths if each.is_file()), None)
    return None if path is None else records.flat(records.clean(config.read_yaml(path)))


KNOWN = ("low", "high", "learning_rate", "num_trainable", "num_parameters", "peak_bytes", "seconds", "forwards")


def _cell(record: Record) -> Cell:
    known: dict[str, Any] = {key: records.number(record.get(key)) for key in KNOWN}
    scores = {str(seed): float(score) for seed, score in record["scores"].items()}
    return Cell(
        arm=record["arm"],
        task=record["task"],
        metric=record["metric"],
        higher_is_better=record["higher_is_better"],
        scores=scores,
        mean=float(record["mean"]),
        interval="95\u00a0% over seeds" if len(scores) > 1 else "95\u00a0% over test examples",
        num_diverged=int(record.get("diverged") or 0),
        **known,
    )


def _difference(record: Record) -> Difference:
    mean, low, high = (records.number(record[key]) for key in ("mean", "low", "high"))
    names = record["task"], record["arm"], record["against"]
    return Difference(*names, mean, low, high, record["num_pairs"], record["verdict"])


def _choice(record: Record, runs: Sequence[Record]) -> Choice:
    """An arm's choice on a task, with which of the rates have failed."""
    arm, task = record["arm"], record["task"]
    failed = {
        each["learning_rate"]
        for each in runs
        if (each["arm"], each["task"], each["role"], each["state"]) == (arm, task, "tuning", "failed")
    }
    tried = (
        Tried(float(each["learning_rate"]), records.number(each["dev_loss"]), each["learning_rate"] in failed)
        for each in record["tried"]
    )
    return Choice(arm, task, records.number(record["chosen"]), tuple(tried))
