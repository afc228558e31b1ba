"""trainer=none: the base model as it is, shown demonstrations before each prompt, or none (zero-shot)."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from lorica import config, files, results
from lorica.config import TrainConfig
from lorica.errors import ConfigError
from lorica.evaluation.evaluate import Evaluation
from lorica.evaluation.predictions import write_predictions
from lorica.results import RunFolder
from lorica.runs.ready import Ready, chosen, prepare
from lorica.tasks import demonstrations
from lorica.tasks.base import Example


def evaluate_in_context(cfg: TrainConfig, say: Console) -> tuple[RunFolder, Evaluation]:
    """Evaluate on the config's split and leave a run folder: config, origin, record, results and predictions.

    With task.num_train, so many training examples are shown before each prompt: one set for all, or with
    task.demonstrations=per_example a set for each. Raises ConfigError for a model without a head for its task.
    """
    begin = time.monotonic()
    if cfg.output_dir is not None:
        results.check_free(cfg.output_dir)
    ready = prepare(cfg.model, cfg.task, cfg.device, cfg.seed)
    if ready.base.has_drawn_head:
        raise headless(ready)
    examples = chosen(ready.task, cfg.eval_split, cfg.task)
    rows = ready.encoded(_shown(cfg, ready, examples, say) if cfg.task.num_train else examples)
    run = results.new_run(cfg.output_dir, f"{ready.task.name}-{Path(cfg.model.name).name}-none")
    with files.locked_folder(run.path):
        files.write_atomic(run.config, config.dump(cfg))
        files.write_json(run.origin, results.origin(cfg.seed, ready.device))
        found = ready.evaluated(cfg.eval_split, rows, cfg.eval_batch_size)
        files.write_json(run.evaluation(found.split), found.as_record())
        write_predictions(run.predictions(found.split), ready.task, rows, found)
        metrics = {f"{found.split}_{name}": score.value for name, score in found.metrics.items()}
        results.finish(run, cfg.model_dump(mode="json"), metrics, {"seconds": time.monotonic() - begin})
    return run, found


def headless(ready: Ready) -> ConfigError:
    """The error of a task that would be answered by a classification head of random numbers."""
    return ConfigError(
        f"{ready.base.name} has no head for {ready.task.name}, and one that is drawn at random knows nothing: train "
        "one first, or ask a causal model by prompt"
    )


def _shown(cfg: TrainConfig, ready: Ready, examples: list[Example], say: Console) -> list[Example]:
    """The examples behind their demonstrations; says how many found no room."""
    if ready.task.kind == "classification":
        raise ConfigError("demonstrations are shown in a prompt, and a head reads none: drop task.num_train")
    size, pool = cfg.task.num_train or 0, ready.task.splits["train"]
    if cfg.task.demonstrations == "per_example":
        if size > len(pool):
            raise ConfigError(f"task.num_train={size}, and {ready.task.name} has {len(pool)} training examples")
        sets = demonstrations.sets_of(
            pool, size, len(examples), seed=cfg.task.train_set_seed, stratified=cfg.task.stratified
        )
    else:
        sets = [chosen(ready.task, "train", cfg.task)] * len(examples)
    shown, num_dropped = demonstrations.demonstrated(
        ready.task,
        examples,
        sets,
        ready.base.tokenizer,
        max_length=ready.max_length,
        is_encoder_decoder=ready.is_encoder_decoder,
    )
    if num_dropped:
        mean = size - num_dropped / len(examples)
        say.print(
            f"warning: {num_dropped} of {size * len(examples)} demonstrations found no room in {ready.max_length} "
            f"tokens: a prompt has {mean:.1f} of {size} in the mean",
            highlight=False,
            soft_wrap=True,
        )
    return shown
