"""A zeroth-order run is rebuilt from its base model and its log alone, bit for bit, or it is said where it differs."""

from __future__ import annotations

import base64
import io
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load, save
from typer.testing import CliRunner

from lorica import cli, config, files, runs
from lorica.config import ReplayConfig, TrainConfig
from lorica.demo import language
from lorica.errors import ConfigError, DataError, InterruptedRunError, MissingPathError, OutputExistsError
from lorica.optim import probes
from lorica.optim.replay import numerics, read_log
from lorica.runs.training import learning, stretch_trainer
from lorica.runs.training.replay import Replayed
from lorica.training import checkpoints, fit
from test_resume import Killed, dies_at

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

SEGMENT = 5
BASE = (
    "model=demo trainer=zo batch_size=2 max_steps=24 learning_rate=1e-2 task.num_train=64 "
    "task.num_dev=20 task.num_eval=20"
)
ADAPTIVE = (
    "adapter.kind=xgblora boosting.use_adaptive_merge=true boosting.patience=5 boosting.improvement_threshold=0.02 "
    "boosting.judge=probe boosting.probe_size=8 learning_rate=0.1 adapter.init=kaiming max_steps=40 zo.num_directions=4"
)
RUNS = {
    "lora": "adapter.rank=2 adapter.init=kaiming zo.num_directions=3",
    "classes": "adapter.rank=2",
    "both factors": "adapter.rank=2 zo.train=both optimizer=adamw schedule=linear warmup=0.1",
    "scaled": "zo.estimator=one_sided zo.num_directions=3 zo.distribution=rademacher zo.space=update zo.normalize=rms "
    "zo.clip=2 learning_rate=1e-3 optimizer=momentum gradient_accumulation_steps=2",
    "clipped": "max_grad_norm=0.5 weight_decay=0.1 schedule=cosine",
    "head": "task.kind=classification",
    "classes, rounds": "adapter.kind=xgblora boosting.steps_per_iteration=10 task.kind=classification",
    "rounds": "adapter.kind=xgblora boosting.steps_per_iteration=10 boosting.layer_fraction=0.5 boosting.rewarm=true "
    "warmup=5 boosting.shrinkage=0.7 boosting.orthogonal=true",
    "epochs": "adapter.kind=xgblora boosting.merge_frequency=1 max_steps=null num_epochs=2.5 task.num_train=16",
    "adaptive": ADAPTIVE,
    "adaptive head": f"{ADAPTIVE} task.kind=classification",
    "along inputs": "adapter.init=activations max_steps=12",
    "full": "adapter.kind=full max_steps=7 zo.num_directions=2 learning_rate=1e-4 weight_decay=0.1",
    "full, half precision": "adapter.kind=full max_steps=6 model.dtype=bfloat16 learning_rate=1e-4",
    "prefix": "adapter.kind=prefix max_steps=12",
}


@pytest.fixture(scope="module", autouse=True)
def often() -> Iterator[None]:
    """A checksum every few steps, so that short runs have some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretch_trainer, "SEGMENT", SEGMENT)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder / "topic"


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder of one of RUNS, trained when first asked for; a test that changes it takes a copy."""
    made: dict[str, Path] = {}

    def trained(name: str) -> Path:
        if name not in made:
            made[name] = train(words_for(data, tmp_path_factory.mktemp("runs") / "run", RUNS[name]))
        return made[name]

    return trained


def words_for(data: Path, folder: Path, *more: str) -> list[str]:
    """BASE, what differs from it, and the places."""
    given = dict(word.split("=", 1) for word in " ".join([BASE, *more]).split())
    return [*(f"{key}={value}" for key, value in given.items()), f"task.path={data}", f"output_dir={folder}"]


def train(words: list[str], said: io.StringIO | None = None) -> Path:
    say = Console(file=said, width=500) if said else Console(quiet=True)
    return runs.train(config.read(TrainConfig, words), say).run.path


def replay(run: Path, *words: str) -> Replayed:
    return runs.replay(str(run), config.read(ReplayConfig, list(words)))


