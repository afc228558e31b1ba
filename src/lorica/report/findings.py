"""What the records say, in sentences: the first is the report's headline. No sentence says more than its figures."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from lorica.report import words
from lorica.report.subjects import Cell, Difference, Matrix, Merge, Study, Subjects, Sweep

VERBS = {"better": "is better than", "worse": "is worse than"}
ORDER = {"better": 0, "worse": 1}  # what is decided comes before what is not


def findings(subjects: Subjects) -> list[str]:
    """One sentence or more for everything that has a figure; at least one."""
    compared = [study for study in subjects.studies if study.kind != "runs"]
    single = [study for study in subjects.studies if study.kind == "runs"]
    said = [
        *(sentence for study in compared for sentence in _of_study(study)),
        *(sentence for study in single for sentence in _of_cells(study)),
        *(sentence for merge in subjects.merges for sentence in _of_merge(merge)),
        *(sentence for sweep in subjects.sweeps for sentence in _of_sweep(sweep)),
        *(sentence for matrix in subjects.matrices for sentence in _of_matrix(matrix)),
    ]
    return said or ["Nothing has been measured yet"]


def _of_study(study: Study) -> Iterator[str]:
    """The arms against the first of them; of one task, or of all together."""
    overall = [each for each in study.differences if each.task is None] or list(study.differences)
    told = sorted((each for each in overall if each.mean is not None), key=lambda each: ORDER.get(each.verdict, 2))
    for each in told:
        yield difference(study, each)
    if not told:
        yield from _of_cells(study)
    for each in overall:
        if each.mean is None and study.is_finished:
            where = each.task or "all tasks together"
            yield f"{each.arm} cannot be compared with {each.against} on {where}: no pair of their runs has finished"
    if not study.is_finished:
        ended = len(study.runs)
        yield f"{study.title} is not finished: {words.numbered(ended, 'final run')} of it ended so far"


def difference(study: Study, found: Difference) -> str:
    """An arm against another, with the size of the difference, the seeds and the interval."""
    where = found.task or (study.tasks[0] if len(study.tasks) == 1 else f"{len(study.tasks)} tasks")
    seeds = words.numbered(found.num_pairs, "seed")
    assert found.mean is not None
    size, unit = gap(study, abs(found.mean)), unit_of(study)
    if found.verdict not in VERBS:
        between = _between(study, found.low, found.high)
        mean = gap(study, found.mean, signed=True)
        return (
            f"No difference shown between {found.arm} and {found.against} on {where}: {mean}{unit} ({seeds}{between})"
        )
    ends: tuple[float | None, float | None] = (found.low, found.high)
    if found.mean < 0 and found.low is not None and found.high is not None:
        ends = (-found.high, -found.low)  # of how much worse it is
    between = _between(study, *ends)
    return f"{found.arm} {VERBS[found.verdict]} {found.against} by {size}{unit} on {where} ({seeds}{between})"


def gap(study: Study, value: float | None, *, signed: bool = False) -> str:
    """A difference as a number: in points where the metric is a share."""
    if value is None:
        return "–"
    written = words.points(value) if _is_share(study) else words.score(value, "")
    return written if signed or value < 0 else written.removeprefix("+")


def unit_of(study: Study) -> str:
    return " points" if _is_share(study) else ""


def _is_share(study: Study) -> bool:
    return all(cell.metric in words.PERCENTAGES for cell in study.cells)


def _between(study: Study, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f", 95{words.SPACE}% {gap(study, low)} to {gap(study, high)}"


def _of_cells(study: Study) -> Iterator[str]:
    """A sentence for each arm: what it reaches."""
    for arm in study.arms:
        cells = [cell for task in study.tasks if (cell := study.cell(arm, task)) is not None]
        if len(cells) == 1:
            yield f"{arm} reaches {_reached(cells[0])} on {cells[0].task}{_known(cells[0])}"
        elif cells and len({cell.metric for cell in cells}) == 1:
            worst = (min if cells[0].higher_is_better else max)(cells, key=lambda cell: cell.mean)
            mean = words.score(fmean(cell.mean for cell in cells), worst.metric)
            metric = worst.metric.replace("_", " ")
            hardest = f"{_reached(worst, bare=True)} on the hardest, {worst.task}"
            yield f"{arm} reaches {mean} {metric} over {len(cells)} tasks, {hardest}"


def _reached(cell: Cell, *, bare: bool = False) -> str:
    found = words.score(cell.mean, cell.metric)
    return found if bare else f"{found} {cell.metric.replace('_', ' ')}"


def _known(cell: Cell) -> str:
    between = words.between(cell.low, cell.high, cell.metric)
    return "" if cell.low is None else f" ({cell.interval}: {between})"


def _of_merge(merge: Merge) -> Iterator[str]:
    counted = [(kept.task, kept.delta[0]) for kept in merge.kept if kept.delta is not None]
    if counted:
        least = min(counted, key=lambda each: each[1])
        mean = words.delta(fmean(value for _, value in counted))
        yield (
            f"{_called(merge)} keeps {mean} of what its adapters had gained, on the mean of "
            f"{words.numbered(len(counted), 'task')}; least of {least[0]}, {words.delta(least[1])}"
        )


def _called(merge: Merge) -> str:
    return merge.name if merge.method in merge.name else f"{merge.name} ({merge.method})"


def _of_sweep(sweep: Sweep) -> Iterator[str]:
    if sweep.best is not None and sweep.best.minimum is not None:
        point = ", ".join(f"{key} = {words.value(value)}" for key, value in sweep.best.point.items())
        yield (
            f"The best of {words.numbered(len(sweep.trials), 'trial')} of {sweep.method}, {point}, keeps at least "
            f"{words.delta(sweep.best.minimum[0])} of every task on {sweep.split}"
        )
    elif not sweep.is_finished:
        yield f"{sweep.name} is not finished: {words.numbered(len(sweep.trials), 'trial')} ended so far"


def _of_matrix(matrix: Matrix) -> Iterator[str]:
    """Which target is best on the mean of the tasks that all of them were asked."""
    asked = [column for column in matrix.columns if all((row, column) in matrix.scores for row in matrix.rows)]
    alike = {(score.metric, score.higher_is_better) for place, score in matrix.scores.items() if place[1] in asked}
    if len(matrix.rows) < 2 or len(alike) != 1:
        return
    (metric, higher_is_better), *_ = alike
    means = {row: fmean(matrix.scores[row, column].value for column in asked) for row in matrix.rows}
    best = (max if higher_is_better else min)(means, key=lambda row: means[row])
    yield (
        f"Of {len(means)} targets {best} does best: {words.score(means[best], metric)} {metric.replace('_', ' ')} on "
        f"{asked[0] if len(asked) == 1 else f'the mean of {len(asked)} tasks'}"
    )
