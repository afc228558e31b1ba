"""What a run may train beside an adapter: the whole model, a prefix, a head alone; each leaves a run like any other."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorica import config, files, models, runs
from lorica.config import EvaluateConfig, ExportConfig, ReplayConfig, TrainConfig
from lorica.demo import language
from lorica.errors import ConfigError, ModelError, ResumeError
from lorica.evaluation.scoring import score_all
from lorica.runs.training import linear_probe
from lorica.training import fit
from test_resume import Killed, dies_at

SIZES = ("batch_size=4", "task.num_train=64", "task.num_dev=20", "task.num_eval=40")
BASE = ("model=demo", *SIZES, "max_steps=8", "save_steps=3", "eval_steps=4")
FEW = ("max_steps=2", "eval_steps=2")
KINDS = {
    "full by backprop": ["adapter.kind=full", "learning_rate=2e-3"],
    "full by zo": ["adapter.kind=full", "trainer=zo", "learning_rate=1e-4", "zo.normalize=rms", "zo.num_directions=2"],
    "full by zo in bfloat16": ["adapter.kind=full", "trainer=zo", "learning_rate=1e-4", "model.dtype=bfloat16"],
    "prefix by backprop": ["--prefix_tuning", "learning_rate=1e-2"],
    "prefix by zo": ["--prefix_tuning", "--num_prefix", "3", "--no_reparam", "--prefix_init_by_real_act", "trainer=zo"],
}
STEPLESS = ("model=demo", *SIZES[1:], "--linear_probing")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder / "topic"


def train(*words: str) -> tuple[Path, str]:
    """The run's folder, and what it said."""
    said = io.StringIO()
    found = runs.train(config.read(TrainConfig, list(words)), Console(file=said, width=500))
    return found.run.path, said.getvalue()


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """A run of this kind that nothing stopped, to be read alone, and what it said; made when first asked for."""

    @functools.cache
    def made(kind: str) -> tuple[Path, str]:
        run = tmp_path_factory.mktemp("unbroken") / "run"
        return train(*BASE, *KINDS[kind], f"task.path={data}", f"output_dir={run}")

    return made


def place(run: Path) -> Path:
    return next(each for each in (run / "adapter", run / "model") if each.is_dir())


