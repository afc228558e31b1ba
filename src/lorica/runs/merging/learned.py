"""A merge's coefficients learned on its adapters' own tasks, all on one base model; what was learned is not repeated.

A fitting's folder holds state.json, from which the same command goes on after a crash, and at the end learned.json.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import lorica
from lorica import config, files, models, randomness
from lorica.config import MergeConfig, ModelConfig
from lorica.errors import ConfigError
from lorica.merging import method as methods
from lorica.merging.fitting.descent import Learned
from lorica.merging.fitting.keeping import NOT_IDENTITY
from lorica.merging.fitting.loading import Learner
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.problem import FittingTask, Problem
from lorica.merging.merge import Merge
from lorica.merging.method import Update
from lorica.runs.bodies import Bodies
from lorica.runs.merging.evaluation import digest_of, model_of, task_of, with_head
from lorica.runs.merging.settling import CARRIER, learner_of
from lorica.runs.ready import Ready, chosen, train_as_of
from lorica.runs.remembered import keep, recall
from lorica.runs.sources import Source
from lorica.tasks import base as tasks
from lorica.tasks.base import TrainAs
from lorica.tasks.prompting import Encoded

MOST_VALIDATION = 3  # at most one row in so many is kept from fitting
Record = dict[str, Any]


@dataclass(frozen=True)
class Lesson:
    """One adapter's task as coefficients are learned on it."""

    source: Source
    model: ModelConfig
    ready: Ready
    rows: list[Encoded]
    validation: list[Encoded]


def learn(
    merge: Merge, cfg: MergeConfig, sources: Sequence[Source], bodies: Bodies, say: Console
) -> tuple[Merge, Record]:
    """The merge at learned coefficients, and how they were learned, as learning.json has it.

    `merge` is the settled merge whose updates get the coefficients. Raises ConfigError if the adapters' base models are
    not one and the same, FolderInUseError if another process is at the same fitting, and what the learner raises.
    """
    assert cfg.optimizer is not None
    learner = learner_of(cfg.optimizer, cfg.seed)
    if learner.descent.force_cpu and models.choose_device(bodies.device) != "cpu":
        bodies = Bodies("cpu", bodies.seed)
    lessons = [lesson_of(source, cfg, learner.descent, bodies) for source in sources]
    _check_one_body(lessons, merge.paths)
    key = _key(learner, merge, cfg, lessons)
    folder = Path(cfg.artifacts_dir) / "learning" / files.content_hash(key)
    record: Record | None = recall(folder / "learned.json", key, _is_record)
    tell = partial(say.print, highlight=False, markup=False, soft_wrap=True)
    if record is None:
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked_folder(folder):
            problem = _problem(merge, cfg, lessons, folder / "state.json", tell)
            record = _record(learner, learner(problem), lessons)
            keep(folder / "learned.json", key, record)
    else:
        tell(f"{learner.name} has learned these coefficients before, in {folder}: not fitted again")
    if cfg.constraint_nonnegative:
        record = _nonnegative(record)
        tell(f"{record['num_clipped']} of {len(record['coefficients'])} coefficients were below 0, and are set to 0")
    method = methods.load(CARRIER, record["method_params"], len(sources))
    return dataclasses.replace(merge, method=method, found=method.surveyed(merge)), record


