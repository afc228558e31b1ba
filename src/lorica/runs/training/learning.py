"""One training run under way: what all kinds of training share, whatever it is that they train."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lorica import files, models, randomness
from lorica.config import TaskConfig, TrainConfig
from lorica.errors import InterruptedRunError
from lorica.optim.replay import Header, ReplayLog, numerics
from lorica.optim.schedules import multiplier, warmup_steps
from lorica.processes import Processes
from lorica.randomness import Name
from lorica.results import RunFolder
from lorica.runs.ready import Ready, asked_size, chosen, train_as_of
from lorica.runs.training.full import Full
from lorica.runs.training.linear_probe import LinearProbe
from lorica.runs.training.lora import Lora
from lorica.runs.training.prefix import PrefixTuning
from lorica.runs.training.resuming import Resumed, differing
from lorica.runs.training.stretch_trainer import StretchTrainer
from lorica.runs.training.tracking import Tracking
from lorica.runs.training.tuning import Outcome, RunUnderWay, Tuning
from lorica.runs.training.xgblora import XGBLora
from lorica.tasks.base import Split
from lorica.tasks.batching import TrainingStream
from lorica.tasks.prompting import Encoded
from lorica.training import callbacks
from lorica.training.decided import Decided
from lorica.training.fit import Progress
from lorica.training.interruption import Interruption
from lorica.training.json_lines import JsonLines
from lorica.training.sharding import shard

NO_REPLAY = "a replay may differ from here on"
Rows = dict[Split, list[Encoded]]
KINDS: dict[str, Callable[[RunUnderWay], Tuning]] = {
    "lora": Lora,
    "xgblora": XGBLora,
    "full": Full,
    "prefix": PrefixTuning,
    "linear_probe": LinearProbe,
}


def encode_splits(cfg: TrainConfig, ready: Ready) -> Rows:
    """The splits that the run looks at, tokenised."""
    return {split: ready.encoded(chosen(ready.task, split, cfg.task)) for split in splits_of(cfg)}


def splits_of(cfg: TrainConfig) -> list[Split]:
    """The splits that a run looks at, each once."""
    during: list[Split] = ["dev"] if cfg.eval_steps or cfg.adapter.kind == "linear_probe" else []
    return list(dict.fromkeys(["train", *during, cfg.eval_split]))


def warn_of_fewer(rows: Rows, task: TaskConfig, say: Console) -> None:
    """Tell which splits have fewer examples than were asked for."""
    for split, examples in rows.items():
        asked = asked_size(split, task)
        if asked is not None and len(examples) < asked:
            say.print(f"warning: {asked} {split} examples were asked for, and there are {len(examples)}: all are taken")


def warn_of_truncation(rows: Rows, max_length: int, say: Console) -> None:
    """Tell how many examples of each split lost tokens."""
    for split, examples in rows.items():
        count = sum(row.truncated for row in examples)
        if count:
            say.print(f"warning: {count} of {len(examples)} {split} examples were cut to {max_length} tokens")


@dataclass
class Learning:
    """One training run under way."""

    cfg: TrainConfig
    ready: Ready
    rows: Rows
    say: Console
    processes: Processes = field(default_factory=Processes)
    sharded: bool = False
    decided: Decided | None = None
    looked: Mapping[str, Tensor] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    best_dev_loss: float | None = None
    probe_rows: list[Encoded] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows["train"], self.probe_rows = parted(self.cfg, self.rows["train"])
        self.stream = TrainingStream(
            [row.length for row in self.rows["train"]],
            self.cfg.batch_size,
            self.cfg.seed,
            self.cfg.bucketing,
            [row.label for row in self.rows["train"]] if self.cfg.stratified else None,
        )
        self.train_as = train_as_of(self.cfg.train_as, self.cfg.zo.objective, self.ready.task)
        self.identity = _identity(self.cfg, self.ready)  # of the bare base: nothing is laid on it yet
        self.tuning: Tuning = KINDS[self.cfg.adapter.kind](self)

    @property
    def num_steps(self) -> int:
        return num_steps(self.cfg, len(self.rows["train"]))

    @property
    def num_seconds(self) -> float:
        return self.cfg.max_seconds or math.inf

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.cfg, len(self.rows["train"]))

    @property
    def evaluates(self) -> bool:
        """Whether this process looks at dev and test: the first, or all where each holds a part of the base."""
        return self.processes.is_first or self.sharded

    def run(
        self, run: RunFolder, resumed: Resumed, interruption: Interruption, tracking: Tracking | None = None
    ) -> Outcome:
        """Train to the end; what was trained stays on the model. InterruptedRunError if a signal came."""
        self.progress, self.best_dev_loss = resumed.progress, resumed.best_dev_loss
        self.say.print(self._headline(), highlight=False, soft_wrap=True)
        if self.sharded:
            shard(self.ready.base.model, self.processes)
        with torch.random.fork_rng(enabled=self.cfg.base_dropout):
            if self.cfg.base_dropout:  # the base's own dropout knows no other generator than the global one
                names: tuple[Name, ...] = ("base dropout", *self.processes.own_names)
                torch.manual_seed(randomness.key(self.cfg.seed, *names) & 0xFFFF_FFFF)
            with self._watched(run) as watchers, self._logged(run) as log:
                trainer = StretchTrainer(self, run, interruption, resumed, watchers, log, tracking)
                outcome = self.tuning.train(run, trainer)
                trainer.note_rounds()
                if outcome is not None and interruption.signal:
                    trainer.save_end()
                    outcome = None
        if outcome is None:
            raise InterruptedRunError(
                f"stopped at step {self.progress.step}; go on with: lorica train resume={run.path}", interruption.signal
            )
        return outcome

    def trainer_state(self) -> dict[str, Any]:
        """Where the run ended, for `trainer_state.json`."""
        rounds = len(self.tuning.rounds())
        return {**asdict(self.progress), "num_rounds": rounds, "best_dev_loss": self.best_dev_loss}

    def rate(self, step: int, first_step: int) -> float:
        """The learning rate of a step in a round that began at `first_step`."""
        cfg = self.cfg
        assert cfg.schedule and cfg.learning_rate is not None
        rate = cfg.learning_rate * multiplier(cfg.schedule, step, self.num_steps, cfg.warmup)
        rise = warmup_steps(cfg.warmup, self.num_steps)
        if cfg.boosting.rewarm and first_step > 0 and step - first_step < rise:
            rate *= (step - first_step + 1) / rise
        return rate

    @contextlib.contextmanager
    def _watched(self, run: RunFolder) -> Iterator[list[callbacks.Watch]]:
        """The first process's watchers; the others neither speak nor write."""
        if not self.processes.is_first:
            yield []
            return
        with callbacks.shown(self.num_steps, self.cfg.logging_steps, self.say) as show:
            yield [callbacks.write_steps(JsonLines(run.training_loss)), show]

    @contextlib.contextmanager
    def _logged(self, run: RunFolder) -> Iterator[ReplayLog | None]:
        """What a zeroth-order run is replayed from, as the first process writes it."""
        if self.cfg.trainer != "zo" or not self.processes.is_first:
            yield None
            return
        with ReplayLog(run.replay, self.header()) as log:
            for each in differing(log.before or {}, asdict(self.header())) if log.before else []:
                self.say.print(f"warning: the steps before were taken with another {each}: {NO_REPLAY}", soft_wrap=True)
            yield log

    def header(self) -> Header:
        """What the log of this run is of."""
        zo, base = self.cfg.zo, self.ready.base
        return Header(
            config=files.content_hash(self.identity["config"]),
            base=self.identity["base"],
            directions={"num": zo.num_directions, "distribution": zo.distribution, "seed": self.cfg.seed},
            numerics=numerics(self.ready.device),
            model={"kind": base.kind, "num_labels": len(self.ready.task.labels)},
        )

    def _headline(self) -> str:
        cfg, task = self.cfg, self.ready.task
        sizes = ", ".join(f"{len(examples)} {split}" for split, examples in self.rows.items())
        where = f"{cfg.model.name} ({cfg.model.dtype}, {self.ready.device})"
        return "\n".join([f"{task.name} ({task.kind}; {sizes}) on {where}", *self.tuning.told()])


