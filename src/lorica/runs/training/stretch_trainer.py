"""One stretch of training as the run does it: optimizer, watchers, checkpoints, signals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapters.branches import blocks_of
from lorica.errors import DriftError, NonFiniteLossError, ResumeError
from lorica.optim.backprop import BackpropTogether, Estimator, averaged, backprop
from lorica.optim.compiled import CompiledBlocks
from lorica.optim.probes import Probing
from lorica.optim.replay import SEGMENT, LoggedRound, ReplayLog, checksum
from lorica.randomness import Name, torch_generator
from lorica.results import RunFolder
from lorica.runs.training.resuming import Resumed
from lorica.runs.training.steps import AnyZerothOrder, optimizer_of, zeroth_order_of
from lorica.runs.training.tracking import Tracking
from lorica.runs.training.tuning import RunUnderWay
from lorica.tasks.objectives import LossModule
from lorica.training import callbacks, checkpoints
from lorica.training.checkpoints import Snapshot
from lorica.training.fit import Step, fit
from lorica.training.interruption import Interruption
from lorica.training.json_lines import JsonLines
from lorica.training.loss_meter import LossMeter
from lorica.training.stretch import INTERRUPTED, Stretch


@dataclass(frozen=True)
class Held:
    """What a stretch holds beside the run, and what a checkpoint inside it keeps."""

    stretch: Stretch
    trainable: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    dropout: torch.Generator
    zeroth_order: AnyZerothOrder | None


@dataclass
class StretchTrainer:
    """Trains the stretches of one run, with a fresh optimizer each, and keeps checkpoints.

    A checkpoint stands between two steps of a stretch. One that falls due where a stretch ends is written at the start
    of the next, when the booster has been laid on; none is written at the run's last step.
    """

    learning: RunUnderWay
    run: RunFolder
    interruption: Interruption
    resumed: Resumed
    watchers: list[callbacks.Watch]
    log: ReplayLog | None = None
    tracking: Tracking | None = None
    owed: bool = False
    held: Held | None = None
    meter: LossMeter = field(init=False)
    probing: Probing = field(init=False)
    compiled: CompiledBlocks | None = None

    def __post_init__(self) -> None:
        self.meter, branches = LossMeter(), self.learning.cfg.zo.branches
        max_branches = branches if isinstance(branches, int) else None
        self.probing = Probing(max_branches, timed=branches == "timed", processes=self.learning.processes)
        if self.learning.cfg.compile:
            self.compiled = CompiledBlocks(blocks_of(self.learning.ready.base.model), self._warn)
            self.learning.say.print("the first step of each kind waits for the compiler", highlight=False)

    def __call__(self, stretch: Stretch) -> str:
        learning, cfg = self.learning, self.learning.cfg
        self.note_rounds()
        if self.log is not None:
            self.log.look(learning.progress.step, learning.looked)
        learning.ready.base.model.train(cfg.base_dropout)
        stretch.live.set_training(cfg.trainer == "backprop")
        trainable = stretch.live.trainable()
        names: tuple[Name, ...] = ("dropout", stretch.number, *learning.processes.own_names)
        generator = torch_generator(cfg.seed, *names, device=learning.ready.device)
        stretch.live.set_dropout_generator(generator)
        zeroth_order = zeroth_order_of(cfg, stretch.live, self.probing) if cfg.trainer == "zo" else None
        held = Held(stretch, trainable, optimizer_of(cfg, trainable, zeroth_order), generator, zeroth_order)
        self.held = held
        self._restore(held)
        if learning.processes.num > 1:
            self._check_agreement(held, learning.progress.step)
        if self.owed or self.interruption.signal:
            self._save(held)
        if self.interruption.signal:
            return INTERRUPTED
        metric = None if cfg.zo.objective == "loss" else cfg.zo.objective
        objective = LossModule(learning.ready.base.model, learning.train_as, metric)
        estimator = zeroth_order or self._backprop(objective)
        rows, make_batch = learning.rows["train"], learning.ready.collate(gold_only=learning.train_as == "lm")
        start = learning.progress.step * cfg.gradient_accumulation_steps
        reason = fit(
            objective,
            trainable,
            (make_batch([rows[index] for index in batch]) for batch in learning.stream.indices(start)),
            estimator=self.compiled.around(estimator) if self.compiled else estimator,
            optimizer=held.optimizer,
            learning_rate=lambda step: learning.rate(step, stretch.first_step),
            num_steps=learning.num_steps,
            num_seconds=learning.num_seconds,
            progress=learning.progress,
            batches_per_step=cfg.gradient_accumulation_steps,
            max_grad_norm=cfg.max_grad_norm,
            on_step=lambda step: self._after(step, held),
        )
        if learning.processes.num > 1 and learning.progress.step % SEGMENT:
            self._check_agreement(held, learning.progress.step)  # what this stretch leaves is not looked at again
        self._check_size(trainable)
        return reason

    def _check_size(self, trainable: Mapping[str, nn.Parameter]) -> None:
        """Raise NonFiniteLossError where a parameter's norm is NaN or beyond float32: nothing can be made of that.

        A round that may be rolled back ends at its best step, whatever came after it.
        """
        norms = torch.stack(torch._foreach_norm(list(trainable.values())))
        if not norms.isfinite().all() and not self.learning.cfg.boosting.use_adaptive_merge:
            raise NonFiniteLossError(
                f"what was trained is NaN or of no size that could be used after step {self.learning.progress.step}: "
                f"lower learning_rate={self.learning.cfg.learning_rate:g}"
            )

    def _backprop(self, objective: LossModule) -> Estimator:
        together = self.learning.processes
        if together.num == 1:
            return backprop
        return BackpropTogether(together, None if self.learning.sharded else averaged(objective))

    def note_rounds(self) -> None:
        """Tell the trackers of the rounds that ended, and write into the log what was decided of them."""
        if self.tracking is not None:
            self.tracking.rounds()
        if self.log is not None:
            for ended in self.learning.tuning.rounds()[self.log.num_rounds :]:
                assert ended.kept_step is not None
                decided = LoggedRound(ended.last_step, ended.round, ended.reason, ended.kept_step, ended.accepted)
                self.log.end_round(decided)

    def _after(self, step: Step, held: Held) -> str | None:
        stretch = held.stretch
        reason = stretch.watch(step)
        agreed = self._check_agreement(held, step.step) if step.step % SEGMENT == 0 else None
        if self.log is not None:
            self.log.step(step.step, step.weights if step.applied else None, step.learning_rate, agreed)
        if held.zeroth_order is not None:
            step = self._measured(step)
        for watcher in self.watchers:
            watcher(step)
        if self.tracking is not None:
            self.tracking.step(step, stretch.live)
        if self.learning.cfg.eval_steps and step.step % self.learning.cfg.eval_steps == 0:
            self._look_at_dev(step)
        every = self.learning.cfg.save_steps
        due = every is not None and step.step % every == 0
        is_last = step.step >= self.learning.num_steps or step.seconds >= self.learning.num_seconds
        if reason is not None or is_last:
            self.owed = due
            return reason
        if due or self.interruption.signal:
            self._save(held)
        return INTERRUPTED if self.interruption.signal else None

    def _check_agreement(self, held: Held, step: int) -> str | None:
        """The checksum of what is trained, which is the same in every process; None where nobody needs it."""
        together = self.learning.processes
        if together.num == 1 and self.log is None:
            return None
        found = together.gathered(checksum(held.trainable))
        if len(set(found)) > 1:
            sums = ", ".join(f"process {rank}: {each}" for rank, each in enumerate(found))
            raise DriftError(
                f"step {step}: the processes' parameters differ ({sums}): let all run on one kind of device with the "
                "same versions, and go on from the last checkpoint with resume"
            )
        return found[0]

    def _measured(self, step: Step) -> Step:
        """The step with the trend that its loss leaves; what should be known of it is said."""
        for warning in self.meter.after(step.loss):
            self._warn(f"step {step.step}: {warning}")
        return replace(step, trend_t=self.meter.trend.t())

    def _warn(self, warning: str) -> None:
        self.learning.say.print(f"warning: {warning}", highlight=False, soft_wrap=True)

    def _look_at_dev(self, step: Step) -> None:
        """The dev split's loss as a line of `eval_loss.jsonl`; the best outcome by it is kept in its own folder."""
        learning, ready = self.learning, self.learning.ready
        if not learning.evaluates:
            return
        rows = learning.rows["dev"]
        found = ready.evaluated("dev", rows, learning.cfg.eval_batch_size)
        if not learning.processes.is_first:
            return
        callbacks.tell_evaluation(step, found, JsonLines(self.run.eval_loss), learning.say)
        if self.tracking is not None:
            self.tracking.evaluation(found, learning.tuning.as_it_stands())
        if learning.best_dev_loss is None or found.loss < learning.best_dev_loss:
            learning.best_dev_loss = found.loss
            now = learning.tuning.as_it_stands()
            now.write(self.run.best(now.place))

    def save_end(self) -> None:
        """Keep a run that was stopped in its last step, to be evaluated when it is resumed."""
        if self.learning.tuning.rounds():
            self._commit({}, {"round": None})  # the ledger has all of it
        elif self.held is not None:
            self._save(self.held)

    def _save(self, held: Held) -> None:
        """Let the first process commit a checkpoint that all can go on from."""
        self.owed, stretch = False, held.stretch
        device = self.learning.ready.device
        generators = self.learning.processes.gathered((held.dropout.get_state(), _global_state(device)))
        tensors: dict[str, Tensor] = {**stretch.tensors(), **checkpoints.optimizer_tensors(held.optimizer)}
        for rank, (dropout, everyone) in enumerate(generators):
            tensors |= {f"generator|dropout|{rank}": dropout, f"generator|{_global_name(device)}|{rank}": everyone}
        values: dict[str, Any] = {"round": stretch.values(), "checksum": checksum(held.trainable)}
        if held.zeroth_order is not None:
            values |= {"zeroth_order": held.zeroth_order.state(), "meter": self.meter.state()}
        self._commit(tensors, values)

    def _commit(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write what is kept of a stretch, with what is kept of the run; all wait until the first process has."""
        learning = self.learning
        if learning.processes.is_first:
            if self.log is not None:
                self.log.flush(durable=True)  # before the checkpoint that relies on it
            kept = {
                "progress": asdict(learning.progress),
                "best_dev_loss": learning.best_dev_loss,
                "identity": learning.identity,
            }
            snapshot = Snapshot(learning.progress.step, tensors, {**kept, **values})
            checkpoints.save_checkpoint(self.run.checkpoints, snapshot)
        learning.processes.wait()

    def _restore(self, held: Held) -> None:
        """Put the checkpoint's state into the first stretch after a resume. Raises ResumeError if it does not fit."""
        snapshot, self.resumed = self.resumed.snapshot, Resumed()
        if snapshot is None:
            return
        try:
            self._put_back(held, snapshot)
        except (KeyError, RuntimeError, ValueError) as error:  # a config that was changed, and forced
            raise ResumeError(
                f"the checkpoint of step {snapshot.step} does not fit what config.yaml now trains, which force=true "
                "cannot change: put back what was there"
            ) from error

    def _put_back(self, held: Held, snapshot: Snapshot) -> None:
        held.stretch.restore(snapshot.tensors, snapshot.values["round"])
        checkpoints.restore_optimizer(held.optimizer, snapshot.tensors)
        cfg, rank, device = self.learning.cfg, self.learning.processes.rank, self.learning.ready.device
        names = ("dropout", _global_name(device))
        dropout, everyone = (snapshot.tensors.get(f"generator|{name}|{rank}") for name in names)
        if dropout is not None and len(dropout) == len(held.dropout.get_state()):
            held.dropout.set_state(dropout)
        elif dropout is not None and (cfg.adapter.dropout or cfg.base_dropout):  # more processes than before have none
            self._warn("the checkpoint is of another kind of device: dropout's draws begin anew")
        if held.zeroth_order is not None:
            held.zeroth_order.restore(snapshot.values["zeroth_order"])
            self.meter.restore(snapshot.values["meter"])
        if cfg.base_dropout and everyone is not None:
            _set_global_state(device, everyone)


def _global_name(device: str) -> str:
    """What the global generator that a device's operations draw from is called in a checkpoint."""
    return "cuda" if device.startswith("cuda") else "torch"


def _global_state(device: str) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.startswith("cuda") else torch.get_rng_state()


def _set_global_state(device: str, state: Tensor) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