def lesson_of(source: Source, cfg: MergeConfig, descent: Descent, bodies: Bodies) -> Lesson:
    """The task's examples of the split, a seeded part of them set aside for validation."""
    task, model = task_of(source), model_of(source, cfg)
    if descent.model_dtype != "auto":
        model = config.check(ModelConfig, {**model.model_dump(), "dtype": descent.model_dtype})
    ready = with_head(source, bodies.prepare(model, task))
    rows = ready.encoded(chosen(ready.task, descent.split, task))
    size = min(descent.validation_batches * descent.batch_size, len(rows) // MOST_VALIDATION)
    generator = randomness.python_generator(descent.seed, "validation", source.name)
    aside = tasks.draw([row.label for row in rows], size, generator, stratified=True)
    fitted = [row for place, row in enumerate(rows) if place not in set(aside)]
    return Lesson(source, model, ready, fitted, [rows[place] for place in aside])


def _check_one_body(lessons: Sequence[Lesson], paths: Sequence[str]) -> None:
    first, *others = (dict(each.ready.base.model.named_modules(remove_duplicate=False)) for each in lessons)
    for lesson, modules in zip(lessons[1:], others, strict=True):
        if any(modules.get(path) is not first.get(path) for path in paths):
            raise ConfigError(
                f"coefficients are learned on one base model, and {lesson.source.name} has another than "
                f"{lessons[0].source.name} ({lesson.model.name}, {lessons[0].model.name}): give model=NAME for all"
            )


def _key(learner: Learner, merge: Merge, cfg: MergeConfig, lessons: Sequence[Lesson]) -> Record:
    """Whatever the coefficients depend on."""
    return {
        "lorica": lorica.__version__,
        "optimizer": learner.name,
        "options": dict(learner.options),
        "descent": _told(learner.descent),
        "merge_mode": cfg.merge_mode,
        "transforms": [[each.name, dict(each.options)] for each, _ in merge.transforms],
        "tasks": [
            {
                "name": each.source.name,
                "adapter": each.source.sha256,
                "model": each.model.model_dump(mode="json"),
                "base": models.fingerprint(each.ready.base),
                "rows": digest_of(each.rows),
                "validation": digest_of(each.validation),
                "train_as": _train_as(each),
            }
            for each in lessons
        ],
        "device": lessons[0].ready.device,
    }


def _told(descent: Descent) -> Record:
    return {name: value for name, value in dataclasses.asdict(descent).items() if name not in NOT_IDENTITY}


def _is_record(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("method_params"), dict)


def _problem(merge: Merge, cfg: MergeConfig, lessons: Sequence[Lesson], state: Path, tell: Any) -> Problem:
    @functools.lru_cache(maxsize=1)
    def updates(path: str) -> Sequence[Update]:
        return merge.inputs(path).updates

    def update_of(place: int, path: str) -> Update:
        return updates(path)[place]

    return Problem(
        model=lessons[0].ready.base.model,
        tasks=[_fitting_task(each, cfg.eval_batch_size) for each in lessons],
        paths=merge.paths,
        updates={name: partial(update_of, place) for place, name in enumerate(merge.names)},
        device=lessons[0].ready.device,
        state=state,
        say=tell,
    )


def _fitting_task(lesson: Lesson, eval_batch_size: int) -> FittingTask:
    ready, train_as = lesson.ready, _train_as(lesson)
    rows = [*lesson.rows, *lesson.validation]

    def judge() -> float:
        """The metric over all rows: trials fit too little to need some set aside."""
        found = ready.evaluated("dev", rows, eval_batch_size)
        score = found.metrics[ready.task.metrics[0]]
        return score.value if score.higher_is_better else -score.value

    return FittingTask(
        name=lesson.source.name,
        model=ready.base.model,
        rows=lesson.rows,
        collate=dataclasses.replace(ready, device="cpu").collate(gold_only=train_as == "lm"),
        train_as=train_as,
        validation=lesson.validation,
        judge=judge,
    )


def _train_as(lesson: Lesson) -> TrainAs:
    """As the run that made the adapter was."""
    asked = lesson.source.run.train_as if lesson.source.run is not None else "auto"
    return train_as_of(asked, "loss", lesson.ready.task)


def _record(learner: Learner, learned: Learned, lessons: Sequence[Lesson]) -> Record:
    values = learned.c.tolist()
    return {
        "optimizer": learner.name,
        "options": dict(learner.options),
        "descent": _told(learner.descent),
        "labels_used": learner.needs_labels,
        "tasks": {
            each.source.name: {"num_fitted": len(each.rows), "num_validation": len(each.validation)} for each in lessons
        },
        "stopped": learned.stopped,
        "best_step": learned.best_step,
        "seconds": learned.seconds,
        "mean_coefficients": _means((adapter for _, adapter in learned.layout.keys), values),
        "coefficients": [
            {"group": group, "adapter": adapter, "value": value}
            for (group, adapter), value in zip(learned.layout.keys, values, strict=True)
        ],
        "method_params": learned.layout.params(learned.c),
        "history": list(learned.history),
    }


def _nonnegative(record: Record) -> Record:
    """The same with 0 for what is below it, and how many these are."""
    values = [max(0.0, each["value"]) for each in record["coefficients"]]
    return {
        **record,
        "mean_coefficients": _means((each["adapter"] for each in record["coefficients"]), values),
        "coefficients": [{**each, "value": value} for each, value in zip(record["coefficients"], values, strict=True)],
        "method_params": _clipped(record["method_params"]),
        "num_clipped": sum(each["value"] < 0 for each in record["coefficients"]),
    }


def _clipped(value: Any) -> Any:
    """Nested tables of coefficients, and switches between them, with 0 for numbers below it."""
    if isinstance(value, dict):
        return {key: _clipped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clipped(inner) for inner in value]
    return max(0.0, value) if isinstance(value, float) else value


def _means(adapters: Iterable[str], values: Sequence[float]) -> dict[str, float]:
    """Of each adapter the mean over its groups."""
    found: dict[str, list[float]] = {}
    for adapter, value in zip(adapters, values, strict=True):
        found.setdefault(adapter, []).append(value)
    return {adapter: math.fsum(own) / len(own) for adapter, own in found.items()}