def changed(run: Path, folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    """A copy of a run, its log changed."""
    subprocess.run(["cp", "-r", run, folder], check=True)
    records = files.read_records(folder / "replay.jsonl")
    change(records)
    (folder / "replay.jsonl").write_text("".join(map(files.record_line, records)))
    return folder


def taken(records: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """The line of a step."""
    return next(each for each in records if each["step"] == step and "weights" in each)


@pytest.mark.parametrize("name", list(RUNS))
def test_every_kind_of_run_is_rebuilt_bit_for_bit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = run(name)
    monkeypatch.setattr(probes.Probing, "losses", forward)
    if name != "along inputs":
        monkeypatch.setattr("lorica.runs.ready.load_task", forward)
    found = replay(folder, f"output_dir={tmp_path / 'out'}")
    assert found.is_identical, found
    assert not found.remarks
    assert found.num_checksums == found.num_steps // SEGMENT > 0
    (left,) = (folder / ("model" if name.startswith("full") else "adapter")).glob("*.safetensors")
    assert (tmp_path / "out" / left.name).read_bytes() == left.read_bytes()


def forward(*_: Any, **__: Any) -> Any:
    raise AssertionError("a replay asks for no loss, and for no data")


def test_the_adaptive_run_is_worth_replaying(run: Run) -> None:
    """Rounds that end by patience, roll back, and are rejected: else the test above shows nothing."""
    lines = files.read_records(run("adaptive") / "ledger.jsonl")
    assert {line["reason"] for line in lines} >= {"patience"}
    assert any(line["rolled_back"] and line["kept_step"] < line["last_step"] for line in lines)
    assert {line["accepted"] for line in lines} == {True, False}


@pytest.mark.parametrize("kind", ["lora", "adaptive"])
def test_a_resumed_run_leaves_the_log_of_the_unbroken_one(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    words = words_for(data, tmp_path / "run", RUNS[kind], "save_steps=8")
    for kill in (11, 19):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(fit, "_told", dies_at(kill))
            train(words)
        words = [f"resume={tmp_path / 'run'}"]
    torch.manual_seed(1)
    train(words)
    there, here = (files.read_records(each / "replay.jsonl") for each in (run(kind), tmp_path / "run"))
    assert here[1:] == there[1:]
    assert replay(tmp_path / "run").is_identical


@pytest.mark.parametrize("kind", ["lora", "adaptive"])
def test_an_interrupted_run_is_compared_with_its_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    original = fit._told

    def told(progress: fit.Progress, *rest: Any) -> fit.Step:
        if progress.step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(progress, *rest)

    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
        patch.setattr(fit, "_told", told)
        train(words_for(data, tmp_path / "run", RUNS[kind]))
    found = replay(tmp_path / "run", f"output_dir={tmp_path / 'out'}")
    assert found.is_identical and found.compared == "the checkpoint of step 13"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()

    def spoil(records: list[dict[str, Any]]) -> None:
        taken(records, 13)["rate"] = 1.0

    assert replay(changed(tmp_path / "run", tmp_path / "spoilt", spoil)).differs == (11, 13)


@pytest.mark.parametrize(
    ("signalled", "killed", "compared", "num_checksums"),
    [(20, None, "the checkpoint of step 20", 5), (None, 23, "the checkpoint of step 20", 5), (24, None, "nothing", 4)],
)
def test_a_run_that_stopped_between_two_rounds_is_compared_with_its_checkpoint(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signalled: int | None,
    killed: int | None,
    compared: str,
    num_checksums: int,
) -> None:
    """Behind the last round nothing is live that a checksum could be of."""
    original = fit._told

    def told(progress: fit.Progress, *rest: Any) -> fit.Step:
        if progress.step == signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        if progress.step == killed:
            raise Killed
        return original(progress, *rest)

    with monkeypatch.context() as patch, pytest.raises((InterruptedRunError, Killed)):
        patch.setattr(fit, "_told", told)
        train(words_for(data, tmp_path / "run", RUNS["rounds"], "save_steps=20"))
    found = replay(tmp_path / "run")
    assert found.is_identical and found.num_checksums == num_checksums
    assert found.compared is not None and found.compared.startswith(compared)


def test_the_log_is_whole_when_a_checkpoint_is_committed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = checkpoints.save_checkpoint, []

    def saved(folder: Path, snapshot: checkpoints.Snapshot) -> None:
        seen.append((snapshot.step, len(read_log(tmp_path / "run" / "replay.jsonl").steps)))
        original(folder, snapshot)

    monkeypatch.setattr(checkpoints, "save_checkpoint", saved)
    train(words_for(data, tmp_path / "run", RUNS["lora"], "max_steps=20 save_steps=8"))
    assert seen == [(8, 8), (16, 16)]


def test_a_run_killed_before_its_first_checkpoint_is_replayed_as_far_as_its_log(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fit, "_told", dies_at(9))
        train(words_for(data, tmp_path / "run", RUNS["lora"]))
    found = replay(tmp_path / "run")
    assert found.is_identical and (found.num_steps, found.num_checksums) == (8, 1)


def test_what_was_deleted_is_rebuilt_and_compared_with_its_hashes(run: Run, tmp_path: Path) -> None:
    folder = changed(run("lora"), tmp_path / "run", lambda records: None)
    expected = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "adapter")
    found = replay(folder, f"output_dir={tmp_path / 'out'}")
    assert found.is_identical and "hashes" in found.told()
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == expected

    def spoil(records: list[dict[str, Any]]) -> None:
        one_bit(records, 23)

    spoilt = replay(changed(folder, tmp_path / "spoilt", spoil))
    assert spoilt.differs == (21, 24), "no checksum was taken after step 20, so that the hashes alone tell"


def test_what_nothing_was_compared_with_is_not_called_identical(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fit, "_told", dies_at(4))
        train(words_for(data, tmp_path / "run", RUNS["lora"]))
    found = replay(tmp_path / "run")
    assert not found.is_identical and found.told().startswith("nothing could be compared: the log's 3 steps")


def one_bit(records: list[dict[str, Any]], at: int) -> None:
    text = records[at]["weights"]
    records[at]["weights"] = ("B" if text[0] == "A" else "A") + text[1:]


@pytest.mark.parametrize(("step", "segment"), [(1, (1, 5)), (5, (1, 5)), (6, (6, 10)), (24, (21, 24))])
def test_it_is_said_where_a_changed_log_first_differs(
    run: Run, tmp_path: Path, step: int, segment: tuple[int, int]
) -> None:
    def larger(records: list[dict[str, Any]]) -> None:
        rate = records[1]["rate"]
        records[step]["rate"] = rate * 1.5
        if step + 1 < len(records):
            records[step + 1]["rate"] = rate

    found = replay(changed(run("lora"), tmp_path / "changed", larger))
    assert found.differs == segment and not found.is_identical
    assert found.told() == f"differs: first between steps {segment[0]} and {segment[1]}, of 24 steps and 4 checksums"


def test_a_decision_that_is_changed_shows(run: Run, tmp_path: Path) -> None:
    def other_verdict(records: list[dict[str, Any]]) -> None:
        ended = next(each for each in records if "round" in each and not each["accepted"])
        ended["accepted"] = True

    assert not replay(changed(run("adaptive"), tmp_path / "verdict", other_verdict)).is_identical

    def other_booster(records: list[dict[str, Any]]) -> None:
        ended = next(each for each in records if "round" in each and each["accepted"] and each["kept"] < each["step"])
        ended["kept"] = ended["step"]

    assert not replay(changed(run("adaptive"), tmp_path / "booster", other_booster)).is_identical


@pytest.mark.parametrize(("kind", "last"), [("lora", 24), ("adaptive", 40)])
def test_a_truncated_log_goes_as_far_as_it_goes(run: Run, tmp_path: Path, kind: str, last: int) -> None:
    def cut(records: list[dict[str, Any]]) -> None:
        del records[records.index(taken(records, 9)) :]

    found = replay(changed(run(kind), tmp_path / "cut", cut))
    assert found.compared is None and found.differs is None and not found.is_identical
    assert found.num_checksums == 1 and "ends too early" in found.told()
    assert any(f"as far as step {found.num_steps}" in remark and f"step {last}" in remark for remark in found.remarks)

    def gap(records: list[dict[str, Any]]) -> None:
        del records[20]

    found = replay(changed(run("lora"), tmp_path / "gap", gap))
    assert found.num_steps == 19 and any("after step 19" in remark for remark in found.remarks)


def test_another_config_base_or_machine_is_named(run: Run, tmp_path: Path) -> None:
    def elsewhere(records: list[dict[str, Any]]) -> None:
        records[0]["header"]["numerics"]["torch"] = "1.0"
        records[0]["header"]["base"] = "0" * 16
        records.insert(11, {"step": 10, "header": {**records[0]["header"], "numerics": {"torch": "9.9"}}})

    found = replay(changed(run("lora"), tmp_path / "elsewhere", elsewhere))
    assert found.is_identical
    for part in ("another numerics.torch ('1.0', now", "another base", "from step 10 on the run had another numerics"):
        assert any(part in remark for remark in found.remarks), (part, found.remarks)
    folder = changed(run("lora"), tmp_path / "config", lambda records: None)
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("rank: 2", "rank: 3"))
    found = replay(folder)
    assert found.differs == (1, 5) and any("another config" in remark for remark in found.remarks)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("num_directions: 3", "num_directions: 2"))
    with pytest.raises(DataError, match="directions"):
        replay(folder)


