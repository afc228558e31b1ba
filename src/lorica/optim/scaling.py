"""What is done to measured slopes before they weigh their directions: outliers are clipped, steps made even."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Normalize = Literal["none", "std", "rms"]

WINDOW = 100  # slopes that an outlier is judged by
ENOUGH = 20  # of them, before anything is clipped
RMS_BETA = 0.99


@dataclass
class Scaling:
    """Clips slopes, then divides them by one number; what it remembers of the slopes so far is its `state`.

    `clip`: a slope g is cut to `clip` times the median of |g| over the last 100 slopes before the step: their MAD about
    0, where a slope along a random direction is centred. Slopes of exactly 0 are left out of the median: under a
    metric most probes change nothing. `normalize`: `rms` divides by a running root mean square of the slopes, this
    step's included; `std` by the standard deviation of the step's losses over ε (FZOO, arXiv 2506.09034).
    """

    normalize: Normalize = "none"
    clip: float | None = None
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    mean_square: float = 0.0
    num_steps: int = 0

    def __call__(self, slopes: Sequence[float], losses: Sequence[float], epsilon: float) -> list[float]:
        """The scaled slopes; slopes and losses are those of one step, all finite."""
        clipped = slopes if self.clip is None else self._clipped(slopes, self.clip)
        if self.normalize == "none":
            return list(clipped)
        unit = _spread(losses) / epsilon if self.normalize == "std" else self._rms(clipped)
        return [slope / unit if unit > 0 else slope for slope in clipped]

    def _clipped(self, slopes: Sequence[float], clip: float) -> list[float]:
        limit = clip * statistics.median(self.recent) if len(self.recent) >= ENOUGH else math.inf
        self.recent.extend(abs(slope) for slope in slopes if slope != 0.0)
        return [min(max(slope, -limit), limit) for slope in slopes]

    def _rms(self, slopes: Sequence[float]) -> float:
        self.num_steps += 1
        mean_square = math.fsum(slope**2 for slope in slopes) / len(slopes)
        self.mean_square += (1 - RMS_BETA) * (mean_square - self.mean_square)
        return math.sqrt(self.mean_square / (1 - RMS_BETA**self.num_steps))

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must keep."""
        return {"recent": list(self.recent), "mean_square": self.mean_square, "num_steps": self.num_steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Put a kept state back."""
        self.recent = deque(state["recent"], maxlen=WINDOW)
        self.mean_square, self.num_steps = state["mean_square"], state["num_steps"]


def _spread(losses: Sequence[float]) -> float:
    mean = math.fsum(losses) / len(losses)
    return math.sqrt(math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1))
