"""The training itself: every component made from the config, then plain LoRA's one round, or boosting's many."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from lorica import models, randomness
from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.config import TrainConfig
from lorica.errors import ConfigError, InterruptedRunError
from lorica.evaluation.scoring import in_eval_mode
from lorica.optim.schedules import multiplier, warmup_steps
from lorica.results import RunFolder
from lorica.runs.ready import Ready, chosen
from lorica.runs.resuming import Resumed
from lorica.runs.round_trainer import RoundTrainer
from lorica.tasks.base import Split
from lorica.tasks.batching import TrainingStream
from lorica.tasks.objectives import losses, scores
from lorica.tasks.prompting import Encoded
from lorica.training import callbacks
from lorica.training.boosting import INTERRUPTED, Foundation, Round, boost
from lorica.training.fit import Progress
from lorica.training.interruption import Interruption
from lorica.training.ledger import Entry, Ledger
from lorica.training.rounds import Adaptive, EverySteps, RoundRule, round_rule
from lorica.training.trackers import JsonLines

Rows = dict[Split, list[Encoded]]


def encode_splits(cfg: TrainConfig, ready: Ready) -> Rows:
    """The splits that the run looks at, tokenised."""
    during: list[Split] = ["dev"] if cfg.eval_steps else []
    return {
        split: ready.encoded(chosen(ready.task, split, cfg.task))
        for split in dict.fromkeys(["train", *during, cfg.eval_split])
    }


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
    progress: Progress = field(default_factory=Progress)
    ledger: Ledger | None = None
    best_dev_loss: float | None = None
    probe_rows: list[Encoded] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.cfg.adapter.profile == "portable" and self.ready.base.heads:
            raise ConfigError(
                "adapter.profile=portable cannot carry a head, which this task trains: use adapter.profile=peft"
            )
        if self.cfg.boosting.judge == "probe":
            self.rows["train"], self.probe_rows = _without(
                self.rows["train"], self.cfg.boosting.probe_size, self.cfg.seed
            )
        self.stream = TrainingStream(
            [row.length for row in self.rows["train"]], self.cfg.batch_size, self.cfg.seed, self.cfg.bucketing
        )
        self.targets = models.target_modules(self.ready.base, self.cfg.adapter.targets)
        self.identity = _identity(self.cfg, self.ready)  # of the bare base: nothing is laid on it yet
        self.first = self.new_booster(0)  # made before the run folder, so that what cannot be made leaves none

    @property
    def num_steps(self) -> int:
        if self.cfg.num_epochs is not None:
            return math.ceil(self.cfg.num_epochs * self.steps_per_epoch)
        assert self.cfg.max_steps is not None
        return self.cfg.max_steps

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.stream.batches_per_epoch / self.cfg.gradient_accumulation_steps)

    def run(self, run: RunFolder, resumed: Resumed, interruption: Interruption) -> Adapter:
        """Train to the end; the adapter is left on the model and returned. InterruptedRunError if a signal came."""
        self.progress, self.best_dev_loss = resumed.progress, resumed.best_dev_loss
        self.say.print(self._headline(), highlight=False, soft_wrap=True)
        with torch.random.fork_rng(enabled=self.cfg.base_dropout):
            if self.cfg.base_dropout:  # the base's own dropout knows no other generator than the global one
                torch.manual_seed(randomness.key(self.cfg.seed, "base dropout") & 0xFFFF_FFFF)
            with callbacks.shown(self.num_steps, self.cfg.logging_steps, self.say) as show:
                trainer = RoundTrainer(
                    self, run, interruption, resumed, [callbacks.write_steps(JsonLines(run.training_loss)), show]
                )
                adapter = self._boosted(run, trainer) if self.cfg.adapter.kind == "xgblora" else self._single(trainer)
        if adapter is None:
            raise InterruptedRunError(
                f"stopped at step {self.progress.step}; go on with: lorica train resume={run.path}", interruption.signal
            )
        return adapter

    def new_booster(self, number: int) -> Adapter:
        """Round `number`'s first factors, and the heads as the round before left them."""
        adapter, boosting = self.cfg.adapter, self.cfg.boosting
        assert adapter.rank is not None and adapter.alpha is not None
        rank = boosting.ranks[min(number, len(boosting.ranks) - 1)] if boosting.ranks else adapter.rank
        new = injection.create(
            self.ready.base.model,
            self._targets_of(number),
            rank=rank,
            alpha=adapter.alpha / adapter.rank * rank,
            init="kaiming" if adapter.init == "activations" else adapter.init,
            init_std=adapter.init_std,
            seed=self.cfg.seed,
            round=number,
            heads=self.ready.base.heads,
            base_model=self.cfg.model.name,
        )
        before = self.ledger.boosters if self.ledger else []
        chain = self.ledger.chain() if self.ledger else Adapter({})
        if adapter.init == "activations":
            new = injection.along_inputs(self.ready.base.model, new, self._run_some_batches, chain)
        elif boosting.orthogonal:
            new = injection.orthogonal_to(new, chain)
        return Adapter(new.updates, before[-1].heads if before else new.heads, new.base_model)

    def as_it_stands(self, round: Round) -> Adapter:
        """What the model is now beyond its base: the chain laid on so far and the live booster, as one adapter."""
        live = injection.extract(round.live)
        if not self.ledger:
            return live
        laid_on = Adapter(self.ledger.chain().updates)
        return Adapter((laid_on + Adapter(live.updates)).updates, live.heads, live.base_model)

    def trainer_state(self) -> dict[str, Any]:
        """Where the run ended, for `trainer_state.json`."""
        rounds = len(self.ledger.boosters) if self.ledger else 0
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

    def _single(self, trainer: RoundTrainer) -> Adapter | None:
        """Plain LoRA: one round that nothing ends but the last step, and nothing is laid on."""
        live = injection.inject(self.ready.base.model, self.first, self.cfg.adapter.dropout)
        live.train_only(self._factors)
        rule = EverySteps(self.num_steps + 1)
        reason = trainer(Round(0, 0, live, rule, self.first))
        return None if reason == INTERRUPTED else injection.extract(live)

    def _boosted(self, run: RunFolder, trainer: RoundTrainer) -> Adapter | None:
        boosting, base = self.cfg.boosting, self.ready.base
        self.ledger = Ledger.open(run.path)
        self.ledger.forget_after(self.progress.step)
        foundation = Foundation(base.model, unfused=boosting.ensemble or self.cfg.model.quantization != "none")
        finished = boost(
            foundation,
            self.ledger,
            rule=self.rule(),
            new_booster=self.new_booster,
            train_round=trainer,
            num_steps=self.num_steps,
            progress=self.progress,
            shrinkage=boosting.shrinkage,
            dropout=self.cfg.adapter.dropout,
            train_factors=self._factors,
            probe=self._probe if boosting.judge == "probe" else None,
            probe_k=boosting.probe_k,
            on_round=self._tell_round,
        )
        if not finished:
            return None
        foundation.take_off()
        chain = self.ledger.chain(self.cfg.model.name)
        adapter = (
            chain if chain.updates else Adapter(self.first.updates, chain.heads or self.first.heads, chain.base_model)
        )
        injection.inject(base.model, adapter)
        return adapter

    @property
    def _factors(self) -> Literal["both", "B"]:
        """The factors that are trained; the two sections that say so agree where both do."""
        return "B" if "B" in (self.cfg.zo.train, self.cfg.boosting.train_factors) else "both"

    def rule(self) -> RoundRule:
        """The round rule in force."""
        boosting = self.cfg.boosting
        return round_rule(
            steps_per_iteration=boosting.steps_per_iteration,
            use_adaptive_merge=boosting.use_adaptive_merge,
            merge_frequency=boosting.merge_frequency,
            steps_per_epoch=self.steps_per_epoch,
            adaptive=Adaptive(
                boosting.patience,
                boosting.ema_beta,
                boosting.improvement_threshold,
                boosting.best_scope,
                boosting.roll_back_on_patience_alone,
            ),
        )

    def _targets_of(self, number: int) -> list[str]:
        """All targets, or the round's seeded share of them in their own order."""
        fraction = self.cfg.boosting.layer_fraction
        if fraction == 1.0:
            return self.targets
        generator = randomness.python_generator(self.cfg.seed, "layers", number)
        taken = set(generator.sample(self.targets, max(1, round(fraction * len(self.targets)))))
        return [path for path in self.targets if path in taken]

    def _run_some_batches(self, num_batches: int = 4) -> None:
        """The run's first batches through the model as it stands."""
        for batch in itertools.islice(self.stream.indices(), num_batches):
            scores(self.ready.base.model, self.ready.collate()([self.rows["train"][index] for index in batch]))

    @torch.no_grad()
    def _probe(self) -> Tensor:
        """(probe_size,) losses of the fixed held-out examples; no dropout, so two calls differ by the model alone."""
        lm = self.cfg.train_as == "lm"
        batch = self.ready.collate(gold_only=lm)(self.probe_rows)
        with in_eval_mode(self.ready.base.model):
            return losses(self.ready.base.model, batch, "lm" if lm else "classification").cpu()

    def _tell_round(self, entry: Entry) -> None:
        best = "" if entry.best_loss is None else f", best smoothed loss {entry.best_loss:.4f}"
        last = "" if entry.last_loss is None else f", current {entry.last_loss:.4f}"
        fate = "laid on" if entry.accepted else "rejected by the probe"
        back = ", rolled back to its best" if entry.rolled_back else ""
        self.say.print(
            f"round {entry.round} ended at step {entry.last_step} ({entry.reason}){best}{last}{back}: {fate}",
            highlight=False,
            soft_wrap=True,
        )

    def _headline(self) -> str:
        cfg, ready = self.cfg, self.ready
        assert cfg.adapter.rank is not None and cfg.adapter.alpha is not None
        updates = self.first.updates.values()
        frozen = sum(update.A.numel() for update in updates) if self._factors == "B" else 0
        count = self.first.num_parameters() - frozen
        total = sum(parameter.numel() for parameter in ready.base.model.parameters())
        sizes = ", ".join(f"{len(examples)} {split}" for split, examples in self.rows.items())
        scale = cfg.adapter.alpha / cfg.adapter.rank
        share = f"{count:,} parameters trainable, {count / total:.2%} of the base's {total:,}"
        lines = [
            f"{ready.task.name} ({ready.task.kind}; {sizes}) on {cfg.model.name} ({cfg.model.dtype}, {ready.device})",
            f"{cfg.adapter.kind} by {cfg.trainer}: rank {cfg.adapter.rank}, alpha {cfg.adapter.alpha:g}, "
            f"scale {scale:g} on {len(self.first.updates)} modules; {share}{'; A stays as drawn' if frozen else ''}",
        ]
        if cfg.adapter.kind == "xgblora":
            judged = "" if cfg.boosting.judge == "none" else f"; judged on {len(self.probe_rows)} held-out examples"
            lines.append(f"rounds: {self.rule().described()}{judged}")
        if cfg.trainer == "zo" and cfg.zo.space == "parameter" and scale > 4:
            lines.append(
                f"warning: alpha/rank = {scale:g} under zo: a step in weight space grows with its square, and "
                f"large ones diverge; alpha={cfg.adapter.rank} gives scale 1, and zo.space=update makes it play no part"
            )
        if cfg.trainer == "zo" and cfg.adapter.dropout:
            lines.append(
                f"warning: adapter.dropout={cfg.adapter.dropout:g} is off under zo: two probes would differ by it"
            )
        return "\n".join(lines)


def _identity(cfg: TrainConfig, ready: Ready) -> dict[str, Any]:
    """What a checkpoint must have been made with to be gone on from: config, data, base."""
    ignored = {"output_dir", "resume", "force", "device", "logging_steps", "save_steps"}
    return {
        "config": cfg.model_dump(mode="json", exclude=ignored),
        "data": ready.task.fingerprint,
        "base": models.fingerprint(ready.base),
    }


def _without(rows: list[Encoded], size: int, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """(the rows to train on, the probe's rows)"""
    size = min(size, len(rows) // 2)
    taken = set(randomness.python_generator(seed, "probe").sample(range(len(rows)), size))
    stay = [row for index, row in enumerate(rows) if index not in taken]
    return stay, [rows[index] for index in sorted(taken)]