def num_steps(cfg: TrainConfig, num_rows: int) -> int:
    """How many steps a resolved config asks for, where so many rows are trained on."""
    if cfg.num_epochs is not None:
        return math.ceil(cfg.num_epochs * steps_per_epoch(cfg, num_rows))
    assert cfg.max_steps is not None
    return cfg.max_steps


def steps_per_epoch(cfg: TrainConfig, num_rows: int) -> int:
    return math.ceil(math.ceil(num_rows / cfg.batch_size) / cfg.gradient_accumulation_steps)


def config_identity(cfg: TrainConfig) -> dict[str, Any]:
    """Of a config, what decides the steps of a run."""
    ignored = {"output_dir", "resume", "force", "device", "logging_steps", "save_steps", "trackers", "tracking"}
    return cfg.model_dump(mode="json", exclude=ignored)


def _identity(cfg: TrainConfig, ready: Ready) -> dict[str, Any]:
    """What a checkpoint must have been made with to be gone on from: config, data, base."""
    return {
        "config": config_identity(cfg),
        "data": ready.task.fingerprint,
        "base": models.fingerprint(ready.base),
    }


def parted(cfg: TrainConfig, rows: list[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """(the rows to train on, those that a probe holds out)"""
    if cfg.boosting.judge != "probe":
        return rows, []
    size = min(cfg.boosting.probe_size, len(rows) // 2)
    taken = set(randomness.python_generator(cfg.seed, "probe").sample(range(len(rows)), size))
    stay = [row for index, row in enumerate(rows) if index not in taken]
    return stay, [rows[index] for index in sorted(taken)]
