"""What coefficients are fitted to: tasks, the one body that they share, and the adapters to be mounted on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lorica.evaluation.scoring import in_eval_mode
from lorica.merging.fitting.layout import Granularity, Layout, layout, ranks_of
from lorica.merging.fitting.options import Descent
from lorica.merging.method import Update
from lorica.merging.runtime import Mounted, mount
from lorica.tasks.batching import Batch
from lorica.tasks.objectives import TrainAs
from lorica.tasks.prompting import Encoded


def _silent(line: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class FittingTask:
    """The task of one adapter."""

    name: str  # of the adapter whose task it is
    model: nn.Module  # the task's view of the shared body: its modules, and the task's own head
    rows: Sequence[Encoded]  # that coefficients are fitted to
    collate: Callable[[Sequence[Encoded]], Batch]  # on the CPU
    train_as: TrainAs = "classification"
    validation: Sequence[Encoded] = ()  # none of `rows`: what early stopping and the best checkpoint go by
    judge: Callable[[], float] | None = None  # the task's metric of `model` as it stands, the higher the better


@dataclass(frozen=True)
class Problem:
    """Tasks whose adapters are to share one body.

    `updates` makes an adapter's update of the module at a path, zero where it has none. It is called whenever modules
    are mounted, and the result is let go with them, so that not all have to be in memory at once.
    """

    model: nn.Module  # the shared body, or a model that holds it; its base is frozen
    tasks: Sequence[FittingTask]
    paths: Sequence[str]
    updates: Mapping[str, Callable[[str], Update]]  # by the adapter's name
    device: str = "cpu"
    state: Path | None = None  # the file that keeps how far fitting has come; its folder is there
    say: Callable[[str], None] = _silent  # takes the lines that a person should read


@contextmanager
def mounted(problem: Problem, descent: Descent) -> Iterator[Mounted]:
    """The problem's adapters live on its body, all models in eval mode. Raises what `runtime.mount` does."""
    updates = {path: [make(path) for make in problem.updates.values()] for path in problem.paths}
    with ExitStack() as undo:
        for task in problem.tasks:
            undo.enter_context(in_eval_mode(task.model))
        live = mount(
            problem.model,
            updates,
            layout(ranks_of(updates), list(problem.updates), descent.granularity),
            merge_impl=descent.merge_impl,
            delta_residency=descent.delta_residency,
            dtype_compute=descent.dtype_compute,
        )
        del updates
        yield undo.enter_context(live)


def layout_of(problem: Problem, granularity: Granularity) -> Layout:
    """The layout of the problem's adapters, one update in memory at a time."""
    ranks = {
        path: tuple(ranks_of({path: [make(path)]})[path][0] for make in problem.updates.values())
        for path in problem.paths
    }
    return layout(ranks, list(problem.updates), granularity)
