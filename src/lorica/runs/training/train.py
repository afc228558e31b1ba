"""`lorica train`: one adapter or a chain of boosters, from config to run folder."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorica import card, config, files, models, processes, results
from lorica.config import TrainConfig
from lorica.config.contradictions import LOW_RANK
from lorica.errors import ConfigError, NonFiniteLossError, OutputExistsError
from lorica.evaluation.evaluate import Evaluation
from lorica.evaluation.predictions import write_predictions
from lorica.models import choose_device
from lorica.optim import compiled
from lorica.optim.backprop import accelerator
from lorica.processes import Processes
from lorica.results import RunFolder
from lorica.runs.ready import prepare
from lorica.runs.training.efficiency import efficiency, forget_peak, peak_bytes
from lorica.runs.training.in_context import evaluate_in_context
from lorica.runs.training.learning import Learning, encode_splits, warn_of_fewer, warn_of_truncation
from lorica.runs.training.resuming import Resumed, resume_from, start_over
from lorica.runs.training.tracking import Tracking, check, tracked
from lorica.runs.training.tuning import Outcome
from lorica.training import sharding
from lorica.training.interruption import Interruption

LEAST_LENGTH = 8  # tokens that a prefix must leave for a prompt: the least task.max_length


@dataclass(frozen=True)
class Trained:
    """What a training run leaves: its folder and what the evaluation at its end found."""

    run: RunFolder
    evaluation: Evaluation
    seconds: float


def train(given: TrainConfig, say: Console) -> Trained:
    """Train, evaluate, and leave a run folder; `say` takes what a person should read.

    With `resume` the run goes on from its newest whole checkpoint, and a finished run is left as it is. Started by
    torchrun, the processes share out the rows of every batch, and the first alone speaks and writes. With trainer=none
    nothing is trained, and the base model is evaluated as it is, behind demonstrations if there are any. Raises
    InterruptedRunError after SIGTERM or SIGINT, when a checkpoint has been written.
    """
    if given.force and given.resume is None:
        raise ConfigError("force=true is of a run that is gone on with: add resume=RUN, or drop it")
    with processes.joined() as together:
        if given.trainer == "none" and given.resume is None:
            return _shown(given, together, say)
        say = say if together.is_first else Console(quiet=True)
        return _gone_on(given, together, say) if given.resume is not None else _begun(given.resolved(), together, say)


def _shown(cfg: TrainConfig, together: Processes, say: Console) -> Trained:
    """A run that trains nothing."""
    if together.num > 1:
        raise ConfigError(
            f"trainer=none trains nothing that {together.num} processes could share: run it without torchrun"
        )
    begin = time.monotonic()
    run, found = evaluate_in_context(cfg, say)
    return Trained(run, found, time.monotonic() - begin)


def _begun(cfg: TrainConfig, together: Processes, say: Console) -> Trained:
    """A new run."""
    if cfg.output_dir is not None and together.is_first:
        results.check_free(cfg.output_dir)
    learning = _prepared(cfg, together, say)
    name = f"{learning.ready.task.name}-{Path(cfg.model.name).name}-{cfg.trainer}"
    run = together.of_first(results.new_run(cfg.output_dir, name) if together.is_first else None)
    assert run is not None
    if not together.is_first:
        return _completed(learning, run, Resumed())
    with files.locked_folder(run.path):
        if run.config.exists():  # another one has come and gone since this one found the folder empty
            raise OutputExistsError(f"another run has taken {run.path}: name a new folder, nothing is written over")
        files.write_atomic(run.config, config.dump(cfg))
        files.write_json(run.origin, results.origin(cfg.seed, learning.ready.device))
        return _completed(learning, run, start_over(run))


def _gone_on(given: TrainConfig, together: Processes, say: Console) -> Trained:
    """A run taken up again, if it is not finished."""
    run = results.open_run(given.resume or "")
    with files.locked_folder(run.path) if together.is_first else contextlib.nullcontext():
        return _finished(run, say) or _resumed(given, run, together, say)


def _resumed(given: TrainConfig, run: RunFolder, together: Processes, say: Console) -> Trained:
    """The run of `run`'s own config gone on with; of the words given only `device` and `force` count beside it."""
    extra = sorted(given.model_fields_set - {"resume", "force", "device"})
    if extra:
        raise ConfigError(f"resume={run.path} takes its config from the run: drop {', '.join(extra)}")
    cfg = config.check(TrainConfig, config.read_yaml(run.config))
    if cfg.trainer == "none":
        raise ConfigError(f"{run.path} trains nothing that could be gone on with: run its config.yaml anew")
    if given.force:
        cfg = cfg.resolved()  # a key that was changed may leave others open
    if "device" in given.model_fields_set:
        cfg = cfg.model_copy(update={"device": given.device})
    learning = _prepared(cfg, together, say)
    found = resume_from(run, learning.identity, given.force, say) if together.is_first else Resumed()
    return _completed(learning, run, together.of_first(found))


def _prepared(cfg: TrainConfig, together: Processes, say: Console) -> Learning:
    """Everything that can be refused is refused here, before there is a run folder."""
    sharded = together.num > 1 and _is_sharded(cfg, together.num)
    if cfg.max_seconds is not None and together.num > 1:
        raise ConfigError(
            f"max_seconds={cfg.max_seconds:g} would end {together.num} processes at different steps: give max_steps"
        )
    check_machine(cfg)
    ready = prepare(cfg.model, cfg.task, cfg.device, cfg.seed, num_prefix=cfg.num_prefix)
    if cfg.num_prefix and ready.max_length < LEAST_LENGTH:
        raise ConfigError(
            f"prefix.num_tokens={cfg.num_prefix} takes too many of the {models.longest_input(ready.base)} positions of "
            f"{cfg.model.name}: leave {LEAST_LENGTH} or more for the prompt"
        )
    rows = encode_splits(cfg, ready)
    warn_of_fewer(rows, cfg.task, say)
    warn_of_truncation(rows, ready.max_length, say)
    return Learning(cfg, ready, rows, say, together, sharded)


