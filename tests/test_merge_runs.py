"""Whole merges through the command line, of adapters trained on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from lorica import cli, config, files, models
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.config import MergeConfig
from lorica.demo import language
from lorica.errors import (
    AdapterFormatError,
    ConfigError,
    LoricaError,
    MissingPathError,
    OutputExistsError,
    ShapeError,
    UnknownNameError,
)
from lorica.merging.method import METHODS

CONFIGS = Path(__file__).parents[1] / "configs" / "merge"
# Those that learn coefficients are run by test_learned_merge.py, in fewer steps.
MERGES = sorted(
    file for file in CONFIGS.glob("*.yaml") if "_sweep_" not in file.name and "optimizer" not in file.read_text()
)


def lorica(*words: object) -> str:
    """What `lorica WORDS` prints on stdout; its errors are raised as they are."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of the embedded model, on tasks of its own language."""
    folder = tmp_path_factory.mktemp("merging")
    language.write_tasks(folder / "data")
    for task in ("topic", "sentiment"):
        lorica(
            *("train", "model=demo", f"task.path={folder / 'data' / task}", "adapter.rank=4", "learning_rate=1e-2"),
            *("max_steps=30", "batch_size=16", "task.num_eval=80", f"output_dir={folder / 'runs' / task}"),
        )
    return folder / "runs"


def merge(runs_dir: Path, *words: object) -> str:
    return lorica("merge", "--adapters", "topic", "sentiment", f"runs_dir={runs_dir}", *words)


def sources(runs_dir: Path) -> list[Adapter]:
    return [peft_format.read(runs_dir / task / "adapter") for task in ("topic", "sentiment")]


def relative(found: Adapter, expected: Adapter) -> float:
    return (found - expected).norm() / expected.norm()


