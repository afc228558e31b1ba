"""Trackers: what they are told of a run, that nothing leaves the machine, and that no run depends on them."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import lorica
from lorica import config, files, runs
from lorica.config import TrainConfig
from lorica.demo import language
from lorica.errors import ConfigError, MissingExtraError, UnknownNameError
from lorica.processes import Processes
from lorica.results import RunFolder
from lorica.runs.training import told_figures
from lorica.runs.training.tracking import log_checks, tracked
from lorica.training import tracker
from lorica.training.fit import Step
from lorica.training.tracker import Figures, Tracked, Trackers

RUN = (
    "model=demo device=cpu batch_size=4 max_steps=12 learning_rate=1e-2 eval_steps=6 logging_steps=3 "
    "adapter.rank=2 task.num_train=40 task.num_dev=10 task.num_eval=10"
)
BOOSTED = "adapter.kind=xgblora boosting.steps_per_iteration=5"
ZO = "trainer=zo adapter.init=kaiming"
STUB = """
import json, os, socket
calls = []
class Run:
    def log(self, figures, step): calls.append([figures, step])
    def finish(self): calls.append("finished")
def Settings(**given): return given
def init(project=None, **given):
    here = {name: value for name, value in os.environ.items() if name.startswith(("WANDB_", "TRACKIO_"))}
    calls.append({"project": project, "environment": here, **given})
    print("* ready")
    return Run()