def left(run: Path) -> dict[str, Any]:
    """Everything that a run leaves, but for the clock."""
    found: dict[str, Any] = {"evaluation": json.loads((run / "eval_results_test.json").read_text())}
    for name in ("training_loss.jsonl", "eval_loss.jsonl"):
        lines = files.read_records(run / name)
        found[name] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    for folder in (place(run), run / f"best_{place(run).name}"):
        tensors = load_file(next(folder.glob("*.safetensors")))
        found[folder.name] = {
            key: (tensor.dtype, tensor.view(torch.uint8).numpy().tobytes()) for key, tensor in tensors.items()
        }
    return found


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_is_evaluated_the_same_and_resumes_bit_for_bit(
    data: Path,
    tmp_path: Path,
    unbroken: Callable[[str], tuple[Path, str]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    whole, said = unbroken(kind)
    evaluation = runs.evaluate_target(str(whole), EvaluateConfig())
    assert evaluation.as_record() == json.loads((whole / "eval_results_test.json").read_text())
    assert kind.partition(" ")[0] in said
    card = (whole / "README.md").read_text()
    assert "| accuracy |" in card and "{" not in card and "LoRA" not in card
    words = [*BASE, *KINDS[kind], f"task.path={data}", f"output_dir={tmp_path / 'run'}"]
    for kill in (2, 7):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(fit, "_told", dies_at(kill))
            train(*words)
        torch.manual_seed(kill)
        words = [f"resume={tmp_path / 'run'}"]
    train(*words)
    assert left(tmp_path / "run") == left(whole)
    losses = [step["loss"] for step in files.read_records(whole / "training_loss.jsonl")]
    assert len(set(losses)) == 8


@pytest.mark.parametrize("kind", ["full by zo", "full by zo in bfloat16", "prefix by zo"])
def test_a_log_rebuilds_what_a_run_trained(unbroken: Callable[[str], tuple[Path, str]], kind: str) -> None:
    run, _ = unbroken(kind)
    assert runs.replay(str(run), ReplayConfig()).is_identical


def test_every_parameter_is_trained_but_for_none_at_rate_zero(data: Path, tmp_path: Path) -> None:
    base = models.load("demo", kind="causal").model.state_dict()
    for trainer in ("backprop", "zo"):
        for rate, moves in (("0", False), ("1e-3", True)):
            words = ["adapter.kind=full", f"trainer={trainer}", f"learning_rate={rate}", f"task.path={data}"]
            run, _ = train("model=demo", *SIZES, *FEW, *words, f"output_dir={tmp_path / trainer / rate}")
            trained = models.load(str(run / "model"), kind="causal").model.state_dict()
            changed = [name for name in base if not torch.equal(base[name], trained[name])]
            assert changed == (list(base) if moves else []), trainer


def test_full_tuning_learns(unbroken: Callable[[str], tuple[Path, str]]) -> None:
    run, _ = unbroken("full by backprop")
    losses = [step["loss"] for step in files.read_records(run / "training_loss.jsonl")]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_a_head_is_trained_with_the_model_and_comes_back(
    tiny_models: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    words = [f"model={tiny_models('bert')}", f"task.path={data.parent / 'intent'}", "task.kind=classification"]
    for trainer in ("backprop", "zo"):
        rest = ["adapter.kind=full", f"trainer={trainer}", f"output_dir={tmp_path / trainer}"]
        run, _ = train(*SIZES, *FEW, *words, *rest)
        evaluation = runs.evaluate_target(str(run), EvaluateConfig())
        assert evaluation.as_record() == json.loads((run / "eval_results_test.json").read_text())


def test_a_whole_model_is_exported_and_evaluated_anywhere(
    data: Path, tmp_path: Path, unbroken: Callable[[str], tuple[Path, str]]
) -> None:
    run, _ = unbroken("full by zo")
    done = runs.export(str(run), ExportConfig(output_dir=str(tmp_path / "out")))
    assert done.told() == "the whole model, exact"
    words = [f"model={tmp_path / 'out'}", f"task.path={data}", "task.num_eval=40"]
    found = runs.evaluate_target(None, config.read(EvaluateConfig, words)).as_record()
    assert found == json.loads((run / "eval_results_test.json").read_text())
    for words in (["rank=2"], ["profile=portable"], ["rounds=1"]):
        with pytest.raises(ConfigError, match="low-rank"):
            runs.export(str(run), config.read(ExportConfig, [f"output_dir={tmp_path / 'no'}", *words]))
    with pytest.raises(ConfigError, match="drop model=demo"):
        runs.evaluate_target(str(run), config.read(EvaluateConfig, ["model=demo"]))


def test_a_prefix_is_exported_and_evaluated_by_its_folder(
    data: Path, tmp_path: Path, unbroken: Callable[[str], tuple[Path, str]]
) -> None:
    run, _ = unbroken("prefix by zo")
    runs.export(str(run), ExportConfig(output_dir=str(tmp_path / "out")))
    words = [f"task.path={data}", "task.num_eval=40"]
    found = runs.evaluate_target(str(tmp_path / "out"), config.read(EvaluateConfig, words)).as_record()
    assert found == json.loads((run / "eval_results_test.json").read_text())
    with pytest.raises(ConfigError, match="fuse is of low-rank adapters"):
        runs.export(str(run), ExportConfig(output_dir=str(tmp_path / "no"), fuse=True))


def test_a_linear_probe_reads_each_example_once_and_is_evaluated_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def noted(model: Any, rows: Any, *rest: Any, **options: Any) -> Any:
        read.append(len(rows))
        return score_all(model, rows, *rest, **options)

    monkeypatch.setattr(linear_probe, "score_all", noted)
    run, said = train(*STEPLESS, f"task.path={data}", f"output_dir={tmp_path / 'run'}")
    assert read == [64, 20]
    assert "linear_probe: score on" in said and "C = " in said
    at_the_end = json.loads((run / "eval_results_test.json").read_text())
    assert runs.evaluate_target(str(run), EvaluateConfig()).as_record() == at_the_end
    words = [f"task.path={data}", "task.num_eval=40", "task.kind=classification"]
    assert runs.evaluate_target(str(run / "adapter"), config.read(EvaluateConfig, words)).as_record() == at_the_end
    runs.export(str(run), ExportConfig(output_dir=str(tmp_path / "model"), fuse=True))
    fused = runs.evaluate_target(None, config.read(EvaluateConfig, [f"model={tmp_path / 'model'}", *words]))
    assert fused.as_record()["metrics"] == at_the_end["metrics"]
    assert "scikit-learn" in (run / "README.md").read_text()
    assert at_the_end["metrics"]["accuracy"]["value"] > 0.6
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    train(f"resume={run}")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before
    with pytest.raises(ConfigError, match="a head alone"):
        runs.export(str(run), ExportConfig(output_dir=str(tmp_path / "no"), rank=1))


def test_a_checkpoint_of_another_kind_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fit, "_told", dies_at(6))
        train(*BASE, *KINDS["full by zo"], f"task.path={data}", f"output_dir={run}")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("kind: full", "kind: lora\n  rank: 8\n  alpha: 16.0"))
    with pytest.raises((ResumeError, ConfigError)):
        train(f"resume={run}")


FULL_ZO = ["adapter.kind=full", "trainer=zo"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["adapter.kind=full", "adapter.rank=4"], ["adapter.rank", "no low-rank factors"]),
        (["adapter.kind=full", "boosting.patience=3"], ["boosting.patience", "none to lay on"]),
        (["adapter.kind=full", "model.quantization=int8"], ["int8"]),
        (["adapter.kind=full", "model.dtype=float16"], ["float16", "float32", "trainer=zo"]),
        ([*FULL_ZO, "optimizer=momentum"], ["optimizer=momentum", "sgd"]),
        ([*FULL_ZO, "max_grad_norm=1"], ["max_grad_norm", "zo.clip"]),
        ([*FULL_ZO, "zo.estimator=forward_gradient"], ["forward_gradient", "as many numbers as the model"]),
        ([*FULL_ZO, "zo.branches=2"], ["zo.branches=2"]),
        ([*FULL_ZO, "zo.train=B"], ["zo.train=B", "low-rank"]),
        ([*FULL_ZO, "zo.space=update", "learning_rate=1"], ["zo.space=update", "low-rank"]),
        (["--prefix_tuning", "adapter.dropout=0.1"], ["adapter.dropout", "adapter.kind=prefix"]),
        (["--prefix_tuning", "boosting.steps_per_iteration=3"], ["boosting.steps_per_iteration", "none to lay on"]),
        (["--prefix_tuning", "task.kind=classification"], ["causal", "classification"]),
        (["--prefix_tuning", "--xgblora"], ["--prefix_tuning", "--xgblora", "contradict"]),
        (["--prefix_tuning", "--lora"], ["--prefix_tuning", "--lora", "contradict"]),
        (["--xgblora", "--lora"], ["--xgblora", "--lora", "contradict"]),
        (["prefix.num_tokens=3"], ["prefix.num_tokens", "adapter.kind=prefix"]),
        (["--linear_probing", "trainer=zo"], ["linear_probe", "trainer=zo"]),
        (["--linear_probing", "learning_rate=0.1"], ["learning_rate", "no steps"]),
        (["--linear_probing", "max_steps=10"], ["max_steps", "no steps"]),
        (["--linear_probing", "task.kind=choice"], ["task.kind=classification"]),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.read(TrainConfig, words)
    assert all(part in str(caught.value) for part in told), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "rate", "distribution"),
    [
        (["adapter.kind=full"], 5e-5, None),
        (FULL_ZO, 1e-6, "rademacher"),
        (["--prefix_tuning"], 1e-3, None),
        (["trainer=zo"], 3e-4, "gaussian"),
        (["trainer=zo", "zo.warm_start_steps=0"], 1e-3, "gaussian"),
        (["trainer=zo", "adapter.kind=xgblora"], 6e-4, "gaussian"),
        (["trainer=zo", "zo.train=both"], 1e-4, "gaussian"),
        ([*FULL_ZO, "zo.distribution=gaussian"], 1e-6, "gaussian"),
    ],
)
def test_defaults_follow_the_kind_and_read_back(
    words: list[str], rate: float, distribution: str | None, tmp_path: Path
) -> None:
    cfg = config.read(TrainConfig, words).resolved()
    assert (cfg.learning_rate, cfg.zo.distribution) == (rate, distribution)
    assert cfg.adapter.rank is None or cfg.adapter.kind in ("lora", "xgblora")
    (tmp_path / "config.yaml").write_text(config.dump(cfg))
    assert config.read(TrainConfig, [str(tmp_path / "config.yaml")]).resolved() == cfg


def test_a_linear_probe_s_config_reads_back(tmp_path: Path) -> None:
    cfg = config.read(TrainConfig, ["--linear_probing"]).resolved()
    (tmp_path / "config.yaml").write_text(config.dump(cfg))
    assert config.read(TrainConfig, [str(tmp_path / "config.yaml")]) == cfg
    assert cfg.task.kind == "classification"


def test_a_model_that_takes_no_prefix_is_refused_before_there_is_a_folder(
    tiny_models: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    words = [f"model={tiny_models('t5')}", "--prefix_tuning", f"task.path={data}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(ModelError, match="seq2seq model of the family t5"):
        train(*BASE[1:], *words)
    assert not (tmp_path / "run").exists()


def test_models_of_other_families_train_whole(tiny_models: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    for family in ("gpt2", "roberta", "t5"):
        words = [f"model={tiny_models(family)}", "adapter.kind=full", "trainer=zo", "task.max_length=64"]
        run, _ = train(*SIZES, *FEW, *words, f"task.path={data}", f"output_dir={tmp_path / family}")
        evaluation = runs.evaluate_target(str(run), EvaluateConfig())
        assert evaluation.as_record() == json.loads((run / "eval_results_test.json").read_text())
