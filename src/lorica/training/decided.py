"""What was decided of the rounds of a run that is taken again, in the place of its rule and its judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.optim.replay import LoggedRound
from lorica.training.boosting import Round
from lorica.training.fit import Step
from lorica.training.rounds import Verdict


@dataclass(frozen=True)
class Decided:
    """A round rule and a judge: rounds end where they ended, keep what they kept, and are laid on if they were."""

    rounds: Sequence[LoggedRound]

    def described(self) -> str:
        return f"as the log has them, {len(self.rounds)} in all"

    def begin(self, step: int) -> None:
        pass

    def after(self, step: Step) -> Verdict:
        ended = next((each for each in self.rounds if each.step == step.step), None)
        is_best = any(each.kept == step.step for each in self.rounds)
        return Verdict(is_best, ended.reason if ended else None)

    def rolls_back(self, reason: str) -> bool:
        return True  # what was kept may be the last booster, and going back to that changes nothing

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass

    def before(self) -> Tensor:
        return torch.empty(0)

    def accepts(self, round: Round) -> bool:
        return self.rounds[round.number].accepted
