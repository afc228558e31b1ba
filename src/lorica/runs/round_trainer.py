"""One round of training as the run does it: optimizer, watchers, checkpoints, signals."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor

from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.config import TrainConfig
from lorica.evaluation.evaluate import evaluate
from lorica.optim.backprop import backprop
from lorica.optim.coordinates import update_scales
from lorica.optim.directions import Directions
from lorica.optim.probes import Probing
from lorica.optim.scaling import Scaling
from lorica.optim.updates import update_rule
from lorica.optim.zeroth_order import ZerothOrder
from lorica.randomness import torch_generator
from lorica.results import RunFolder
from lorica.runs.ready import Ready
from lorica.runs.resuming import Resumed
from lorica.tasks.base import Split
from lorica.tasks.batching import TrainingStream
from lorica.tasks.objectives import LossModule
from lorica.tasks.prompting import Encoded
from lorica.training import callbacks, checkpoints
from lorica.training.boosting import INTERRUPTED, Round
from lorica.training.checkpoints import Snapshot
from lorica.training.fit import Progress, Step, fit
from lorica.training.interruption import Interruption
from lorica.training.loss_meter import LossMeter
from lorica.training.trackers import JsonLines


class RunUnderWay(Protocol):
    """What a round has to know of the run that it belongs to."""

    cfg: TrainConfig
    ready: Ready
    rows: dict[Split, list[Encoded]]
    stream: TrainingStream
    say: Console
    progress: Progress
    best_dev_loss: float | None
    identity: dict[str, Any]

    @property
    def num_steps(self) -> int: ...

    def rate(self, step: int, first_step: int) -> float: ...

    def as_it_stands(self, round: Round) -> Adapter: ...


@dataclass(frozen=True)
class Held:
    """What a round holds beside the run, and what a checkpoint inside it keeps."""

    round: Round
    optimizer: torch.optim.Optimizer
    dropout: torch.Generator
    zeroth_order: ZerothOrder | None


@dataclass
class RoundTrainer:
    """Trains rounds of one run, with a fresh optimizer each, and keeps checkpoints.

    A checkpoint stands between two steps of a round. One that falls due where a round ends is written at the start of
    the next round, when the booster has been laid on; none is written at the run's last step.
    """

    learning: RunUnderWay
    run: RunFolder
    interruption: Interruption
    resumed: Resumed
    watchers: list[callbacks.Watch]
    owed: bool = False
    meter: LossMeter = field(init=False)
    probing: Probing = field(init=False)

    def __post_init__(self) -> None:
        self.meter, branches = LossMeter(), self.learning.cfg.zo.branches
        self.probing = Probing(branches if isinstance(branches, int) else None, timed=branches == "timed")

    def __call__(self, round: Round) -> str:
        learning, cfg = self.learning, self.learning.cfg
        assert cfg.optimizer and cfg.learning_rate is not None
        lm = cfg.train_as == "lm"
        metric = None if cfg.zo.objective == "loss" else cfg.zo.objective
        learning.ready.base.model.train(cfg.base_dropout)
        round.live.set_training(cfg.trainer == "backprop")
        optimizer = update_rule(
            cfg.optimizer,
            round.live.trainable().values(),
            learning_rate=cfg.learning_rate,
            weight_decay=cfg.weight_decay,
        )
        generator = torch_generator(cfg.seed, "dropout", round.number, device=learning.ready.device)
        round.live.set_dropout_generator(generator)
        zeroth_order = self._zeroth_order(round) if cfg.trainer == "zo" else None
        held = Held(round, optimizer, generator, zeroth_order)
        self._restore(held)
        if self.owed or self.interruption.signal:
            self._save(held)
        if self.interruption.signal:
            return INTERRUPTED
        rows, make_batch = learning.rows["train"], learning.ready.collate(gold_only=lm)
        start = learning.progress.step * cfg.gradient_accumulation_steps
        return fit(
            LossModule(learning.ready.base.model, "lm" if lm else "classification", metric),
            round.live.trainable(),
            (make_batch([rows[index] for index in batch]) for batch in learning.stream.indices(start)),
            estimator=zeroth_order or backprop,
            optimizer=optimizer,
            learning_rate=lambda step: learning.rate(step, round.first_step),
            num_steps=learning.num_steps,
            progress=learning.progress,
            batches_per_step=cfg.gradient_accumulation_steps,
            max_grad_norm=cfg.max_grad_norm,
            on_step=lambda step: self._after(step, held),
        )

    def _zeroth_order(self, round: Round) -> ZerothOrder:
        """A round's own estimator: like its optimizer, it remembers nothing of the round before."""
        zo, seed = self.learning.cfg.zo, self.learning.cfg.seed
        return ZerothOrder(
            zo.estimator,
            epsilon=zo.epsilon,
            directions=Directions(zo.num_directions, zo.distribution, seed),
            scaling=Scaling(zo.normalize, zo.clip),
            scales=update_scales(round.start, round.live.trainable()) if zo.space == "update" else None,
            probing=self.probing,
        )

    def _after(self, step: Step, held: Held) -> str | None:
        round = held.round
        reason = round.watch(step)
        if held.zeroth_order is not None:
            step = self._measured(step)
        for watcher in self.watchers:
            watcher(step)
        if self.learning.cfg.eval_steps and step.step % self.learning.cfg.eval_steps == 0:
            self._look_at_dev(step, round)
        every = self.learning.cfg.save_steps
        due = every is not None and step.step % every == 0
        if reason is not None or step.step >= self.learning.num_steps:
            self.owed = due
            return reason
        if due or self.interruption.signal:
            self._save(held)
        return INTERRUPTED if self.interruption.signal else None

    def _measured(self, step: Step) -> Step:
        """The step with the trend that its loss leaves; what should be known of it is said."""
        for warning in self.meter.after(step.loss):
            self.learning.say.print(f"warning: step {step.step}: {warning}", highlight=False, soft_wrap=True)
        return replace(step, trend_t=self.meter.trend.t())

    def _look_at_dev(self, step: Step, round: Round) -> None:
        """The dev split's loss as a line of `eval_loss.jsonl`; the best adapter by it is kept in `best_adapter/`."""
        learning, ready = self.learning, self.learning.ready
        rows = learning.rows["dev"]
        batch_size = learning.cfg.eval_batch_size
        found = evaluate(ready.base.model, ready.task, "dev", rows, ready.collate(), batch_size=batch_size)
        callbacks.tell_evaluation(step, found, JsonLines(self.run.eval_loss), learning.say)
        if learning.best_dev_loss is None or found.loss < learning.best_dev_loss:
            learning.best_dev_loss = found.loss
            adapter = learning.cfg.adapter
            now = learning.as_it_stands(round)
            ready.write(now, self.run.best_adapter, profile=adapter.profile, dropout=adapter.dropout)

    def _save(self, held: Held) -> None:
        self.owed, round = False, held.round
        tensors: dict[str, Tensor] = {
            **checkpoints.adapter_tensors("live", injection.extract(round.live)),
            **checkpoints.optimizer_tensors(held.optimizer),
            "generator|dropout": held.dropout.get_state(),
            "generator|torch": torch.get_rng_state(),
        }
        if round.best is not None:
            tensors |= checkpoints.adapter_tensors("best", round.best)
        if round.before is not None:
            tensors["probe|before"] = round.before
        values: dict[str, Any] = {
            "progress": asdict(self.learning.progress),
            "round": {"number": round.number, "first_step": round.first_step, "last_loss": round.last_loss},
            "rule": round.rule.state(),
            "best_dev_loss": self.learning.best_dev_loss,
            "identity": self.learning.identity,
        }
        if held.zeroth_order is not None:
            values |= {"zeroth_order": held.zeroth_order.state(), "meter": self.meter.state()}
        snapshot = Snapshot(self.learning.progress.step, tensors, values)
        checkpoints.save_checkpoint(self.run.checkpoints, snapshot)

    def _restore(self, held: Held) -> None:
        """Put the checkpoint's state into the first round after a resume."""
        snapshot, self.resumed = self.resumed.snapshot, Resumed()
        if snapshot is None:
            return
        round = held.round
        live = checkpoints.adapter_of("live", snapshot.tensors)
        if live is not None:
            round.live.put(live)
        round.best = checkpoints.adapter_of("best", snapshot.tensors)
        round.before = snapshot.tensors.get("probe|before")
        round.first_step = snapshot.values["round"]["first_step"]
        round.last_loss = snapshot.values["round"]["last_loss"]
        round.rule.restore(snapshot.values["rule"])
        checkpoints.restore_optimizer(held.optimizer, snapshot.tensors)
        held.dropout.set_state(snapshot.tensors["generator|dropout"])
        if held.zeroth_order is not None:
            held.zeroth_order.restore(snapshot.values["zeroth_order"])
            self.meter.restore(snapshot.values["meter"])
        if self.learning.cfg.base_dropout:
            torch.set_rng_state(snapshot.tensors["generator|torch"])
