"""`lorica replay`: a zeroth-order run taken again from its base model and its log, and compared with what it left."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from lorica import config, files, models, results
from lorica.config import ReplayConfig, TrainConfig
from lorica.errors import DataError, MissingPathError
from lorica.optim.replay import Header, Log, LoggedStep, checksum, read_log
from lorica.results import RunFolder
from lorica.runs.ready import Ready, chosen, load_base, prepare
from lorica.runs.training.learning import Learning, config_identity
from lorica.runs.training.resuming import differing
from lorica.runs.training.steps import optimizer_of, zeroth_order_of
from lorica.tasks.base import Task
from lorica.tasks.prompting import Encoded
from lorica.training.checkpoints import newest_checkpoint
from lorica.training.decided import Decided
from lorica.training.fit import Step, apply
from lorica.training.stretch import INTERRUPTED, Stretch

MOST_LABELS = 1000  # of a task, as far as a log is believed


@dataclass(frozen=True)
class Replayed:
    """What came of replaying: how far it went, what it was compared with, and between which steps it first differs."""

    num_steps: int
    num_checksums: int
    compared: str | None  # None where the log does not reach what the run left, or nothing at all could be compared
    differs: tuple[int, int] | None
    remarks: Sequence[str]
    folder: Path | None

    @property
    def is_identical(self) -> bool:
        """Whether what the run left was rebuilt bit for bit."""
        return self.compared is not None and self.differs is None

    def told(self) -> str:
        """The verdict in a line."""
        far = f"{self.num_steps} steps and {self.num_checksums} checksums"
        if self.differs is not None:
            return f"differs: first between steps {self.differs[0]} and {self.differs[1]}, of {far}"
        if self.compared is None and self.num_checksums == 0:
            return (
                f"nothing could be compared: the log's {self.num_steps} steps have no checksum, and reach nothing that "
                "the run left"
            )
        if self.compared is None:
            return f"the log ends too early: {far} agree, and what the run left was not reached"
        return f"identical: {far}, and {self.compared}"


def replay(target: str, given: ReplayConfig) -> Replayed:
    """Take a run's steps again without data or forward passes, and write what they lead to, if `output_dir` is given.

    An interrupted run is compared with its newest whole checkpoint, and a finished one whose outcome was deleted with
    the hashes in its record. adapter.init=activations looks at the run's first batches, so that it needs the task's
    data too. Raises MissingPathError for a run without a log, DataError for a log that cannot be read.
    """
    run = results.open_run(target)
    if not run.replay.is_file():
        raise MissingPathError(f"{run.path} has no replay.jsonl: only runs with trainer=zo can be replayed")
    if given.output_dir is not None:
        results.check_free(given.output_dir)
    log, left = read_log(run.replay), _left(run)
    cfg = config.check(TrainConfig, config.read_yaml(run.config))
    cfg = cfg.model_copy(update={"device": given.device or cfg.device})
    with tempfile.TemporaryDirectory() as scratch:
        with _fitting(run.replay):
            learning = _learning(cfg, log, left)
            retaking = Retaking(learning, log.steps, left)
            outcome = learning.tuning.train(RunFolder(Path(scratch)), retaking) or learning.tuning.as_it_stands()
        folder = Path(given.output_dir or f"{scratch}/outcome")
        outcome.write(folder)
        retaking.compare_outcome(folder)
    return Replayed(
        num_steps=len(log.steps),
        num_checksums=retaking.num_checked,
        compared=left.name if retaking.reached and (left.is_comparable or retaking.num_checked) else None,
        differs=retaking.differs,
        remarks=_remarks(cfg, learning, log, left),
        folder=Path(given.output_dir) if given.output_dir else None,
    )


@dataclass(frozen=True)
class Left:
    """What a run left to compare with: its outcome, or a checksum in its newest checkpoint."""

    name: str
    step: int
    is_finished: bool = False  # whether no step was to follow
    is_outcome: Callable[[Path], bool] | None = None  # whether a folder holds the run's outcome
    checksum: str | None = None

    @property
    def is_comparable(self) -> bool:
        return self.is_outcome is not None or self.checksum is not None


@dataclass
class Retaking:
    """Takes the logged steps of a stretch, and compares on the way whatever can be compared."""

    learning: Learning
    steps: Sequence[LoggedStep]
    left: Left
    agreed: int = 0  # the last step whose checksum was the same
    differs: tuple[int, int] | None = None
    num_checked: int = 0

    @property
    def reached(self) -> bool:
        """Whether the log goes as far as what the run left."""
        return len(self.steps) >= self.left.step

    def __call__(self, stretch: Stretch) -> str:
        """Why the stretch ended; INTERRUPTED where the log does."""
        cfg, progress = self.learning.cfg, self.learning.progress
        trainable = stretch.live.trainable()
        zeroth_order = zeroth_order_of(cfg, stretch.live)
        optimizer = optimizer_of(cfg, trainable, zeroth_order)
        self._compare_with_checkpoint(trainable)  # one that falls due where a round ends is written as the next begins
        for logged in self.steps[progress.step :]:
            if logged.weights is not None:
                zeroth_order.set_gradient(trainable, progress.step, logged.weights)
                apply(optimizer, trainable, logged.rate, cfg.max_grad_norm)
            progress.step = logged.step
            if logged.checksum is not None:
                self._compare(trainable, logged.checksum)
            reason = stretch.watch(_told(logged))
            if reason is not None:
                return reason
            self._compare_with_checkpoint(trainable)
        return INTERRUPTED

    def compare_outcome(self, folder: Path) -> None:
        """Compare what was rebuilt, in a folder, with what the run left in one."""
        is_outcome = self.left.is_outcome
        if is_outcome is not None and self.reached and self.differs is None and not is_outcome(folder):
            self.differs = (self.agreed + 1, self.left.step)

    def _compare_with_checkpoint(self, trainable: Mapping[str, nn.Parameter]) -> None:
        if self.left.checksum is not None and self.learning.progress.step == self.left.step:
            self._compare(trainable, self.left.checksum)

    def _compare(self, trainable: Mapping[str, nn.Parameter], expected: str) -> None:
        self.num_checked += 1
        step = self.learning.progress.step
        if self.differs is None and checksum(trainable) == expected:
            self.agreed = step
        elif self.differs is None:
            self.differs = (self.agreed + 1, step)


def _told(logged: LoggedStep) -> Step:
    """A step as the stretch is told of it: whatever its loss was, the log has what it decided."""
    return Step(logged.step, 0.0, logged.rate, forwards=0, tokens=0, seconds=0.0, applied=logged.weights is not None)


def _left(run: RunFolder) -> Left:
    if run.record.exists():
        return _left_at_its_end(run)
    snapshot, _ = newest_checkpoint(run.checkpoints)
    if snapshot is None:
        return Left("nothing else, for the run left no checkpoint", 0)
    if snapshot.values["round"] is None:
        return Left("nothing else, for it was stopped as its last round had ended", snapshot.step, is_finished=True)
    return Left(f"the checkpoint of step {snapshot.step}", snapshot.step, checksum=snapshot.values["checksum"])


def _left_at_its_end(run: RunFolder) -> Left:
    """What a finished run left: its adapter or its model, or where that is gone its hashes in the record."""
    step = files.read_json(run.trainer_state)["step"]
    for place in (run.adapter, run.model):
        if any(place.glob("*.safetensors")):
            return Left(f"the run's {place.name}", step, True, partial(_same_tensors, place))
    hashes = _of_weights(files.read_json(run.record).get("artifacts") or {})
    if not hashes:
        return Left("nothing else, for what the run left is gone", step, True)
    return Left("the hashes of what the run left, which is gone", step, True, partial(_has_hashes, hashes))


def _learning(cfg: TrainConfig, log: Log, left: Left) -> Learning:
    """The run as far as its steps need it: the base, what is trained, what was decided of its rounds; no examples."""
    drawn = {"num": cfg.zo.num_directions, "distribution": cfg.zo.distribution, "seed": cfg.seed}
    if log.header.directions != drawn:
        raise DataError(f"the log's directions are {log.header.directions}, and the config's {drawn}: put that back")
    ready, rows = _with_examples(cfg) if cfg.adapter.init == "activations" else (_bare(cfg, log.header), [])
    num_steps = len(log.steps) + (not left.is_finished)  # a run that went on had begun its next round
    as_long = cfg.model_copy(update={"max_steps": num_steps, "num_epochs": None, "max_seconds": None})
    return Learning(
        as_long, ready, {"train": rows}, Console(quiet=True), decided=Decided(log.rounds), looked=log.looked
    )


@contextlib.contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Tell where the model cannot take what the examples have shown, as the log has it. Raises DataError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        told = str(error).splitlines()[0]
        raise DataError(f"{path} holds what the model of this run cannot take ({told})") from error


def _with_examples(cfg: TrainConfig) -> tuple[Ready, list[Encoded]]:
    ready = prepare(cfg.model, cfg.task, cfg.device, cfg.seed)
    return ready, ready.encoded(chosen(ready.task, "train", cfg.task))


def _bare(cfg: TrainConfig, header: Header) -> Ready:
    """The base model, with a task that has labels and nothing else."""
    kind, num_labels = header.model.get("kind"), header.model.get("num_labels")
    # In a list, since what the header says may have no hash.
    if kind not in list(models.CLASSES) or not isinstance(num_labels, int) or not 0 < num_labels <= MOST_LABELS:
        raise DataError(f"the log's header says of the base model {dict(header.model)}, which names none")
    device = models.choose_device(cfg.device)
    base = load_base(cfg.model, kind, device, cfg.seed, num_labels)
    labels = tuple(str(label) for label in range(num_labels))
    return Ready(base, Task("replayed", "choice", labels, (), None, (), {}), device, cfg.task.max_length)


def _same_tensors(left: Path, found: Path) -> bool:
    """Whether two folders hold the same tensors under the same names, bit for bit."""
    names = {path.name for folder in (left, found) for path in folder.glob("*.safetensors")}
    return all((left / name).is_file() and (found / name).is_file() for name in names) and all(
        checksum(load_file(left / name)) == checksum(load_file(found / name)) for name in names
    )


def _has_hashes(hashes: Mapping[str, str], folder: Path) -> bool:
    """Whether the folder's tensors are in files of these hashes."""
    return _of_weights(results.artifacts(folder, "")) == hashes


def _of_weights(artifacts: Mapping[str, Any]) -> dict[str, str]:
    """Name -> hash of the files that hold tensors, of a record's artifacts."""
    noted = artifacts.get("files", {}).items()
    return {Path(name).name: found for name, found in noted if name.endswith(".safetensors")}


def _remarks(cfg: TrainConfig, learning: Learning, log: Log, left: Left) -> list[str]:
    """What is not as it was when the steps were taken, and how far the log goes."""
    then = asdict(log.header)
    now = {**asdict(learning.header()), "config": files.content_hash(config_identity(cfg))}
    remarks = [f"this replay has another {each}" for each in differing(then, now)]
    for step, header in log.later.items():
        remarks += [f"from step {step} on the run had another {each}" for each in differing(then, asdict(header))]
    if log.broken is not None:
        remarks.append(f"the log is not used any further: {log.broken}")
    if len(log.steps) < left.step:
        remarks.append(f"the log goes as far as step {len(log.steps)}, and {left.name} is of step {left.step}")
    return remarks
