"""Whole runs through the command line, on the embedded model and a task of its own language."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from lorica import cli, config, files, models, runs
from lorica.adapters import peft_format
from lorica.demo import language
from lorica.errors import LoricaError, NonFiniteLossError

SHORT = (
    *("model=demo", "max_steps=6", "batch_size=8", "logging_steps=3"),
    *("task.num_train=48", "task.num_dev=8", "task.num_eval=24"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder


def lorica(*words: object) -> str:
    """What `lorica WORDS` prints on stdout; its errors are raised as they are."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A short run, for a test to copy; made when first asked for."""

    @functools.cache
    def made() -> Path:
        run = tmp_path_factory.mktemp("finished") / "run"
        lorica("train", *SHORT, f"task.path={data / 'topic'}", f"output_dir={run}")
        return run

    return made


def copy_of_demo(folder: Path) -> Path:
    """The embedded model's files, for a test to spoil."""
    folder.mkdir()
    for file in models.DEMO_BASE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("trainer", ["backprop", "spsa"])
def test_a_run_leaves_its_whole_folder(data: Path, tmp_path: Path, trainer: str) -> None:
    run = tmp_path / "run"
    printed = lorica(
        "train", *SHORT, f"task.path={data / 'topic'}", f"trainer={trainer}", f"output_dir={run}", "eval_steps=3"
    )
    assert printed.strip().splitlines()[-1] == str(run)
    assert {each.name for each in run.iterdir()} == {
        *("config.yaml", "origin.json", "record.json", "README.md", "adapter", "eval_results_test.json"),
        "predictions_test.parquet",
        *("training_loss.jsonl", "eval_loss.jsonl", "best_adapter", "trainer_state.json", ".lock"),
        *(("replay.jsonl",) if trainer == "spsa" else ()),
    }
    steps = files.read_records(run / "training_loss.jsonl")
    assert [step["step"] for step in steps] == list(range(1, 7))
    assert steps[-1]["forwards"] == (6 if trainer == "backprop" else 48 // 8 + 12)  # the look at the task, then pairs
    assert steps[-1]["tokens"] > 6 * 8 * 5 and steps[-1]["seconds"] > 0
    assert [line["step"] for line in files.read_records(run / "eval_loss.jsonl")] == [3, 6]
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"] == (
        "adamw" if trainer == "backprop" else "sgd"
    )
    origin = json.loads((run / "origin.json").read_text())
    assert origin["seed"] == 0 and origin["libraries"]["torch"] == torch.__version__
    assert "HOME" not in json.dumps(origin) and files.read_records(tmp_path / "index.jsonl")[0]["run"] == "run"
    card = (run / "README.md").read_text()
    assert "| accuracy |" in card and "rank 8" in card and "{" not in card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluate_gives_exactly_the_number_of_the_training_run(data: Path, tmp_path: Path, dtype: str) -> None:
    run = tmp_path / "run"
    lorica(
        "train",
        *SHORT,
        f"task.path={data / 'topic'}",
        f"output_dir={run}",
        f"model.dtype={dtype}",
        "learning_rate=1e-2",
    )
    at_the_end = json.loads((run / "eval_results_test.json").read_text())
    lorica("evaluate", run)
    later = files.read_records(run / "evaluations.jsonl")[0]
    assert {key: later[key] for key in at_the_end} == at_the_end
    lorica(
        "evaluate",
        run / "adapter",
        f"task.path={data / 'topic'}",
        f"model.dtype={dtype}",
        "task.num_eval=60",
        "model.name=demo",
    )


def test_the_same_seed_gives_the_same_run(data: Path, tmp_path: Path) -> None:
    for trainer in ("backprop", "spsa"):
        adapters, losses = [], []
        for name in ("a", "b"):
            run = tmp_path / f"{trainer}-{name}"
            words = [
                *SHORT,
                f"task.path={data / 'topic'}",
                f"output_dir={run}",
                "adapter.dropout=0.1",
                f"trainer={trainer}",
            ]
            lorica("train", *words)
            torch.manual_seed(len(name))  # what the global generator holds must not matter
            torch.rand(3)
            adapters.append(load_file(run / "adapter" / "adapter_model.safetensors"))
            losses.append([step["loss"] for step in files.read_records(run / "training_loss.jsonl")])
        assert losses[0] == losses[1]
        assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


