"""Sweeps: on a planted bench, and whole sweeps of the embedded model through the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorica import cli, config, files, tables
from lorica.adapters import peft_format
from lorica.config import MergeConfig, SweepConfig
from lorica.demo import language
from lorica.errors import ConfigError, LoricaError, MissingPathError, ResumeError
from lorica.evaluation.evaluate import evaluate
from lorica.evaluation.recovery import recovery
from lorica.runs import ready
from lorica.runs.studying import sweep as sweeping
from lorica.runs.studying.sweep import Swept
from lorica.runs.studying.sweep_bench import outcome
from lorica.studies.search import Trial, ranked
from lorica.studies.space import Point, key

SHIPPED = Path(__file__).parents[1] / "configs" / "merge" / "merge_weighted_delta_sweep_bayes.yaml"


def tent(point: Point) -> float:
    """Two tasks, the one lost where the other is kept: highest at 0.37."""
    return min(point["lambda"] / 0.37, (1 - point["lambda"]) / 0.63)


GRID = {"type": "grid", "grid": {"lambda": [0.0, 0.25, 0.5, 0.75, 1.0]}}
BAYES = {"type": "bayes", "budget": 8, "init_points": 3, "space": {"lambda": {"type": "float", "min": 0, "max": 1}}}


@dataclass
class Planted:
    """A bench without a model: two tasks, the first kept as λ grows, the second lost."""

    cfg: SweepConfig
    method: str = "weighted_delta"
    sources: tuple[Any, ...] = ()
    left_out: list[str] = field(default_factory=list)
    die_at: int | None = None
    data: str = "data"
    judged_points: list[Point] = field(default_factory=list)

    def judged(self, point: Point) -> dict[str, Any]:
        if len(self.judged_points) == self.die_at:
            raise KeyboardInterrupt
        self.judged_points.append(point)
        kept = {"a": point["lambda"] / 0.37, "b": (1 - point["lambda"]) / 0.63}
        tasks = {name: {"task": name, "interference_delta": [value] * 3} for name, value in kept.items()}
        return {
            "tasks": tasks,
            "minimum": [min(kept.values())] * 3,
            "mean": [sum(kept.values()) / 2] * 3,
            "feasible": True,
            "reason": None,
            "seconds": 0.0,
        }

    def identity(self) -> dict[str, Any]:
        assert self.cfg.search is not None
        space = {name: each.model_dump(mode="json") for name, each in self.cfg.search.space.items()}
        return {"method": self.method, "eval_tasks": {"a": self.data, "b": self.data}, "space": space}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Swept]:
    """Sweep on a planted bench; keywords beside the config's are the bench's."""

    def run(die_at: int | None = None, data: str = "data", bench: list[Planted] | None = None, **tree: Any) -> Swept:
        def opened(cfg: SweepConfig, say: Console) -> Planted:
            made = Planted(cfg, die_at=die_at, data=data)
            if bench is not None:
                bench.append(made)
            return made

        monkeypatch.setattr(sweeping, "open_bench", opened)
        if "resume" not in tree:
            tree = {"adapters": ["a", "b"], "save_merged": False, "final_split": None, **tree}
        return sweeping.sweep(config.check(SweepConfig, tree), Console(stderr=True, width=1000))

    return run


def tried(folder: Path) -> list[Point]:
    return [each["params"] for each in files.read_records(folder / "trials.jsonl")]


@pytest.mark.parametrize(
    "search", [GRID, BAYES, {**BAYES, "acquisition": "composite"}], ids=["grid", "bayes", "composite"]
)
def test_an_interrupted_sweep_goes_on_as_if_it_had_not_been(
    search: dict[str, Any], planted: Callable[..., Swept], tmp_path: Path
) -> None:
    whole = planted(search=search, output_dir=str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        planted(search=search, output_dir=str(tmp_path / "cut"), die_at=4)
    assert not (tmp_path / "cut" / "summary.json").exists()
    benches: list[Planted] = []
    resumed = planted(resume=str(tmp_path / "cut"), bench=benches)
    assert tried(resumed.folder) == tried(whole.folder)
    assert benches[0].judged_points == tried(whole.folder)[4:]
    assert resumed.summary["best"]["params"] == whole.summary["best"]["params"]
    assert (resumed.folder / "history.png").read_bytes().startswith(b"\x89PNG")
    again = planted(resume=str(tmp_path / "cut"), bench=benches)
    assert len(benches) == 1 and again.summary == resumed.summary


def test_a_folder_is_checked_before_it_is_gone_on_with(planted: Callable[..., Swept], tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        planted(search=GRID, output_dir=str(folder), die_at=2)
    with pytest.raises(ResumeError, match=r"eval_tasks\.a"):
        planted(resume=str(folder), data="other data")
    with pytest.raises(ConfigError, match="drop method"):
        planted(resume=str(folder), method="ties")
    with pytest.raises(MissingPathError):
        planted(resume=str(tmp_path))
    with (folder / "trials.jsonl").open("a") as file:
        file.write('{"number": 2, "par')
    with pytest.warns(UserWarning, match="torn"):
        done = planted(resume=str(folder))
    assert len(tried(folder)) == 5 and done.summary["best"]["params"] == {"lambda": 0.5}


def test_the_record_says_how_the_choice_was_made(planted: Callable[..., Swept], tmp_path: Path) -> None:
    words = {"split": "test", "allow_test_selection": True, "output_dir": str(tmp_path / "out")}
    done = planted(search=GRID, **words)
    summary = files.read_json(done.folder / "summary.json")
    assert (summary["split"], summary["allow_test_selection"]) == ("test", True)
    assert summary["search"]["grid"] == GRID["grid"] and summary["origin"]["libraries"]["optuna"]
    assert [each["number"] for each in summary["ranking"]] == [2, 1, 3, 4, 0]


def test_earlier_sweeps_are_used_where_they_fit(planted: Callable[..., Swept], tmp_path: Path, capsys: Any) -> None:
    first = planted(search=BAYES, output_dir=str(tmp_path / "sweeps" / "first")).folder
    planted(search=BAYES, output_dir=str(tmp_path / "sweeps" / "other"), data="other data")
    narrow = {**BAYES, "space": {"lambda": {"type": "float", "min": 0, "max": 0.5}}}
    planted(search=narrow, output_dir=str(tmp_path / "sweeps" / "narrow"))
    capsys.readouterr()
    search = {
        **BAYES,
        "budget": 2,
        "seed": 1,
        "warm_start_sweeps": [f"{tmp_path}/sweeps/*", str(first / "summary.json")],
    }
    done = planted(search=search, output_dir=str(tmp_path / "out"))
    said = capsys.readouterr().err
    assert "8 points of 1 sweeps" in said
    assert "eval_tasks.a ('other data', now 'data')" in said and "space.lambda.max (0.5, now 1.0)" in said
    assert done.summary["num_trials"] == 2 and len(done.summary["ranking"]) == 10
    assert not {key(each) for each in tried(done.folder)} & {key(each) for each in tried(first)}
    few = planted(search={**search, "warm_start_max_points": 3}, output_dir=str(tmp_path / "few"))
    best = ranked([Trial(place, {}, (tent(each),)) for place, each in enumerate(tried(first))])[:3]
    earlier = [each for each in few.summary["ranking"] if each["sweep"] == str(first)]
    assert sorted(each["minimum"][0] for each in earlier) == sorted(each.values[0] for each in best)
    with pytest.raises(MissingPathError, match="nothing is there"):
        planted(search={**search, "warm_start_sweeps": ["no/such"]}, output_dir=str(tmp_path / "no"))


def test_a_spoiled_earlier_sweep_is_passed_over(planted: Callable[..., Swept], tmp_path: Path, capsys: Any) -> None:
    first = planted(search=BAYES, output_dir=str(tmp_path / "first")).folder
    lines = files.read_records(first / "trials.jsonl")
    lines[3]["params"]["lambda"] = 1.5
    (first / "trials.jsonl").write_text("".join(map(files.record_line, lines)))
    search = {**BAYES, "warm_start_sweeps": [str(first)]}
    done = planted(search=search, output_dir=str(tmp_path / "out"))
    assert "line 4 is no trial" in capsys.readouterr().err and done.summary["num_warm_start"] == 0


def lorica(*words: object) -> str:
    """What `lorica WORDS` prints on stdout; its errors are raised as they are."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of the embedded model, and one whose adapter does nothing."""
    folder = tmp_path_factory.mktemp("sweeping")
    language.write_tasks(folder / "data")
    for task in ("topic", "sentiment"):
        lorica(
            *("train", "model=demo", f"task.path={folder / 'data' / task}", "adapter.rank=4", "learning_rate=1e-2"),
            *("max_steps=30", "batch_size=16", "task.num_eval=40", "task.num_dev=40"),
            f"output_dir={folder / 'runs' / task}",
        )
    shutil.copytree(folder / "runs" / "sentiment", folder / "runs" / "idle")
    weights = folder / "runs" / "idle" / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    return folder / "runs"


