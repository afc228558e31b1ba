"""`lorica evaluate`."""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn

from lorica import config, files, results
from lorica.adapters import injection, peft_format
from lorica.adapters import prefix as prefixes
from lorica.adapters.adapter import Adapter
from lorica.config import EvaluateConfig, ModelConfig, TaskConfig, TrainConfig
from lorica.errors import ConfigError, MissingPathError
from lorica.evaluation.evaluate import Evaluation
from lorica.evaluation.predictions import write_predictions
from lorica.merging import saving
from lorica.merging.live import attach
from lorica.merging.merge import Merged
from lorica.results import RunFolder
from lorica.runs.merge_heads import HEADS, read_heads
from lorica.runs.prefix import lay_on
from lorica.runs.ready import chosen, prepare


def evaluate_target(target: str | None, given: EvaluateConfig) -> Evaluation:
    """Evaluate a run folder, a PEFT folder (LoRA or prefix), a merge's folder, or (target None) the base model alone.

    A run brings its own model and task; an adapter or a merge brings its base model, and needs `task`; a merge has the
    task's head too. With a run, the line is appended to its `evaluations.jsonl`, and the split's predictions are
    written anew.
    """
    model, task, folder, run = _resolve_target(target, given)
    cfg = config.check(TrainConfig, config.read_yaml(run.config)) if run else None
    split = given.split or (cfg.eval_split if cfg else "test")
    prefix = prefixes.read(folder) if folder is not None and _is_prefix(folder) else None
    ready = prepare(model, task, given.device, cfg.seed if cfg else 0, prefix.num_tokens if prefix else 0)
    if prefix is not None:
        lay_on(ready.base, prefix)
    elif folder is not None:
        _lay_on(ready.base.model, folder, ready.task.name)
    rows = ready.encoded(chosen(ready.task, split, task))
    found = ready.evaluated(split, rows, given.eval_batch_size or (cfg.eval_batch_size if cfg else 64))
    if run:
        of = split if given.task is None else f"{files.slug(ready.task.name)}_{split}"  # the run's own task, or another
        write_predictions(run.predictions(of), ready.task, rows, found)
        line = {**found.as_record(), "model": model.name, "finished": time.time()}
        files.append_record(run.evaluations, line)
    return found


def _is_prefix(folder: Path) -> bool:
    return (folder / peft_format.CONFIG_FILE).is_file() and prefixes.is_prefix(folder)


def _lay_on(model: nn.Module, folder: Path, task: str) -> None:
    """Put the adapter or the dense merge of a folder on the model, with the head for the task if there is one."""
    dense = folder / saving.DENSE_PATCH
    if dense.is_file():
        attach(model, (Merged(path, update, None) for path, update in saving.read_dense_patch(dense).items()))
    adapter = Adapter({}) if dense.is_file() else peft_format.read(folder)
    injection.inject(model, _with_head(adapter, folder, task))


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
    is_dense = (path / saving.DENSE_PATCH).is_file()
    if (path / "config.yaml").is_file() and not (is_adapter or is_dense):
        run = results.open_run(path)
        cfg = config.check(TrainConfig, config.read_yaml(run.config))
        if cfg.trainer == "none":
            raise ConfigError(f"{target!r} trained nothing: give model={cfg.model.name} task={cfg.task.name}")
        task = given.task or cfg.task
        if cfg.adapter.kind != "full":
            return given.model or cfg.model, task, run.adapter, run
        if given.model is not None:
            raise ConfigError(
                f"{target!r} trained a whole model and is evaluated as that: drop model={given.model.name}"
            )
        return cfg.model.model_copy(update={"name": str(run.model), "revision": None}), task, None, run
    if not (is_adapter or is_dense):
        raise MissingPathError(f"{target!r} is neither a run folder (config.yaml) nor an adapter (adapter_config.json)")
    if given.task is None:
        raise ConfigError(f"{target!r} is an adapter or a merge, which knows no task: give task=NAME")
    return given.model or ModelConfig(name=_base_of(path, is_adapter)), given.task, path, None


def _base_of(path: Path, is_adapter: bool) -> str:
    """The base model that an adapter, or a dense merge, says it is for."""
    if is_adapter:
        return (prefixes.read(path) if prefixes.is_prefix(path) else peft_format.read(path)).base_model or ""
    return str(files.read_json(path / "merge_metadata.json")["sources"][0]["base_model"])
