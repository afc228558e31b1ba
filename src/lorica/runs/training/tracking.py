"""A run before the eyes of its trackers: what they are told, and when.

Every `logging_steps` steps they see what costs next to nothing; the spectra of the updates, which cost a decomposition
each, at evaluations alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from lorica import config, files
from lorica.adapters.injection import Live
from lorica.config import TrainConfig
from lorica.evaluation.evaluate import Evaluation
from lorica.results import RunFolder
from lorica.runs.training import told_figures
from lorica.runs.training.efficiency import peak_bytes
from lorica.runs.training.lora import AdapterOutcome
from lorica.runs.training.tuning import Outcome, RunUnderWay
from lorica.training import tracker
from lorica.training.fit import Step
from lorica.training.stretch import Tunable
from lorica.training.tracker import Tracked, Trackers


@dataclass
class Tracking:
    """What the trackers of a run under way have been told of."""

    learning: RunUnderWay
    trackers: Trackers
    told: Step | None = None
    num_rounds: int = field(init=False, default=0)

    def step(self, step: Step, live: Tunable) -> None:
        """A step, if one is due: the first, the last, and every `logging_steps`."""
        learning = self.learning
        if step.step % learning.cfg.logging_steps and self.told is not None and step.step < learning.num_steps:
            return
        figures = told_figures.of_step(step, self.told)
        figures["efficiency/peak_bytes"] = peak_bytes(learning.ready.device)
        if step.weights:
            figures |= told_figures.of_slopes(step, learning.progress.num_left_out)
        if isinstance(live, Live):
            figures |= told_figures.of_factors(live)
        self.trackers.log(figures, step.step)
        self.told = step

    def evaluation(self, found: Evaluation, outcome: Outcome) -> None:
        """What an evaluation has found, and the spectra of what it was of."""
        figures = told_figures.of_evaluation(found)
        if isinstance(outcome, AdapterOutcome):
            figures |= told_figures.of_spectra(outcome.adapter)
        self.trackers.log(figures, self.learning.progress.step)

    def rounds(self) -> None:
        """The rounds so far, if one has ended since this was asked last."""
        entries = list(self.learning.tuning.rounds())
        if len(entries) > self.num_rounds:
            self.num_rounds = len(entries)
            self.trackers.log(told_figures.of_rounds(entries), self.learning.progress.step)


def check(names: Sequence[str]) -> None:
    """Raise UnknownNameError or MissingExtraError for a tracker that cannot be had."""
    for name in names:
        tracker.find(name)


@contextlib.contextmanager
def tracked(learning: RunUnderWay, run: RunFolder, first_step: int) -> Iterator[Tracking | None]:
    """The run before its trackers' eyes during the block; None where it has none, or another process tells them."""
    if not learning.cfg.trackers or not learning.processes.is_first:
        yield None
        return
    trackers = _started(learning.cfg, run, first_step, learning.say)
    num_parameters = sum(parameter.numel() for parameter in learning.ready.base.model.parameters())
    trackers.log(told_figures.of_share(learning.tuning.num_trainable(), num_parameters), first_step)
    try:
        yield Tracking(learning, trackers)
    finally:
        trackers.finish()


def log_checks(run: RunFolder, checks: Mapping[str, bool], say: Console) -> None:
    """Tell the trackers of a finished run which checks it passes."""
    cfg = config.check(TrainConfig, config.read_yaml(run.config))
    if cfg.trackers:
        last_step = files.read_json(run.trainer_state)["step"]
        trackers = _started(cfg, run, last_step, say)
        trackers.log(told_figures.of_checks(checks), last_step)
        trackers.finish()


def _started(cfg: TrainConfig, run: RunFolder, first_step: int, say: Console) -> Trackers:
    def warn(message: str) -> None:
        say.print(f"warning: {message}", highlight=False, markup=False, soft_wrap=True)

    name, begun = cfg.tracking.name or run.path.name, files.read_json(run.origin)["started"]
    about = Tracked(
        folder=run.path,
        project=cfg.tracking.project,
        name=name,
        id=f"{files.slug(name, 40)}-{files.content_hash([str(run.path.resolve()), begun])}",
        config=cfg.model_dump(mode="json"),
        first_step=first_step,
        online=cfg.tracking.online,
    )
    return Trackers.started(cfg.trackers, about, warn)
