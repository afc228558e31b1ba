"""Several processes on one search: every trial once, a dead worker's taken over, colleagues that end with the sweep."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from lorica import files
from lorica.runs.studying.sweep_workers import colleagues
from lorica.studies import children
from lorica.studies.ledger import CLAIMS, TRIALS, Ledger
from lorica.studies.search import Bayes, Grid, Trial
from lorica.studies.space import Parameter, Space, key

GRID = Grid(tuple({"a": place} for place in range(12)))
WORKER = """
import sys, time
from pathlib import Path
from lorica.studies.ledger import Ledger
from lorica.studies.search import Bayes, Grid, Trial
from lorica.studies.space import Parameter, Space
ledger = Ledger(Path(sys.argv[1]), lambda number, line: Trial(number, line["params"], (line["value"],)))
search = eval(sys.argv[2])
print("ready", flush=True)
input()
while True:
    with ledger.claimed(search) as claim:
        if claim is None:
            break
        print(claim.number, flush=True)
        time.sleep(float(sys.argv[3]))
        ledger.finish(claim, {"value": claim.point["a"], "worker": sys.argv[4]})
"""


def worker(folder: Path, search: str, seconds: float, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(folder), search, str(seconds), name]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    return started


def go(started: subprocess.Popen[str]) -> None:
    assert started.stdin is not None
    started.stdin.write("\n")
    started.stdin.flush()


def ledger(folder: Path) -> Ledger:
    return Ledger(folder, lambda number, line: Trial(number, line["params"], (line["value"],)))


def test_two_processes_try_every_point_once(tmp_path: Path) -> None:
    search = Bayes(Space((Parameter("a", "float", 0.0, 1.0),)), 12, 12, 0)
    both = [worker(tmp_path, repr(search), 0.05, name) for name in "ab"]
    for each in both:
        go(each)
    for each in both:
        each.communicate()
        assert each.returncode == 0
    lines = ledger(tmp_path).records()
    assert [each["number"] for each in lines] == list(range(12))
    assert len({key(each["params"]) for each in lines}) == 12 and {each["worker"] for each in lines} == {"a", "b"}
    assert not list((tmp_path / CLAIMS).iterdir())


def test_who_waits_for_the_last_trial_takes_it_over_when_its_worker_is_killed(tmp_path: Path) -> None:
    two = Grid(GRID.points[:2])
    doomed = worker(tmp_path, repr(two), 1000, "doomed")
    go(doomed)
    assert doomed.stdout is not None and doomed.stdout.readline() == "0\n"
    with ledger(tmp_path).claimed(two) as claim:
        assert claim is not None and claim.number == 1
        ledger(tmp_path).finish(claim, {"value": 1})
    killing = threading.Timer(0.3, doomed.kill)
    killing.start()
    begin = time.monotonic()
    with ledger(tmp_path).claimed(two) as claim:
        assert claim is not None and (claim.number, claim.point) == (0, {"a": 0})
        assert time.monotonic() - begin > 0.2
        ledger(tmp_path).finish(claim, {"value": 0})
    with ledger(tmp_path).claimed(two) as claim:
        assert claim is None
    killing.join()
    doomed.communicate()
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
