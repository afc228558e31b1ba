"""Whole studies through the command line, on the embedded model: what they leave, and how they go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lorica import cli, files
from lorica.demo import language
from lorica.errors import FolderInUseError, LoricaError, OutputExistsError, ResumeError
from lorica.evaluation.predictions import read_values

TINY = (
    *("model=demo", "launcher=inline", "batch_size=2", "task.num_train=8", "task.num_dev=6", "task.num_eval=12"),
    *("device=cpu",),
)
Lorica = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder


@pytest.fixture
def compare(data: Path, tmp_path: Path) -> Lorica:
    """`lorica compare WORDS` of tiny runs on a demo task, in the folder `study`."""

    def run(*words: str, exit_code: int = 0, folder: str = "study") -> str:
        places = (f"task.path={data / 'topic'}", f"output_dir={tmp_path / folder}")
        return lorica("compare", *TINY, *places, *words, exit_code=exit_code)

    return run


def lorica(*words: str, exit_code: int = 0) -> str:
    """What `lorica WORDS` prints; its errors are raised as they are."""
    done = CliRunner().invoke(cli.app, words)
    if isinstance(done.exception, LoricaError):
        raise done.exception
    assert done.exit_code == exit_code, done.output
    return done.stdout


def told(folder: Path) -> Any:
    """What a study has found, without what a clock or a memory says."""
    found = files.read_json(folder / "study.json")
    cells = [{key: each[key] for key in each if key not in ("seconds", "peak_bytes")} for each in found["cells"]]
    return {**found, "cells": cells}


def finished(folder: Path) -> dict[str, int]:
    """Folder of each finished run -> when its record was written."""
    return {str(each.parent.relative_to(folder)): each.stat().st_mtime_ns for each in folder.rglob("record.json")}


def test_a_comparison_leaves_its_whole_folder(compare: Lorica, tmp_path: Path) -> None:
    words = ("--arms", "lora", "full", "linear_probe", "learning_rates=[1e-30, 1e-2]", "max_steps=2", "seeds=[0, 1]")
    printed = compare(*words, "task.kind=classification", "save_steps=1")
    study = tmp_path / "study"
    assert printed.strip().splitlines()[-1] == str(study)
    assert {each.name for each in study.iterdir()} == {
        *("study.yaml", "study.json", "study.csv", "origin.json", "README.md", ".lock", "runs"),
        *("loss.png", "loss.svg", "loss.csv"),
    }
    assert not list(study.rglob("checkpoints"))
    found = files.read_json(study / "study.json")
    assert (found["kind"], found["finished"], found["budget"]) == ("compare", True, {"unit": "steps", "amount": 2})
    assert [(each["arm"], each["role"]) for each in found["runs"]] == [
        *(("lora", "tuning"), ("lora", "tuning"), ("full", "tuning"), ("full", "tuning")),
        *((arm, "final") for arm in ("lora", "full", "linear_probe") for _ in range(2)),
    ]
    for line in found["tuning"]["found"]:
        losses = [
            files.read_json(study / f"runs/{line['arm']}/topic/tuning/seed100-lr{rate}/eval_results_dev.json")["loss"]
            for rate in ("1e-30", "0.01")
        ]
        assert [each["dev_loss"] for each in line["tried"]] == losses
        assert line["chosen"] == (0.01 if losses[1] < losses[0] else 1e-30)
    runs = {(each["arm"], each["seed"]): study / each["folder"] for each in found["runs"] if each["role"] == "final"}
    records = {key: files.read_json(folder / "record.json") for key, folder in runs.items()}
    for cell in found["cells"]:
        own = [records[cell["arm"], seed] for seed in (0, 1)]
        assert list(cell["scores"].values()) == [each["metrics"]["test_accuracy"] for each in own]
        assert cell["mean"] == pytest.approx(sum(cell["scores"].values()) / 2)
        assert cell["num_trainable"] == own[0]["efficiency"]["num_trainable"] > 0
        assert cell["peak_bytes"] == min(each["timing"]["peak_bytes"] for each in own) > 1e6
        assert (cell["forwards"], cell["learning_rate"] is None) == (
            (0, True) if "probe" in cell["arm"] else (2, False)
        )
    shares = {key[0]: each["efficiency"] for key, each in records.items()}
    assert shares["full"]["num_trainable"] == shares["full"]["num_parameters"] == shares["lora"]["num_parameters"]
    weights = runs["lora", 0] / "adapter" / "adapter_model.safetensors"
    assert shares["lora"]["adapter_bytes"] == weights.stat().st_size
    full = next(each for each in found["differences"] if each["arm"] == "full")
    accuracy = {key: each["metrics"]["test_accuracy"] for key, each in records.items()}
    mean = sum(accuracy["full", seed] - accuracy["lora", seed] for seed in (0, 1)) / 2
    assert full["mean"] == pytest.approx(mean) and full["low"] <= mean <= full["high"] and full["num_pairs"] == 2
    assert len((study / "study.csv").read_text().splitlines()) == 1 + 6
    card = (study / "README.md").read_text()
    assert "full against lora on topic: " in card and "| topic | lora |" in card and full["verdict"] in printed
    values = read_values(runs["full", 0] / "predictions_test.parquet", "accuracy")
    assert values is not None and values.mean() == pytest.approx(accuracy["full", 0]) and len(values) == 12


@pytest.mark.parametrize(
    "words",
    [
        "compare --learning_rate 1e-5 --zo_eps 1e-3 --max_steps 2 --xgblora_use_adaptive_merge --xgblora_patience 100 "
        "--xgblora_ema_beta 0.9 --seeds 0 1 2 --output_root {out} {task_name}",
        "compare --loss_figure_path {out}/loss.png --learning_rate 1e-5 --zo_eps 1e-3 --max_steps 2 "
        "--xgblora_steps_per_iteration 2 --eval_steps 1 --lora_rank 1 --lora_alpha 16 --seeds 0 --output_root {out} "
        "{task_name}",
        "compare --loss_figure_path {out}/loss.png --max_steps 2 --xgblora_steps_per_iteration 1 --eval_steps 1 "
        "--lora_rank 1 --lora_alpha 16 --seeds 0 --output_root {out} {task_name}",
        "sweep --mode sweep --max_steps 2 --output_dir {out} {task}",
        "ablate --mode ablation --ablation-type rank --max_steps 2 --output_dir {out} {task}",
    ],
)
def test_the_older_tools_lines_mean_what_they_meant(data: Path, tmp_path: Path, words: str) -> None:
    out = tmp_path / "out"
    verb, *given = words.format(out=out, task_name="--task_name SST2", task="--task sst2").split()
    printed = lorica(verb, *given, *TINY, f"task.path={data / 'sentiment'}")
    assert printed.strip().splitlines()[-1] == str(out)
    found, line = told(out), words.split()
    finals = [each for each in found["runs"] if each["role"] == "final"]
    records = [files.read_json(out / each["folder"] / "record.json")["config"] for each in finals]
    assert found["finished"] and (out / "loss.png").exists()
    by_zo = "--zo_eps" in line
    assert {each["trainer"] for each in records} == {"zo" if by_zo else "backprop"}
    assert (found["tuning"] is None) == (by_zo or verb == "ablate")
    if verb == "compare":
        assert [each["name"] for each in found["arms"]] == ["lora", "xgblora"]
        arms = {each["adapter"]["kind"]: each for each in records}
        assert arms["xgblora"]["adapter"]["rank"] == 1
    if "--lora_rank" in line:
        assert (arms["lora"]["adapter"]["rank"], arms["lora"]["adapter"]["alpha"]) == (1, 16)
        assert (out / finals[0]["folder"] / "eval_loss.jsonl").read_text().count("\n") == 2
    if verb == "sweep":
        assert found["seeds"] == found["tuning"]["seeds"] == [42, 1337, 2024]
        assert found["tuning"]["learning_rates"] == [1e-4, 3e-4] and records[0]["warmup"] == 0.06
    if verb == "ablate":
        assert [each["name"] for each in found["arms"]] == ["rank=4", "rank=8", "rank=16"]
        assert {(each["adapter"]["rank"], each["adapter"]["alpha"]) for each in records} == {(4, 8), (8, 16), (16, 32)}


def test_a_single_run_by_the_older_tools_line(data: Path, tmp_path: Path) -> None:
    words = ("--task", "sst2", "--mode", "single", "--seed", "42", "max_steps=1", f"task.path={data / 'sentiment'}")
    tiny = (word for word in TINY if "launcher" not in word)
    lorica("train", *words, *tiny, f"output_dir={tmp_path / 'run'}")
    assert files.read_json(tmp_path / "run" / "record.json")["origin"]["seed"] == 42
    with pytest.raises(LoricaError, match="--mode sweep is lorica sweep"):
        lorica("train", "--mode", "sweep")


def test_a_study_killed_in_the_middle_runs_only_what_is_missing(compare: Lorica, data: Path, tmp_path: Path) -> None:
    study, words = tmp_path / "study", ("learning_rates=[1e-3]", "max_steps=2", "seeds=[0]")
    places = (f"task.path={data / 'topic'}", f"output_dir={study}")
    command = [sys.executable, "-m", "lorica", "compare", *TINY, *words, *places]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as child:
        while len(finished(study)) < 2:
            assert child.poll() is None
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
    before = finished(study)
    assert len(before) < 4 and not told(study)["finished"]
    lorica("compare", f"resume={study}")
    after = finished(study)
    assert len(after) == 4 and {key: after[key] for key in before} == before
    compare(*words, folder="whole")
    assert told(study) == told(tmp_path / "whole")
    compare(*words)
    assert finished(study) == after


def test_what_fails_is_told_and_run_again_when_asked(compare: Lorica, tmp_path: Path) -> None:
    arms = "arms=[{name: lora, overrides: {learning_rate: 1e-3}}, {name: broken, overrides: {learning_rate: 1e+38}}]"
    words = (arms, "max_steps=12", "seeds=[0]", "tune=false")
    failures, runs = tmp_path / "study" / "failures.jsonl", {}
    for more, num_failures in (((), 1), ((), 1), (("retry=true",), 2)):
        printed = compare(*words, *more, exit_code=1)
        assert "failed: runs/broken/topic/seed0: " in printed.replace("\n", "")
        assert len(files.read_records(failures)) == num_failures
        found = told(tmp_path / "study")
        runs = {each["arm"]: each for each in found["runs"]}
        assert (runs["lora"]["state"], runs["broken"]["state"], found["finished"]) == ("finished", "failed", True)
    assert "finite" in runs["broken"]["error"] and runs["lora"]["error"] is None
    assert found["differences"][0]["mean"] is None and found["cells"][1]["diverged"] == 1
    told_of = compare(*words, "--plan").replace("\n", " ")
    assert "0 runs are left, of 2; 1 failed, and are run again with retry=true alone" in told_of
    assert "1 runs are left, of 2" in compare(*words, "--plan", "retry=true")


def test_a_rate_that_diverges_is_not_chosen(compare: Lorica, tmp_path: Path) -> None:
    compare("arms=[lora]", "learning_rates=[1e-3, 1e+38]", "max_steps=12", "seeds=[0]")
    found = told(tmp_path / "study")
    assert found["tuning"]["found"][0]["chosen"] == 1e-3 and found["finished"]
    assert [each["state"] for each in found["runs"]] == ["finished", "failed", "finished"]
    compare("arms=[lora]", "learning_rate=1e+38", "max_steps=12", "seeds=[0]", folder="alone", exit_code=1)
    assert told(tmp_path / "alone")["cells"][0]["diverged"] == 1


def test_a_study_may_grow_and_nothing_else(compare: Lorica, tmp_path: Path) -> None:
    study = tmp_path / "study"
    compare("arms=[lora]", "max_steps=2", "seeds=[0]", "learning_rate=1e-3")
    before = finished(study)
    compare("arms=[lora, xgblora]", "max_steps=2", "seeds=[0]", "learning_rate=1e-3", "title=One question")
    assert finished(study).items() > before.items() and told(study)["title"] == "One question"
    only = told(study)["differences"][0]
    assert only["num_pairs"] == 1 and only["low"] is not None  # over the test examples
    with pytest.raises(ResumeError, match=r"max_steps \(2, now 3\)"):
        compare("arms=[lora]", "max_steps=3", "seeds=[0]", "learning_rate=1e-3")
    assert "max_steps: 2\n" in (study / "study.yaml").read_text()  # of what is there, not of what was refused
    with pytest.raises(LoricaError, match="takes its config from the study: drop seeds"):
        lorica("compare", f"resume={study}", "seeds=[1]")
    with files.locked_folder(study), pytest.raises(FolderInUseError) as caught:
        lorica("compare", f"resume={study}")
    assert caught.value.exit_code == 75
    with pytest.raises(OutputExistsError, match="no study that could be gone on with"):
        compare("arms=[lora]", folder="study/runs")


def test_a_budget_in_seconds_ends_runs_by_the_clock(compare: Lorica, tmp_path: Path) -> None:
    words = ("arms=[lora, {name: boosted, overrides: {adapter.kind: xgblora, boosting.steps_per_iteration: 2}}]",)
    compare(*words, "max_seconds=0.2", "seeds=[0]", "learning_rate=1e-3")
    for arm in ("lora", "boosted"):
        steps = files.read_records(tmp_path / "study" / f"runs/{arm}/topic/seed0/training_loss.jsonl")
        assert steps[-1]["seconds"] >= 0.2 and all(each["seconds"] < 0.2 for each in steps[:-1])
    rounds = files.read_records(tmp_path / "study/runs/boosted/topic/seed0/ledger.jsonl")
    assert rounds[-1]["last_step"] == len(steps)