def swept(runs_dir: Path, out: Path, *words: object) -> tuple[str, dict[str, Any]]:
    """(what is printed, summary.json)"""
    printed = lorica("sweep", *words, f"runs_dir={runs_dir}", f"output_dir={out}")
    return printed, files.read_json(out / "summary.json")


def test_the_shipped_config_runs_and_leaves_a_whole_folder(runs_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--config", SHIPPED, "--adapters", "topic", "sentiment", "search.budget=4", "search.init_points=2")
    printed, summary = swept(runs_dir, out, *words)
    assert printed.strip().splitlines()[-1] == str(out)
    assert {each.name for each in out.iterdir()} - {".lock"} == {
        *("config.yaml", "identity.json", "origin.json", "warm_start.json"),
        *("trials.jsonl", "summary.json", "history.png", "best"),
    }
    lines = files.read_records(out / "trials.jsonl")
    assert [each["number"] for each in lines] == [0, 1, 2, 3] and lines[0]["tasks"]["topic"]["n"] == 40
    best = max(lines, key=lambda each: (each["minimum"][0], each["mean"][0]))
    assert summary["best"]["params"] == best["params"] and len(summary["ranking"]) == 4
    topic, sentiment = (peft_format.read(runs_dir / task / "adapter") for task in ("topic", "sentiment"))
    share = best["params"]["lambda"]
    expected = share * topic + (1 - share) * sentiment
    assert (peft_format.read(out / "best") - expected).norm() / expected.norm() < 1e-6
    assert (out / "best" / "eval_results_test.json").is_file() and summary["final"]["split"] == "test"
    assert config.read(MergeConfig, [str(out / "best" / "config.yaml")]).method_params == {"lambda": share}


def test_a_grid_by_the_other_name_without_saving(runs_dir: Path, tmp_path: Path) -> None:
    words = ("--config", SHIPPED, "--search-type", "grid", "--grid", '{"lambda": [0.0, 0.5]}', "save_merged=false")
    rest = ("--adapters", "topic", "sentiment", f"runs_dir={runs_dir}", f"artifacts_dir={tmp_path}", "final_split=dev")
    folder = Path(lorica("merge-sweep", *words, *rest).strip().splitlines()[-1])
    assert folder.parent == tmp_path / "sweeps" / "weighted_delta" / "topic_sentiment"
    assert folder.name.startswith("sweep-") and not list((folder / "best").glob("*.safetensors"))
    summary = files.read_json(folder / "summary.json")
    assert summary["best"]["params"] == {"lambda": 0.5}
    judged = [each["interference_delta"] for each in summary["best"]["tasks"].values()]
    assert [each["interference_delta"] for each in summary["final"]["tasks"]] == judged  # as `lorica merge` finds it


def test_workers_share_a_sweep(runs_dir: Path, tmp_path: Path) -> None:
    words = ("--adapters", "topic", "sentiment", "method=weighted_delta", "workers=2", "save_merged=false")
    search = ("--grid", '{"lambda": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]}', "final_split=null")
    _, summary = swept(runs_dir, tmp_path / "out", *words, *search)
    lines = files.read_records(tmp_path / "out" / "trials.jsonl")
    assert sorted(each["number"] for each in lines) == list(range(6)) and summary["num_trials"] == 6
    left = {each.name for each in (tmp_path / "out").iterdir()}
    assert "summary.json" in left and not any(name.startswith(("worker", "claims")) for name in left)


def test_a_sweep_without_a_winner_says_why(planted: Callable[..., Swept], tmp_path: Path) -> None:
    def judged(self: Planted, point: Point) -> dict[str, Any]:
        empty = {"tasks": {}, "minimum": None, "mean": None, "feasible": False}
        return {**empty, "reason": "too [bold] a point", "seconds": 0.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planted, "judged", judged)
        summary = planted(search=GRID, output_dir=str(tmp_path / "out")).summary
    assert summary["best"] is None and len(summary["ranking"]) == 5
    head, reason = tables.sweep(summary)
    assert "0 feasible" in str(head) and Text.from_markup(str(reason)).plain == "infeasible: too [bold] a point"


def test_a_point_below_the_base_is_infeasible_under_the_constraint() -> None:
    labels = np.arange(40) % 2
    half = np.where(np.arange(40) < 20, labels, 1 - labels)  # right for the first half
    worse = np.where(np.arange(40) < 10, labels, 1 - labels)
    kept = recovery("kept", "accuracy", labels, base=half, single=labels, merged=labels, num_classes=2)
    lost = recovery("lost", "accuracy", labels, base=half, single=labels, merged=worse, num_classes=2)
    idle = recovery("idle", "accuracy", labels, base=half, single=half, merged=worse, num_classes=2)
    found = outcome([kept, lost], nonnegative=True)
    assert not found["feasible"] and "lost" in found["reason"] and found["minimum"][0] == -0.5
    assert outcome([kept, lost], nonnegative=False)["feasible"]
    alone = outcome([kept, idle], nonnegative=True)
    assert alone["feasible"] and alone["minimum"][0] == 1 and alone["tasks"]["idle"]["interference_delta"] is None


@pytest.mark.parametrize("size", [(), ("rank=2",)], ids=["exact", "compressed"])
def test_neither_zero_nor_an_infinite_merge_is_evaluated(
    size: tuple[str, ...], runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append("")
        return evaluate(*arguments, **options)

    monkeypatch.setattr(ready, "evaluate", counted)
    words = ("--adapters", "topic", "idle", "method=uniform_scalar_delta", "final_split=null", "save_merged=false")
    search = (*size, "--grid", '{"scale": [1.0e+39, 0.0, 1.0]}')
    _, summary = swept(runs_dir, tmp_path / "out", *words, *search)
    assert len(calls) == 2 * 2 + 2  # base and own adapter of two tasks, and one point of three
    assert summary["left_out"] == ["sentiment"]
    infinite, zero, _ = files.read_records(tmp_path / "out" / "trials.jsonl")
    assert not infinite["feasible"] and "finit" in infinite["reason"] and infinite["minimum"] is None
    assert zero["minimum"] == [0, 0, 0] and zero["tasks"]["sentiment"]["interference_delta"] is None
    assert summary["best"]["params"] == {"scale": 1.0} and summary["ranking"][-1]["number"] == 0


BAD = {
    "corner out of bounds": (["search.space.lambda={min: 0, max: 1.5}"], "lambda=1.5"),
    "unknown parameter": (["search.space={lambad: {min: 0, max: 1}}"], "did you mean lambda"),
    "twice set": (["lambda_policy={type: scalar, value: 0.5}"], "drop one of the two"),
    "unknown task": (["--eval-tasks", "weather"], "eval_tasks=weather"),
    "no headroom": (["--adapters", "idle", "idle"], "nothing to search for"),
    "grid out of bounds": (["--search-type", "grid", "--grid", '{"lambda": [0.5, 2]}'], "lambda=2"),
}


@pytest.mark.parametrize("words, message", BAD.values(), ids=BAD.keys())
def test_bad_words_are_one_line_and_write_nothing(
    words: list[str], message: str, runs_dir: Path, tmp_path: Path
) -> None:
    base = ["method=weighted_delta", *([] if "--search-type" in words else ["search.type=bayes"])]
    space = [] if any("search.space" in each for each in words) else ["search.space.lambda={min: 0, max: 1}"]
    adapters = [] if "--adapters" in words else ["--adapters", "topic", "sentiment"]
    with pytest.raises(LoricaError) as caught:
        swept(runs_dir, tmp_path / "out", *base, *space, *adapters, *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
