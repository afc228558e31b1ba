"""`lorica evaluate` of one target on one task; of several, see `matrix`."""

from __future__ import annotations

import time

from lorica import files
from lorica.config import EvaluateConfig
from lorica.errors import ConfigError
from lorica.evaluation.evaluate import Evaluation
from lorica.evaluation.predictions import write_predictions
from lorica.runs.evaluating.targets import BASE, Target, resolve_target
from lorica.runs.ready import chosen, prepare


def evaluate_target(word: str | None, given: EvaluateConfig) -> Evaluation:
    """Evaluate a run, an adapter (LoRA or prefix), a merge, a model, or (None) the model of the config alone.

    A run brings its own model and task; an adapter or a merge brings its base model, and needs `task`; a merge has the
    task's head too. With a run, the line is appended to its `evaluations.jsonl`, and the split's predictions are
    written anew.
    """
    target = _base(given) if word in (None, BASE) else resolve_target(word, given.model)
    cfg, run = target.cfg, target.run
    task = given.task or (cfg.task if cfg else None)
    if task is None:
        raise ConfigError(f"{word!r} is an adapter, a merge or a model, which knows no task: give task=NAME")
    split = given.split or (cfg.eval_split if cfg else "test")
    ready = prepare(target.model, task, given.device, cfg.seed if cfg else 0, target.num_prefix)
    with target.laid_on(ready):
        rows = ready.encoded(chosen(ready.task, split, task))
        found = ready.evaluated(split, rows, given.eval_batch_size or target.eval_batch_size)
    if run:
        of = split if given.task is None else f"{files.slug(ready.task.name)}_{split}"  # the run's own task, or another
        write_predictions(run.predictions(of), ready.task, rows, found)
        line = {**found.as_record(), "model": target.model.name, "finished": time.time()}
        files.append_record(run.evaluations, line)
    return found


def _base(given: EvaluateConfig) -> Target:
    if given.model is None or given.task is None:
        raise ConfigError("nothing to evaluate: name a run or an adapter folder, or give model=M task=T")
    return Target(given.model)