"""


@dataclass
class Recorder:
    """A tracker that keeps what it is told."""

    run: Tracked
    told: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    finished: bool = False

    def log(self, figures: Figures, step: int) -> None:
        assert not self.finished
        self.told.append((step, dict(figures)))

    def finish(self) -> None:
        self.finished = True

    def series(self, name: str) -> dict[int, float]:
        return {step: figures[name] for step, figures in self.told if name in figures}

    def names(self, namespace: str) -> set[str]:
        return {name for _, figures in self.told for name in figures if name.startswith(namespace)}


class Broken(Recorder):
    """One that fails at the second thing it is told."""

    def log(self, figures: Figures, step: int) -> None:
        if self.told:
            raise ConnectionError("no\nroute")
        super().log(figures, step)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder / "topic"


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Recorder]]:
    """What trackers by these names were told, in the order that they were started in."""
    started: dict[str, list[Recorder]] = {"good": [], "broken": []}

    def find(name: str) -> Callable[[Tracked], Recorder]:
        kind = {"good": Recorder, "broken": Broken}[name]
        return lambda run: started[name].append(kind(run)) or started[name][-1]

    monkeypatch.setattr(tracker, "find", find)
    return started


@pytest.fixture
def sealed_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection to any other machine."""

    def connect(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a tracker connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


def train(data: Path, folder: Path, *more: str, say: Console | None = None) -> RunFolder:
    """RUN, what differs from it, and the places."""
    given = dict(word.split("=", 1) for word in " ".join([RUN, *more]).split())
    words = [*(f"{key}={value}" for key, value in given.items()), f"task.path={data}", f"output_dir={folder}"]
    return runs.train(config.read(TrainConfig, words), say or Console(quiet=True)).run


def test_what_a_run_tells(recorders: dict[str, list[Recorder]], data: Path, tmp_path: Path) -> None:
    run = train(data, tmp_path / "run", "trackers=good")
    (told,) = recorders["good"]
    assert told.finished and told.run.config == files.read_json(run.record)["config"]
    assert (told.run.project, told.run.name, told.run.online, told.run.folder) == ("lorica", "run", False, run.path)
    lines = {line["step"]: line for line in files.read_records(run.training_loss)}
    assert told.series("train/loss") == {step: lines[step]["loss"] for step in (1, 3, 6, 9, 12)}
    for name in ("forwards", "tokens", "seconds"):
        assert told.series(f"training_efficiency/{name}")[12] == lines[12][name]
    speed = (lines[12]["tokens"] - lines[9]["tokens"]) / (lines[12]["seconds"] - lines[9]["seconds"])
    assert told.series("efficiency/tokens_per_second")[12] == pytest.approx(speed)
    assert told.series("efficiency/peak_bytes")[12] > 1e6
    record = files.read_json(run.record)
    assert told.series("efficiency/trainable_share") == {0: record["efficiency"]["trainable_share"]}
    assert told.series("dev/loss") == {line["step"]: line["loss"] for line in files.read_records(run.eval_loss)}
    assert {name.replace("/", "_", 1): told.series(name)[12] for name in told.names("test/") - {"test/loss"}} == record[
        "metrics"
    ]
    assert not told.names("zo/") and not told.names("boosting/")


def test_norms_and_ranks_are_those_of_the_adapter(
    recorders: dict[str, list[Recorder]], data: Path, tmp_path: Path
) -> None:
    run = train(data, tmp_path / "run", "trackers=good")
    (told,) = recorders["good"]
    adapter = lorica.load_adapter(run.adapter)
    factors = {which: [getattr(each, which).double().numpy() for each in adapter.updates.values()] for which in "AB"}
    for which, of in factors.items():
        expected = math.sqrt(sum(float((each**2).sum()) for each in of))
        assert told.series(f"lora_adapters/{which}_norm")[12] == pytest.approx(expected, rel=1e-5)
    assert told.names("lora_adapters/") >= {"lora_adapters/q_proj/A_norm", "lora_adapters/v_proj/B_norm"}
    values = [np.linalg.svd(each.dense().double().numpy(), compute_uv=False) for each in adapter.updates.values()]
    shares = [(each / each.sum())[each > 0] for each in values]
    effective = float(np.mean([np.exp(-(p * np.log(p)).sum()) for p in shares]))
    assert told.series("lora_rank/effective_rank")[12] == pytest.approx(effective, rel=1e-4)
    assert told.series("lora_rank/rank_utilisation")[12] == pytest.approx(effective / 2, rel=1e-4)
    assert set(told.series("lora_rank/stable_rank")) == {6, 12}, "spectra are taken at evaluations alone"


def test_rounds_and_probes_are_told(recorders: dict[str, list[Recorder]], data: Path, tmp_path: Path) -> None:
    boosted = train(data, tmp_path / "boosted", "trackers=good", BOOSTED)
    train(data, tmp_path / "zo", "trackers=good", ZO)
    rounds, probes = recorders["good"]
    assert rounds.series("boosting/rounds") == {5: 1, 10: 2, 12: 3}
    ledger = files.read_records(boosted.path / "ledger.jsonl")
    assert list(rounds.series("boosting/norm").values()) == [line["norm"] for line in ledger]
    assert rounds.series("boosting/laid_on")[12] == 3 and rounds.series("boosting/rolled_back")[12] == 0
    assert set(probes.series("zo/slope")) == {1, 3, 6, 9, 12} and probes.series("zo/skipped_probes")[12] == 0
    assert min(probes.series("zo/slope").values()) > 0 and not probes.names("boosting/")


def test_a_steps_slope_is_the_root_mean_square_of_those_that_count() -> None:
    step = Step(3, 1.0, 0.1, 9, 20, 1.0, num_left_out=1, trend_t=-2.5, weights=(0.3 / 2, 0.0, -0.4 / 2))
    found = told_figures.of_slopes(step, num_left_out=4)
    expected = {"zo/slope": math.sqrt((0.3**2 + 0.4**2) / 2), "zo/skipped_probes": 4, "zo/t_statistic": -2.5}
    assert found == pytest.approx(expected)


def test_a_run_is_the_same_whoever_looks_on(recorders: dict[str, list[Recorder]], data: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    alone = train(data, tmp_path / "alone")
    seen = train(data, tmp_path / "seen", "trackers=[broken,good]", say=Console(file=said, width=1000))
    losses = [[line["loss"] for line in files.read_records(run.training_loss)] for run in (alone, seen)]
    assert losses[0] == losses[1]
    assert said.getvalue().count("the tracker broken failed and is left out (ConnectionError: no route)") == 1
    assert len(recorders["broken"][0].told) == 1 and recorders["good"][0].series("train/loss").keys() >= {12}


def test_a_run_that_is_gone_on_with_keeps_its_name(
    recorders: dict[str, list[Recorder]], data: Path, tmp_path: Path
) -> None:
    run = train(data, tmp_path / "run", "trackers=good", "save_steps=5")
    run.record.unlink()
    runs.train(config.read(TrainConfig, [f"resume={run.path}"]), Console(quiet=True))
    first, second = recorders["good"]
    assert (first.run.id, first.run.first_step, second.run.first_step) == (second.run.id, 0, 10)
    assert set(second.series("train/loss")) == {11, 12}


def test_only_the_first_process_tells(recorders: dict[str, list[Recorder]], data: Path, tmp_path: Path) -> None:
    @dataclass
    class Second:
        cfg: TrainConfig
        processes: Processes

    cfg = config.read(TrainConfig, ["trackers=good", "max_steps=1"])
    with tracked(Second(cfg, Processes(1, 2)), RunFolder(tmp_path), 0) as tracking:  # type: ignore[arg-type]
        assert tracking is None
    assert recorders["good"] == []


def test_what_verify_finds_is_told(recorders: dict[str, list[Recorder]], data: Path, tmp_path: Path) -> None:
    run = train(data, tmp_path / "run", "trackers=good")
    log_checks(run, {"finite_factors": True, "base_unchanged": False}, Console(quiet=True))
    assert recorders["good"][1].told == [
        (12, {"verification/finite_factors": 1, "verification/base_unchanged": 0, "verification/num_failed": 1})
    ]


def test_figures_that_are_no_numbers_are_left_out() -> None:
    told = Recorder(Tracked(Path(), "p", "n", "i", {}))
    Trackers(pytest.fail, {"t": told}).log({"train/loss": math.nan, "zo/t_statistic": -math.inf, "train/x": 1.0}, 3)
    assert told.told == [(3, {"train/x": 1.0})]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["trackers=wandbb"], UnknownNameError, "unknown tracker 'wandbb': did you mean wandb"),
        (["tracking.online=true"], ConfigError, "tracking.online is set, and there is nobody to tell"),
        (["trackers=[]", "tracking.name=x"], ConfigError, "tracking.name is set, and there is nobody to tell"),
    ],
)
def test_what_is_refused(words: list[str], error: type[Exception], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        train(data, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "wandb" else real(name))
    with pytest.raises(MissingExtraError, match=r"pip install lorica\[wandb\]"):
        tracker.find("wandb")


real = importlib.util.find_spec


@pytest.mark.usefixtures("sealed_off")
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_nothing_leaves_the_machine_unless_asked(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / f"{name}.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path / "stubs")
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/elsewhere")
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    for online in ("false", "true"):
        train(data, tmp_path / online, f"trackers={name} tracking.project=team tracking.online={online}")
    offline, *told, finished, online_call = calls_of(name)[: calls_of(name).index("finished") + 2]
    assert finished == "finished" and offline["project"] == online_call["project"] == "team"
    assert "secret" not in json.dumps([{**offline, "environment": None}, *told])
    assert "ready" not in capsys.readouterr().out or name == "wandb"
    if name == "wandb":
        assert (offline["mode"], online_call["mode"]) == ("offline", "online")
        assert offline["environment"]["WANDB_ERROR_REPORTING"] == "false"
    else:
        assert (offline["space_id"], online_call["space_id"]) == (None, "team")
        assert "TRACKIO_SPACE_ID" not in offline["environment"] and "TRACKIO_SPACE_ID" in online_call["environment"]
    monkeypatch.delitem(sys.modules, name)


def calls_of(name: str) -> list[Any]:
    """What the stub of this name was asked for."""
    calls: list[Any] = sys.modules[name].calls
    return calls


@pytest.mark.usefixtures("sealed_off")
@pytest.mark.skipif(real("tensorboard") is None, reason="no tensorboard: pip install lorica[tensorboard]")
def test_tensorboards_own_files_hold_the_figures(data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(data, tmp_path / "run", "trackers=tensorboard")
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    lines = {line["step"]: line["loss"] for line in files.read_records(run.training_loss)}
    found = {each.step: each.value for each in events.Scalars("train/loss")}
    assert found == pytest.approx({step: lines[step] for step in (1, 3, 6, 9, 12)})
    assert "lora_rank/effective_rank" in events.Tags()["scalars"]
