"""Gradient boosting with low-rank boosters (XGBLoRA, arXiv 2410.19694; MATH section 2), read as the algorithm.

Train a booster; judge it; lay it on the base, or roll back; note it in the ledger; start the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.injection import Live
from lorica.training.fit import Progress, Step
from lorica.training.ledger import Entry, Ledger
from lorica.training.rounds import RoundRule
from lorica.training.stretch import INTERRUPTED, inside, within


@dataclass
class Round:
    """A round under way: what a checkpoint must keep of it beside the optimizer."""

    number: int
    first_step: int
    live: Live
    rule: RoundRule
    start: Adapter  # the new booster, and the heads that it found
    best: dict[str, Tensor] | None = None
    best_step: int | None = None
    before: Tensor | None = None  # (b,) the probe's losses before the round
    last_loss: float | None = None

    def watch(self, step: Step) -> str | None:
        """Show the rule a step; keep the booster if it is the best so far; the reason if the round ends."""
        if step.applied:
            self.last_loss = step.loss
        verdict = self.rule.after(step)
        if verdict.is_best:
            self.best, self.best_step = self.live.state(), step.step
        return verdict.reason

    def tensors(self) -> dict[str, Tensor]:
        kept = within("live", self.live.state()) | within("best", self.best or {})
        return kept if self.before is None else {**kept, "probe|before": self.before}

    def values(self) -> dict[str, Any]:
        return {
            "first_step": self.first_step,
            "best_step": self.best_step,
            "last_loss": self.last_loss,
            "rule": self.rule.state(),
        }

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.live.restore(inside("live", tensors))
        self.best, self.before = inside("best", tensors) or None, tensors.get("probe|before")
        self.first_step, self.best_step = values["first_step"], values["best_step"]
        self.last_loss = values["last_loss"]
        self.rule.restore(values["rule"])


class TrainRound(Protocol):
    """Trains a round to its end and returns why it ended; `INTERRUPTED` leaves it to be resumed."""

    def __call__(self, round: Round, /) -> str: ...


class Judge(Protocol):
    """Says at the end of a round whether its booster is laid on."""

    def before(self) -> Tensor:
        """What it sees before a round, to be kept as the round's `before`."""

    def accepts(self, round: Round) -> bool:
        """Whether the booster is laid on, which stands on the model as it would be."""


@dataclass(frozen=True)
class Probe:
    """Accepts what improves the losses of fixed examples, (b,), by more than `k` standard errors."""

    losses: Callable[[], Tensor]
    k: float = 1.0

    def before(self) -> Tensor:
        return self.losses()

    def accepts(self, round: Round) -> bool:
        return improves(round.before, self.losses(), self.k)


@dataclass
class Foundation:
    """A base model and the boosters laid on it.

    Fused: live weight = cast(W0 + Σ), summed in fp32 from the pristine W0 at each lay-on, never accumulated. Unfused (a
    quantised or shared base, an ensemble): the chain runs beside the weights, which are never written.
    """

    model: nn.Module
    unfused: bool = False
    pristine: dict[str, Tensor] = field(default_factory=dict)
    beside: Live | None = None

    def lay_on(self, chain: Adapter) -> None:
        """Let the model be its pristine weights and this chain, whatever was laid on before. Heads are not touched."""
        self.take_off()
        bare = Adapter(chain.updates)
        if self.unfused:
            self.beside = injection.inject(self.model, bare)
        else:
            self.pristine = injection.fuse(self.model, bare)

    def take_off(self) -> None:
        """Give the model its own weights back, bit for bit."""
        if self.beside is not None:
            injection.remove(self.beside)
            self.beside = None
        injection.unfuse(self.model, self.pristine)
        self.pristine = {}


def boost(
    foundation: Foundation,
    ledger: Ledger,
    *,
    rule: RoundRule,
    new_booster: Callable[[int], Adapter],
    train_round: TrainRound,
    num_steps: int,
    num_seconds: float = math.inf,
    progress: Progress,
    shrinkage: float = 1.0,
    dropout: float = 0.0,
    train_factors: str = "both",
    judge: Judge | None = None,
    resumed: Callable[[Round], None] | None = None,
    on_round: Callable[[Entry], None] = lambda entry: None,
) -> bool:
    """Boost from `progress` to step `num_steps`, or past `num_seconds` of training.

    The ledger holds every round, the foundation what was laid on.
    `new_booster(k)` gives round k's first factors and heads; `resumed` puts a kept state into the first round. A
    round's best booster is taken where the rule rolls back; with a `judge` it is laid on only if that accepts it.
    Returns whether the run came to its end; an interrupted one is left inside a round.
    """
    foundation.lay_on(ledger.chain())
    while progress.step < num_steps and progress.seconds < num_seconds:
        number = len(ledger.boosters)
        start = new_booster(number)
        live = injection.inject(foundation.model, start, dropout)
        live.train_only(train_factors)
        round = Round(number, progress.step, live, rule, start)
        rule.begin(progress.step)
        if resumed is not None:
            resumed(round)
            resumed = None
        if judge is not None and round.before is None:
            round.before = judge.before()
        reason = train_round(round)
        if reason == INTERRUPTED:
            return False
        entry, booster = judged(round, reason, progress, shrinkage, judge)
        injection.remove(live)
        ledger.append(entry, booster)
        foundation.lay_on(ledger.chain())
        on_round(entry)
    return True


def judged(
    round: Round,
    reason: str,
    progress: Progress,
    shrinkage: float,
    judge: Judge | None = None,
) -> tuple[Entry, Adapter]:
    """The round's booster, rolled back to its best where the rule says so, and its line in the ledger.

    A rejected booster is kept beside the heads that it found.
    """
    rolled_back = round.best is not None and round.rule.rolls_back(reason)
    if rolled_back and round.best is not None:
        round.live.restore(round.best)
    booster = injection.extract(round.live)
    accepted = judge is None or judge.accepts(round)
    smoothed = round.rule.state()
    entry = Entry(
        round=round.number,
        first_step=round.first_step,
        last_step=progress.step,
        reason=reason,
        accepted=accepted,
        rolled_back=rolled_back,
        weight=shrinkage if accepted else 0.0,
        best_loss=smoothed.get("best"),
        last_loss=smoothed.get("loss", round.last_loss),
        norm=booster.norm(),
        file="",
        sha256="",
        kept_step=round.best_step if rolled_back else progress.step,
    )
    return entry, booster if accepted else Adapter(booster.updates, round.start.heads)


def improves(before: Tensor | None, after: Tensor, k: float) -> bool:
    """Whether the mean per-example difference d lies below −k of its standard errors; equal batches, no dropout."""
    assert before is not None
    d = (after - before).double()  # (b,)
    return bool(torch.isfinite(d).all()) and float(d.mean()) < -k * float(d.std() / len(d) ** 0.5)