def test_going_on_elsewhere_is_told_and_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fit, "_told", dies_at(15))
        train(words_for(data, tmp_path / "run", RUNS["lora"], "max_steps=24 save_steps=10"))
    said = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(learning, "numerics", lambda device: {**numerics(device), "cpu": "ABACUS"})
        train([f"resume={tmp_path / 'run'}"], said)
    assert "another numerics.cpu" in said.getvalue() and "now 'ABACUS'" in said.getvalue()
    found = replay(tmp_path / "run")
    assert found.is_identical and any("from step 10 on" in remark for remark in found.remarks)


def test_a_step_that_was_not_applied_is_not_applied_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = probes.Probing.losses

    def sometimes(self: probes.Probing, *given: Any) -> torch.Tensor:
        found = original(self, *given)
        sometimes.calls += 1
        return torch.full_like(found, torch.nan) if sometimes.calls in (3, 4) else found

    sometimes.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(probes.Probing, "losses", sometimes)
        train(words_for(data, tmp_path / "run", RUNS["lora"], "max_steps=12 optimizer=momentum"))
    lines = files.read_records(tmp_path / "run" / "replay.jsonl")
    assert [line["step"] for line in lines if "weights" not in line] == [0, 3, 4]
    assert replay(tmp_path / "run").is_identical


