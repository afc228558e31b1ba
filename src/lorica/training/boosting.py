"""Gradient boosting with low-rank boosters (XGBLoRA, arXiv 2410.19694; MATH section 2), read as the algorithm.

Train a booster; judge it; lay it on the base, or roll back; note it in the ledger; start the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.injection import Live
from lorica.training.fit import Progress, Step
from lorica.training.ledger import Entry, Ledger
from lorica.training.rounds import RoundRule

INTERRUPTED = "interrupted"


@dataclass
class Round:
    """A round under way: what a checkpoint must keep of it beside the optimizer."""

    number: int
    first_step: int
    live: Live
    rule: RoundRule
    start: Adapter  # the new booster, and the heads that it found
    best: Adapter | None = None
    before: Tensor | None = None  # (b,) the probe's losses before the round
    last_loss: float | None = None

    def watch(self, step: Step) -> str | None:
        """Show the rule a step; keep the booster if it is the best so far; the reason if the round ends."""
        if step.applied:
            self.last_loss = step.loss
        verdict = self.rule.after(step)
        if verdict.is_best:
            self.best = injection.extract(self.live)
        return verdict.reason


class TrainRound(Protocol):
    """Trains a round to its end and returns why it ended; `INTERRUPTED` leaves it to be resumed."""

    def __call__(self, round: Round) -> str: ...


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
    progress: Progress,
    shrinkage: float = 1.0,
    dropout: float = 0.0,
    train_factors: str = "both",
    probe: Callable[[], Tensor] | None = None,
    probe_k: float = 1.0,
    resumed: Callable[[Round], None] | None = None,
    on_round: Callable[[Entry], None] = lambda entry: None,
) -> bool:
    """Boost from `progress` to step `num_steps`; the ledger holds every round, the foundation what was laid on.

    `new_booster(k)` gives round k's first factors and heads; `resumed` puts a kept state into the first round. A
    round's best booster is taken where the rule rolls back; with a `probe` (per-example losses of a fixed batch) it is
    laid on only if it improves the probe by more than `probe_k` standard errors. Returns whether the run came to its
    end; an interrupted one is left inside a round.
    """
    foundation.lay_on(ledger.chain())
    while progress.step < num_steps:
        number = len(ledger.boosters)
        start = new_booster(number)
        live = injection.inject(foundation.model, start, dropout)
        live.train_only(train_factors)
        round = Round(number, progress.step, live, rule, start)
        rule.begin(progress.step)
        if resumed is not None:
            resumed(round)
            resumed = None
        if probe is not None and round.before is None:
            round.before = probe()
        reason = train_round(round)
        if reason == INTERRUPTED:
            return False
        entry, booster = judged(round, reason, progress, shrinkage, probe, probe_k)
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
    probe: Callable[[], Tensor] | None = None,
    probe_k: float = 1.0,
) -> tuple[Entry, Adapter]:
    """The round's booster, rolled back to its best where the rule says so, and its line in the ledger.

    A rejected booster is kept beside the heads that it found.
    """
    last = injection.extract(round.live)
    rolled_back = round.best is not None and round.rule.rolls_back(reason)
    booster = round.best if rolled_back and round.best is not None else last
    if rolled_back:
        round.live.put(booster)
    accepted = probe is None or improves(round.before, probe(), probe_k)
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
    )
    return entry, booster if accepted else Adapter(booster.updates, round.start.heads)


def improves(before: Tensor | None, after: Tensor, k: float) -> bool:
    """Whether the mean per-example difference d lies below −k of its standard errors; equal batches, no dropout."""
    assert before is not None
    d = (after - before).double()  # (b,)
    return bool(torch.isfinite(d).all()) and float(d.mean()) < -k * float(d.std() / len(d) ** 0.5)