def test_an_exact_merge_leaves_a_whole_folder(runs_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = merge(runs_dir, "method=uniform_delta", f"output_dir={out}", "--eval-tasks", "topic", "sentiment")
    assert printed.strip().splitlines()[-1] == str(out)
    assert {each.name for each in out.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "config.yaml", "README.md"),
        *("merge_metadata.json", "summary.json", "eval_results_test.json"),
    }
    topic, sentiment = sources(runs_dir)
    assert relative(peft_format.read(out), 0.5 * topic + 0.5 * sentiment) < 1e-6
    metadata = json.loads((out / "merge_metadata.json").read_text())
    assert metadata["total_error"] == 0 and [each["name"] for each in metadata["sources"]] == ["topic", "sentiment"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["max_rank"] == 8 and {each["task"] for each in summary["tasks"]} == {"topic", "sentiment"}
    assert "| topic |" in (out / "README.md").read_text()
    assert config.read(MergeConfig, [str(out / "config.yaml")]).method == "uniform_delta"


def test_a_merge_without_output_dir_goes_into_the_artifacts(runs_dir: Path, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    words = ("method=uniform_scalar_delta", f"artifacts_dir={artifacts}", "--eval-tasks", "all")
    folders = [Path(merge(runs_dir, *words).strip().splitlines()[-1]) for _ in range(2)]
    assert folders[0].parent == artifacts / "merged" / "uniform_scalar_delta" / "topic_sentiment" / "runs"
    assert len(files.read_records(artifacts / "evaluations" / "index.jsonl")) == 2
    linked = sorted((artifacts / "evaluations" / "test" / "topic").iterdir())
    assert len(linked) == 2 and all(not each.is_symlink() or not each.readlink().is_absolute() for each in linked)
    assert json.loads(linked[0].read_text())["topic"]["task"] == "topic"


def test_a_subset_never_stands_where_the_whole_split_does(runs_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(runs_dir, f"output_dir={out}", "--eval-tasks", "topic", "eval_subset.max_samples=20")
    (found,) = out.glob("eval_results_*.json")
    assert found.name.startswith("eval_results_test_subset-")
    assert json.loads(found.read_text())["topic"]["metrics"]["accuracy"]["n"] == 20


def test_evaluate_merged_writes_no_weights(runs_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--adapters", "topic", "sentiment", f"runs_dir={runs_dir}", f"output_dir={out}")
    printed = lorica("evaluate-merged", "--config", CONFIGS / "merge_ties.yaml", *words, "--eval-tasks", "topic")
    assert "topic" in printed and (out / "eval_results_dev.json").is_file()
    assert not list(out.glob("*.safetensors"))


@pytest.mark.parametrize("file", MERGES, ids=lambda file: file.stem)
def test_every_shipped_config_runs(file: Path, runs_dir: Path, tmp_path: Path) -> None:
    merge(runs_dir, "--config", file, f"output_dir={tmp_path / 'out'}")
    assert peft_format.read(tmp_path / "out").updates


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_merges_and_reloads(method: str, runs_dir: Path, tmp_path: Path) -> None:
    merge(runs_dir, f"method={method}", f"output_dir={tmp_path / 'out'}", "calibration_batches=2")
    reloaded = peft_format.read(tmp_path / "out")
    live = injection.inject(models.load("demo", kind="causal").model, reloaded)
    assert set(live.layers) == set(sources(runs_dir)[0].updates)


@pytest.mark.parametrize("size", ["rank=3", "energy=0.9", "rank_budget=10"])
@pytest.mark.parametrize("method", ["uniform_delta", "ties"])
def test_the_stated_error_is_the_measured_one(method: str, size: str, runs_dir: Path, tmp_path: Path) -> None:
    merge(runs_dir, f"method={method}", size, f"output_dir={tmp_path / 'small'}")
    merge(runs_dir, f"method={method}", "save=dense", f"output_dir={tmp_path / 'dense'}")
    small, dense = peft_format.read(tmp_path / "small"), load_file(tmp_path / "dense" / "delta.safetensors")
    metadata = json.loads((tmp_path / "small" / "merge_metadata.json").read_text())
    lost = total = 0.0
    for path, matrix in dense.items():
        difference = float((small.updates[path].dense() - matrix).norm()) if path in small.updates else matrix.norm()
        assert metadata["modules"][path]["error"] == pytest.approx(difference / float(matrix.norm()), abs=1e-4)
        lost, total = lost + difference**2, total + float(matrix.norm()) ** 2
    assert metadata["total_error"] == pytest.approx((lost / total) ** 0.5, abs=1e-4)
    if size.startswith("rank_budget"):
        assert sum(each["rank"] for each in metadata["modules"].values()) == 10


def test_a_fused_model_is_the_base_plus_the_merge(runs_dir: Path, tmp_path: Path) -> None:
    merge(runs_dir, "save=model", f"output_dir={tmp_path / 'fused'}")
    merge(runs_dir, f"output_dir={tmp_path / 'adapter'}")
    fused = models.load(str(tmp_path / "fused" / "model"), kind="causal")
    live = models.load("demo", kind="causal")
    injection.inject(live.model, peft_format.read(tmp_path / "adapter"))
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():  # the embedded model is kept in half precision, and so is what it is fused to
        assert tiny.relative(fused.model(tokens).logits, live.model(tokens).logits) < 1e-3


def test_a_merge_of_classifiers_keeps_every_head_and_evaluates(runs_dir: Path, tmp_path: Path) -> None:
    data, folders = runs_dir.parent / "data", []
    for task in ("topic", "sentiment"):
        words = ("model=demo", "model.kind=classification", f"task.path={data / task}", "task.num_eval=60")
        folders.append(tmp_path / task)
        lorica("train", *words, "max_steps=5", "batch_size=8", "adapter.rank=2", f"output_dir={folders[-1]}")
    out = tmp_path / "out"
    lorica("merge", "--adapters", *folders, f"output_dir={out}", "--eval-tasks", "all")
    assert sorted(each.name for each in (out / "heads").iterdir()) == ["sentiment.safetensors", "topic.safetensors"]
    assert not peft_format.read(out).heads
    merged = json.loads((out / "eval_results_test.json").read_text())["topic"]["metrics"]["accuracy"]["value"]
    words = ("model=demo", "model.kind=classification", f"task.path={data / 'topic'}", "task.num_eval=60")
    assert f"{merged:.4f}" in lorica("evaluate", out, *words)


def test_a_merges_folder_is_evaluated_whatever_it_was_saved_as(runs_dir: Path, tmp_path: Path) -> None:
    words = (f"task.path={runs_dir.parent / 'data' / 'topic'}", "task.num_eval=80")
    expected = {}
    for form in ("adapter", "dense", "model"):
        out = tmp_path / form
        merge(runs_dir, f"save={form}", f"output_dir={out}", "--eval-tasks", "topic")
        found = json.loads((out / "eval_results_test.json").read_text())["topic"]["metrics"]["accuracy"]["value"]
        target = (f"model={out / 'model'}", "model.kind=causal") if form == "model" else (out, "model=demo")
        expected[form] = f"{found:.4f}" in lorica("evaluate", *target, *words)
    assert expected == dict.fromkeys(expected, True)
    with pytest.raises(ConfigError, match="give task=NAME"):
        lorica("evaluate", tmp_path / "dense")


def test_old_keys_are_read_and_told(runs_dir: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.write_text("adapters: [topic, sentiment]\nmethod: weighted_delta\nlambda: 0.7\n")
    with pytest.warns(DeprecationWarning, match="method_params.lambda"):
        lorica("merge", "--config", old, f"runs_dir={runs_dir}", f"output_dir={tmp_path / 'a'}")
    old.write_text("adapters: [topic, sentiment]\nmethod: weighted_delta\nparams: {lambda: 0.7}\n")
    with pytest.warns(DeprecationWarning, match="method_params"):
        lorica("merge", "--config", old, f"runs_dir={runs_dir}", f"output_dir={tmp_path / 'b'}")
    topic, sentiment = sources(runs_dir)
    for name in ("a", "b"):
        assert relative(peft_format.read(tmp_path / name), 0.7 * topic + 0.3 * sentiment) < 1e-6


def test_plan_and_diagnosis_write_nothing(runs_dir: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert "rank" in merge(runs_dir, "--plan", "rank=4")
    assert "cosine" in merge(runs_dir, "--diagnose")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_audit_knows_its_own_merge(runs_dir: Path, tmp_path: Path) -> None:
    merge(runs_dir, f"output_dir={tmp_path / 'out'}")
    printed = lorica("merge", "--audit", tmp_path / "out", "topic", "sentiment", f"runs_dir={runs_dir}")
    assert "0.5" in printed


def renamed(folder: Path, source: Path, change: object) -> Path:
    """A copy of a PEFT folder with one tensor changed by `change`, or its config by a dict."""
    folder.mkdir()
    settings = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    if isinstance(change, dict):
        settings |= change
    else:
        tensors = change(tensors)  # type: ignore[operator]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def spoiled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(iter(tensors))
    return {**tensors, first: tensors[first] * float("nan")}


def moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("layers.", "blocks."): tensor for name, tensor in tensors.items()}


def shorter(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kept = sorted(tensors)[2:]
    return {name: tensors[name] for name in kept}


def wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([each, each], dim=1).contiguous() if "lora_A" in name else each
        for name, each in tensors.items()
    }


BAD = {
    "unknown method": (["method=tise"], UnknownNameError, "did you mean ties"),
    "unknown option": (["method=ties", "method_params.densiti=0.2"], UnknownNameError, "did you mean density"),
    "lambda out of range": (["method=weighted", "--lambda", "1.5"], ConfigError, "lambda=1.5"),
    "unknown transform": (["transforms=[layer_norm]"], UnknownNameError, "unknown transform"),
    "two sizes": (["rank=2", "energy=0.5"], ConfigError, "drop one"),
    "weights without use": (["lambda_policy={type: per_adapter, weights: [1, 2]}"], ConfigError, "no use for weights"),
    "policy without lambda": (["lambda_policy={type: scalar, value: 1}"], ConfigError, "has no lambda"),
    "no such layer": (
        ["method=weighted", "lambda_policy={type: per_layer, default: 0.5, overrides: {99: 1}}"],
        ConfigError,
        "layer 99",
    ),
    "task that is not merged": (["--eval-tasks", "weather"], ConfigError, "eval_tasks=weather"),
}


@pytest.mark.parametrize("words, error, message", BAD.values(), ids=BAD.keys())
def test_bad_words_are_one_line_and_write_nothing(
    words: list[str], error: type[LoricaError], message: str, runs_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(error) as caught:
        merge(runs_dir, *words, f"output_dir={out}")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not out.exists() and sorted(each.name for each in tmp_path.iterdir()) in ([], ["cache"])


FOREIGN = {
    "NaN": (spoiled, (), AdapterFormatError, "NaN"),
    "nothing in common": (moved, (), ShapeError, "no module in common"),
    "other shapes": (wider, ("merge_mode=strict",), ShapeError, "different shapes"),
    "modules missing": (shorter, ("merge_mode=strict",), ShapeError, "use common or union"),
    "other base": ({"base_model_name_or_path": "other/base"}, (), ConfigError, "different base models"),
    "DoRA": ({"use_dora": True}, (), AdapterFormatError, "use_dora"),
    "bias": ({"bias": "all"}, (), AdapterFormatError, "bias"),
}


@pytest.mark.parametrize("change, words, error, message", FOREIGN.values(), ids=FOREIGN.keys())
def test_bad_adapters_are_one_line_and_write_nothing(
    change: object, words: tuple[str, ...], error: type[LoricaError], message: str, runs_dir: Path, tmp_path: Path
) -> None:
    other = renamed(tmp_path / "other", runs_dir / "topic" / "adapter", change)
    out = tmp_path / "out"
    with pytest.raises(error) as caught:
        lorica("merge", "--adapters", "sentiment", other, f"runs_dir={runs_dir}", f"output_dir={out}", *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not out.exists()


def test_a_third_adapter_is_refused_where_two_are_merged(runs_dir: Path, tmp_path: Path) -> None:
    words = ("--adapters", "topic", "sentiment", "topic", f"runs_dir={runs_dir}", f"output_dir={tmp_path / 'out'}")
    with pytest.raises(ConfigError, match="merges 2 adapters, and was given 3"):
        lorica("merge", *words, "method=weighted_delta")


def test_a_full_output_folder_and_an_unknown_adapter(runs_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(OutputExistsError, match="not empty"):
        merge(runs_dir, f"output_dir={tmp_path / 'full'}")
    assert [each.name for each in (tmp_path / "full").iterdir()] == ["precious"]
    with pytest.raises(MissingPathError, match="did you mean topic"):
        lorica("merge", "--adapters", "topik", "sentiment", f"runs_dir={runs_dir}")


def test_adapters_are_found_by_folder_run_and_task(runs_dir: Path, tmp_path: Path) -> None:
    words = [runs_dir / "topic", runs_dir / "topic" / "adapter", "TOPIC"]
    out = tmp_path / "out"
    lorica("merge", "--adapters", *words, f"runs_dir={runs_dir}", f"output_dir={out}")
    metadata = json.loads((out / "merge_metadata.json").read_text())
    assert [each["name"] for each in metadata["sources"]] == ["topic", "topic-2", "topic-3"]
    assert len({each["sha256"] for each in metadata["sources"]}) == 1
    assert relative(peft_format.read(out), peft_format.read(runs_dir / "topic" / "adapter")) < 1e-6
    assert yaml.safe_load((out / "config.yaml").read_text())["merge_mode"] == "common"
