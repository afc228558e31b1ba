"""Runs that were named one by one, told apart by what differs in their configs and put together by what does not."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from lorica.report.subjects import Cell, Record, Run, Study

# What does not make two runs different things: where they lie, their task and seed, and how they are watched.
IGNORED = ("output_dir", "resume", "force", "device", "logging_steps", "save_steps", "seed", "task.")
SPEAKING = {"adapter.kind", "trainer", "adapter.init", "zo.estimator"}  # keys whose values need no key beside them
MOST_SHOWN = 3  # differences in an arm's name; with more, the folder says it better


def grouped(runs: Sequence[Run]) -> Study:
    """The runs as a study without differences: runs that differ in their seeds alone are one arm."""
    named = _named(runs)
    arms, tasks = (tuple(dict.fromkeys(values)) for values in ([run.arm for run in named], [run.task for run in named]))
    cells = (_cell([run for run in named if (run.arm, run.task) == key]) for key in _keys(named))
    return Study(
        title="the run" if len(runs) == 1 else f"{len(runs)} single runs",
        name="runs",
        kind="runs",
        is_finished=all(run.is_finished for run in named),
        arms=arms,
        tasks=tasks,
        runs=tuple(named),
        cells=tuple(cell for cell in cells if cell is not None),
        configs={(run.arm, run.task): run.config for run in reversed(named)},
    )


def differing_keys(configs: Iterable[Record]) -> list[str]:
    """The keys that some of the configs have with another value than others, but for what never counts."""
    trees = list(configs)
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return [
        key
        for key in keys
        if not key.startswith(IGNORED) and len({json.dumps(tree.get(key), sort_keys=True) for tree in trees}) > 1
    ]


def _named(runs: Sequence[Run]) -> list[Run]:
    """The runs with an arm each: those whose configs differ in nothing that counts have the same."""
    keys = differing_keys(run.config for run in runs)
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(json.dumps([run.config.get(key) for key in keys]), []).append(run)
    speaking = [key for key in keys if key in SPEAKING]
    names = next(
        (found for shown in (speaking, keys) if (found := _names(kinds.values(), shown)) is not None),
        [members[0].folder.name for members in kinds.values()],
    )
    arms = dict(zip(kinds, names, strict=True))
    return [replace(run, arm=arms[json.dumps([run.config.get(key) for key in keys])]) for run in runs]


def _names(kinds: Collection[Sequence[Run]], keys: Sequence[str]) -> list[str] | None:
    """What each kind of run is called by the values of `keys`; None if that is too long or does not tell them apart."""
    if len(keys) > MOST_SHOWN:
        return None
    names = [_name(members[0], keys) for members in kinds]
    return names if len(set(names)) == len(names) else None


def _name(run: Run, keys: Sequence[str]) -> str:
    if not keys:
        return str(run.config.get("adapter.kind", "run"))
    told = [_words(key, value) for key in keys if (value := run.config.get(key)) is not None]
    return ", ".join(told) or run.folder.name


def _words(key: str, value: Any) -> str:
    return str(value) if key in SPEAKING else f"{key.rpartition('.')[2]} {value}"


def _keys(runs: Sequence[Run]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((run.arm, run.task) for run in runs))


def _cell(runs: Sequence[Run]) -> Cell | None:
    """What the finished runs of one arm on one task came to; None if there are none."""
    done = [run for run in runs if run.score is not None]
    if not done:
        return None
    first = done[0].score
    assert first is not None
    scores = {_seed(run, at): run.score.value for at, run in enumerate(done) if run.score is not None}
    low, high, said = first.low, first.high, "95\u00a0% over test examples"
    if len(done) > 1:
        low, high, said = min(scores.values()), max(scores.values()), f"least and most of {len(done)} seeds"
    return Cell(
        arm=done[0].arm,
        task=done[0].task,
        metric=first.metric,
        higher_is_better=first.higher_is_better,
        scores=scores,
        mean=fmean(scores.values()),
        low=low,
        high=high,
        interval=said,
        learning_rate=done[0].config.get("learning_rate"),
        num_trainable=done[0].num_trainable,
        num_parameters=done[0].num_parameters,
        num_diverged=0,
        **_costs(done),
    )


def _seed(run: Run, at: int) -> str:
    """The seed; of runs without one, their place."""
    return str(run.seed) if run.seed is not None else f"run {at}"


def _costs(runs: Sequence[Run]) -> Mapping[str, float | None]:
    """The medians of what was measured."""
    measured = {
        "peak_bytes": [run.peak_bytes for run in runs],
        "seconds": [run.seconds for run in runs],
        "forwards": [float(run.curve.forwards[-1]) if run.curve is not None else None for run in runs],
    }
    known = {name: [each for each in values if each is not None] for name, values in measured.items()}
    return {name: median(values) if values else None for name, values in known.items()}
