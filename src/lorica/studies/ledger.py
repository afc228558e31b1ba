"""A search's trials, shared by whoever works on them: each is tried once, and one whose worker dies is taken over.

A finished trial is a line of trials.jsonl. One under work is a file of claims/, which its worker holds locked: the
kernel lets go of the lock when the worker dies (on a network file system, the server when it no longer hears of the
machine), so that no clock of ours has to say who is alive. The folder's own lock is held to propose and claim, and to
write a line; never while a point is tried.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lorica import files
from lorica.studies.search import Search, Trial
from lorica.studies.space import Point

TRIALS, CLAIMS = "trials.jsonl", "claims"
Record = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A trial that is this process's alone until it closes `lock`; `finished` are those that were so before it."""

    number: int
    point: Point
    lock: BinaryIO
    finished: Sequence[Trial]


@dataclass(frozen=True)
class Ledger:
    """The trials in a folder; `read` makes a trial of a line's number and the line."""

    folder: Path
    read: Callable[[int, Mapping[str, Any]], Trial]

    def records(self) -> list[Record]:
        """The line of every finished trial, in the order of their numbers; one may be torn while others write."""
        path = self.folder / TRIALS
        records = files.read_records(path) if path.exists() else []
        return sorted(records, key=lambda each: each["number"])

    @contextlib.contextmanager
    def claimed(self, search: Search, known: Sequence[Trial] = ()) -> Iterator[Claim | None]:
        """A trial to work on: one whose worker died, or else the next of `search`; None when all are finished.

        Where all that are left are under work elsewhere, it waits until they are finished or a worker dies.
        """
        claim, under_work = self._claim(search, known)
        while claim is None and under_work:
            _wait(under_work[0])
            claim, under_work = self._claim(search, known)
        with claim.lock if claim else contextlib.nullcontext():
            yield claim

    def finish(self, claim: Claim, outcome: Mapping[str, Any]) -> None:
        """Write the trial's line, after which nobody tries it again."""
        with files.locked_folder(self.folder, wait=True):
            record = {"number": claim.number, "params": claim.point, **outcome}
            files.append_record(self.folder / TRIALS, record)
            self._path(claim.number).unlink()

    def close(self) -> None:
        """Remove what only a search under way needs."""
        shutil.rmtree(self.folder / CLAIMS, ignore_errors=True)

    def _claim(self, search: Search, known: Sequence[Trial]) -> tuple[Claim | None, list[Path]]:
        """A trial, if there is one to be had, and the claims of the others."""
        with files.locked_folder(self.folder, wait=True):
            records = self.records()
            others = self._claims({each["number"] for each in records})
            trials = [self.read(each["number"], each) for each in records]
            for path in others:
                if (lock := files.hold(path)) is not None:
                    left = files.read_json(path)
                    return Claim(left["number"], left["params"], lock, trials), others
            point = search.propose(trials, known, [files.read_json(path)["params"] for path in others])
            if point is None:
                return None, others
            number = len(records) + len(others)
            return Claim(number, point, self._new(number, point), trials), others

    def _claims(self, finished: set[int]) -> list[Path]:
        """The claims on unfinished trials. A worker that dies between its line and the end of its claim leaves more."""
        numbers = sorted(int(path.stem) for path in (self.folder / CLAIMS).glob("*.json"))
        return [self._path(number) for number in numbers if number not in finished]

    def _new(self, number: int, point: Point) -> BinaryIO:
        path = self._path(number)
        path.parent.mkdir(exist_ok=True)
        files.write_json(path, {"number": number, "params": point})
        lock = files.hold(path)
        assert lock is not None  # nobody else looks at claims as long as the folder is locked
        return lock

    def _path(self, number: int) -> Path:
        return self.folder / CLAIMS / f"{number}.json"


def _wait(claim: Path) -> None:
    """Until the claim's worker has finished the trial, or is dead."""
    with contextlib.suppress(FileNotFoundError):  # finished already
        lock = files.hold(claim, wait=True)
        assert lock is not None
        lock.close()