def test_what_cannot_be_replayed_is_refused(run: Run, data: Path, tmp_path: Path) -> None:
    other = train(words_for(data, tmp_path / "backprop", "trainer=backprop max_steps=2"))
    with pytest.raises(MissingPathError, match="trainer=zo"):
        replay(other)
    with pytest.raises(MissingPathError, match="not a run folder"):
        replay(tmp_path)
    with pytest.raises(OutputExistsError):
        replay(run("lora"), f"output_dir={other}")
    with pytest.raises(ConfigError):
        config.read(ReplayConfig, ["rank=1"])

    def of_nothing(records: list[dict[str, Any]]) -> None:
        records[0]["header"]["model"] = {"kind": "causal", "num_labels": 10**9}

    with pytest.raises(DataError, match="num_labels"):
        replay(changed(run("lora"), tmp_path / "hostile", of_nothing))

    def of_another_width(records: list[dict[str, Any]]) -> None:
        line = next(each for each in records if "looked" in each)
        narrow = {name: seen[:, 1:].contiguous() for name, seen in load(base64.b64decode(line["looked"])).items()}
        line["looked"] = base64.b64encode(save(narrow)).decode()

    with pytest.raises(DataError, match="what the model of this run cannot take") as caught:
        replay(changed(run("classes"), tmp_path / "narrow", of_another_width))
    assert "\n" not in str(caught.value)


def test_the_command_says_identical_or_exits_with_1(run: Run, tmp_path: Path) -> None:
    def spoil(records: list[dict[str, Any]]) -> None:
        one_bit(records, 5)

    spoilt = changed(run("lora"), tmp_path / "spoilt", spoil)
    for folder, code, told in ((run("lora"), 0, "identical: 24 steps"), (spoilt, 1, "differs")):
        done = CliRunner().invoke(cli.app, ["replay", str(folder)])
        assert done.exit_code == code and told in done.output, done.output
