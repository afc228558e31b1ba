"""`lorica train`: one adapter or a chain of boosters, from config to run folder."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from lorica import card, config, files, results
from lorica.adapters.adapter import Adapter
from lorica.config import TrainConfig
from lorica.errors import ConfigError
from lorica.evaluation.evaluate import Evaluation, evaluate
from lorica.results import RunFolder
from lorica.runs.learning import Learning, Rows, encode_splits, warn_of_truncation
from lorica.runs.ready import Ready, prepare
from lorica.runs.resuming import Resumed, resume_from, start_over
from lorica.training.interruption import Interruption


@dataclass(frozen=True)
class Trained:
    """What a training run leaves: its folder and what the evaluation at its end found."""

    run: RunFolder
    evaluation: Evaluation
    seconds: float


def train(given: TrainConfig, say: Console) -> Trained:
    """Train, evaluate, and leave a run folder; `say` takes what a person should read.

    With `resume` the run goes on from its newest whole checkpoint, and a finished run is left as it is. Raises
    InterruptedRunError after SIGTERM or SIGINT, when a checkpoint has been written.
    """
    if given.resume is not None:
        run = results.open_run(given.resume)
        with files.locked_folder(run.path):
            return _finished(run, say) or _resumed(given, run, say)
    cfg = given.resolved()
    if cfg.output_dir is not None:
        results.check_free(cfg.output_dir)
    learning = _prepared(cfg, say)
    run = results.new_run(cfg.output_dir, f"{learning.ready.task.name}-{Path(cfg.model.name).name}-{cfg.trainer}")
    with files.locked_folder(run.path):
        files.write_atomic(run.config, config.dump(cfg))
        files.write_json(run.origin, results.origin(cfg.seed, learning.ready.device))
        return _completed(learning, run, start_over(run))


def _resumed(given: TrainConfig, run: RunFolder, say: Console) -> Trained:
    """The run of `run`'s own config gone on with; of the words given only `device` and `force` count beside it."""
    extra = sorted(given.model_fields_set - {"resume", "force", "device"})
    if extra:
        raise ConfigError(f"resume={run.path} takes its config from the run: drop {', '.join(extra)}")
    cfg = config.check(TrainConfig, config.read_yaml(run.config))
    if "device" in given.model_fields_set:
        cfg = cfg.model_copy(update={"device": given.device})
    learning = _prepared(cfg, say)
    return _completed(learning, run, resume_from(run, learning.identity, given.force, say))


def _prepared(cfg: TrainConfig, say: Console) -> Learning:
    """Everything that can be refused is refused here, before there is a run folder."""
    ready = prepare(cfg.model, cfg.task, cfg.device, cfg.seed)
    rows = encode_splits(cfg, ready)
    warn_of_truncation(rows, ready.max_length, say)
    return Learning(cfg, ready, rows, say)


def _completed(learning: Learning, run: RunFolder, resumed: Resumed) -> Trained:
    """Train from where the run stands, write the adapter, evaluate it, leave the record."""
    begin, cfg = time.monotonic(), learning.cfg
    with Interruption() as interruption:
        adapter = learning.run(run, resumed, interruption)
    learning.ready.write(adapter, run.adapter, profile=cfg.adapter.profile, dropout=cfg.adapter.dropout)
    found = _evaluated(cfg, learning.ready, learning.rows)
    seconds = time.monotonic() - begin
    _leave_record(learning, run, adapter, found, seconds)
    return Trained(run, found, seconds)


def _finished(run: RunFolder, say: Console) -> Trained | None:
    """What a finished run found, so that resuming it does nothing."""
    if not run.record.exists():
        return None
    cfg = config.check(TrainConfig, config.read_yaml(run.config))
    say.print(f"{run.path} is finished: nothing to resume", highlight=False, soft_wrap=True)
    return Trained(run, Evaluation.of_record(files.read_json(run.evaluation(cfg.eval_split))), 0.0)


def _evaluated(cfg: TrainConfig, ready: Ready, rows: Rows) -> Evaluation:
    return evaluate(
        ready.base.model,
        ready.task,
        cfg.eval_split,
        rows[cfg.eval_split],
        ready.collate(),
        batch_size=cfg.eval_batch_size,
    )


def _leave_record(learning: Learning, run: RunFolder, adapter: Adapter, found: Evaluation, seconds: float) -> None:
    cfg, ready = learning.cfg, learning.ready
    files.write_json(run.evaluation(found.split), found.as_record())
    steps = files.read_records(run.training_loss)
    text = card.run_card(
        config=cfg.model_dump(mode="json"),
        task=ready.task.name,
        base_model=cfg.model.name,
        kind=ready.base.kind,
        num_labels=len(ready.task.labels),
        modules=list(adapter.updates),
        rank=max(update.rank for update in adapter.updates.values()),
        heads=list(adapter.heads),
        num_parameters=adapter.num_parameters(),
        num_examples={split: len(examples) for split, examples in learning.rows.items()},
        evaluation=found.as_record(),
        losses=[step["loss"] for step in steps if step["applied"]],
        last_step=steps[-1] if steps else {},
        rounds=[asdict(booster.entry) for booster in learning.ledger.boosters] if learning.ledger else [],
        folder=str(run.path),
    )
    files.write_atomic(run.card, text)
    files.write_json(run.trainer_state, learning.trainer_state())
    metrics = {f"{found.split}_{name}": score.value for name, score in found.metrics.items()}
    results.finish(run, cfg.model_dump(mode="json"), metrics, {"seconds": seconds})