def test_a_classification_head_is_trained_and_comes_back(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lorica("train", *SHORT, f"task.path={data / 'intent'}", "task.kind=classification", f"output_dir={run}")
    assert list(peft_format.read(run / "adapter").heads) == ["score"]
    lorica("evaluate", run, "split=dev")
    assert files.read_records(run / "evaluations.jsonl")[0]["split"] == "dev"


def test_zero_steps_leave_the_base_as_it_was(data: Path, tmp_path: Path) -> None:
    words = ["model=demo", f"task.path={data / 'topic'}"]
    lorica("train", *words, "max_steps=0", "task.num_eval=60", f"output_dir={tmp_path / 'run'}")
    base = runs.evaluate_target(None, config.read(config.EvaluateConfig, [*words, "task.num_eval=60"]))
    assert json.loads((tmp_path / "run" / "eval_results_test.json").read_text()) == base.as_record()


def test_the_portable_profile_is_written_and_read(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lorica("train", *SHORT, f"task.path={data / 'topic'}", "adapter.profile=portable", f"output_dir={run}")
    written = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert written["lora_alpha"] == written["r"] == 8 and written["target_modules"] == ["q_proj", "v_proj"]
    lorica("evaluate", run)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model=nowhere/at/all"], ["model.name", "nowhere/at/all"]),
        (["task.path=nowhere"], ["task.path", "nowhere"]),
        (["task.name=sst22", "task.path="], ["sst22", "sst2"]),
        (["adapter.rank=4000"], ["adapter.rank=4000", "at most"]),
        (["adapter.targets=[q_porj]"], ["q_porj", "q_proj"]),
        (["task.num_train=100000"], ["100000", "train"]),
        (["model.kind=causal", "task.kind=classification"], ["task.kind=classification", "causal"]),
        (["device=quantum"], ["device", "quantum"]),
        (["output_dir=taken"], ["output_dir", "taken", "nothing is written over"]),
        (["output_dir=taken/file/out"], ["taken/file", "is a file"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("precious")
    given = {"output_dir": "out", "task.path": str(data / "topic")}
    given |= dict(word.split("=", 1) for word in [*SHORT, *words])
    with pytest.raises(LoricaError) as caught:
        lorica("train", *(f"{key}={value}" for key, value in given.items() if value))
    message = str(caught.value)
    assert all(part in message for part in told), message
    assert "\n" not in message and caught.value.exit_code == 2
    assert message.count("model.name") <= 1  # told once, not wrapped in another telling of it
    assert (tmp_path / "taken" / "file").read_text() == "precious"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trainer", ["backprop", "spsa"])
def test_a_loss_that_is_nan_ends_the_run_with_the_adapter_unharmed(data: Path, tmp_path: Path, trainer: str) -> None:
    poisoned = copy_of_demo(tmp_path / "model")
    weights = load_file(poisoned / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, poisoned / "model.safetensors", {"format": "pt"})
    words = [*SHORT[2:], f"task.path={data / 'topic'}", f"output_dir={tmp_path / 'out'}", f"trainer={trainer}"]
    with pytest.raises(NonFiniteLossError, match="NaN or infinite in 10 of 10 steps") as caught:
        lorica("train", f"model.name={poisoned}", "max_steps=50", *words)
    assert "learning_rate" in str(caught.value) and "\n" not in str(caught.value)
    steps = files.read_records(tmp_path / "out" / "training_loss.jsonl")
    assert [(step["loss"], step["applied"]) for step in steps] == [(None, False)] * 10


@pytest.mark.parametrize(("kind", "rate"), [("lora", "1e38"), ("lora", "1e18"), ("full", "1e38"), ("xgblora", "1e38")])
def test_a_short_run_that_diverges_is_told_to_lower_its_rate(data: Path, tmp_path: Path, kind: str, rate: str) -> None:
    out = tmp_path / "out"
    words = (f"task.path={data / 'topic'}", f"adapter.kind={kind}", f"learning_rate={rate}", f"output_dir={out}")
    rounds = ("boosting.steps_per_iteration=2",) if kind == "xgblora" else ()
    with pytest.raises(NonFiniteLossError, match="lower learning_rate=1e"):
        lorica("train", *SHORT, *words, *rounds)
    assert not (out / "record.json").exists()


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_a_truncated_adapter_is_told_in_one_line(finished: Callable[[], Path], tmp_path: Path, size: int) -> None:
    run = shutil.copytree(finished(), tmp_path / "run")
    weights = run / "adapter" / "adapter_model.safetensors"
    os.truncate(weights, size)
    with pytest.raises(LoricaError, match=r"truncated|corrupt") as caught:
        lorica("evaluate", run)
    assert "\n" not in str(caught.value)


def test_a_truncated_model_is_told_in_one_line(data: Path, tmp_path: Path) -> None:
    broken = copy_of_demo(tmp_path / "model")
    os.truncate(broken / "model.safetensors", 10_000)
    with pytest.raises(LoricaError, match=r"model\.name") as caught:
        lorica("train", *SHORT, f"model.name={broken}", f"task.path={data / 'topic'}", f"output_dir={tmp_path / 'out'}")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_an_incomplete_model_is_refused_by_the_key_it_lacks(data: Path, tmp_path: Path) -> None:
    broken = copy_of_demo(tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    lost = next(key for key in weights if "q_proj" in key)
    save_file(
        {key: value for key, value in weights.items() if key != lost}, broken / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(LoricaError, match="lacks") as caught:
        lorica(
            "train", *SHORT[1:], f"model.name={broken}", f"task.path={data / 'topic'}", f"output_dir={tmp_path / 'out'}"
        )
    assert lost in str(caught.value)


def test_the_command_exits_2_with_one_line_and_no_traceback(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lorica", "train", "adapter.rnk=3"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    printed = capfd.readouterr().err
    assert printed.startswith("error: unknown key 'adapter.rnk'") and len(printed.splitlines()) == 1


def test_plan_counts_what_training_counts(tmp_path: Path) -> None:
    prefix = ("prefix.num_tokens=3", "prefix.reparameterize=false")
    found = runs.plan(
        config.read(config.PlanConfig, ["model=demo", "adapter.rank=4", "batch_size=2", "length=16", *prefix])
    )
    base = models.load("demo", kind="causal")
    assert found.num_parameters == sum(parameter.numel() for parameter in base.model.parameters())
    by_backprop, by_spsa, full, full_by_spsa, *by_prefix = found.ways
    assert by_backprop.num_trainable == 8 * 4 * (128 + 128)
    assert by_spsa.activations_bytes < by_backprop.activations_bytes
    assert full.num_trainable == found.num_parameters and full.total_bytes > by_backprop.total_bytes
    assert full_by_spsa.num_trainable == found.num_parameters and full_by_spsa.total_bytes < full.total_bytes
    assert [each.num_trainable for each in by_prefix] == [3 * 4 * 2 * 128] * 2  # tokens, layers, keys and values, width
    assert "8.00 kB" not in lorica("plan", "model=demo")


def test_the_demo_runs_and_prints_its_report_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = language.examples
    monkeypatch.setattr(language, "examples", lambda task, split: every(task, split)[:24])
    printed = lorica("demo", "steps=2", "comparison_steps=2", f"output_dir={tmp_path / 'demo'}")
    assert printed.strip().splitlines()[-1] == str(tmp_path / "demo" / "report" / "index.html")
    assert "average of all four" in printed.replace("\n", " ") or "average" in printed
    trained = {each.parent.name for each in (tmp_path / "demo").glob("*/adapter")}
    assert trained == set(language.TASKS)
    compared = {each.parts[-4] for each in (tmp_path / "demo" / "comparison" / "runs").glob("*/*/*/adapter")}
    assert compared == {f"{kind}-by-{trainer}" for kind in ("lora", "xgblora") for trainer in ("backprop", "zo")}


@pytest.mark.parametrize("trainer", ["backprop", "spsa"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_trains_and_evaluates_the_same(
    data: Path, tmp_path: Path, tiny_models: Callable[..., Path], family: str, trainer: str
) -> None:
    run = tmp_path / "run"
    words = ("max_steps=2", "batch_size=4", "task.num_train=12", "task.num_dev=4", "task.num_eval=12")
    where = ("task.max_length=64", f"model={tiny_models(family)}", f"task.path={data / 'topic'}", f"output_dir={run}")
    lorica("train", *words, *where, "adapter.rank=2", f"trainer={trainer}", "adapter.targets=all-linear")
    at_the_end = json.loads((run / "eval_results_test.json").read_text())
    lorica("evaluate", run)
    later = files.read_records(run / "evaluations.jsonl")[0]
    assert {key: later[key] for key in at_the_end} == at_the_end


def test_language_model_loss_trains_too(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lorica("train", *SHORT, f"task.path={data / 'topic'}", "train_as=lm", "learning_rate=1e-2", f"output_dir={run}")
    steps = files.read_records(run / "training_loss.jsonl")
    assert steps[-1]["loss"] < steps[0]["loss"]
