"""What a study's runs have found so far, read from their folders alone: the same runs give the same outcome."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lorica import config, files
from lorica.config import AblateConfig, TrainConfig
from lorica.errors import ResumeError
from lorica.evaluation.metrics import Array
from lorica.evaluation.predictions import read_values
from lorica.results import RunFolder
from lorica.runs.studying.plan import Key, Planned, StudyPlan
from lorica.runs.training.learning import config_identity
from lorica.runs.training.resuming import differing
from lorica.studies.comparison import Interval, interval

FAILURES = "failures.jsonl"
CSV_HEAD = ("arm", "task", "seed", "learning_rate", "metric", "score", "state", "folder", "error")
State = Literal["finished", "failed", "missing"]
Record = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A planned run and what there is of it."""

    planned: Planned
    run: RunFolder
    error: str | None  # of its last failure

    @property
    def state(self) -> State:
        if self.run.record.exists():
            return "finished"
        return "failed" if self.error is not None else "missing"

    @property
    def is_done(self) -> bool:
        return self.state == "finished"

    @cached_property
    def record(self) -> Record:
        return files.read_json(self.run.record)

    @cached_property
    def evaluation(self) -> Record:
        return files.read_json(self.run.evaluation(self.planned.cfg.eval_split))

    @property
    def metric(self) -> str:
        """The task's first."""
        return next(iter(self.evaluation["metrics"]))

    @property
    def score(self) -> float:
        return self.evaluation["metrics"][self.metric]["value"]

    @property
    def higher_is_better(self) -> bool:
        return self.evaluation["metrics"][self.metric]["higher_is_better"]

    @cached_property
    def values(self) -> Array | None:
        """(n,) what each example adds to the score."""
        return read_values(self.run.predictions(self.planned.cfg.eval_split), self.metric)

    @property
    def diverged(self) -> bool:
        """Whether it failed on steps that could not be applied."""
        if self.state != "failed" or not self.run.training_loss.exists():
            return False
        steps = files.read_records(self.run.training_loss)
        return bool(steps) and not steps[-1]["applied"]


Pair = tuple[Found, Found]  # of the same task and seed


def check_folders(plan: StudyPlan, folder: Path) -> None:
    """Raise ResumeError if the place of a run is taken by one of another config."""
    every_rate = [run for rates in plan.every_choice() for run in plan.finals(rates)]
    for each in [*plan.tuning(), *every_rate]:
        run = RunFolder(folder / each.folder)
        if run.config.exists():
            there = config_identity(config.check(TrainConfig, config.read_yaml(run.config)))
            others = differing(there, config_identity(each.cfg))
            if others:
                raise ResumeError(f"{run.path} holds a run with another {', '.join(others)}: take another output_dir")


def found_runs(runs: Iterable[Planned], folder: Path) -> list[Found]:
    """The runs with what there is of them."""
    path = folder / FAILURES
    lines = files.read_records(path) if path.exists() else []
    errors = {each["hash"]: each["error"] for each in lines}
    return [Found(each, RunFolder(folder / each.folder), errors.get(each.hash)) for each in runs]


def chosen_rates(plan: StudyPlan, tuning: Sequence[Found]) -> dict[Key, float | None]:
    """The rate of the least mean dev loss for each arm and task, of those that no seed failed at.

    None as long as runs are missing, and where no rate has finished.
    """
    chosen: dict[Key, float | None] = {}
    for key in plan.trees:
        runs = [each for each in tuning if (each.planned.arm, each.planned.task) == key]
        if runs:
            losses = dev_losses(runs)
            complete = all(each.state != "missing" for each in runs)
            chosen[key] = min(losses, key=lambda rate: losses[rate]) if complete and losses else None
    return chosen


def dev_losses(runs: Sequence[Found]) -> dict[float, float]:
    """Rate -> the mean dev loss of its seeds, where all have finished."""
    by_rate: dict[float, list[Found]] = {}
    for each in runs:
        assert each.planned.learning_rate is not None
        by_rate.setdefault(each.planned.learning_rate, []).append(each)
    return {
        rate: statistics.fmean(each.evaluation["loss"] for each in same)
        for rate, same in by_rate.items()
        if all(each.is_done for each in same)
    }


def outcome(plan: StudyPlan, folder: Path) -> Record:
    """The study as `study.json` holds it: runs, cells, differences; what is not known is null.

    It is finished when nothing is missing; what failed does not go on by itself.
    """
    given = plan.given
    tuning = found_runs(plan.tuning(), folder)
    finals = found_runs(plan.finals(chosen_rates(plan, tuning)), folder)
    unit, amount = given.budget
    return {
        "format": 1,
        "kind": "ablate" if isinstance(given, AblateConfig) else "compare",
        "title": title(plan),
        "finished": all(each.state != "missing" for each in (*tuning, *finals)),
        "budget": {"unit": unit, "amount": amount},
        "arms": [each.model_dump(mode="json") for each in given.arms],
        "tasks": list(plan.tasks),
        "seeds": given.seeds,
        "tuning": _tuning(plan, tuning),
        "runs": [_run(each) for each in (*tuning, *finals)],
        "cells": [_cell(arm.name, task, finals) for arm in given.arms for task in plan.tasks],
        "differences": _differences(plan, finals),
    }


def title(plan: StudyPlan) -> str:
    """The question, as it was put, or of the arms and tasks."""
    if plan.given.title:
        return plan.given.title
    names = [arm.name for arm in plan.given.arms]
    arms = names[0] if len(names) == 1 else f"{', '.join(names[1:])} against {names[0]}"
    return f"{arms} on {', '.join(plan.tasks)}"


