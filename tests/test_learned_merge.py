"""Merges whose coefficients are learned, from command line to folder, of adapters trained on the embedded model."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from lorica import cli, config, files
from lorica.adapters import peft_format
from lorica.config import MergeConfig
from lorica.demo import language
from lorica.errors import ConfigError, InterruptedRunError, LoricaError, UnknownNameError
from lorica.merging import transform as transforms
from lorica.merging.fitting import gradients
from lorica.merging.fitting.loading import LEARNERS
from lorica.merging.layers import layer_of
from lorica.merging.method import Module, OneModule, Site
from lorica.runs.bodies import Bodies
from lorica.runs.merging import learned
from lorica.runs.merging.evaluation import open_arenas
from lorica.runs.merging.settling import settle
from lorica.runs.sources import resolve

SHIPPED = Path(__file__).parents[1] / "configs" / "merge"
TASKS = ("topic", "sentiment")
FEW = {"steps": 3, "batch_size": 4, "validation_batches": 1, "eval_steps": 1}


def run(*words: object) -> tuple[str, str]:
    """What `lorica WORDS` prints on stdout and on stderr; its errors are raised as they are."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of the embedded model, with 30 dev examples each."""
    folder = tmp_path_factory.mktemp("learning")
    language.write_tasks(folder / "data")
    for task in TASKS:
        words = ("model=demo", f"task.path={folder / 'data' / task}", "task.num_dev=30", "task.num_eval=40")
        run(
            "train",
            *words,
            "adapter.rank=2",
            "learning_rate=1e-2",
            "max_steps=30",
            f"output_dir={folder / 'runs' / task}",
        )
    return folder / "runs"


def merge(runs_dir: Path, name: str, *words: object, **params: object) -> tuple[str, str]:
    """`lorica merge` of the two adapters by the optimizer called `name`, in a few steps, into ./out."""
    options = json.dumps({**({} if name in ("none", "bayes") else FEW), **params})
    given = ("--adapters", *TASKS, f"runs_dir={runs_dir}", f"optimizer.name={name}", f"optimizer.params={options}")
    out = [] if any(str(word).startswith("output_dir=") for word in words) else ["output_dir=out"]
    return run("merge", *given, *out, *words)


def learning(folder: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "learning.json").read_text())
    return found


def deltas(runs_dir: Path) -> list[Mapping[str, Tensor]]:
    adapters = [peft_format.read(runs_dir / task / "adapter") for task in TASKS]
    return [{path: update.dense().double() for path, update in adapter.updates.items()} for adapter in adapters]


