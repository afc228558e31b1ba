"""When a boosting round ends (MATH section 2): every n steps, every n epochs, or adaptively."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from lorica.training.fit import MAX_STEPS, Step

BestScope = Literal["round", "run"]


@dataclass(frozen=True)
class Verdict:
    """What a rule says after a step: whether the booster is the best so far, and why the round ends, if it does."""

    is_best: bool = False
    reason: str | None = None


class RoundRule(Protocol):
    """Watches the raw loss of every step of a round."""

    def described(self) -> str:
        """The rule in words, for the person who started the run."""

    def begin(self, step: int) -> None:
        """A new round starts after `step` steps of the run."""

    def after(self, step: Step) -> Verdict:
        """What follows from this step."""

    def rolls_back(self, reason: str) -> bool:
        """Whether a round that ends for this reason takes the best booster instead of the last."""

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must keep of the rule."""

    def restore(self, state: dict[str, Any]) -> None:
        """Put a kept state back."""


@dataclass
class EverySteps:
    """A round is `num_steps` optimizer steps long; the last booster is laid on as it stands.

    Rounds of whole epochs are the same rule: the number of steps in them is known.
    """

    num_steps: int
    name: str = "steps"
    started: int = 0

    def described(self) -> str:
        return f"every {self.num_steps} steps" + (" (whole epochs)" if self.name == "epochs" else "")

    def begin(self, step: int) -> None:
        self.started = step

    def after(self, step: Step) -> Verdict:
        return Verdict(reason=self.name if step.step - self.started >= self.num_steps else None)

    def rolls_back(self, reason: str) -> bool:
        return False

    def state(self) -> dict[str, Any]:
        return {"started": self.started}

    def restore(self, state: dict[str, Any]) -> None:
        self.started = state["started"]


@dataclass
class Smoothed:
    """What the adaptive rule remembers: smoothed loss, best smoothed loss, steps without an improvement."""

    loss: float | None = None
    best: float = math.inf
    patience: int = 0


@dataclass
class Adaptive:
    """A round ends when the smoothed raw loss has not improved by `threshold` for `patience` steps.

    L̃ ← β·L̃ + (1−β)·L from the round's first raw loss on; an improvement L̃ < best − threshold keeps the booster. With
    patience 0 only the run's last step ends a round. `best_scope` says whether `best` starts anew each round (round) or
    carries over (run). The kept booster is laid on, after patience alone if `roll_back_on_patience_alone`.
    """

    patience: int = 100
    beta: float = 0.9
    threshold: float = 0.01
    best_scope: BestScope = "round"
    roll_back_on_patience_alone: bool = False
    smoothed: Smoothed = field(default_factory=Smoothed)

    def described(self) -> str:
        last = f"no gain over {self.threshold:g} for {self.patience} steps" if self.patience else "the run's last step"
        return f"adaptive: until {last} (smoothed by {self.beta:g}, best of the {self.best_scope})"

    def begin(self, step: int) -> None:
        best = self.smoothed.best if self.best_scope == "run" else math.inf
        self.smoothed = Smoothed(best=best)

    def after(self, step: Step) -> Verdict:
        """A step that was not applied (a loss that is not finite) is no evidence either way."""
        if not step.applied:
            return Verdict()
        now = self.smoothed
        now.loss = step.loss if now.loss is None else self.beta * now.loss + (1 - self.beta) * step.loss
        if now.loss < now.best - self.threshold:
            now.best, now.patience = now.loss, 0
            return Verdict(is_best=True)
        now.patience += 1
        return Verdict(reason="patience" if 0 < self.patience <= now.patience else None)

    def rolls_back(self, reason: str) -> bool:
        return reason == "patience" or (reason == MAX_STEPS and not self.roll_back_on_patience_alone)

    def state(self) -> dict[str, Any]:
        # JSON has no word for infinity: a best that is not there yet is null.
        found = asdict(self.smoothed)
        return {**found, "best": None if math.isinf(self.smoothed.best) else self.smoothed.best}

    def restore(self, state: dict[str, Any]) -> None:
        best = math.inf if state["best"] is None else state["best"]
        self.smoothed = Smoothed(state["loss"], best, state["patience"])


def round_rule(
    *,
    steps_per_iteration: int | None,
    use_adaptive_merge: bool,
    merge_frequency: int | None,
    steps_per_epoch: int,
    adaptive: Adaptive,
) -> EverySteps | Adaptive:
    """The one rule in force: steps if they are given, else adaptive if it is on, else whole epochs (1 unless given)."""
    if steps_per_iteration:
        return EverySteps(steps_per_iteration)
    if use_adaptive_merge:
        return adaptive
    return EverySteps((merge_frequency or 1) * steps_per_epoch, name="epochs")
