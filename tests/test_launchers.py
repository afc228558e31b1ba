"""Launchers: one command, the same record wherever it runs; what is started ends with the one who started it."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorica import config, files, runs
from lorica.config import CompareConfig
from lorica.demo import language
from lorica.errors import MissingExtraError, UnknownNameError
from lorica.results import RunFolder
from lorica.studies import children, launcher
from lorica.studies.launcher import Ended, Job
from lorica.studies.launchers.here import Place, places

LASTING = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(float(sys.argv[1]))
"""
RUN = ["model=demo", "device=cpu", "eval_steps=3", "task.num_train=20", "task.num_dev=10", "task.num_eval=10"]
ARMS = (["adapter.kind=lora"], ["adapter.kind=xgblora", "boosting.steps_per_iteration=2"])
HAS_RAY = importlib.util.find_spec("ray") is not None


def needs_ray(test: Any) -> Any:
    """A local cluster takes its seconds to start."""
    return pytest.mark.slow(pytest.mark.skipif(not HAS_RAY, reason="no ray: pip install lorica[ray]")(test))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder / "topic"


@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that stay for so many seconds, whoever asks them to go."""
    monkeypatch.setattr(children, "PROGRAM", ("-c", LASTING))


def runs_of(data: Path, folder: Path, seeds: tuple[int, ...], num_steps: int = 3) -> list[Job]:
    """A run of each arm with each seed."""
    given = (f"task.path={data}", f"max_steps={num_steps}")
    words = [(*RUN, *arm, f"seed={seed}", *given) for arm in ARMS for seed in seeds]
    return [
        Job(("train", *each, f"output_dir={folder / str(number)}"), folder / f"{number}.log")
        for number, each in enumerate(words)
    ]


def folder_of(job: Job) -> RunFolder:
    return RunFolder(Path(job.words[-1].removeprefix("output_dir=")))


def record(run: RunFolder) -> dict[str, Any]:
    """What a run found, without its clock and its place."""
    told = files.read_json(run.record)
    lines = [*files.read_records(run.training_loss), *files.read_records(run.eval_loss)]
    return {
        "config": told["config"] | {"output_dir": None},
        "metrics": told["metrics"],
        "origin": told["origin"]["command"][:2],
        "lines": [{**line, "seconds": None} for line in lines],
    }


def launched(name: str, jobs: list[Job], num_workers: int | None = None) -> list[Ended]:
    """How the jobs ended, in the order that they were given in."""
    found = list(launcher.find(name)(jobs, num_workers=num_workers))
    assert len(found) == len(jobs)
    return sorted(found, key=lambda each: jobs.index(each.job))


def test_a_run_is_the_same_in_this_process_and_in_one_of_its_own(data: Path, tmp_path: Path) -> None:
    boosted, words = {name: runs_of(data, tmp_path / name, (0,))[1] for name in ("inline", "here")}, sys.argv
    for name, job in boosted.items():
        assert [(each.exit_code, each.error) for each in launched(name, [job])] == [(0, None)]
        assert "step 3/3" in job.log.read_text()
    assert record(folder_of(boosted["inline"])) == record(folder_of(boosted["here"]))
    assert sys.argv is words


@needs_ray
def test_the_same_study_through_ray_leaves_the_same_records(data: Path, tmp_path: Path) -> None:
    words = [*RUN, "seeds=[0, 1]", "max_steps=3", "learning_rate=1e-2", "boosting.steps_per_iteration=2"]
    found, records = {}, {}
    for name in ("here", "ray"):
        places = [f"task.path={data}", f"launcher={name}", "num_workers=2", f"output_dir={tmp_path / name}"]
        done = runs.study(config.read(CompareConfig, [*words, *places]), Console(quiet=True))
        found[name] = done.outcome
        records[name] = [
            record(RunFolder(done.folder / each["folder"])) for each in done.outcome["runs"] if each["error"] is None
        ]
        for cell in done.outcome["cells"]:
            del cell["seconds"], cell["peak_bytes"]
    assert len(records["ray"]) == 4 and records["ray"] == records["here"]
    assert found["ray"] == found["here"]


@needs_ray
def test_a_run_whose_ray_worker_dies_is_told_and_ends(data: Path, tmp_path: Path) -> None:
    job = runs_of(data, tmp_path, (0,), num_steps=1_000_000)[0]
    killing = threading.Thread(target=kill_the_parent, args=(tmp_path / "0",))
    killing.start()
    (ended,) = launched("ray", [job])
    killing.join()
    assert ended.exit_code == -9 and ended.error is not None and "ray lost this run" in ended.error
    gone(trainer(tmp_path / "0"))


def kill_the_parent(run: Path) -> None:
    """Kill who started the process that trains, once it does."""
    wait_until(lambda: (run / "training_loss.jsonl").exists())
    parent = Path("/proc", str(trainer(run)), "stat").read_text().rpartition(")")[2].split()[1]
    os.kill(int(parent), signal.SIGKILL)


def trainer(run: Path) -> int:
    """The process that trains in a run's folder, which holds its lock."""
    return int((run / ".lock").read_text().split()[1])


