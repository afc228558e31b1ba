"""adapter.kind=xgblora: a chain of low-rank boosters, each trained on what the ones before it left (MATH section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorica import randomness
from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.injection import Live
from lorica.config import TrainConfig
from lorica.evaluation.scoring import in_eval_mode
from lorica.results import RunFolder
from lorica.runs.training import lora
from lorica.runs.training.first_look import FirstLook
from lorica.runs.training.lora import AdapterOutcome
from lorica.runs.training.tuning import RunUnderWay
from lorica.runs.training.warm_start import warm_started
from lorica.tasks.objectives import losses
from lorica.training.boosting import Foundation, Judge, Probe, Round, boost
from lorica.training.ledger import Entry, Ledger
from lorica.training.rounds import Adaptive, RoundRule, round_rule
from lorica.training.stretch import TrainStretch


@dataclass
class XGBLora:
    """Rounds of training, each of which lays a booster on the base."""

    learning: RunUnderWay
    targets: list[str] = field(init=False)
    look: FirstLook = field(init=False)
    first: Adapter = field(init=False)
    ledger: Ledger | None = None
    live: Live | None = None

    def __post_init__(self) -> None:
        self.targets = lora.targets(self.learning.ready.base, self.learning.cfg.adapter)
        self.look = lora.look(self.learning, self.targets)
        self.first = self.new_booster(0)

    def told(self) -> list[str]:
        probed = self.learning.cfg.boosting.judge == "probe"
        judged = f"; judged on {len(self.learning.probe_rows)} held-out examples" if probed else ""
        first, *warnings = lora.told(self.learning, self.first)
        return [first, f"rounds: {self.rule().described()}{judged}", *warnings]

    def num_trainable(self) -> int:
        return lora.num_trainable(self.learning.cfg, self.first)

    def train(self, run: RunFolder, train_stretch: TrainStretch) -> AdapterOutcome | None:
        learning, cfg, boosting = self.learning, self.learning.cfg, self.learning.cfg.boosting
        model = learning.ready.base.model
        lora.count_look(learning, self.look)
        self.ledger = Ledger.open(run.path, learning.processes)
        self.ledger.forget_after(learning.progress.step)

        def train_round(round: Round) -> str:
            self.live = round.live
            return train_stretch(round)

        unfused = boosting.ensemble or learning.sharded or cfg.model.quantization != "none"
        foundation = Foundation(model, unfused=unfused)
        finished = boost(
            foundation,
            self.ledger,
            rule=self.rule(),
            new_booster=self._started_booster,
            train_round=train_round,
            num_steps=learning.num_steps,
            num_seconds=learning.num_seconds,
            progress=learning.progress,
            shrinkage=boosting.shrinkage,
            dropout=cfg.adapter.dropout,
            train_factors=lora.factors(cfg),
            judge=self._judge(),
            on_round=self._tell_round,
        )
        if not finished:
            return None
        foundation.take_off()
        chain = self.ledger.chain(cfg.model.name)
        adapter = (
            chain if chain.updates else Adapter(self.first.updates, chain.heads or self.first.heads, chain.base_model)
        )
        injection.inject(model, adapter)
        return AdapterOutcome(adapter, learning.ready, cfg)

    def as_it_stands(self) -> AdapterOutcome:
        """The chain laid on so far and the live booster, as one adapter."""
        assert self.live is not None and self.ledger is not None
        live = injection.extract(self.live)
        laid_on = Adapter(self.ledger.chain().updates)
        whole = Adapter((laid_on + Adapter(live.updates)).updates, live.heads, live.base_model)
        return AdapterOutcome(whole, self.learning.ready, self.learning.cfg)

    def rounds(self) -> Sequence[Entry]:
        return [booster.entry for booster in self.ledger.boosters] if self.ledger else []

    def new_booster(self, number: int) -> Adapter:
        """Round `number`'s first factors, and the heads as the round before left them."""
        ranks = self.learning.cfg.boosting.ranks
        rank = ranks[min(number, len(ranks) - 1)] if ranks else None
        chain = self.ledger.chain() if self.ledger else Adapter({})
        paths = targets_of_round(self.learning.cfg, self.targets, number)
        new = lora.draw(self.learning, paths, self.look, rank=rank, round=number, chain=chain)
        before = self.ledger.boosters if self.ledger else []
        return Adapter(new.updates, before[-1].heads if before else new.heads, new.base_model)

    def _started_booster(self, number: int) -> Adapter:
        """The first one holds what the warm start has fitted."""
        new = self.new_booster(number)
        return new if number else warm_started(self.learning, new)

    def rule(self) -> RoundRule:
        """The round rule in force."""
        boosting = self.learning.cfg.boosting
        if self.learning.decided is not None:
            return self.learning.decided
        return round_rule(
            steps_per_iteration=boosting.steps_per_iteration,
            use_adaptive_merge=boosting.use_adaptive_merge,
            merge_frequency=boosting.merge_frequency,
            steps_per_epoch=self.learning.steps_per_epoch,
            adaptive=Adaptive(
                boosting.patience,
                boosting.ema_beta,
                boosting.improvement_threshold,
                boosting.best_scope,
                boosting.roll_back_on_patience_alone,
            ),
        )

    def _judge(self) -> Judge | None:
        """Who says whether a booster is laid on."""
        boosting = self.learning.cfg.boosting
        if boosting.judge == "none":
            return None
        return self.learning.decided or Probe(self._probe, boosting.probe_k)

    @torch.no_grad()
    def _probe(self) -> Tensor:
        """(probe_size,) losses of the fixed held-out examples; no dropout, so two calls differ by the model alone."""
        ready, train_as = self.learning.ready, self.learning.train_as
        batch = ready.collate(gold_only=train_as == "lm")(self.learning.probe_rows)
        with in_eval_mode(ready.base.model):
            found = losses(ready.base.model, batch, train_as).cpu()
        return self.learning.processes.of_first(found)  # one verdict for all

    def _tell_round(self, entry: Entry) -> None:
        best = "" if entry.best_loss is None else f", best smoothed loss {entry.best_loss:.4f}"
        last = "" if entry.last_loss is None else f", current {entry.last_loss:.4f}"
        fate = "laid on" if entry.accepted else "rejected by the probe"
        back = ", rolled back to its best" if entry.rolled_back else ""
        self.learning.say.print(
            f"round {entry.round} ended at step {entry.last_step} ({entry.reason}){best}{last}{back}: {fate}",
            highlight=False,
            soft_wrap=True,
        )


def targets_of_round(cfg: TrainConfig, targets: list[str], number: int) -> list[str]:
    """All targets, or the round's seeded share of them in their own order."""
    fraction = cfg.boosting.layer_fraction
    if fraction == 1.0:
        return targets
    generator = randomness.python_generator(cfg.seed, "layers", number)
    taken = set(generator.sample(targets, max(1, round(fraction * len(targets)))))
    return [path for path in targets if path in taken]
