"""A run stopped anywhere and resumed is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tiny
from lorica import config, files, models, runs
from lorica.adapters import injection
from lorica.config import TrainConfig
from lorica.demo import language
from lorica.errors import ConfigError, FolderInUseError, InterruptedRunError, LoricaError, ResumeError
from lorica.training import checkpoints, fit, ledger
from lorica.training.interruption import Interruption

BASE = {
    "model": "demo",
    "batch_size": "4",
    "max_steps": "24",
    "save_steps": "4",
    "eval_steps": "10",
    "task.num_train": "64",
    "task.num_dev": "20",
    "task.num_eval": "40",
    "learning_rate": "1e-2",
    "adapter.dropout": "0.1",
}
BRANCHES = {"spsa": {"zo.branches": "2"}}  # several in one pass, however long the batch
KINDS = {
    "lora": {"adapter.rank": "2"},
    "xgblora": {"adapter.kind": "xgblora", "boosting.steps_per_iteration": "8"},
    "adaptive": {
        "adapter.kind": "xgblora",
        "boosting.use_adaptive_merge": "true",
        "boosting.patience": "4",
        "boosting.improvement_threshold": "0.05",
        "boosting.judge": "probe",
        "boosting.probe_size": "8",
    },
    "head": {"adapter.rank": "2", "task.kind": "classification"},
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is tidied up after it but what Python itself does."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder


def words_for(data: Path, folder: Path, kind: str, trainer: str, **more: str) -> list[str]:
    given = {**BASE, **KINDS[kind], "trainer": trainer, **BRANCHES.get(trainer, {}), **more}
    return [*(f"{key}={value}" for key, value in given.items()), f"task.path={data / 'topic'}", f"output_dir={folder}"]


def train(words: list[str]) -> Path:
    return runs.train(config.read(TrainConfig, words), Console(quiet=True)).run.path


def what_must_agree(run: Path) -> dict[str, Any]:
    """Everything a run leaves, but for the clock and the run's own name."""
    found: dict[str, Any] = {}
    for name in ("training_loss.jsonl", "eval_loss.jsonl", "ledger.jsonl"):
        lines = files.read_records(run / name) if (run / name).exists() else []
        found[name] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    found["evaluation"] = json.loads((run / "eval_results_test.json").read_text())
    for part in ("adapter", "best_adapter"):
        tensors = load_file(run / part / "adapter_model.safetensors")
        found[part] = {key: (tensor.dtype, tensor.numpy().tobytes()) for key, tensor in tensors.items()}
    return found


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What each kind of run leaves when nothing stops it; made when first asked for."""
    return {}


@pytest.fixture(scope="module")
def dead(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Path], Path]:
    """(step, folder) -> a copy, in the folder, of a run that was killed at the step."""
    made = functools.cache(lambda at: killed(data, tmp_path_factory.mktemp("dead") / "run", at))
    return lambda at, folder: shutil.copytree(made(at), folder)


def reference(
    unbroken: dict[tuple[str, str], dict[str, Any]], data: Path, folder: Path, kind: str, trainer: str
) -> dict[str, Any]:
    if (kind, trainer) not in unbroken:
        unbroken[kind, trainer] = what_must_agree(train(words_for(data, folder / "unbroken", kind, trainer)))
    return unbroken[kind, trainer]


@pytest.mark.parametrize("trainer", ["backprop", "spsa"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_killed_at_random_steps_ends_the_same(
    data: Path,
    tmp_path: Path,
    unbroken: dict[tuple[str, str], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    trainer: str,
) -> None:
    expected = reference(unbroken, data, tmp_path, kind, trainer)
    run = tmp_path / "run"
    kills = sorted(random.Random(f"{kind} {trainer}").sample(range(1, 25), 5))
    words = words_for(data, run, kind, trainer)
    for kill in kills:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(fit, "_told", dies_at(kill))
            train(words)
        torch.manual_seed(kill)  # the global generator is elsewhere in the next process
        words = [f"resume={run}"]
    train(words)
    assert what_must_agree(run) == expected


@pytest.mark.parametrize("kind", ["full", "prefix"])
def test_a_run_with_the_base_s_own_dropout_goes_on_with_its_draws(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Which come from the global generator: evaluations leave it alone, and a checkpoint keeps it."""
    with models.quiet():
        base = tiny.save(tmp_path / "base", "opt")  # dropout 0.1
    places = [f"model={base}", f"task.path={data / 'topic'}", "task.max_length=100"]
    sizes = ["batch_size=4", "max_steps=6", "save_steps=2", "task.num_train=16", "task.num_dev=4", "task.num_eval=4"]
    words = [*places, *sizes, f"adapter.kind={kind}"]
    whole = losses(train([*words, "base_dropout=true", "eval_steps=3", f"output_dir={tmp_path / 'whole'}"]))
    assert whole != losses(train([*words, f"output_dir={tmp_path / 'without'}"]))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fit, "_told", dies_at(5))
        train([*words, "base_dropout=true", f"output_dir={tmp_path / 'run'}"])
    torch.manual_seed(1)
    train([f"resume={tmp_path / 'run'}"])
    assert losses(tmp_path / "run") == whole


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in files.read_records(run / "training_loss.jsonl")]


