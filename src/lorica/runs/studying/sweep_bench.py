"""Where a sweep's points are judged: adapters read once, one base model and tokenised task for each evaluation."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lorica import config
from lorica.adapters.delta import LowRank
from lorica.config import MergeConfig, SearchConfig, SweepConfig
from lorica.errors import ConfigError, NonFiniteLossError
from lorica.evaluation.recovery import Interval, Recovery, summarise
from lorica.merging.merge import Grams, Merged
from lorica.merging.method import Update
from lorica.runs.bodies import Bodies
from lorica.runs.merging.evaluation import Arena, judged_sources, open_arenas
from lorica.runs.merging.learned import learn
from lorica.runs.merging.settling import settings, settle
from lorica.runs.sources import Source, resolve
from lorica.studies.search import Bayes, Grid, Search
from lorica.studies.space import Parameter, Point, Space, grid_points

Record = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Everything a point costs nothing of: it is here already."""

    cfg: SweepConfig
    method: str  # or the optimizer that learns its coefficients
    sources: Sequence[Source]
    arenas: Sequence[Arena]
    headrooms: Mapping[str, Interval]  # of every task
    grams: Grams | None
    bodies: Bodies
    say: Console

    @property
    def left_out(self) -> list[str]:
        """The tasks without headroom."""
        return [name for name, headroom in self.headrooms.items() if headroom.low <= 0]

    def judged(self, point: Point) -> Record:
        """What the merge at `point` keeps of every task; where there is no such merge, why."""
        begin = time.monotonic()
        try:
            found = outcome(self._recoveries(point), self.cfg.constraint_nonnegative)
        except (ConfigError, LinAlgError, NonFiniteLossError) as error:
            found = _nothing(str(error))
        return {**found, "seconds": time.monotonic() - begin}

    def identity(self) -> Record:
        """What two sweeps must have in common for a point to come to the same in both."""
        cfg, search = self.cfg, _search_config(self.cfg)
        names = search.grid if search.type == "grid" else search.space
        shared = ("merge_mode", "transforms", "lambda_policy", "model", "rank", "energy", "rank_budget", "split")
        dumped = cfg.model_dump(mode="json")
        learned = {} if cfg.optimizer is None else {"optimizer": _without(dumped["optimizer"]["params"], names)}
        return {
            "method": self.method,
            **learned,
            "method_params": {key: value for key, value in dumped["method_params"].items() if key not in names},
            "order": [each.name for each in self.sources],
            "adapters": {each.name: each.sha256 for each in self.sources},
            **{key: dumped[key] for key in (*shared, "eval_subset", "constraint_nonnegative")},
            "in_factors": cfg.save == "adapter",
            "eval_tasks": {each.source.name: each.digest for each in self.arenas},
            "space": dumped["search"]["grid" if search.type == "grid" else "space"],
        }

    def _recoveries(self, point: Point) -> list[Recovery]:
        cfg = merge_at(self.cfg, point)
        merge = settle(cfg, self.sources, self.grams, self.bodies)
        if cfg.optimizer is not None:
            merge, _ = learn(merge, cfg, self.sources, self.bodies, self.say)
        if self.cfg.save != "adapter":  # then updates may be dense, too large to be kept from task to task
            return [self._recovery(arena, merge.modules()) for arena in self.arenas]
        modules = list(merge.modules())
        _check_finite(modules)
        if all(_is_zero(each.update) for each in modules):  # the base model by construction
            return [self._fixed(arena.recovered(arena.base.predictions)) for arena in self.arenas]
        return [self._recovery(arena, modules) for arena in self.arenas]

    def _recovery(self, arena: Arena, modules: Iterable[Merged]) -> Recovery:
        evaluation, found = arena.judged(modules)
        if not math.isfinite(evaluation.loss):
            raise ConfigError(f"the loss on {found.task} is not finite")
        return self._fixed(found)

    def _fixed(self, found: Recovery) -> Recovery:
        # Resampling differs a little from point to point: a task on the edge would count at one and not at the next.
        return dataclasses.replace(found, headroom=self.headrooms[found.task])


def open_bench(cfg: SweepConfig, say: Console) -> Bench:
    """Read the adapters, check every corner of the search space, and open the tasks; nothing is written.

    Raises what `lorica merge` raises, for any corner; ConfigError if no task has headroom.
    """
    points = _corners(_search_config(cfg))
    _check_lambda(cfg, points[0])
    sources = resolve(cfg.adapters, Path(cfg.runs_dir))
    judged_on = judged_sources(cfg, sources)
    for point in points:
        settings(merge_at(cfg, point), len(sources))
    bodies = Bodies(cfg.device, cfg.seed)
    merge = settle(merge_at(cfg, points[0]), sources, bodies=bodies)
    arenas = open_arenas(judged_on, cfg, cfg.split, bodies)
    headrooms = {each.source.name: each.recovered(each.base.predictions).headroom for each in arenas}
    method = merge.method.name if cfg.optimizer is None else cfg.optimizer.name
    bench = Bench(cfg, method, sources, arenas, headrooms, merge.grams or None, bodies, say)
    if len(bench.left_out) == len(arenas):
        raise ConfigError(
            f"nothing to search for: on split={cfg.split} no adapter is surely better than the base, "
            f"of {', '.join(bench.left_out)}: take more examples, or another eval_tasks"
        )
    for name in bench.left_out:
        say.print(f"warning: {name}'s own adapter is not surely better than the base: left out", highlight=False)
    return bench