def _tuning(plan: StudyPlan, runs: Sequence[Found]) -> Record | None:
    if not runs:
        return None
    found, rates = [], set()
    for (arm, task), chosen in chosen_rates(plan, runs).items():
        losses = dev_losses([each for each in runs if (each.planned.arm, each.planned.task) == (arm, task)])
        tried = [{"learning_rate": rate, "dev_loss": losses.get(rate)} for rate in plan.rates(arm, task)]
        found.append({"arm": arm, "task": task, "chosen": chosen, "tried": tried})
        rates |= set(plan.rates(arm, task))
    return {"learning_rates": sorted(rates), "seeds": plan.given.tuned_seeds, "by": "dev loss", "found": found}


def _run(found: Found) -> Record:
    planned = found.planned
    return {
        "arm": planned.arm,
        "task": planned.task,
        "seed": planned.seed,
        "learning_rate": planned.cfg.learning_rate if planned.cfg.adapter.kind != "linear_probe" else None,
        "role": planned.role,
        "folder": str(planned.folder),
        "state": found.state,
        "error": found.error if found.state == "failed" else None,
        "hash": planned.hash,
    }


def _cell(arm: str, task: str, finals: Sequence[Found]) -> Record:
    """What an arm comes to on a task: the mean over seeds, its interval, and what its runs took."""
    runs = [each for each in finals if (each.planned.arm, each.planned.task) == (arm, task)]
    done = [each for each in runs if each.is_done]
    first = done[0] if done else None
    mean = _mean(done)
    return {
        "arm": arm,
        "task": task,
        "learning_rate": _run(runs[0])["learning_rate"] if runs else None,
        "metric": first.metric if first else None,
        "higher_is_better": first.higher_is_better if first else None,
        "scores": {str(each.planned.seed): each.score for each in done},
        "mean": mean.mean,
        "low": _within_scale(mean.low),
        "high": _within_scale(mean.high),
        **{name: _taken(done, "efficiency", name) for name in ("num_trainable", "num_parameters")},
        "peak_bytes": _taken(done, "timing", "peak_bytes"),
        "seconds": _taken(done, "timing", "seconds"),
        "forwards": _taken(done, "efficiency", "forwards"),
        "diverged": sum(each.diverged for each in runs),
    }


def _within_scale(end: float | None) -> float | None:
    """An end of a score's interval: every metric that there is, is a share, and none lies beyond 0 or 1."""
    return None if end is None else min(1.0, max(0.0, end))


def _mean(done: Sequence[Found]) -> Interval:
    values = [each.values for each in done]
    known = [each for each in values if each is not None]
    return interval([each.score for each in done], [np.stack(known)] if len(known) == len(done) > 0 else None)


def _taken(done: Sequence[Found], part: str, name: str) -> Any:
    """The median over seeds of what the records say; null where they do not."""
    values = [(each.record.get(part) or {}).get(name) for each in done]
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.median(known) if part == "timing" and name == "seconds" else statistics.median_low(known)


def _differences(plan: StudyPlan, finals: Sequence[Found]) -> list[Record]:
    """Every arm against the first: on each task, and on all together where there are several."""
    names, tasks = [arm.name for arm in plan.given.arms], list(plan.tasks)
    groups = [(task, [task]) for task in tasks]
    together: list[tuple[str | None, list[str]]] = [(None, tasks)] if len(tasks) > 1 else []
    done = {(each.planned.arm, each.planned.task, each.planned.seed): each for each in finals if each.is_done}
    rows = []
    for arm in names[1:]:
        for task, members in [*groups, *together]:
            places = [[(arm, each, seed) for each in members] for seed in plan.given.seeds]
            pairs = [
                [(done[place], done[names[0], *place[1:]]) for place in seed]
                for seed in places
                if all(place in done and (names[0], *place[1:]) in done for place in seed)
            ]
            rows.append({"task": task, "arm": arm, "against": names[0], **_compared(pairs)})
    return rows


def _compared(pairs: Sequence[Sequence[Pair]]) -> Record:
    found = _difference(pairs)
    higher_is_better = all(one.higher_is_better for seed in pairs for one, _ in seed)
    return {
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "num_pairs": found.num_seeds,
        "verdict": found.verdict(higher_is_better),
    }


def _difference(pairs: Sequence[Sequence[Pair]]) -> Interval:
    """Of (seeds, tasks) pairs of runs; the tasks of a seed are averaged before the seeds are compared."""
    means = [statistics.fmean(one.score - other.score for one, other in tasks) for tasks in pairs]
    examples = [_example_differences(same) for same in zip(*pairs, strict=True)]
    known = [each for each in examples if each is not None]
    return interval(means, known if len(known) == len(examples) else None)


def _example_differences(pairs: Sequence[Pair]) -> Array | None:
    """(seeds, n) of one task; None where a metric is no mean over examples."""
    found = []
    for one, other in pairs:
        if one.values is None or other.values is None:
            return None
        found.append(one.values - other.values)
    return np.stack(found)


def final_rows(study: Mapping[str, Any]) -> list[list[Any]]:
    """A row of `CSV_HEAD` for each run that is compared."""
    cells = {(each["arm"], each["task"]): each for each in study["cells"]}
    rows = []
    for each in study["runs"]:
        if each["role"] == "final":
            cell = cells[each["arm"], each["task"]]
            found = {**each, "metric": cell["metric"], "score": cell["scores"].get(str(each["seed"]))}
            rows.append([found[name] for name in CSV_HEAD])
    return rows
