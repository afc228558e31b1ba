"""`lorica evaluate`."""

from __future__ import annotations

import time
from pathlib import Path

from lorica import config, files, results
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.config import EvaluateConfig, ModelConfig, TaskConfig, TrainConfig
from lorica.errors import ConfigError, MissingPathError
from lorica.evaluation.evaluate import Evaluation, evaluate
from lorica.results import RunFolder
from lorica.runs.merge_heads import HEADS, read_heads
from lorica.runs.ready import chosen, prepare


def evaluate_target(target: str | None, given: EvaluateConfig) -> Evaluation:
    """Evaluate a run folder, a PEFT adapter folder, or (target None) the base model alone.

    A run brings its own model and task; an adapter brings its base model, and needs `task`; a merge's folder has the
    task's head too. With a run, the line is appended to its `evaluations.jsonl` too.
    """
    model, task, folder, run = _resolve_target(target, given)
    cfg = config.check(TrainConfig, config.read_yaml(run.config)) if run else None
    split = given.split or (cfg.eval_split if cfg else "test")
    ready = prepare(model, task, given.device, cfg.seed if cfg else 0)
    if folder is not None:
        injection.inject(ready.base.model, _with_head(peft_format.read(folder), folder, ready.task.name))
    found = evaluate(
        ready.base.model,
        ready.task,
        split,
        ready.encoded(chosen(ready.task, split, task)),
        ready.collate(),
        batch_size=given.eval_batch_size or (cfg.eval_batch_size if cfg else 64),
    )
    if run:
        line = {**found.as_record(), "model": model.name, "finished": time.time()}
        files.append_record(run.evaluations, line)
    return found


def _with_head(adapter: Adapter, folder: Path, task: str) -> Adapter:
    """The adapter, with the head that a merge keeps beside it for the task, if there is one."""
    file = folder / HEADS / f"{files.slug(task)}.safetensors"
    if adapter.heads or not file.is_file():
        return adapter
    return Adapter(adapter.updates, read_heads(file), adapter.base_model)


def _resolve_target(
    target: str | None, given: EvaluateConfig
) -> tuple[ModelConfig, TaskConfig, Path | None, RunFolder | None]:
    """(model, task, adapter folder, run) that an evaluation is about."""
    if target is None:
        if given.model is None or given.task is None:
            raise ConfigError("nothing to evaluate: name a run or an adapter folder, or give model=M task=T")
        return given.model, given.task, None, None
    path = Path(target)
    is_adapter = (path / peft_format.CONFIG_FILE).is_file()
    if (path / "config.yaml").is_file() and not is_adapter:
        run = results.open_run(path)
        cfg = config.check(TrainConfig, config.read_yaml(run.config))
        return given.model or cfg.model, given.task or cfg.task, run.adapter, run
    if not is_adapter:
        raise MissingPathError(f"{target!r} is neither a run folder (config.yaml) nor an adapter (adapter_config.json)")
    model = given.model or ModelConfig(name=peft_format.read(path).base_model or "")
    if given.task is None:
        raise ConfigError(f"{target!r} is an adapter, which knows no task: give task=NAME")
    return model, given.task, path, None
