"""Fitting coefficients: gradient, Adam, a look at the validation batches now and then; all of it resumes by number."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorica import progress
from lorica.errors import NonFiniteLossError
from lorica.merging.fitting import feeding, gradients, keeping
from lorica.merging.fitting.gradients import Estimate, Estimator, Objective, StepBatches, Total
from lorica.merging.fitting.layout import Layout
from lorica.merging.fitting.losses import Losses, Measured
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.parameterization import Parameterization
from lorica.merging.fitting.problem import Problem
from lorica.tasks.batching import Batch
from lorica.training.interruption import Interruption

ADAM_EPSILON = 1e-8
# What each task's validation batches gave at the start, and give now -> a reason to stop
Watch = Callable[[Sequence[Measured], Sequence[Measured]], str | None]
Entry = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Learned:
    """Coefficients, and how they came about."""

    layout: Layout
    c: Tensor  # (K,) float64
    history: Sequence[Mapping[str, Any]] = ()
    best_step: int | None = None  # whose coefficients they are; None where nothing was validated, and they are the last
    stopped: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class State:
    """How far fitting has come; plain numbers, so that JSON keeps it bit for bit."""

    u: list[float]
    mean: list[float]  # Adam's moments of the gradient
    square: list[float]
    step: int = 0
    best_value: float | None = None
    best_step: int | None = None
    best_c: list[float] | None = None
    strikes: int = 0  # evaluations in a row that were no better
    history: list[Entry] = field(default_factory=list)
    stopped: str | None = None
    seconds: float = 0.0


def descend(
    losses: Losses,
    descent: Descent,
    parameterization: Parameterization,
    *,
    label: str,
    settings: Mapping[str, Any],
    total: Total,
    validation_total: Total | None = None,
    watch: Watch | None = None,
) -> Learned:
    """Minimise `total` of the tasks' losses over the coefficients that `parameterization` reaches.

    `validation_total` is what the validation batches are judged by, where it is another; `watch` may end the fitting
    before what it has seen counts as the best. The state file is written every `logging_steps` and at the end; where
    one is left by the same `label`, `settings` (whatever shapes the objective), options and layout, fitting goes on
    from there to the same last bit. Raises NonFiniteLossError, and InterruptedRunError after SIGTERM or SIGINT, when
    the state has been written.
    """
    problem, layout = losses.problem, losses.mounted.layout
    run = _Run(
        descent,
        parameterization,
        Objective(losses, total, parameterization.coefficients),
        gradients.estimator(descent),
        layout,
        validation_total or total,
        watch,
        feeding.validation_batches(problem, descent),
    )
    settings = {**settings, "start": parameterization.start.tolist()}
    identity = keeping.identity(label, settings, descent, layout)
    state = _resumed(problem, identity) or _started(parameterization)
    begin = time.monotonic() - state.seconds
    with Interruption() as interruption, _shown(problem, descent, label) as show:
        batches = feeding.step_batches(problem, descent, state.step)
        while state.stopped is None:
            if run.is_due(state):
                state = run.evaluated(state)
            if state.stopped is None:
                state = run.stepped(state, next(batches))
            state = replace(state, seconds=time.monotonic() - begin)
            show(state)
            if state.stopped is not None or interruption.signal or state.step % descent.logging_steps == 0:
                keeping.keep(problem, identity, asdict(state))
            if state.stopped is None and interruption.signal:
                raise keeping.interrupted(problem, f"step {state.step}", interruption.signal)
    return _learned(state, parameterization, descent, layout)


@dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same from step to step."""

    descent: Descent
    parameterization: Parameterization
    objective: Objective
    estimator: Estimator
    layout: Layout
    validation_total: Total
    watch: Watch | None
    validation: Sequence[Sequence[Batch]]

    def is_due(self, state: State) -> bool:
        """Whether the state is to be looked at before a step is taken from it."""
        return state.step >= self.descent.steps or (bool(self.validation) and state.step % self.descent.eval_steps == 0)

    def evaluated(self, state: State) -> State:
        """The state with what the validation batches say of its coefficients, stopped where that is the end."""
        state = self._validated(state) if self.validation else state
        if state.stopped is None and state.step >= self.descent.steps:
            return replace(state, stopped=f"all {self.descent.steps} steps done")
        return state

    def _validated(self, state: State) -> State:
        c = self._coefficients(state)
        found = self._measured(c)
        losses = torch.tensor([each.loss for each in found], dtype=torch.float64)
        value = float(self.validation_total(losses))
        self._check_finite(state, losses, value)
        entry = {"step": state.step, "validation": value, "validation_losses": self._named(losses), **self._told(c)}
        state = replace(state, history=[*state.history, entry])
        reason = None if self.watch is None else self.watch(self._at_start, found)
        if reason is not None:
            warnings.warn(f"stopped at step {state.step}: {reason}", stacklevel=4)
            return replace(state, stopped=reason)
        return self._compared(state, value, c)

    @cached_property
    def _at_start(self) -> list[Measured]:
        return self._measured(self.parameterization.coefficients(self.parameterization.start))

    def _measured(self, c: Tensor) -> list[Measured]:
        pairs = zip(self.objective.tasks, self.validation, strict=True)
        return [self.objective.losses.measured(task, c, batches) for task, batches in pairs]

    def _compared(self, state: State, value: float, c: Tensor) -> State:
        """The state after an evaluation that gave `value`: the best so far, and whether patience is at its end."""
        best = math.inf if state.best_value is None else state.best_value
        if value < best - self.descent.early_stopping_threshold:
            strikes = 0
        else:
            strikes = state.strikes + (state.step > self.descent.early_stopping_warmup_steps)
        if value < best:
            state = replace(state, best_value=value, best_step=state.step, best_c=c.tolist())
        patience = self.descent.early_stopping_patience
        if patience is None or strikes < patience or state.step < self.descent.min_optimizer_steps_before_early_stop:
            return replace(state, strikes=strikes)
        return replace(state, strikes=strikes, stopped=f"no better validation {strikes} times in a row")

    def stepped(self, state: State, batches: StepBatches) -> State:
        """The state after one step of Adam (Kingma & Ba 2015, arXiv 1412.6980)."""
        u = _tensor(state.u)
        estimate = self.estimator(self.objective, u, batches, state.step)
        self._check_finite(state, estimate.losses, float(estimate.gradient.sum()))
        first, second = self.descent.betas
        step = state.step + 1
        mean = _tensor(state.mean).lerp(estimate.gradient, 1 - first)
        square = _tensor(state.square).lerp(estimate.gradient.square(), 1 - second)
        scale = (square / (1 - second**step)).sqrt() + ADAM_EPSILON
        u = self.parameterization.projected(u - self.descent.learning_rate / (1 - first**step) * mean / scale)
        state = replace(state, u=u.tolist(), mean=mean.tolist(), square=square.tolist(), step=step)
        return self._logged(state, estimate) if step % self.descent.logging_steps == 0 else state

    def _logged(self, state: State, estimate: Estimate) -> State:
        entry = {"step": state.step, "objective": estimate.value, "losses": self._named(estimate.losses)}
        return replace(state, history=[*state.history, {**entry, **self._told(self._coefficients(state))}])

    def _coefficients(self, state: State) -> Tensor:
        return self.parameterization.coefficients(_tensor(state.u))

    def _named(self, losses: Tensor) -> dict[str, float]:
        return dict(zip([task.name for task in self.objective.tasks], losses.tolist(), strict=True))

    def _told(self, c: Tensor) -> dict[str, Any]:
        """The mean coefficient of each adapter, for the history."""
        parts: dict[str, list[float]] = {name: [] for name in self.layout.names}
        for (_, name), value in zip(self.layout.keys, c.tolist(), strict=True):
            parts[name].append(value)
        return {"coefficients": {name: math.fsum(part) / max(1, len(part)) for name, part in parts.items()}}

    def _check_finite(self, state: State, losses: Tensor, value: float) -> None:
        bad = next((name for name, loss in self._named(losses).items() if not math.isfinite(loss)), None)
        if bad is not None or not math.isfinite(value):
            what = f"the loss of {bad}" if bad is not None else "the objective or its gradient"
            raise NonFiniteLossError(
                f"{what} is NaN or infinite at step {state.step}: lower learning_rate={self.descent.learning_rate:g}, "
                "or load the model in float32 (model_dtype=float32)"
            )


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _started(parameterization: Parameterization) -> State:
    start = parameterization.start.tolist()
    return State(start, [0.0] * len(start), [0.0] * len(start))


