"""The tables of a study: differences with their verdicts, and what each arm came to at which cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorica.report import words
from lorica.report.findings import gap, unit_of
from lorica.report.subjects import Cell, Difference, Study

SPAN = 100.0  # the width of an interval's picture, in its own units
MARGIN = 6.0


@dataclass(frozen=True)
class Strip:
    """An interval as a picture: where zero, low, mean and high stand on a strip of width `SPAN`."""

    zero: float
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """A row: an arm against another on a task."""

    task: str
    arm: str
    against: str
    mean: str
    between: str
    num_pairs: int
    verdict: str
    strip: Strip | None


def verdicts(study: Study) -> list[Verdict]:
    """All tasks together first, then each on its own, on one scale."""
    reach = max(
        (abs(end) for each in study.differences for end in (each.low, each.high, each.mean) if end is not None),
        default=0.0,
    )
    ordered = sorted(study.differences, key=lambda each: each.task is not None)
    if len(study.tasks) == 1:  # then the two say the same
        ordered = [each for each in ordered if each.task is not None] or ordered
    return [_verdict(study, each, reach) for each in ordered]


def _verdict(study: Study, found: Difference, reach: float) -> Verdict:
    known = found.low is not None and found.high is not None
    low, high = (gap(study, end, signed=True) for end in (found.low, found.high))
    return Verdict(
        task=found.task or "all tasks",
        arm=found.arm,
        against=found.against,
        mean=gap(study, found.mean, signed=True) + (unit_of(study) if found.mean is not None else ""),
        between=f"{low} to {high}" if known else "–",
        num_pairs=found.num_pairs,
        verdict=found.verdict if found.num_pairs else f"{found.verdict}: no pair of runs has finished",
        strip=_strip(found, reach),
    )


def _strip(found: Difference, reach: float) -> Strip | None:
    if found.mean is None or found.low is None or found.high is None or reach == 0:
        return None
    half = SPAN / 2 - MARGIN
    return Strip(SPAN / 2, *(round(SPAN / 2 + half * end / reach, 2) for end in (found.low, found.mean, found.high)))


def missing(study: Study) -> str:
    """What an unfinished study has yet to run, those apart that only choose rates."""
    counts = {"that rates are chosen by": study.num_missing_choosing, "that are compared": study.num_missing}
    return words.listed([f"{count:,} of the runs {told}" for told, count in counts.items() if count])


@dataclass(frozen=True)
class Outcome:
    """A row: what an arm came to on a task, and what it cost."""

    task: str
    arm: str
    place: int  # of the arm's colour
    score: str
    metric: str
    between: str
    interval: str
    is_best: bool
    learning_rate: str
    num_trainable: str
    share: str
    memory: str
    duration: str
    forwards: str
    num_diverged: int


def outcomes(study: Study) -> list[Outcome]:
    """Task by task, arm by arm; an arm of which no run has finished on a task is a row of dashes."""
    places = [(arm, task, study.cell(arm, task)) for task in study.tasks for arm in study.arms]
    return [
        _nothing(study, arm, task) if cell is None else _outcome(study, cell)
        for arm, task, cell in places
        if cell is not None or study.kind != "runs"
    ]


def _nothing(study: Study, arm: str, task: str) -> Outcome:
    unknown = words.score(None)
    return Outcome(
        task=task,
        arm=arm,
        place=study.arms.index(arm),
        score=unknown,
        metric="no run has finished",
        between=unknown,
        interval="",
        is_best=False,
        learning_rate=unknown,
        num_trainable=unknown,
        share=unknown,
        memory=unknown,
        duration=unknown,
        forwards=unknown,
        num_diverged=0,
    )


def _outcome(study: Study, cell: Cell) -> Outcome:
    rivals: Sequence[Cell] = [each for each in study.cells if each.task == cell.task and each.metric == cell.metric]
    best = (max if cell.higher_is_better else min)(each.mean for each in rivals)
    return Outcome(
        task=cell.task,
        arm=cell.arm,
        place=study.arms.index(cell.arm),
        score=words.score(cell.mean, cell.metric),
        metric=cell.metric.replace("_", " "),
        between=words.between(cell.low, cell.high, cell.metric),
        interval=cell.interval,
        is_best=len(rivals) > 1 and cell.mean == best,
        learning_rate=words.rate(cell.learning_rate),
        num_trainable=words.count(cell.num_trainable),
        share=words.share(cell.num_trainable, cell.num_parameters),
        memory=words.size(cell.peak_bytes),
        duration=words.duration(cell.seconds),
        forwards=words.count(cell.forwards),
        num_diverged=cell.num_diverged,
    )