@pytest.mark.parametrize("moment", ["before the booster file", "before its line", "after its line", "in the fold"])
@pytest.mark.parametrize("kind", ["xgblora", "adaptive"])
def test_a_run_killed_inside_a_lay_on_ends_the_same(
    data: Path,
    tmp_path: Path,
    unbroken: dict[tuple[str, str], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    moment: str,
) -> None:
    expected = reference(unbroken, data, tmp_path, kind, "backprop")
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "before the booster file":
            patch.setattr(ledger, "save", dies)
        elif moment == "before its line":
            patch.setattr(ledger.files, "append_record", dies_on("ledger.jsonl", files.append_record))
        elif moment == "after its line":
            patch.setattr(ledger.Ledger, "chain", dies_when_filled(ledger.Ledger.chain))
        else:
            patch.setattr(injection, "fused_weight", dies)
        train(words_for(data, run, kind, "backprop"))
    train([f"resume={run}"])
    assert what_must_agree(run) == expected


@pytest.mark.parametrize(("kind", "trainer"), [("xgblora", "backprop"), ("lora", "backprop")])
def test_a_signal_saves_and_the_run_goes_on(
    data: Path,
    tmp_path: Path,
    unbroken: dict[tuple[str, str], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    trainer: str,
) -> None:
    expected = reference(unbroken, data, tmp_path, kind, trainer)
    run = tmp_path / "run"
    original = fit._told

    def told(progress: fit.Progress, *rest: Any) -> fit.Step:
        if progress.step in (5, 16, 24):  # in a round, at the end of one, and in the run's last step
            os.kill(os.getpid(), signal.SIGTERM)
        return original(progress, *rest)

    monkeypatch.setattr(fit, "_told", told)
    words = words_for(data, run, kind, trainer)
    for _ in range(3):
        with pytest.raises(InterruptedRunError, match="resume=") as caught:
            train(words)
        assert caught.value.exit_code == 143
        words = [f"resume={run}"]
    train(words)
    assert what_must_agree(run) == expected


@pytest.mark.parametrize("wound", ["truncated", "flipped bit", "removed file", "removed manifest"])
def test_a_wounded_checkpoint_is_passed_over(
    data: Path,
    tmp_path: Path,
    unbroken: dict[tuple[str, str], dict[str, Any]],
    dead: Callable[[int, Path], Path],
    wound: str,
) -> None:
    expected = reference(unbroken, data, tmp_path, "lora", "backprop")
    run = dead(18, tmp_path / "run")
    saved = sorted((run / "checkpoints").iterdir())
    assert [each.name for each in saved] == ["step-00000012", "step-00000016"]
    tensors = saved[-1] / checkpoints.TENSORS
    content = bytearray(tensors.read_bytes())
    if wound == "truncated":
        tensors.write_bytes(content[:-7])
    elif wound == "flipped bit":
        content[len(content) // 2] ^= 4
        tensors.write_bytes(content)
    else:
        (saved[-1] / (checkpoints.MANIFEST if "manifest" in wound else checkpoints.VALUES)).unlink()
    snapshot, skipped = checkpoints.newest_checkpoint(run / "checkpoints")
    assert snapshot is not None and snapshot.step == 12 and len(skipped) == 1 and "step-00000016" in skipped[0]
    train([f"resume={run}"])
    assert what_must_agree(run) == expected


def test_a_full_disk_keeps_the_old_checkpoint(
    dead: Callable[[int, Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dead(10, tmp_path / "run")
    before = sorted(each.name for each in (run / "checkpoints").iterdir())
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(checkpoints, "save_file", no_space)
        train([f"resume={run}"])
    assert sorted(each.name for each in (run / "checkpoints").iterdir()) == before


def test_resuming_a_finished_run_does_nothing(data: Path, tmp_path: Path) -> None:
    run = train(words_for(data, tmp_path / "run", "lora", "backprop", max_steps="4"))
    before = times(run)
    train([f"resume={run}"])
    assert times(run) == before


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("seed: 0", "seed: 7", "config.seed"),
        ("rank: 2", "rank: 3", "config.adapter.rank"),
        ("trainer: backprop", "trainer: zo", "config.trainer"),
    ],
)
def test_a_changed_config_is_told_by_its_key(
    dead: Callable[[int, Path], Path], tmp_path: Path, old: str, new: str, key: str
) -> None:
    run = dead(10, tmp_path / "run")
    path = run / "config.yaml"
    path.write_text(path.read_text().replace(f"\n{old}\n", f"\n{new}\n").replace(f"  {old}\n", f"  {new}\n"))
    with pytest.raises(ResumeError, match=key) as caught:
        train([f"resume={run}"])
    assert "force=true" in str(caught.value)
    if key == "config.seed":
        train([f"resume={run}", "force=true"])
        return
    with pytest.raises(ResumeError, match="step 8 does not fit"):
        train([f"resume={run}", "force=true"])


def test_a_checkpoint_of_another_kind_of_device_is_gone_on_from(
    dead: Callable[[int, Path], Path], tmp_path: Path
) -> None:
    """Where a generator's state has another length: a GPU's has 16 bytes."""
    run = dead(10, tmp_path / "run")
    snapshot, _ = checkpoints.newest_checkpoint(run / "checkpoints")
    assert snapshot is not None
    tensors = {**snapshot.tensors, "generator|dropout|0": torch.zeros(16, dtype=torch.uint8)}
    checkpoints.save_checkpoint(run / "checkpoints", dataclasses.replace(snapshot, tensors=tensors))
    said = io.StringIO()
    runs.train(config.read(TrainConfig, [f"resume={run}"]), Console(file=said, width=500))
    assert "going on from step 8" in said.getvalue() and "dropout's draws begin anew" in said.getvalue()


def test_changed_data_is_told(tmp_path: Path) -> None:
    own = tmp_path / "data"
    language.write_tasks(own)
    run = killed(own, tmp_path / "run", at=10)
    path = own / "topic" / "train.jsonl"
    path.write_text(path.read_text().replace("the", "a", 1))
    with pytest.raises(ResumeError, match="another data"):
        train([f"resume={run}"])


def test_a_resumed_run_takes_no_other_words(dead: Callable[[int, Path], Path], tmp_path: Path) -> None:
    run = dead(10, tmp_path / "run")
    with pytest.raises(ConfigError, match="drop learning_rate"):
        train([f"resume={run}", "learning_rate=1e-4"])
    with pytest.raises(LoricaError, match="not a run folder"):
        train([f"resume={tmp_path}"])
    with pytest.raises(ConfigError, match="add resume=RUN"):
        train(["force=true", f"output_dir={tmp_path / 'new'}"])


def test_two_processes_cannot_hold_one_run_folder(tmp_path: Path) -> None:
    hold = (
        "from lorica import files; from pathlib import Path\n"
        f"with files.locked_folder(Path({str(tmp_path)!r})): print('held', flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match=f"process {holder.pid}") as caught, files.locked_folder(tmp_path):
        pass
    assert caught.value.exit_code == 75
    holder.kill()
    holder.communicate()
    with files.locked_folder(tmp_path):
        pass


def test_a_process_killed_for_real_resumes_the_same(
    data: Path, tmp_path: Path, unbroken: dict[tuple[str, str], dict[str, Any]]
) -> None:
    expected = reference(unbroken, data, tmp_path, "xgblora", "backprop")
    run = tmp_path / "run"
    words = words_for(data, run, "xgblora", "backprop")
    process = subprocess.Popen(
        [sys.executable, "-m", "lorica.cli", "train", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(
        lambda: (run / "training_loss.jsonl").exists() and (run / "training_loss.jsonl").read_bytes().count(b"\n") >= 13
    )
    process.kill()
    process.wait()
    train([f"resume={run}"])
    assert what_must_agree(run) == expected


def test_a_second_signal_is_not_caught() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without one
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.signal == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)


def times(run: Path) -> dict[Path, int]:
    """When each file was last written; the lock says who holds the folder, and is no part of the run."""
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}


def killed(data: Path, run: Path, at: int) -> Path:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fit, "_told", dies_at(at))
        train(words_for(data, run, "lora", "backprop"))
    return run


def dies_at(step: int) -> Any:
    original = fit._told

    def told(progress: fit.Progress, *rest: Any) -> fit.Step:
        if progress.step >= step:
            raise Killed
        return original(progress, *rest)

    return told


def dies(*_: Any, **__: Any) -> Any:
    raise Killed


def dies_on(name: str, original: Any) -> Any:
    def call(path: Path, *rest: Any) -> Any:
        if path.name == name:
            raise Killed
        return original(path, *rest)

    return call


def dies_when_filled(original: Any) -> Any:
    def chain(self: ledger.Ledger, *rest: Any) -> Any:
        if len(self.boosters) == 2:
            raise Killed
        return original(self, *rest)

    return chain


def no_space(*_: Any) -> None:
    raise OSError("no space left on device")


def until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
