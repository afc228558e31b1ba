"""Whether the raw loss falls at all, or has risen far: what a person should be told of a noisy run (MATH section 3)."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

WINDOW = 500  # losses that the trend is taken over
NO_TREND = -2.0  # t above which no learning is shown
RECENT = 50  # losses that say where the run is
RISE = 0.25  # of the first loss: a rise by this share of it is far,
DEVIATIONS, ERRORS = 2.0, 6.0  # if so many deviations are left out that one loss has, or errors that two means have
RISING = 5.0  # t from which the loss rises
DIVERGES = "the run diverges. What usually helps: a lower learning_rate, a smaller adapter.alpha, zo.clip=5"


@dataclass
class LossTrend:
    """The t-statistic of the least-squares slope of the last `window` losses, at a constant cost a loss.

    Running sums are kept about `centre` and taken afresh once a window, so that no rounding or outlier stays in them.
    """

    window: int = WINDOW
    losses: deque[float] = field(default_factory=deque)
    centre: float = 0.0
    total: float = 0.0  # Σ y, with y = loss − centre
    moment: float = 0.0  # Σ i·y, i the place in the window, from 0
    square: float = 0.0  # Σ y²
    num_since: int = 0  # losses since the sums were taken afresh

    def add(self, loss: float) -> None:
        """One more loss, a finite one; the oldest falls out of a full window."""
        if len(self.losses) == self.window:
            oldest = self.losses.popleft() - self.centre
            self.moment -= self.total - oldest
            self.total -= oldest
            self.square -= oldest**2
        self.losses.append(loss)
        self.num_since += 1
        if self.num_since >= self.window:
            self._take_afresh()
            return
        y = loss - self.centre
        self.moment += (len(self.losses) - 1) * y
        self.total += y
        self.square += y**2

    def _take_afresh(self) -> None:
        self.centre, self.num_since = statistics.fmean(self.losses), 0
        ys = [loss - self.centre for loss in self.losses]
        self.total, self.square = math.fsum(ys), math.fsum(y * y for y in ys)
        self.moment = math.fsum(place * y for place, y in enumerate(ys))

    def t(self) -> float | None:
        """Slope over its standard error; None until the window is full. 0 where all losses are the same."""
        n = len(self.losses)
        if n < self.window:
            return None
        spread = n * (n * n - 1) / 12  # Σ (i − mean i)²
        slope = (self.moment - (n - 1) / 2 * self.total) / spread
        left = self.square - self.total**2 / n - slope**2 * spread  # squared residuals
        error = math.sqrt(max(left, 0.0) / (n - 2) / spread)
        return slope / error if error > 0 else 0.0 if slope == 0 else math.copysign(math.inf, slope)


@dataclass
class LossMeter:
    """Reads every raw loss of a run, and says each of its two warnings once.

    No learning is shown while the trend over the last 500 losses has t > −2. The loss has risen far from t = 5 on, or
    when the mean of the last 50 lies a quarter of the run's first loss, and what may be noise, above that loss or above
    the lowest such mean so far. The first loss alone is sure to be from before a jump: a step that is too long shows in
    the second. A loss that is not finite is passed over.
    """

    trend: LossTrend = field(default_factory=LossTrend)
    first: float | None = None
    lowest: tuple[float, float] | None = None  # mean of 50 losses so far, and their standard deviation
    told: list[str] = field(default_factory=list)

    def after(self, loss: float) -> list[str]:
        """What should be said after this loss: warnings that were not given before."""
        if not math.isfinite(loss):
            return []
        self.trend.add(loss)
        if self.first is None:
            self.first = loss
        warnings = {"rise": self._rise(), "trend": self._no_trend()}
        new = {name: text for name, text in warnings.items() if text and name not in self.told}
        self.told += new
        return list(new.values())

    def _rise(self) -> str:
        """The warning, or nothing."""
        if self.first is None or len(self.trend.losses) < RECENT or "rise" in self.told:
            return ""
        t = self.trend.t()
        if t is not None and t >= RISING:
            return f"the loss rises over the last {self.trend.window} steps (t = {t:.1f}): {DIVERGES}"
        recent = [self.trend.losses[place] for place in range(-RECENT, 0)]
        now = statistics.fmean(recent)
        deviation = math.sqrt(math.fsum((loss - now) ** 2 for loss in recent) / (RECENT - 1))
        low, spread = self.lowest = min(self.lowest or (now, deviation), (now, deviation))
        far = RISE * abs(self.first)
        if now > self.first + far + DEVIATIONS * deviation:
            before = f"{self.first:.4g} at the first step"
        elif now > low + far + ERRORS * math.hypot(deviation, spread) / math.sqrt(RECENT):
            before = f"{low:.4g} at its lowest"
        else:
            return ""
        return f"the loss has risen from {before} to {now:.4g} (mean of the last {RECENT}): {DIVERGES}"

    def _no_trend(self) -> str:
        """The warning, or nothing."""
        t = self.trend.t()
        if t is None or not NO_TREND < t < RISING:
            return ""
        step = "a lower learning_rate" if t >= -NO_TREND else "a larger zo.num_directions with a larger learning_rate"
        return (
            f"the loss shows no fall over the last {self.trend.window} steps (t = {t:.1f}): either the run has "
            f"converged, or it does not learn. What usually helps: {step}; for an adapter zo.train=B or "
            "zo.estimator=forward_gradient; trainer=backprop"
        )

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must keep."""
        trend = self.trend
        sums = [trend.centre, trend.total, trend.moment, trend.square]
        return {
            "losses": list(trend.losses), "sums": sums, "num_since": trend.num_since,
            "first": self.first, "lowest": self.lowest, "told": self.told,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Put a kept state back."""
        centre, total, moment, square = state["sums"]
        losses = deque(state["losses"])
        self.trend = LossTrend(self.trend.window, losses, centre, total, moment, square, state["num_since"])
        self.first, self.told, lowest = state["first"], list(state["told"]), state.get("lowest")
        self.lowest = (lowest[0], lowest[1]) if lowest else None
