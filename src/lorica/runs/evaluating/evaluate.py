"""`lorica evaluate` of one target on one task; of several, see `matrix`."""

from __future__ import annotations

import time

from lorica import files
from lorica.config import EvaluateConfig, TaskConfig, TrainConfig
from lorica.errors import ConfigError
from lorica.evaluation.evaluate import Evaluation
from lorica.evaluation.predictions import write_predictions
from lorica.runs.evaluating.asked_tasks import changes_of, check_shown, told_apart_by
from lorica.runs.evaluating.targets import BASE, Target, lacks_head, resolve_target
from lorica.runs.ready import Ready, chosen, prepare, task_of
from lorica.runs.training.in_context import headless


def evaluate_target(word: str | None, given: EvaluateConfig) -> Evaluation:
    """Evaluate a run, an adapter (LoRA or prefix), a merge, a model, or (None) the model of the config alone.

    A run brings its own model and task, of which `task` may change some keys; an adapter or a merge brings its base
    model, and needs `task`; a merge has the task's head too. With a run, the line is appended to its
    `evaluations.jsonl`, and the split's predictions are written anew. Raises ConfigError for a model whose head would
    be drawn.
    """
    target = _base(given) if word in (None, BASE) else resolve_target(word, given.model)
    cfg, run = target.cfg, target.run
    task = _task(given, cfg)
    if task is None:
        raise ConfigError(f"{word!r} is an adapter, a merge or a model, which knows no task: give task=NAME")
    split = given.split or (cfg.eval_split if cfg else "test")
    ready = prepare(target.model, task, given.device, cfg.seed if cfg else 0, target.num_prefix)
    if lacks_head(ready, target):
        raise headless(ready)
    if cfg is not None and told_apart_by(task) != told_apart_by(cfg.task):
        _check_labels(ready, cfg)
    with target.laid_on(ready):
        rows = ready.encoded(chosen(ready.task, split, task))
        found = ready.evaluated(split, rows, given.eval_batch_size or target.eval_batch_size)
    if run:
        is_own = given.task is None  # and as the run has it, so that its predictions are those of its results
        of = split if is_own else f"{files.slug(ready.task.name)}_{split}"
        write_predictions(run.predictions(of), ready.task, rows, found)
        line = {**found.as_record(), "model": target.model.name, "finished": time.time()}
        files.append_record(run.evaluations, line)
    return found


def _task(given: EvaluateConfig, cfg: TrainConfig | None) -> TaskConfig | None:
    """The run's own task, with what is said of it; or the one that is named."""
    check_shown(given.task, given.split)
    changes = changes_of(given.task)
    if cfg is None or changes.keys() & {"name", "path"}:
        return given.task
    return cfg.task.model_copy(update=changes)


def _check_labels(ready: Ready, cfg: TrainConfig) -> None:
    """Raise ConfigError if a run's head would be asked a task whose labels are not those that it was trained on."""
    if ready.base.kind != "classification":
        return
    own = task_of(cfg.task, "classification")
    if own.labels != ready.task.labels:
        raise ConfigError(
            f"its head is of {own.name}, which has the labels {', '.join(own.labels)}, and cannot be asked "
            f"{ready.task.name}, which has others"
        )


def _base(given: EvaluateConfig) -> Target:
    if given.model is None or given.task is None:
        raise ConfigError("nothing to evaluate: name a run or an adapter folder, or give model=M task=T")
    return Target(given.model)