def by_key(found: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    return {(each["group"], each["adapter"]): each["value"] for each in found["coefficients"]}


@pytest.mark.parametrize("file", ["merge_supermerge.yaml", "merge_regret.yaml"])
def test_a_shipped_config_leaves_a_whole_folder(file: str, runs_dir: Path) -> None:
    few = [f"optimizer.params.{name}={value}" for name, value in FEW.items()]
    few += ["optimizer.params.num_baseline_batches=2"] if "regret" in file else []
    out, err = run(
        "merge", "--config", SHIPPED / file, "--adapters", *TASKS, f"runs_dir={runs_dir}", "output_dir=out", *few
    )
    expected = {"learning.json", "learning.png", "adapter_model.safetensors", "eval_results_test.json"}
    assert expected <= {each.name for each in Path("out").iterdir()}
    assert "step 3" in err or "all 3 steps" in err
    found = learning()
    assert f"coefficients learned by {found['optimizer']}" in " ".join(out.split())
    assert found["optimizer"] in Path("out/README.md").read_text()
    assert Path("out/learning.png").read_bytes()[:4] == b"\x89PNG"
    assert {entry["step"] for entry in found["history"]} == {0, 1, 2, 3}
    assert json.loads(Path("out/summary.json").read_text())["optimizer"] == found["optimizer"]
    assert config.read(MergeConfig, ["out/config.yaml"]).optimizer is not None


@pytest.mark.parametrize("variant", ["task_wise", "layer_wise", "module_wise"])
def test_what_is_saved_is_the_sum_at_the_coefficients(variant: str, runs_dir: Path) -> None:
    merge(runs_dir, "supermerge", variant=variant)
    c, saved = by_key(learning()), peft_format.read(Path("out"))
    topic, sentiment = deltas(runs_dir)
    assert len(set(c.values())) > 1
    for path, update in saved.updates.items():
        group = {"task_wise": "", "layer_wise": str(layer_of(path)), "module_wise": path}[variant]
        expected = c[group, "topic"] * topic[path] + c[group, "sentiment"] * sentiment[path]
        assert torch.linalg.norm(update.dense() - expected) < 1e-6 * torch.linalg.norm(expected)


def test_what_was_learned_is_not_learned_again(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(runs_dir, "supermerge")
    monkeypatch.setattr(gradients, "backprop", None)  # whatever would fit again fails
    _, err = merge(runs_dir, "supermerge", "output_dir=again")
    assert "not fitted again" in err
    assert learning("again") == learning()
    assert files.read_json(Path("again/summary.json"))["num_modules"] == 8
    (kept,) = Path("artifacts/learning").glob("*/learned.json")
    kept.write_text("{}")
    _, err = merge(runs_dir, "supermerge", "output_dir=third")  # the state says that all steps are done
    assert "fitted before" in err and learning("third")["coefficients"] == learning()["coefficients"]


def test_ctrl_c_leaves_a_state_to_go_on_from(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(runs_dir, "supermerge", "artifacts_dir=whole", "output_dir=expected")
    backprop = gradients.backprop

    def interrupted(objective: Any, u: Tensor, batches: Any, step: int) -> Any:
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return backprop(objective, u, batches, step)

    with monkeypatch.context() as patched, pytest.raises(InterruptedRunError, match="the same command goes on"):
        patched.setattr(gradients, "backprop", interrupted)
        merge(runs_dir, "supermerge")
    assert not Path("out").exists()
    _, err = merge(runs_dir, "supermerge")
    assert "going on from step 2" in err
    for key in ("coefficients", "best_step", "stopped", "history"):
        assert learning()[key] == learning("expected")[key]


@pytest.mark.parametrize("name", LEARNERS.names())
def test_every_optimizer_merges_and_evaluates(name: str, runs_dir: Path) -> None:
    small = {"bayes": {"budget": 3, "init_points": 2}, "regret_smoothmax": {"num_baseline_batches": 2}}
    merge(runs_dir, name, "--eval-tasks", "all", **small.get(name, {}))
    found = learning()
    assert found["optimizer"] == name and set(found["mean_coefficients"]) == set(TASKS)
    assert len(json.loads(Path("out/summary.json").read_text())["tasks"]) == 2


def test_plus_plus_learns_and_saves_filtered_updates(runs_dir: Path) -> None:
    merge(runs_dir, "adamerging", "save=dense", plus_plus=True)
    dense, c = load_file("out/delta.safetensors"), by_key(learning())
    names = [each["name"] for each in json.loads(Path("out/merge_metadata.json").read_text())["transforms"]]
    assert learning()["descent"]["merge_impl"] == "fused_linear" and names == ["ties"]
    stacked = [torch.cat([each[path].flatten() for path in dense]) for each in deltas(runs_dir)]
    floors = [float(each.abs().kthvalue(len(each) - int(0.2 * len(each)) + 1)[0]) for each in stacked]
    for path, found in dense.items():
        kept = [each[path] * (each[path].abs() >= floor) for each, floor in zip(deltas(runs_dir), floors, strict=True)]
        elected = sum(kept).sign()  # type: ignore[union-attr]
        expected = sum(c["", name] * each * (each * elected > 0) for name, each in zip(TASKS, kept, strict=True))
        wrong = (found - expected).abs() > 1e-6
        assert wrong.double().mean() < 1e-3  # float32 may put an entry on the threshold's other side
    merge(runs_dir, "adamerging", "output_dir=small", plus_plus=True)
    assert json.loads(Path("small/summary.json").read_text())["total_error"] > 0


def test_the_filter_is_zero_against_the_elected_sign() -> None:
    updates = [torch.tensor([[3.0, -1.0, 2.0, 0.5]]), torch.tensor([[-1.0, -4.0, 2.0, -0.5]])]
    site = Site("x", ("a", "b"))
    ties = transforms.load("ties", {"k": 100})
    found = ties(Module(site, updates, [1.0, 1.0]))
    assert [each.tolist() for each in found] == [[[3.0, -1.0, 2.0, 0.0]], [[0.0, -4.0, 2.0, 0.0]]]  # type: ignore[union-attr]
    half = transforms.load("ties", {"k": 50})
    module = Module(site, updates, [1.0, 1.0])
    site = Site("x", ("a", "b"), found=half.surveyed(OneModule(module)))
    found = half(Module(site, updates, [1.0, 1.0]))
    assert [each.tolist() for each in found] == [[[3.0, 0.0, 2.0, 0.0]], [[0.0, -4.0, 2.0, 0.0]]]  # type: ignore[union-attr]


def test_rows_to_validate_are_apart_and_few(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = []
    lesson = learned.lesson_of
    monkeypatch.setattr(learned, "lesson_of", lambda *words: lessons.append(lesson(*words)) or lessons[-1])
    merge(runs_dir, "supermerge", validation_batches=100)
    for each in lessons:
        assert len(each.rows) == 20 and len(each.validation) == 10
        whole = each.ready.encoded(each.ready.task.splits["dev"])
        assert all(row in whole for row in (*each.rows, *each.validation))
    first = [(each.rows, each.validation) for each in lessons]
    merge(runs_dir, "supermerge", "output_dir=again", validation_batches=100)
    assert [(each.rows, each.validation) for each in lessons[2:]] == first


def test_the_models_dtype_and_device_are_as_asked(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = []
    lesson = learned.lesson_of
    monkeypatch.setattr(learned, "lesson_of", lambda *words: lessons.append(lesson(*words)) or lessons[-1])
    merge(runs_dir, "supermerge", model_dtype="bfloat16", force_cpu=True, steps=1)
    assert {each.ready.base.model.dtype for each in lessons} == {torch.bfloat16}
    assert {each.ready.device for each in lessons} == {"cpu"}
    assert len({id(each.ready.base.model) for each in lessons}) == 1  # one body for all tasks
    with pytest.raises(ConfigError, match="dtype='int3'"):
        merge(runs_dir, "supermerge", "output_dir=bad", model_dtype="int3")


def test_a_merge_judged_by_what_it_was_fitted_to_is_told(runs_dir: Path) -> None:
    assert "were fitted to split=dev" in merge(runs_dir, "supermerge", "split=dev", "--eval-tasks", "all")[1]
    assert "were fitted to" not in merge(runs_dir, "supermerge", "output_dir=b", "--eval-tasks", "all")[1]


def test_classifiers_learn_on_one_body_with_their_own_heads(runs_dir: Path, tmp_path: Path) -> None:
    folders = []
    for task in TASKS:
        words = ("model=demo", "model.kind=classification", f"task.path={runs_dir.parent / 'data' / task}")
        folders.append(tmp_path / task)
        small = ("max_steps=4", "adapter.rank=2", "task.num_dev=20", "task.num_eval=20")
        run("train", *words, *small, f"output_dir={folders[-1]}")
    params = json.dumps(FEW)
    words = ("optimizer.name=supermerge", f"optimizer.params={params}", "output_dir=out", "--eval-tasks", "all")
    run("merge", "--adapters", *folders, *words)
    assert len(list(Path("out/heads").iterdir())) == 2
    assert learning()["tasks"] == {name: {"num_fitted": 16, "num_validation": 4} for name in TASKS}


def test_learning_leaves_the_shared_model_as_it_was(runs_dir: Path) -> None:
    cfg = config.check(MergeConfig, {"device": "cpu", "optimizer": {"name": "supermerge", "params": FEW}})
    sources = resolve(TASKS, runs_dir)
    bodies = Bodies("cpu", 0)
    model = open_arenas(sources, cfg, "dev", bodies)[0].ready.base.model
    before = {name: (id(value), value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    learned.learn(settle(cfg, sources, bodies=bodies), cfg, sources, bodies, Console(quiet=True))
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    for name, (place, value, flag) in before.items():
        assert id(after[name]) == place and torch.equal(after[name], value)
        assert after[name].requires_grad == flag and after[name].grad is None


def test_a_sweep_searches_the_optimizers_options(runs_dir: Path) -> None:
    grid = '{"optimizer.learning_rate": [0.001, 0.1]}'
    options = json.dumps({**FEW, "split": "validation"})
    given = ("--adapters", *TASKS, f"runs_dir={runs_dir}", "optimizer.name=supermerge", f"optimizer.params={options}")
    run("sweep", *given, "--grid", grid, "output_dir=swept", "eval_subset.max_samples=20")
    summary = json.loads(Path("swept/summary.json").read_text())
    assert summary["num_trials"] == 2 and len(list(Path("artifacts/learning").iterdir())) == 2
    best = learning("swept/best")
    assert best["descent"]["learning_rate"] == summary["best"]["params"]["optimizer.learning_rate"]
    identity = json.loads(Path("swept/identity.json").read_text())
    assert (identity["method"], identity["optimizer"]) == ("supermerge", {**FEW, "split": "validation"})


BAD: dict[str, tuple[list[str], type[LoricaError], str]] = {
    "unknown optimizer": (["optimizer=supermerg"], UnknownNameError, "did you mean supermerge"),
    "unknown option": (["optimizer.params.lerning_rate=1"], UnknownNameError, "did you mean learning_rate"),
    "another method": (["method=ties"], ConfigError, "method=ties has none"),
    "its own coefficients": (["method_params.task_coefficients={topic: 1}"], ConfigError, "task_coefficients"),
    "on the test split": (["optimizer.params.split=test"], ConfigError, "enforce_validation_only_selection=false"),
    "with a lambda": (["lambda_policy={type: scalar, value: 1}"], ConfigError, "has no lambda"),
    "without headway": (["optimizer.params.steps=-1"], ConfigError, "steps=-1"),
}


@pytest.mark.parametrize("words, error, message", BAD.values(), ids=BAD.keys())
def test_bad_words_are_one_line_and_write_nothing(
    words: list[str], error: type[LoricaError], message: str, runs_dir: Path
) -> None:
    name = [] if words[0].startswith("optimizer=") else ["optimizer.name=supermerge"]
    with pytest.raises(error) as caught:
        run("merge", "--adapters", *TASKS, f"runs_dir={runs_dir}", "output_dir=out", *name, *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("out").exists() and not Path("artifacts").exists()


def test_another_base_model_is_refused(runs_dir: Path) -> None:
    sources = resolve(TASKS, runs_dir)
    assert sources[0].run is not None
    words = ("--adapters", runs_dir / "topic", "other", "optimizer.name=none", "output_dir=out")
    tree = json.loads(json.dumps(sources[1].run.model_dump(mode="json")))  # type: ignore[union-attr]
    tree["model"]["dtype"] = "bfloat16"
    other = Path("other")
    other.mkdir()
    (other / "config.yaml").write_text(json.dumps(tree))
    (other / "adapter").symlink_to(runs_dir / "sentiment" / "adapter")
    with pytest.raises(ConfigError, match="learned on one base model, and sentiment has another than topic"):
        run("merge", *words)


def test_a_search_of_no_optimizers_option_is_refused(runs_dir: Path) -> None:
    words = ("--adapters", *TASKS, f"runs_dir={runs_dir}", "--grid", '{"optimizer.learning_rate": [0.1]}')
    with pytest.raises(ConfigError, match="there is none: give optimizer"):
        run("sweep", *words)


def test_optimizers_are_listed() -> None:
    listed, _ = run("list", "optimizers")
    assert all(name in listed for name in ("adamerging", "supermerge", "bayes", "none"))
    assert "2412.10416" in listed.replace("\n", "")