def check_machine(cfg: TrainConfig) -> None:
    """Raise what this machine lacks for a run by the config: its device, a compiler, a library."""
    choose_device(cfg.device)
    if cfg.compile:
        compiled.check_compiler()
    if cfg.model.quantization == "int8":
        models.int8()
    check(cfg.trackers)


def _is_sharded(cfg: TrainConfig, num_processes: int) -> bool:
    """Whether several processes are to hold the base in parts, as accelerate is set up.

    Raises ConfigError where they would not come to what one process comes to.
    """
    if cfg.zo.objective == "macro_f1":
        raise ConfigError(
            f"zo.objective=macro_f1 is no mean over examples, and each of {num_processes} processes sees a part of the "
            "batch: use zo.objective=accuracy or loss, or one process"
        )
    if cfg.trainer != "backprop":
        if sharding.is_asked_for():
            raise ConfigError(
                f"accelerate is set up for FSDP, and under trainer={cfg.trainer} every process holds the base whole: "
                "start with torchrun instead"
            )
        return False
    if not sharding.is_asked_for():
        accelerator(choose_device(cfg.device))  # which refuses what else it may be set up for
        return False
    if cfg.adapter.kind not in LOW_RANK or cfg.model.quantization != "none":
        raise ConfigError(
            f"accelerate is set up for FSDP, which shards a frozen float base: adapter.kind={cfg.adapter.kind}, "
            f"model.quantization={cfg.model.quantization} needs it whole; start with torchrun instead"
        )
    if cfg.compile:
        raise ConfigError(
            "accelerate is set up for FSDP, under which compile=true is not supported: start with torchrun, or drop one"
        )
    return True


def _completed(learning: Learning, run: RunFolder, resumed: Resumed) -> Trained:
    """Go on from where the run stands to its record, before the eyes of its trackers."""
    with tracked(learning, run, resumed.progress.step) as tracking:
        return _trained(learning, run, resumed, tracking)


def _trained(learning: Learning, run: RunFolder, resumed: Resumed, tracking: Tracking | None) -> Trained:
    """Train, write the adapter, evaluate it, leave the record."""
    begin, cfg = time.monotonic() - resumed.progress.seconds, learning.cfg
    base = models.checksum(learning.ready.base) if learning.processes.is_first else ""  # nothing is laid on it yet
    num_parameters = sum(parameter.numel() for parameter in learning.ready.base.model.parameters())
    forget_peak(learning.ready.device)
    with Interruption(learning.processes) as interruption:
        outcome = learning.run(run, resumed, interruption, tracking)
    peak = peak_bytes(learning.ready.device)
    if learning.processes.is_first:
        outcome.write(run.outcome(outcome.place))
    trained = None
    if learning.evaluates:
        found = learning.ready.evaluated(cfg.eval_split, learning.rows[cfg.eval_split], cfg.eval_batch_size)
        if not math.isfinite(found.loss):
            told = f"the loss on {cfg.eval_split} is {found.loss} after training"
            raise NonFiniteLossError(f"{told}: lower learning_rate={cfg.learning_rate:g}")
        trained = Trained(run, found, time.monotonic() - begin)
        if tracking is not None:
            tracking.evaluation(found, outcome)
    if learning.processes.is_first and trained is not None:
        parts = {
            "timing": {"seconds": trained.seconds, "peak_bytes": peak},
            "efficiency": efficiency(learning, num_parameters, run, outcome),
            "artifacts": results.artifacts(run.outcome(outcome.place), base),
        }
        _leave_record(learning, outcome, trained, parts)
    return learning.processes.of_first(trained)  # type: ignore[return-value]


def _finished(run: RunFolder, say: Console) -> Trained | None:
    """What a finished run found, so that resuming it does nothing."""
    if not run.record.exists():
        return None
    cfg = config.check(TrainConfig, config.read_yaml(run.config))
    say.print(f"{run.path} is finished: nothing to resume", highlight=False, soft_wrap=True)
    return Trained(run, Evaluation.of_record(files.read_json(run.evaluation(cfg.eval_split))), 0.0)


def _leave_record(
    learning: Learning, outcome: Outcome, trained: Trained, parts: Mapping[str, Mapping[str, Any]]
) -> None:
    cfg, ready, run, found = learning.cfg, learning.ready, trained.run, trained.evaluation
    files.write_json(run.evaluation(found.split), found.as_record())
    write_predictions(run.predictions(found.split), ready.task, learning.rows[found.split], found)
    steps = files.read_records(run.training_loss)
    text = card.run_card(
        about=outcome.about(),
        config=cfg.model_dump(mode="json"),
        task=ready.task.name,
        base_model=cfg.model.name,
        num_examples={split: len(examples) for split, examples in learning.rows.items()},
        evaluation=found.as_record(),
        losses=[step["loss"] for step in steps if step["applied"]],
        last_step=steps[-1] if steps else {},
        rounds=[asdict(entry) for entry in learning.tuning.rounds()],
        folder=str(run.path),
    )
    files.write_atomic(run.card, text)
    files.write_json(run.trainer_state, learning.trainer_state())
    metrics = {f"{found.split}_{name}": score.value for name, score in found.metrics.items()}
    results.finish(run, cfg.model_dump(mode="json"), metrics, **parts)