@pytest.mark.parametrize("name", ["here", "inline"])
def test_a_command_that_fails_is_told_with_its_error_and_the_others_go_on(name: str, tmp_path: Path) -> None:
    failed, fine = launched(name, [Job(("list", what), tmp_path / what) for what in ("nothing", "tasks")])
    assert failed.exit_code == 2 and str(failed.error).startswith("unknown list 'nothing'")
    assert (fine.exit_code, fine.error) == (0, None) and "sst2" in fine.job.log.read_text()


def test_a_bug_in_a_run_does_not_end_those_behind_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks(what: str) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("lorica.tables.listing", breaks)
    ended = launched("inline", [Job(words, tmp_path / words[0]) for words in (("list",), ("--version",))])
    assert [(each.exit_code, each.error) for each in ended] == [(1, "exit code 1: ZeroDivisionError: a bug"), (0, None)]


def test_a_killed_run_is_told_with_its_signal(lasting: None, tmp_path: Path) -> None:
    jobs = [Job(("1000",), tmp_path / name) for name in "ab"]
    killing = threading.Thread(target=lambda: [os.kill(pid_in(job.log), signal.SIGKILL) for job in jobs])
    killing.start()
    ended = launched("here", jobs, 2)
    killing.join()
    assert [each.exit_code for each in ended] == [-9, -9]
    assert all(str(each.error).startswith("ended by SIGKILL") for each in ended)


def test_what_was_started_ends_with_the_loop_even_if_it_does_not_want_to(
    lasting: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(children, "GRACE_SECONDS", 0.1)
    jobs = [Job((seconds,), tmp_path / seconds) for seconds in ("0.5", "1000", "2000")]
    ended = launcher.find("here")(jobs, num_workers=2)
    assert next(ended).job is jobs[0]
    stubborn = pid_in(jobs[1].log)
    ended.close()  # type: ignore[attr-defined]
    gone(stubborn)
    assert not jobs[2].log.exists() or gone(pid_in(jobs[2].log))


STARTER = """
import sys, time
from pathlib import Path
from lorica.studies import children
children.PROGRAM = ("-c", sys.argv[2])
children.start((), Path(sys.argv[1]))
time.sleep(1000)
"""
ATTACHED = """
import os, runpy, time
from lorica.studies import attached
runpy.run_module = lambda *rest, **options: (print(os.getpid(), flush=True), time.sleep(1000))
attached.main()
"""


def test_a_child_does_not_outlive_its_parent_even_if_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path / "log"), ATTACHED])
    child = pid_in(tmp_path / "log")
    parent.kill()
    parent.wait()
    gone(child)


def test_each_place_has_its_own_cores_and_device() -> None:
    assert places(range(8), ["2", "3"], 3) == [Place((0, 1), "2"), Place((2, 3, 4), "3"), Place((5, 6, 7), "2")]
    assert places([4, 5], [], 3) == [Place((4,), None), Place((4,), None), Place((5,), None)]
    assert places([0], ["0"], 1)[0].environment == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}


def test_a_child_runs_on_the_cores_of_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asks = "import os; print(*os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setattr(children, "PROGRAM", ("-c", f"import time; time.sleep(0.3); {asks}"))
    jobs = [Job((), tmp_path / name) for name in "ab"]
    launched("here", jobs, 2)
    cores = sorted(os.sched_getaffinity(0))
    expected = [" ".join(map(str, [*place.cores, len(place.cores)])) for place in places(cores, [], 2)]
    assert sorted(job.log.read_text().strip() for job in jobs) == sorted(expected)


def test_ray_that_is_not_there_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install lorica\[ray\]"):
        next(launcher.find("ray")([], num_workers=2))
    with pytest.raises(UnknownNameError, match="did you mean here"):
        launcher.find("her")
    assert launcher.LAUNCHERS.names() == ["here", "inline", "ray"]


def pid_in(log: Path) -> int:
    """The process that has written its number into its log, once it has."""
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
    return int(log.read_text())


def gone(pid: int) -> bool:
    """Wait until there is no such process."""
    wait_until(lambda: not Path("/proc", str(pid)).exists() or " Z " in Path("/proc", str(pid), "stat").read_text())
    return True


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
