"""A run taken up again from its newest whole checkpoint: bit for bit as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from lorica import files
from lorica.errors import ResumeError
from lorica.results import RunFolder
from lorica.training.checkpoints import Snapshot, newest_checkpoint
from lorica.training.fit import Progress


@dataclass(frozen=True)
class Resumed:
    """Where a run starts: at its beginning, or at a checkpoint."""

    progress: Progress = field(default_factory=Progress)
    best_dev_loss: float | None = None
    snapshot: Snapshot | None = None


def start_over(run: RunFolder) -> Resumed:
    """The beginning; whatever a run without a checkpoint had written of its steps is cut away."""
    _cut_after(0, run)
    return Resumed()


def resume_from(run: RunFolder, identity: Mapping[str, Any], force: bool, say: Console) -> Resumed:
    """The newest whole checkpoint of the run, its logs cut back to it; the beginning if there is none.

    Raises ResumeError, naming the keys, if it was made with another config, other data or another base model.
    """
    snapshot, skipped = newest_checkpoint(run.checkpoints)
    for each in skipped:
        say.print(f"warning: passed over checkpoint {each}", highlight=False, soft_wrap=True)
    if snapshot is None:
        say.print("no whole checkpoint: starting over", highlight=False)
        return start_over(run)
    others = list(differing(snapshot.values["identity"], identity))
    if others and not force:
        raise ResumeError(
            f"the checkpoint of step {snapshot.step} was made with another {', '.join(others)}: put that back, or "
            "go on all the same with force=true"
        )
    _cut_after(snapshot.step, run)
    say.print(f"going on from step {snapshot.step}", highlight=False)
    return Resumed(Progress(**snapshot.values["progress"]), snapshot.values["best_dev_loss"], snapshot)


def differing(then: Any, now: Any, prefix: str = "") -> list[str]:
    """The dotted keys whose values differ."""
    if not (isinstance(then, Mapping) and isinstance(now, Mapping)):
        return [] if then == now else [f"{prefix} ({then!r}, now {now!r})"]
    return [
        found
        for key in {**then, **now}
        for found in differing(then.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
    ]


def _cut_after(step: int, run: RunFolder) -> None:
    """Leave the lines of what was done until a step, as they are."""
    for path in (run.training_loss, run.eval_loss, run.replay):
        if path.exists():
            records = files.read_records(path)
            lines = (line for line in path.read_bytes().split(b"\n") if line)
            kept = [line + b"\n" for line, record in zip(lines, records, strict=False) if record["step"] <= step]
            files.write_atomic(path, b"".join(kept))
