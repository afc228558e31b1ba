"""Several processes on one search: every trial once, a dead worker's taken over, colleagues that end with the sweep."""

from __future__ import annotations

import io
import multiprocessing
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from rich.console import Console

from lorica import files
from lorica.runs.studying.sweep_workers import colleagues
from lorica.studies import children
from lorica.studies.ledger import CLAIMS, TRIALS, Ledger
from lorica.studies.search import Bayes, Grid, Search, Trial
from lorica.studies.space import Parameter, Space, key

GRID = Grid(tuple({"a": place} for place in range(12)))


def ledger(folder: Path) -> Ledger:
    return Ledger(folder, lambda number, line: Trial(number, line["params"], (line["value"],)))


class Worker:
    """A process that, once it is told to, takes trials until there are none; each takes it so many seconds."""

    def __init__(self, folder: Path, search: Search, seconds: float, name: str) -> None:
        context = multiprocessing.get_context("fork")
        self._told, there = context.Pipe()
        self.process = context.Process(target=_works, args=(there, folder, search, seconds, name))
        self.process.start()

    def go(self) -> None:
        self._told.send("go")

    def number(self) -> int:
        """Of the next trial that it takes, once it has."""
        assert self._told.poll(60)
        taken: int = self._told.recv()
        return taken


def _works(told: Connection, folder: Path, search: Search, seconds: float, name: str) -> None:
    told.recv()
    while True:
        with ledger(folder).claimed(search) as claim:
            if claim is None:
                break
            told.send(claim.number)
            time.sleep(seconds)
            ledger(folder).finish(claim, {"value": claim.point["a"], "worker": name})


def test_two_processes_try_every_point_once(tmp_path: Path) -> None:
    search = Bayes(Space((Parameter("a", "float", 0.0, 1.0),)), 12, 12, 0)
    both = [Worker(tmp_path, search, 0.05, name) for name in "ab"]
    for each in both:
        each.go()
    for each in both:
        each.process.join()
        assert each.process.exitcode == 0
    lines = ledger(tmp_path).records()
    assert [each["number"] for each in lines] == list(range(12))
    assert len({key(each["params"]) for each in lines}) == 12 and {each["worker"] for each in lines} == {"a", "b"}
    assert not list((tmp_path / CLAIMS).iterdir())


def test_who_waits_for_the_last_trial_takes_it_over_when_its_worker_is_killed(tmp_path: Path) -> None:
    two = Grid(GRID.points[:2])
    doomed = Worker(tmp_path, two, 1000, "doomed")
    doomed.go()
    assert doomed.number() == 0
    with ledger(tmp_path).claimed(two) as claim:
        assert claim is not None and claim.number == 1
        ledger(tmp_path).finish(claim, {"value": 1})
    killing = threading.Timer(0.3, doomed.process.kill)
    killing.start()
    begin = time.monotonic()
    with ledger(tmp_path).claimed(two) as claim:
        assert claim is not None and (claim.number, claim.point) == (0, {"a": 0})
        assert time.monotonic() - begin > 0.2
        ledger(tmp_path).finish(claim, {"value": 0})
    with ledger(tmp_path).claimed(two) as claim:
        assert claim is None
    killing.join()
    doomed.process.join()
    assert [each["number"] for each in ledger(tmp_path).records()] == [0, 1]


def test_a_worker_that_dies_behind_its_line_leaves_nothing_to_repeat(tmp_path: Path) -> None:
    with ledger(tmp_path).claimed(GRID) as claim:
        assert claim is not None
        files.append_record(tmp_path / TRIALS, {"number": 0, "params": claim.point, "value": 0})
    with ledger(tmp_path).claimed(GRID) as claim:
        assert claim is not None and (claim.number, claim.point) == (1, {"a": 1})


def test_a_colleague_that_fails_is_told_and_its_log_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "PROGRAM", ("-c", "import sys; print(*sys.argv[1:]); sys.exit(2)"))
    said = io.StringIO()
    with colleagues(tmp_path, 1, "cpu", Console(file=said, width=1000)):
        pass
    (log,) = tmp_path.glob("worker-*.log")
    assert "exit code 2" in said.getvalue() and str(log) in said.getvalue()
    assert log.read_text() == f"sweep resume={tmp_path} device=cpu\n"


def test_sigterm_ends_the_colleagues_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "PROGRAM", ("-c", "import time; print('at work', flush=True); time.sleep(1000)"))
    started: list[children.Child] = []
    monkeypatch.setattr(children, "start", lambda *words, start=children.start, **more: noted(start(*words, **more)))

    def noted(child: children.Child) -> children.Child:
        started.append(child)
        return child

    with pytest.raises(SystemExit) as left, colleagues(tmp_path, 2, "cpu", Console()):
        assert [child.poll() for child in started] == [None, None]
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 128 + signal.SIGTERM
    assert [child.returncode for child in started] == [-signal.SIGTERM] * 2 and not list(tmp_path.iterdir())
