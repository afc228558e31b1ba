"""The runs that a study consists of: every arm on every task with every seed, each as a training run's config."""

from __future__ import annotations

import bisect
import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lorica import config, files
from lorica.config import AblateConfig, ArmConfig, CompareConfig, TaskConfig, TrainConfig
from lorica.config.contradictions import LOW_RANK, STEPS
from lorica.config.studies import KINDS
from lorica.errors import ConfigError, LoricaError
from lorica.runs.evaluating.asked_tasks import PLACE, folder_of
from lorica.runs.sources import task_name
from lorica.runs.training.first_look import NUM_EXAMPLES
from lorica.runs.training.learning import config_identity
from lorica.runs.training.lora import init_of
from lorica.runs.training.warm_start import num_batches, num_forwards

Role = Literal["tuning", "final"]
Study = CompareConfig | AblateConfig
Key = tuple[str, str]  # an arm and a task
Tree = dict[str, Any]
SECTIONS_OF = {
    "boosting": ("xgblora",),
    "prefix": ("prefix",),
    "adapter": LOW_RANK,
}  # -> the kinds that have the section


@dataclass(frozen=True)
class Planned:
    """One run of a study; `folder` is relative to the study's."""

    arm: str
    task: str
    seed: int
    learning_rate: float | None  # None: the arm's own
    role: Role
    cfg: TrainConfig

    @property
    def folder(self) -> Path:
        """Runs of a study that choose rates lie apart from those that are compared."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        place = Path("runs", files.slug(self.arm), files.slug(self.task))
        return (place / "tuning" if self.role == "tuning" else place) / f"seed{self.seed}{rate}"

    @cached_property
    def hash(self) -> str:
        """The same for runs that take the same steps and evaluate the same."""
        return files.content_hash(config_identity(self.cfg))


@dataclass(frozen=True)
class Before:
    """What is known of a run before its first step, once its data is read."""

    num_rows: int  # that it trains on
    num_forwards: int  # of its first look at them


@dataclass(frozen=True)
class StudyPlan:
    """What a study's config asks for, checked: `trees` holds a config for each (arm, task), without seed and rate."""

    given: Study
    tasks: Mapping[str, Tree]
    trees: Mapping[Key, Tree] = field(repr=False)

    def is_tuned(self, arm: str, task: str) -> bool:
        """Whether a rate is chosen for this arm: where it has one, and nobody has said which."""
        tree = self.trees[arm, task]
        return self.given.tune and "learning_rate" not in tree and _kind(tree) != "linear_probe"

    def tuning(self) -> list[Planned]:
        """The runs that rates are chosen by: as long as those that are compared, and evaluated on dev alone."""
        return [
            self._run(arm, task, seed, rate, "tuning")
            for arm, task in self.trees
            if self.is_tuned(arm, task)
            for rate in self.rates(arm, task)
            for seed in self.given.tuned_seeds
        ]

    def finals(self, chosen: Mapping[Key, float | None]) -> list[Planned]:
        """The runs that are compared; of an arm that is tuned, as far as its rate is chosen."""
        return [
            self._run(arm, task, seed, chosen.get((arm, task)), "final")
            for arm, task in self.trees
            if not self.is_tuned(arm, task) or chosen.get((arm, task)) is not None
            for seed in self.given.seeds
        ]

    def every_choice(self) -> list[dict[Key, float | None]]:
        """Choices of rates among which every arm has each of its own."""
        tuned = {key: self.rates(*key) for key in self.trees if self.is_tuned(*key)}
        return [
            {key: rates[min(at, len(rates) - 1)] for key, rates in tuned.items()}
            for at in range(max(map(len, tuned.values()), default=1))
        ]

    def rates(self, arm: str, task: str) -> list[float]:
        own = next(each.learning_rates for each in self.given.arms if each.name == arm)
        return own or self.given.rates(self.trees[arm, task].get("trainer", "backprop"))

    def _run(self, arm: str, task: str, seed: int, rate: float | None, role: Role) -> Planned:
        tree = copy.deepcopy(self.trees[arm, task]) | {
            "seed": seed,
            "eval_split": "dev" if role == "tuning" else "test",
        }
        with told_of(arm, task):
            cfg = config.check(TrainConfig, tree if rate is None else tree | {"learning_rate": rate})
        return Planned(arm, task, seed, rate, role, cfg.resolved())


def planned(given: Study) -> StudyPlan:
    """Every run of a study, with every rate that it may be given, as a config that has been checked.

    Raises ConfigError, naming the arm and the task, for what contradicts itself, for a key that would reach no arm, and
    for two runs in one place.
    """
    _check_names([arm.name for arm in given.arms])
    tasks = _tasks(given)
    trees = {(arm.name, name): _tree(given, arm, name, task) for arm in given.arms for name, task in tasks.items()}
    _check_shared_keys(given, [trees[arm.name, next(iter(tasks))] for arm in given.arms])
    plan = StudyPlan(given, tasks, trees)
    tuning = plan.tuning()
    for rates in plan.every_choice():
        _check_places([*tuning, *plan.finals(rates)])
    return plan


@contextlib.contextmanager
def told_of(arm: str, task: str) -> Iterator[None]:
    """Let an error of an arm on a task name both."""
    try:
        yield
    except LoricaError as error:
        raise type(error)(f"arm {arm!r} on {task}: {error}") from None


def within_budget(plan: StudyPlan, before: Mapping[Key, Before]) -> StudyPlan:
    """The plan with a budget of forward passes cut to what is left behind each (arm, task)'s first look."""
    if plan.given.budget[0] != "forwards":
        return plan
    trees = dict(plan.trees)
    for key, tree in plan.trees.items():
        if _kind(tree) != "linear_probe":
            with told_of(*key):
                trees[key] = tree | _length(plan.given, tree, before[key])
    return replace(plan, trees=trees)


