"""`lorica compare --plan` and `lorica ablate --plan`: what a study would take, and what of it is done."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorica import planning
from lorica.config.contradictions import LOW_RANK
from lorica.config.schema import ModelConfig, PrefixConfig
from lorica.errors import ModelError
from lorica.models import Kind
from lorica.runs.studying.outcome import Found, check_folders, chosen_rates, found_runs, title
from lorica.runs.studying.plan import Study, StudyPlan
from lorica.runs.studying.rehearsal import Rehearsed
from lorica.runs.studying.study import check_free, looked_ahead
from lorica.studies import launcher

Ways = Callable[..., Mapping[str, int]]


@dataclass(frozen=True)
class ArmForecast:
    """What an arm takes on a task. What a run takes is None where it cannot be known before."""

    arm: str
    task: str
    rates: tuple[float, ...]  # to choose from, or the one that is given; none of a linear probe
    num_tuning: int  # runs that choose the rate
    num_finals: int  # runs that are compared
    num_steps: int | None  # of a run, as the next three are
    num_forwards: int | None
    num_trainable: int
    memory_bytes: int | None
    num_finished: int
    num_failed: int  # of them those that are left alone
    seconds: float | None  # of a run, the mean of those that have finished

    @property
    def num_runs(self) -> int:
        return self.num_tuning + self.num_finals

    @property
    def num_left(self) -> int:
        return self.num_runs - self.num_finished - self.num_failed


@dataclass(frozen=True)
class Forecast:
    """What a study would take; `num_workers` is None where a cluster decides."""

    title: str
    arms: tuple[ArmForecast, ...]
    num_workers: int | None

    @property
    def num_runs(self) -> int:
        return sum(each.num_runs for each in self.arms)

    @property
    def num_left(self) -> int:
        return sum(each.num_left for each in self.arms)

    @property
    def num_timed(self) -> int:
        """How many of the runs that are left have finished ones beside them, of the same arm and task."""
        return sum(each.num_left for each in self.arms if each.seconds is not None)

    @property
    def seconds_left(self) -> float:
        """Until those that are `num_timed` have finished, if they take as long as the ones beside them."""
        seconds = sum(each.num_left * each.seconds for each in self.arms if each.seconds is not None)
        return seconds / max(1, min(self.num_workers or 1, self.num_left))


def plan_study(given: Study) -> Forecast:
    """What the study would take, and what of it is done where its folder is there. Runs and writes nothing.

    Raises what `study` raises before its first run.
    """
    plan, known = looked_ahead(given)
    found = _found(plan, None if plan.given.output_dir is None else Path(plan.given.output_dir))
    ways = functools.cache(_ways)
    arms = [
        _foreseen(plan, arm.name, task, known[arm.name, task], found, ways)
        for task in plan.tasks
        for arm in plan.given.arms
    ]
    return Forecast(title(plan), tuple(arms), launcher.num_places(plan.given.launcher, plan.given.num_workers))


def _found(plan: StudyPlan, folder: Path | None) -> list[Found]:
    """What there is of the study's runs, as far as they are decided."""
    if folder is None:
        return []
    check_free(folder)
    check_folders(plan, folder)
    tuning = found_runs(plan.tuning(), folder)
    return [*tuning, *found_runs(plan.finals(chosen_rates(plan, tuning)), folder)]


def _foreseen(
    plan: StudyPlan, arm: str, task: str, known: Rehearsed, found: Sequence[Found], ways: Ways
) -> ArmForecast:
    own = [each for each in found if (each.planned.arm, each.planned.task) == (arm, task)]
    tuned, rate = plan.is_tuned(arm, task), known.cfg.learning_rate
    rates = tuple(plan.rates(arm, task)) if tuned else () if rate is None else (rate,)
    num_tuning = len(rates) * len(plan.given.tuned_seeds) if tuned else 0
    # Where every rate has been tried and none has finished, there will be nothing to compare.
    given_up = 0 < len(own) == num_tuning and not plan.given.retry and all(each.state != "missing" for each in own)
    seconds = [each.record["timing"]["seconds"] for each in own if each.is_done]
    return ArmForecast(
        arm=arm,
        task=task,
        rates=rates,
        num_tuning=num_tuning,
        num_finals=0 if given_up else len(plan.given.seeds),
        num_steps=known.num_steps,
        num_forwards=known.num_forwards,
        num_trainable=known.num_trainable,
        memory_bytes=_memory_bytes(known, ways),
        num_finished=len(seconds),
        num_failed=0 if plan.given.retry else sum(each.state == "failed" for each in own),
        seconds=statistics.fmean(seconds) if seconds else None,
    )


def _memory_bytes(known: Rehearsed, ways: Ways) -> int | None:
    """What a run holds at once, at a batch of rows as long as its longest; None of what `lorica plan` does not know."""
    cfg, kind = known.cfg, "adapter" if known.cfg.adapter.kind in LOW_RANK else known.cfg.adapter.kind
    if kind == "linear_probe" or cfg.model.quantization != "none":
        return None
    targets = cfg.adapter.targets if kind == "adapter" else "all-linear"  # which some bases lack of the others
    try:
        found = ways(
            cfg.model.model_dump_json(),
            known.kind,
            kind,
            targets if isinstance(targets, str) else tuple(targets),
            max(cfg.boosting.ranks or [cfg.adapter.rank or 1]),
            cfg.optimizer or "adamw",
            cfg.batch_size,
            known.length,
            cfg.prefix,
        )
    except ModelError:
        return None
    return found[f"{kind}, {'spsa' if cfg.trainer == 'zo' else 'backprop'}"]


def _ways(
    model: str,
    kind: Kind,
    trained: planning.Trained,
    targets: str | tuple[str, ...],
    rank: int,
    optimizer: str,
    batch_size: int,
    length: int,
    prefix: PrefixConfig,
) -> dict[str, int]:
    """The ways to train a base, whose section is `model`, and the bytes that each holds at once."""
    said = ModelConfig.model_validate_json(model)
    found = planning.plan(
        said.name,
        dtype=said.dtype,
        targets=targets,
        rank=rank,
        optimizer=optimizer,
        batch_size=batch_size,
        length=length,
        num_prefix=prefix.num_tokens,
        reparameterize=prefix.reparameterize,
        kinds=[trained],
        kind=kind,
        revision=said.revision,
        trust_remote_code=said.trust_remote_code,
    )
    return {way.name: way.total_bytes for way in found.ways}
