"""Whole merges through the command line, of adapters trained on the embedded model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from lorica import cli, config, files, models
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.config import MergeConfig, SweepConfig
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
from lorica.merging.merge import Merge
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
            *("max_steps=10", "batch_size=16", "task.num_dev=20", "task.num_eval=40"),
            f"output_dir={folder / 'runs' / task}",
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


def test_a_merge_with_an_output_dir_is_indexed_too(runs_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "artifacts").symlink_to("elsewhere")  # a relative link counts from where its folder really lies
    for out in ("deep/out", "out"):
        merge(runs_dir, f"output_dir={out}", "--eval-tasks", "topic")
    assert [each["folder"] for each in files.read_records(Path("artifacts/evaluations/index.jsonl"))] == [
        "deep/out",
        "out",
    ]
    linked = sorted(Path("artifacts/evaluations/test/topic").iterdir())
    assert len(linked) == 2 and all(each.is_symlink() and not each.readlink().is_absolute() for each in linked)
    found = {(tmp_path / out / "eval_results_test.json").read_text() for out in ("deep/out", "out")}
    assert {each.read_text() for each in linked} == found


def test_metrics_are_copied_where_there_are_no_links(
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refused)
    merge(runs_dir, "output_dir=out", "--eval-tasks", "topic")
    (copied,) = Path("artifacts/evaluations/test/topic").iterdir()
    assert not copied.is_symlink() and copied.read_text() == Path("out/eval_results_test.json").read_text()


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


def test_what_a_fused_model_has_lost_is_stated(runs_dir: Path, tmp_path: Path) -> None:
    printed = merge(
        runs_dir, "method=uniform", "save=model", f"output_dir={tmp_path / 'model'}", "--eval-tasks", "topic"
    )
    merge(runs_dir, "method=uniform", f"output_dir={tmp_path / 'adapter'}")
    stated, exact = (json.loads((tmp_path / form / "merge_metadata.json").read_text()) for form in ("model", "adapter"))
    demo = models.checkpoint_folder("demo")
    before, after = (load_file(folder / "model.safetensors") for folder in (demo, tmp_path / "model" / "model"))
    layout = models.placements("demo", kind="causal")
    for path, update in peft_format.read(tmp_path / "adapter").updates.items():
        (key,) = (key for key in layout[path].keys if key in before)
        kept, wanted = after[key].double() - before[key].double(), update.to(torch.float64).dense()
        measured = tiny.relative(kept.T if layout[path].transposed else kept, wanted)
        assert stated["modules"][path]["error"] == pytest.approx(measured, rel=1e-3) and measured > 0
        assert stated["modules"][path]["distance"] == exact["modules"][path]["distance"] > 0
    assert stated["total_error"] > 0 == exact["total_error"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert "rounding of base + update" in card and "saved exactly" not in card and "from the exact merge" in card
    assert "relative error" in printed and "from the exact merge" in printed


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
    words = (f"task.path={runs_dir.parent / 'data' / 'topic'}", "task.num_eval=40")
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


OLDER = {
    "options that are none": ("params: 5", "params=5: give keys and values"),
    "a grid that is none": ("grid: 3\nsearch: x", "grid=3: give keys and values"),
    "a search that is none": ("grid: {lambda: [0.5]}\nsearch: x", "search='x': give keys and values"),
    "two lambdas": ("lambda: 0.5\nparams: {lambda: 0.9}", "lambda=0.5 and params.lambda=0.9 contradict each other"),
}


@pytest.mark.parametrize("text, message", OLDER.values(), ids=OLDER.keys())
@pytest.mark.filterwarnings("ignore:the top-level key:DeprecationWarning")
def test_older_keys_that_make_no_sense_are_one_line(text: str, message: str) -> None:
    Path("old.yaml").write_text(f"adapters: [a, b]\nmethod: ties\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        config.read(SweepConfig, ["old.yaml"])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_an_empty_section_takes_an_older_key() -> None:
    Path("old.yaml").write_text("adapters: [a, b]\nmethod_params:\nlambda: 0.5\n")
    with pytest.warns(DeprecationWarning, match="the top-level key lambda is now method_params.lambda"):
        assert config.read(MergeConfig, ["old.yaml"]).method_params == {"lambda": 0.5}


def test_an_older_flag_is_told_in_one_line_that_names_no_file_of_ours() -> None:
    with pytest.warns(DeprecationWarning) as told:
        assert config.read(MergeConfig, ["--lambda", "0.5"]).method_params == {"lambda": 0.5}
    (found,) = told
    printed = warnings.formatwarning(found.message, found.category, found.filename, found.lineno)
    (line,) = printed.splitlines()
    assert "the flag --lambda is now method_params.lambda=VALUE" in line and ".py" not in line


@pytest.mark.parametrize(
    "policy, shares, told",
    [
        ("{type: scalar, value: 0.7}", {}, "(lambda=0.7)"),
        (
            "{type: per_layer, default: 0.7, overrides: {0: 0.2}}",
            {"0": 0.2},
            "(lambda=0.7, 0.2 in layer 0)",
        ),
    ],
    ids=["scalar", "per_layer"],
)
def test_a_lambda_policy_is_what_is_computed_and_told(
    policy: str, shares: dict[str, float], told: str, runs_dir: Path
) -> None:
    merge(runs_dir, "method=weighted_delta", f"lambda_policy={policy}", "output_dir=out", "rank=8")
    topic, sentiment = sources(runs_dir)
    used = set()
    for path, update in peft_format.read(Path("out")).updates.items():
        share = next((value for layer, value in shares.items() if f"layers.{layer}." in path), 0.7)
        used.add(share)
        first, second = (each.updates[path].to(torch.float64).dense().numpy() for each in (topic, sentiment))
        expected = share * first + (1 - share) * second
        assert np.linalg.norm(update.dense().numpy() - expected) < 1e-5 * np.linalg.norm(expected)
    assert used == {0.7, *shares.values()}
    metadata, card = json.loads(Path("out/merge_metadata.json").read_text()), Path("out/README.md").read_text()
    assert metadata["method_params"] == {} and metadata["lambda_policy"]["type"] in policy
    assert told in card and "Asked for: merge_mode=common, rank=8, no transforms." in card


def test_a_card_tells_the_transforms(runs_dir: Path) -> None:
    merge(runs_dir, "transforms=[{name: trim, params: {k: 50}}]", "merge_mode=union", "output_dir=out")
    assert "merge_mode=union, no size, transforms `trim` k=50.0 " in Path("out/README.md").read_text()


def without_first(folder: Path, source: Path) -> tuple[Path, str]:
    """The adapter without one of its modules, whose path is told."""
    found = peft_format.read(source)
    path = next(iter(found.updates))
    peft_format.write(Adapter({key: each for key, each in found.updates.items() if key != path}), folder)
    return folder, path


@pytest.mark.parametrize("mode", ["common", "union"])
def test_a_module_that_one_adapter_lacks_is_dropped_or_zero(mode: str, runs_dir: Path, tmp_path: Path) -> None:
    few, path = without_first(tmp_path / "few", runs_dir / "topic" / "adapter")
    words = (f"runs_dir={runs_dir}", f"merge_mode={mode}", "output_dir=out", "force=true")
    printed = lorica("merge", "--adapters", few, "sentiment", *words)
    topic, sentiment = sources(runs_dir)
    expected = 0.5 * topic + 0.5 * sentiment
    alone = Adapter({path: 0.5 * sentiment.updates[path]})
    rest = Adapter({key: each for key, each in expected.updates.items() if key != path})
    assert relative(peft_format.read(Path("out")), rest + alone if mode == "union" else rest) < 1e-6
    metadata, card = json.loads(Path("out/merge_metadata.json").read_text()), Path("out/README.md").read_text()
    assert metadata["dropped_modules"] == ([path] if mode == "common" else [])
    assert (f"`{path}`" in card) == (mode == "common") == ("were dropped" in printed)


def test_adapters_of_other_bases_are_merged_by_force(runs_dir: Path, tmp_path: Path) -> None:
    other = renamed(tmp_path / "other", runs_dir / "topic" / "adapter", {"base_model_name_or_path": "other/base"})
    lorica("merge", "--adapters", other, "sentiment", f"runs_dir={runs_dir}", "output_dir=out", "force=true")
    topic, sentiment = sources(runs_dir)
    assert relative(peft_format.read(Path("out")), 0.5 * topic + 0.5 * sentiment) < 1e-6


@pytest.mark.parametrize("method", ["dare", "ties", "tsv"])
def test_any_number_of_workers_gives_the_same_bytes(method: str, runs_dir: Path) -> None:
    for workers in (1, 4):
        merge(runs_dir, f"method={method}", f"num_workers={workers}", f"output_dir=out{workers}", "rank=5")
    one, four = (Path(f"out{workers}/adapter_model.safetensors").read_bytes() for workers in (1, 4))
    assert one == four


@pytest.mark.parametrize("constrained", [False, True])
def test_learned_coefficients_below_zero_are_set_to_it(constrained: bool, runs_dir: Path) -> None:
    words = ("optimizer={name: none, params: {init: -0.2}}", f"constraint_nonnegative={str(constrained).lower()}")
    merge(runs_dir, *words, "output_dir=out")
    assert (peft_format.read(Path("out")).norm() == 0) == constrained
    learning = json.loads(Path("out/learning.json").read_text())
    assert learning["mean_coefficients"] == dict.fromkeys(("topic", "sentiment"), 0.0 if constrained else -0.2)
    assert ("2 of them were below 0" in Path("out/README.md").read_text()) == constrained


def test_adapters_without_their_flag_are_told_of_it() -> None:
    with pytest.raises(ConfigError, match="topic sentiment: adapters stand behind --adapters"):
        lorica("merge", "topic", "sentiment", "--plan")


def test_one_adapter_alone_is_remarked_on(runs_dir: Path) -> None:
    words = ["merge", "--adapters", "topic", f"runs_dir={runs_dir}", "output_dir=out"]
    assert "warning: topic is the only adapter" in CliRunner().invoke(cli.app, words).stderr


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
    "lambda out of range": (["method=weighted", "method_params.lambda=1.5"], ConfigError, "lambda=1.5"),
    "policy out of range": (["method=weighted", "lambda_policy={value: 1.5}"], ConfigError, "lambda=1.5"),
    "override out of range": (
        ["method=ties", "lambda_policy={type: per_layer, default: 1, overrides: {0: -3}}"],
        ConfigError,
        "layer 0: lambda=-3",
    ),
    "two lambdas": (
        ["method=weighted", "method_params.lambda=0.2", "lambda_policy={value: 0.7}"],
        ConfigError,
        "both set lambda",
    ),
    "density as text": (["method=ties", "method_params.density='0.2'"], ConfigError, "density='0.2' is not a number"),
    "density as a list": (["method=ties", "method_params.density=[0.2]"], ConfigError, "density=[0.2] is not a number"),
    "weights that are none": (
        ["method=task_vector", "lambda_policy={type: per_adapter, weights: [1, much]}"],
        ConfigError,
        "lambda_policy.weights=[1, 'much']: give each adapter a number",
    ),
    "neither saved nor evaluated": (["save_merged=false"], ConfigError, "give --eval-tasks all"),
    "nothing to constrain": (["constraint_nonnegative=true"], ConfigError, "has neither: drop it"),
    "a negative weight": (
        [
            "method=task_vector",
            "lambda_policy={type: per_adapter, weights: {sentiment: -1}}",
            "constraint_nonnegative=true",
        ],
        ConfigError,
        "lambda_policy.weights.sentiment=-1",
    ),
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
    with pytest.raises(error) as caught:
        merge(runs_dir, *words, f"output_dir={tmp_path / 'new' / 'out'}")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(each.name for each in tmp_path.iterdir()) in ([], ["cache"])


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


def doubled(folder: Path, source: Path) -> Path:
    """The same adapter with twice the rank."""
    found = peft_format.read(source)
    peft_format.write(0.5 * found + 0.5 * found, folder)
    return folder


def another(folder: Path, source: Path) -> Path:
    return renamed(folder, source, {})


def wide(folder: Path, source: Path) -> Path:
    return renamed(folder, source, wider)


LATE = {
    "ranks": (doubled, ("method=uniform",), ShapeError, "needs equal ranks, and those at"),
    "a task that is not known": (another, ("--eval-tasks", "all", "model=demo"), UnknownNameError, "'weather'"),
    "a base of other shapes": (wide, ("save=model", "model=demo"), ShapeError, "the merge updates"),
}


@pytest.mark.parametrize("make, words, error, message", LATE.values(), ids=LATE.keys())
def test_what_only_the_adapters_tell_is_refused_before_any_work(
    make: Callable[[Path, Path], Path],
    words: tuple[str, ...],
    error: type[LoricaError],
    message: str,
    runs_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Merge, "module", lambda *_: pytest.fail("a module was merged"))
    monkeypatch.setattr(Merge, "surveyed", lambda *_: pytest.fail("the modules were looked at"))
    other = make(tmp_path / "weather", runs_dir / "topic" / "adapter")
    names = (other, other) if make is wide else ("sentiment", other)
    with pytest.raises(error) as caught:
        lorica("merge", "--adapters", *names, f"runs_dir={runs_dir}", "output_dir=new/out", *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("new").exists()


def test_a_folder_that_cannot_be_made_is_told_before_the_adapters_are_read(tmp_path: Path) -> None:
    Path("file.py").write_text("")
    for out in ("file.py/out", "file.py/deep/out", "a" * 300):
        with pytest.raises(ConfigError, match="no folder can be made at") as caught:
            lorica("merge", "--adapters", "no", "such", f"output_dir={out}")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"'file.py' is a file"):
        lorica("merge", "--adapters", "no", "such", "output_dir=file.py/out")
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "cache") == ["file.py"]


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