def _check_names(names: Sequence[str]) -> None:
    twice = next((name for at, name in enumerate(names) if files.slug(name) in map(files.slug, names[:at])), None)
    if twice is not None:
        raise ConfigError(f"two arms are called {twice!r}: give each a name of its own")


def _check_places(runs: Sequence[Planned]) -> None:
    counts = Counter(each.folder for each in runs)
    twice = next((each for each in runs if counts[each.folder] > 1), None)
    if twice is not None:
        raise ConfigError(f"two runs would lie in {twice.folder}: give each task, seed and learning rate once")


def _tasks(given: Study) -> dict[str, Tree]:
    """Name -> the task section of its runs."""
    section = given.run.get("task") or {}
    section = {"name": section} if isinstance(section, str) else dict(section)
    if not given.tasks:
        if "name" not in section and "path" not in section:
            raise ConfigError("a study needs a task: give task=NAME, tasks=[NAMES], or task.path=FOLDER")
        return {task_name(config.check(TaskConfig, section)): section}
    if "name" in section:
        raise ConfigError(f"tasks={given.tasks} and task.name={section['name']} both name tasks: drop one of them")
    if "path" not in section:
        return {name: {**section, "name": name} for name in given.tasks}
    if PLACE not in section["path"]:
        raise ConfigError(f"task.path={section['path']} is one folder, and tasks names several: write FOLDER/{PLACE}")
    return {name: {**section, "path": folder_of(name, section["path"])} for name in given.tasks}


def _tree(given: Study, arm: ArmConfig, name: str, task: Tree) -> Tree:
    """An arm's config on a task, without what a run of it differs in."""
    tree = copy.deepcopy({**given.run, "task": task})
    kind = str(arm.overrides.get("adapter.kind") or (arm.name if arm.name in KINDS else _kind(tree)))
    own: Tree = {}
    if isinstance(given, CompareConfig) and kind == "lora":
        own = {f"adapter.{key}": value for key, value in given.lora if value is not None}
    trainer = str(arm.overrides.get("trainer", tree.get("trainer", "backprop")))
    tree = {key: value for key, value in tree.items() if _has(kind, trainer, key)}
    for key, value in {"adapter.kind": kind, **own, **arm.overrides}.items():
        config.set_key(tree, key, value)
    with told_of(arm.name, name):
        return tree if kind == "linear_probe" else tree | _length(given, tree)


def _kind(tree: Tree) -> str:
    return str((tree.get("adapter") or {}).get("kind", "lora"))


def _has(kind: str, trainer: str, key: str) -> bool:
    """Whether an arm of this kind has what a shared key of a run sets."""
    if kind == "linear_probe" and key in (*STEPS, "trainer", "zo"):
        return False
    if key == "zo":
        return trainer in ("zo", "spsa")
    return kind in SECTIONS_OF.get(key, KINDS)


def _length(given: Study, tree: Tree, before: Before | None = None) -> Tree:
    """The budget as an arm's own length; one of forward passes needs to know what goes `before` the steps."""
    unit, amount = given.budget
    if unit != "forwards":
        key = {"steps": "max_steps", "epochs": "num_epochs", "seconds": "max_seconds"}[unit]
        return {key: amount}

    def passes(num_steps: int) -> int:
        return forwards_of(config.check(TrainConfig, {**tree, "max_steps": num_steps}).resolved(), num_steps, before)

    if amount < passes(1):
        looked = f" with the first look at {before.num_rows} rows" if before and before.num_forwards else ""
        raise ConfigError(f"max_forwards={amount} is less than one step takes{looked}, which is {passes(1)}")
    return {"max_steps": bisect.bisect_right(range(1, int(amount) + 1), amount, key=passes)}


def forwards_of(cfg: TrainConfig, num_steps: int, before: Before | None = None) -> int:
    """Forward passes of so many steps by a resolved config, and of its warm start.

    Those of a first look are counted where what goes `before` the steps is given.
    """
    taken = num_steps * forwards_per_step(cfg) + (before.num_forwards if before else 0)
    return taken + num_forwards(num_batches(cfg, num_steps))


def looked_at(cfg: TrainConfig, num_rows: int) -> int:
    """Forward passes of the first look that a config has at so many rows of training data, if they have classes."""
    if cfg.adapter.kind not in LOW_RANK or init_of(cfg) != "discriminant":
        return 0
    return -(-min(num_rows, NUM_EXAMPLES) // cfg.batch_size)


def forwards_per_step(cfg: TrainConfig) -> int:
    """Forward passes of a step by a resolved config, as `training_loss.jsonl` counts them; a backward is not one."""
    if cfg.trainer != "zo":
        return cfg.gradient_accumulation_steps
    assert cfg.zo.num_directions is not None
    probes = 1 if cfg.zo.estimator == "one_sided" else 2
    return probes * cfg.zo.num_directions * cfg.gradient_accumulation_steps


def _check_shared_keys(given: Study, trees: Sequence[Tree]) -> None:
    """Every key that was given for all arms decides something in one of them at least."""
    lora = given.lora.model_dump(exclude_none=True) if isinstance(given, CompareConfig) else {}
    if lora and not any(_kind(tree) == "lora" for tree in trees):
        raise ConfigError(f"lora.{next(iter(lora))} is set, and no arm is of kind lora: drop it, or add one")
    for key, value in _leaves(given.run):
        if key[0] not in ("task", "model") and not any(_at(tree, key) == value for tree in trees):
            raise ConfigError(f"{'.'.join(key)}={value} is set, and no arm takes it as it is: drop it")


def _leaves(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _at(tree: Any, key: Iterable[str]) -> Any:
    for part in key:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
