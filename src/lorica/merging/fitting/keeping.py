"""What fitting has come to, in one file that is replaced whole: a killed process goes on from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lorica import files
from lorica.errors import InterruptedRunError
from lorica.merging.fitting.layout import Layout
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.problem import Problem

FORMAT_VERSION = 1
NOT_IDENTITY = {"progress_bar", "dataloader_num_workers", "dataloader_pin_memory", "non_blocking_transfer"}


def identity(label: str, settings: Mapping[str, Any], descent: Descent, layout: Layout) -> str:
    """What tells one fitting from another, as far as options go; the data is for who names the file."""
    options = {name: value for name, value in asdict(descent).items() if name not in NOT_IDENTITY}
    return files.content_hash([FORMAT_VERSION, label, dict(settings), options, layout.keys])


def kept(problem: Problem, identity: str) -> dict[str, Any] | None:
    """What the state file keeps of this very fitting; None if there is none, or it is of another."""
    if problem.state is None or not problem.state.exists():
        return None
    found = files.read_json(problem.state)
    if not isinstance(found, dict) or found.pop("identity", None) != identity:
        problem.say(f"{problem.state} is of another fitting: starting over")
        return None
    return found


def keep(problem: Problem, identity: str, values: Mapping[str, Any]) -> None:
    """Replace the state file, if the problem has one."""
    if problem.state is not None:
        files.write_json(problem.state, {"identity": identity, **values})


def interrupted(problem: Problem, done: str, signal: int) -> InterruptedRunError:
    """The error that ends a fitting after a signal; `done` says how far it has come."""
    what_now = "no state is kept" if problem.state is None else "the same command goes on from there"
    return InterruptedRunError(f"interrupted after {done}: {what_now}", signal)