def search_of(cfg: SweepConfig) -> Search:
    """The search that a config asks for. Raises ConfigError for a grid or a space that holds nothing to search."""
    search = _search_config(cfg)
    if search.type == "grid":
        return Grid(tuple(grid_points(search.grid)))
    return Bayes(space_of(search), search.budget, search.init_points, search.seed, search.acquisition)


def space_of(search: SearchConfig) -> Space:
    return Space(
        tuple(
            Parameter(name, each.type, each.min, each.max, tuple(each.choices)) for name, each in search.space.items()
        )
    )


def merge_at(cfg: SweepConfig, point: Point) -> MergeConfig:
    """The merge at a point.

    A parameter is an option of the method, `weights.ADAPTER`, `lambda_policy.KEY`, or `optimizer.KEY`.
    """
    own = MergeConfig.model_fields.keys() - {"constraint_nonnegative"}  # in a sweep it judges a point's scores
    tree = {key: value for key, value in cfg.model_dump(mode="json").items() if key in own}
    for name, value in point.items():
        first, *rest = name.split(".")
        if first == "weights" and rest:
            tree["lambda_policy"] = tree["lambda_policy"] or {"type": "per_adapter", "weights": {}}
            _set(tree, ["lambda_policy", "weights", ".".join(rest)], name, value)
        elif first == "lambda_policy":
            _set(tree, [first, *rest], name, value)
        elif first == "optimizer":
            if cfg.optimizer is None:
                raise ConfigError(f"search: {name} is an option of the optimizer, and there is none: give optimizer")
            _set(tree, [first, "params", *rest], name, value)
        else:
            _set(tree, ["method_params", first, *rest], name, value)
    return config.check(MergeConfig, tree)


def outcome(found: Sequence[Recovery], nonnegative: bool) -> Record:
    """A point's record from what it keeps of each task, of which at least one has headroom.

    It is infeasible if a score is not finite, or under `nonnegative` if a task fares worse than under the base model.
    """
    summary = summarise(found)
    assert summary is not None
    values = [each.delta.value for each in found if each.has_headroom]
    if not all(map(math.isfinite, values)):
        return _nothing("a score is not finite")
    below = [each.task for each in found if nonnegative and each.has_headroom and each.delta.value < 0]
    return {
        "tasks": {each.task: each.as_record() for each in found},
        "minimum": summary.minimum.as_record(),
        "mean": summary.mean.as_record(),
        "feasible": not below,
        "reason": f"below the base model on {', '.join(below)}" if below else None,
    }


def _without(params: Record, names: Iterable[str]) -> Record:
    """An optimizer's options that are not searched."""
    return {key: value for key, value in params.items() if f"optimizer.{key}" not in names}


def _set(tree: Record, keys: Sequence[str], name: str, value: Any) -> None:
    for key in keys[:-1]:
        tree[key] = {} if tree.get(key) is None else tree[key]
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ConfigError(f"search: {name} cannot be set: {key} is {tree!r}, not keys and values")
    tree[keys[-1]] = value


def _search_config(cfg: SweepConfig) -> SearchConfig:
    assert cfg.search is not None
    return cfg.search


def _corners(search: SearchConfig) -> list[Point]:
    """The points that tell whether all points are within the method's bounds."""
    return grid_points(search.grid) if search.type == "grid" else space_of(search).corners()


def _check_lambda(cfg: SweepConfig, point: Point) -> None:
    if "lambda" in point and cfg.lambda_policy is not None and cfg.lambda_policy.type != "per_adapter":
        raise ConfigError("lambda is searched, and lambda_policy would set it at every point: drop one of the two")


def _nothing(reason: str) -> Record:
    return {"tasks": {}, "minimum": None, "mean": None, "feasible": False, "reason": " ".join(reason.split())}


def _check_finite(modules: Sequence[Merged]) -> None:
    for each in modules:
        finite = each.update.is_finite() if isinstance(each.update, LowRank) else bool(each.update.isfinite().all())
        if not finite:
            raise ConfigError(f"the merge of {each.path} is not finite")


def _is_zero(update: Update) -> bool:
    """Whether the update is zero for a factor of nothing but zeros; one that cancels is not looked for."""
    factors: tuple[Tensor, ...] = (update.A, update.B) if isinstance(update, LowRank) else (update,)
    return any(not bool(factor.any()) for factor in factors)