def _resumed(problem: Problem, identity: str) -> State | None:
    """The state of this fitting that the file keeps."""
    kept = keeping.kept(problem, identity)
    if kept is None:
        return None
    state = State(**kept)
    problem.say(f"going on from step {state.step}" if state.stopped is None else f"fitted before: {state.stopped}")
    return state


@contextmanager
def _shown(problem: Problem, descent: Descent, label: str) -> Iterator[Callable[[State], None]]:
    """A bar on a terminal, if one is wanted; otherwise a plain line every `logging_steps` steps."""
    with progress.bar(wanted=descent.progress_bar) as bar:
        task = bar.add_task(f"fitting {label}", total=descent.steps, note="")

        def show(state: State) -> None:
            note = _note(state)
            bar.update(task, completed=state.step, note=note)
            if state.stopped is not None:
                problem.say(f"{label}: {state.stopped}  {note}  {state.seconds:.1f} s")
            elif bar.disable and state.step % descent.logging_steps == 0:
                problem.say(f"{label}: step {state.step}/{descent.steps}  {note}  {state.seconds:.1f} s")

        yield show


def _note(state: State) -> str:
    """The newest value of each kind that the history has."""
    newest = {key: entry[key] for entry in state.history for key in ("objective", "validation") if key in entry}
    return "  ".join(f"{key} {value:.4f}" for key, value in newest.items())


def _learned(state: State, parameterization: Parameterization, descent: Descent, layout: Layout) -> Learned:
    last = parameterization.coefficients(_tensor(state.u)).detach()
    is_best = descent.restore_best_checkpoint and state.best_c is not None
    return Learned(
        layout,
        c=_tensor(state.best_c) if is_best and state.best_c is not None else last,
        history=state.history,
        best_step=state.best_step if is_best else None,
        stopped=state.stopped or "",
        seconds=state.seconds,
    )
