"""Run folders and study folders, as the subjects of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lorica import config, results
from lorica.errors import DataError
from lorica.report import records
from lorica.report.subjects import Cell, Curve, Difference, Record, Round, Run, Score, Study


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
    final = [each for each in record["runs"] if each["role"] == "final"]
    name = records.text(folder.resolve().name)
    return Study(
        title=record["title"] or name,
        name=name,
        kind=record["kind"],
        is_finished=record["finished"],
        arms=tuple(each["name"] for each in record["arms"]),
        tasks=tuple(record["tasks"]),
        runs=tuple(_member(folder, each) for each in final if each["state"] == "finished"),
        cells=tuple(map(_cell, record["cells"])),
        differences=tuple(map(_difference, record["differences"])),
        overrides={each["name"]: each["overrides"] for each in record["arms"]},
        failures=tuple(each for each in record["runs"] if each["state"] == "failed"),
        num_missing=sum(each["state"] == "missing" for each in record["runs"]),
        budget=f"{record['budget']['amount']:,} {record['budget']['unit']}",
        tuning=_tuning(record["tuning"]),
        origin=records.origin_of(folder),
    )


def _begun(folder: Path) -> Study:
    """A study of which no run has ended."""
    name = records.text(folder.resolve().name)
    return Study(name, name, "compare", False, (), (), (), (), origin=records.origin_of(folder))


def _member(folder: Path, record: Record) -> Run:
    """A run of a study, under the name that the study gives it."""
    path = folder / record["folder"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder / 'study.json'} names a run outside the study: {record['folder']}")
    found = read_run(path)
    return replace(found, arm=record["arm"], task=record["task"], seed=record["seed"])


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


def _tuning(record: Mapping[str, Any] | None) -> str | None:
    """How the learning rates were chosen, in words."""
    if record is None:
        return None
    rates = ", ".join(f"{rate:g}" for rate in record["learning_rates"])
    return f"each arm's learning rate is the best it was tried at, among {rates}, by {record['by']}"
