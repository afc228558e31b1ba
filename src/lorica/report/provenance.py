"""Where the figures come from: what differed between the arms, which versions ran which commands, and every run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from lorica.config.contradictions import LOW_RANK, STEPS
from lorica.report import words
from lorica.report.grouping import differing_keys
from lorica.report.subjects import Record, Run, Study, Subjects

VERSIONS = ("lorica", "commit", "python", "platform", "device", "num_cpus")


@dataclass(frozen=True)
class Difference:
    """A key of the config, and what each arm has there."""

    key: str
    values: list[str]


@dataclass(frozen=True)
class RunLine:
    folder: str
    arm: str
    task: str
    seed: str
    score: str
    duration: str
    started: str


@dataclass(frozen=True)
class Provenance:
    versions: list[tuple[str, str]]
    commands: list[str]
    seeds: list[str]
    started: str | None


def differences(study: Study) -> list[Difference]:
    """Each key that the arms do not share, in the order of their configs, with what every arm has there."""
    found = [
        Difference(key, [_value(study, arm, key) for arm in study.arms])
        for key in differing_keys(study.configs.values())
    ]
    return [each for each in found if len(set(each.values)) > 1]


def _value(study: Study, arm: str, key: str) -> str:
    """What an arm's config has; where that hangs on the task, as a learning rate may, what it has on each."""
    configs = {task: study.configs[arm, task] for task in study.tasks if (arm, task) in study.configs}
    told = {
        task: words.value(config.get(key)) if _decides(key, config) else words.value(None)
        for task, config in configs.items()
    }
    if len(set(told.values())) <= 1:
        return next(iter(told.values()), words.value(None))
    return ", ".join(f"{value} on {task}" for task, value in told.items())


def _decides(key: str, config: Record) -> bool:
    """Whether the key decides anything in a run of this config, whose other keys stand at their defaults."""
    kind, section = config.get("adapter.kind"), key.partition(".")[0]
    if kind == "linear_probe" and section in STEPS:
        return False
    if section == "zo":
        return config.get("trainer") == "zo"
    kinds = {"boosting": ("xgblora",), "prefix": ("prefix",), "adapter": LOW_RANK}
    return key == "adapter.kind" or kind in kinds.get(section, (kind,))


def run_lines(study: Study) -> list[RunLine]:
    return [
        RunLine(
            folder=run.folder.name if study.kind == "runs" else "/".join(run.folder.parts[-3:]),
            arm=run.arm,
            task=run.task,
            seed=words.value(run.seed),
            score=_score(run),
            duration=words.duration(run.seconds),
            started=str(run.origin.get("started") or "–"),
        )
        for run in study.runs
    ]


def _score(run: Run) -> str:
    return words.score(run.score.value, run.score.metric) if run.score is not None else "not finished"


def provenance(subjects: Subjects) -> Provenance:
    """Versions, commands and seeds of everything together; where several differ, all of them are named."""
    origins = list(_origins(subjects))
    versions = [(name, _all(each.get(name) for each in origins)) for name in VERSIONS]
    libraries = dict.fromkeys(name for each in origins for name in each.get("libraries", {}))
    versions += [(name, _all(each.get("libraries", {}).get(name) for each in origins)) for name in libraries]
    started = sorted(str(each["started"]) for each in origins if each.get("started"))
    return Provenance(
        versions=[(name, value) for name, value in versions if value],
        commands=list(dict.fromkeys(shlex.join(map(str, each["command"])) for each in origins if each.get("command"))),
        seeds=sorted({str(run.seed) for study in subjects.studies for run in study.runs if run.seed is not None}),
        started=None if not started else " to ".join(dict.fromkeys([started[0], started[-1]])),
    )


def _origins(subjects: Subjects) -> Iterable[Record]:
    for study in subjects.studies:
        yield from (each for each in (study.origin, *(run.origin for run in study.runs)) if each)
    yield from (merge.origin for merge in subjects.merges if merge.origin)
    yield from (sweep.origin for sweep in subjects.sweeps if sweep.origin)
    yield from (matrix.origin for matrix in subjects.matrices if matrix.origin)


def _all(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(each) for each in values if each is not None))
