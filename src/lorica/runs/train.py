"""`lorica train`: one adapter or a chain of boosters, from config to run folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
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

    With `resume` the run goes on from its newest whole checkpoint. Raises InterruptedRunError after SIGTERM or SIGINT,
    when a checkpoint has been written.
    """
    begin = time.monotonic()
    cfg = given.resolved() if given.resume is None else config_of_run(given)
    if cfg.output_dir is not None and given.resume is None:
        results.check_free(cfg.output_dir)
    if given.resume is not None and (finished := _finished(results.open_run(given.resume), say)):
        return finished
    ready = prepare(cfg.model, cfg.task, cfg.device, cfg.seed)
    rows = encode_splits(cfg, ready)
    warn_of_truncation(rows, ready.max_length, say)
    learning = Learning(cfg, ready, rows, say)
    with _folder(given, cfg, ready) as run, Interruption() as interruption:
        resumed = _starting_point(given, run, learning, say)
        adapter = learning.run(run, resumed, interruption)
        ready.write(adapter, run.adapter, profile=cfg.adapter.profile, dropout=cfg.adapter.dropout)
        found = _evaluated(cfg, ready, rows)
        _leave_record(learning, run, adapter, found, time.monotonic() - begin)
    return Trained(run, found, time.monotonic() - begin)


def config_of_run(given: TrainConfig) -> TrainConfig:
    """The config of the run to be resumed; of the words given only `device` and `force` count beside it."""
    run = results.open_run(given.resume or "")
    extra = sorted(given.model_fields_set - {"resume", "force", "device"})
    if extra:
        raise ConfigError(f"resume={run.path} takes its config from the run: drop {', '.join(extra)}")
    return config.check(TrainConfig, config.read_yaml(run.config))


@contextlib.contextmanager
def _folder(given: TrainConfig, cfg: TrainConfig, ready: Ready) -> Iterator[RunFolder]:
    """The run's folder, new or taken up again, locked against a second process."""
    if given.resume is not None:
        run = results.open_run(given.resume)
        with files.locked_folder(run.path):
            yield run
        return
    run = results.new_run(cfg.output_dir, f"{ready.task.name}-{Path(cfg.model.name).name}-{cfg.trainer}")
    with files.locked_folder(run.path):
        files.write_atomic(run.config, config.dump(cfg))
        files.write_json(run.origin, results.origin(cfg.seed, ready.device))
        yield run


def _starting_point(given: TrainConfig, run: RunFolder, learning: Learning, say: Console) -> Resumed:
    if given.resume is None:
        return start_over(run)
    return resume_from(run, learning.identity, given.force, say)


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
