"""Sweeps: the search on planted objectives, and whole sweeps of the embedded model through the command line."""

from __future__ import annotations

import importlib
import itertools
import json
import math
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
from lorica.errors import ConfigError, FolderInUseError, LoricaError, MissingPathError, ResumeError
from lorica.evaluation.evaluate import evaluate
from lorica.evaluation.recovery import recovery
from lorica.runs import merge_evaluation
from lorica.runs.sweep import Swept
from lorica.runs.sweep_bench import merge_at, outcome
from lorica.studies.search import Bayes, Grid, Search, Trial, ranked
from lorica.studies.space import Parameter, Point, Space, grid_points, key

SHIPPED = Path(__file__).parents[1] / "configs" / "merge" / "merge_weighted_delta_sweep_bayes.yaml"
SWEEPING = importlib.import_module("lorica.runs.sweep")  # its function has its name in lorica.runs
LAMBDA = Space((Parameter("lambda", "float", 0.0, 1.0),))
Objective = Callable[[Point], float]


def searched(search: Search, objective: Objective, known: tuple[Trial, ...] = ()) -> list[Trial]:
    """Every trial of a search of `objective`; where that is NaN, nothing came of the point."""
    trials: list[Trial] = []
    while (point := search.propose(trials, known)) is not None:
        value = objective(point)
        trials.append(Trial(len(trials), point, () if math.isnan(value) else (value, value), not math.isnan(value)))
    return trials


def tent(point: Point) -> float:
    """Two tasks, the one lost where the other is kept: highest at 0.37."""
    return min(point["lambda"] / 0.37, (1 - point["lambda"]) / 0.63)


def test_a_grid_is_tried_in_order_and_its_best_found() -> None:
    points = grid_points({"a": [1, 2], "b": ["x", "y", "z"]})
    assert [tuple(point.values()) for point in points[:4]] == [(1, "x"), (1, "y"), (1, "z"), (2, "x")]
    trials = searched(Grid(tuple(points)), lambda point: point["a"] - (point["b"] != "y"))
    assert [each.point for each in trials] == points
    assert ranked(trials)[0].point == {"a": 2, "b": "y"}


def test_ties_are_broken_by_the_mean_and_then_by_the_order() -> None:
    values = [(0.5, 0.6), (0.5, 0.7), (0.5, 0.7), (0.4, 1.0), (math.nan, 1.0)]
    trials = [Trial(number, {"a": number}, each) for number, each in enumerate(values)]
    trials.append(Trial(5, {"a": 5}, (0.9, 0.9), feasible=False))
    assert [each.number for each in ranked(trials)] == [1, 2, 0, 3]


def test_bayes_is_no_worse_than_a_grid_of_as_many_points() -> None:
    best_of_grid = max(tent({"lambda": place / 19}) for place in range(20))
    found = (ranked(searched(Bayes(LAMBDA, 20, 6, seed), tent))[0].values[0] for seed in range(5))
    good = (value for value in found if value >= best_of_grid - 0.02)
    assert len(list(itertools.islice(good, 4))) == 4  # of the five seeds


def test_bayes_learns_from_points_that_came_to_nothing() -> None:
    trials = searched(Bayes(LAMBDA, 12, 4, 0), lambda point: math.nan if point["lambda"] > 0.5 else tent(point))
    assert any(not each.feasible for each in trials)
    assert tent(ranked(trials)[0].point) > 0.95
    assert sum(each.feasible for each in trials[-6:]) >= 4


def test_bayes_goes_on_where_nothing_came_of_any_point() -> None:
    trials = searched(Bayes(LAMBDA, 5, 2, 0), lambda point: math.nan)
    assert len({key(each.point) for each in trials}) == 5 and ranked(trials) == []


def test_bayes_stays_in_its_space_and_ends_with_it() -> None:
    space = Space(
        (
            Parameter("choice", "categorical", choices=(1, True, [1], None)),
            Parameter("count", "int", 1, 2),
        )
    )
    trials = searched(Bayes(space, 20, 3, 0), lambda point: point["count"])
    assert len({key(each.point) for each in trials}) == len(trials) == 8
    wide = Space((Parameter("rate", "log", 1e-4, 1.0),))
    rates = [each.point["rate"] for each in searched(Bayes(wide, 7, 4, 0), lambda point: -abs(point["rate"] - 0.01))]
    assert all(1e-4 <= rate <= 1 for rate in rates)
    assert sorted(int(-math.log10(rate)) for rate in rates[:4]) == [0, 1, 2, 3]


def test_what_is_proposed_follows_from_what_was_tried() -> None:
    search = Bayes(LAMBDA, 9, 4, 3)
    trials = searched(search, tent)
    for number in (0, 3, 4, 8):
        read = [Trial(each.number, json.loads(json.dumps(each.point)), each.values) for each in trials[:number]]
        assert search.propose(read) == trials[number].point


BAD_SPACES: dict[str, tuple[Callable[[], object], str]] = {
    "no values": (lambda: grid_points({"a": []}), "search.grid.a has no value"),
    "twice": (lambda: grid_points({"a": [1, 1]}), "1 twice"),
    "empty": (lambda: grid_points({}), "0 points"),
    "reversed": (lambda: Parameter("a", "float", 1, 0), "min below max"),
    "log of zero": (lambda: Parameter("a", "log", 0, 1), "min above 0"),
    "half": (lambda: Parameter("a", "int", 0, 1.5), "whole numbers"),
    "one choice": (lambda: Parameter("a", "categorical", choices=(1,)), "two choices"),
    "both": (lambda: Parameter("a", "float", 0, 1, (1, 2)), "drop choices"),
}


@pytest.mark.parametrize("make, message", BAD_SPACES.values(), ids=BAD_SPACES.keys())
def test_a_bad_space_is_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def sweep_config(*words: object, **tree: Any) -> SweepConfig:
    return config.check(SweepConfig, {"adapters": ["a", "b"], "method": "weighted_delta", **tree, **dict(words)})  # type: ignore[arg-type]


GRID = {"type": "grid", "grid": {"lambda": [0.0, 0.25, 0.5, 0.75, 1.0]}}
BAYES = {"type": "bayes", "budget": 8, "init_points": 3, "space": {"lambda": {"type": "float", "min": 0, "max": 1}}}


def test_selection_on_test_has_to_be_said() -> None:
    with pytest.raises(ConfigError, match="split=test") as caught:
        sweep_config(search=GRID, split="test")
    assert "\n" not in str(caught.value)
    assert sweep_config(search=GRID, split="test", allow_test_selection=True).split == "test"
    assert sweep_config(search=GRID).split == "dev"


def test_a_merge_is_not_a_sweep() -> None:
    with pytest.raises(ConfigError, match="lorica sweep"):
        config.read(MergeConfig, [str(SHIPPED)])
    with pytest.raises(ConfigError, match=r"needs search\.grid"):
        sweep_config()


def test_older_keys_are_read_and_told(tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.write_text("adapters: [a, b]\nmethod: uniform_scalar_delta\ngrid: {scale: [0.0, 0.5]}\n")
    with pytest.warns(DeprecationWarning, match=r"search\.grid"):
        cfg = config.read(SweepConfig, [str(old)])
    assert cfg.search is not None and (cfg.search.type, cfg.search.grid) == ("grid", {"scale": [0.0, 0.5]})


def test_flags_and_words_reach_into_a_search(tmp_path: Path) -> None:
    words = ["--config", str(SHIPPED), "--search-type", "grid", "--grid", '{"lambda": [0.0, 0.5]}']
    cfg = config.read(SweepConfig, [*words, "search.space.lambda.max=0.9"])
    assert cfg.search is not None and cfg.search.type == "grid"
    assert cfg.search.grid == {"lambda": [0.0, 0.5]} and cfg.search.space["lambda"].max == 0.9
    (tmp_path / "config.yaml").write_text(config.dump(cfg))
    assert config.read(SweepConfig, [str(tmp_path / "config.yaml")]) == cfg


def test_a_point_is_set_where_its_name_says() -> None:
    cfg = sweep_config(search=GRID, method_params={"lambda": 0.1, "seed": 3})
    assert merge_at(cfg, {"lambda": 0.7}).method_params == {"lambda": 0.7, "seed": 3}
    nested = merge_at(cfg, {"task_coefficients.a": 0.2}).method_params
    assert nested["task_coefficients"] == {"a": 0.2}
    policy = merge_at(cfg, {"weights.a": 2.0}).lambda_policy
    assert policy is not None and policy.weights == {"a": 2.0}
    layered = sweep_config(search=GRID, lambda_policy={"type": "per_layer", "default": 0.5})
    policy = merge_at(layered, {"lambda_policy.overrides.0": 0.1}).lambda_policy
    assert policy is not None and (policy.default, policy.overrides) == (0.5, {"0": 0.1})
    with pytest.raises(ConfigError, match="cannot be set"):
        merge_at(cfg, {"lambda.deep": 1})


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

        monkeypatch.setattr(SWEEPING, "open_bench", opened)
        if "resume" not in tree:
            tree = {"adapters": ["a", "b"], "save_merged": False, "final_split": None, **tree}
        return SWEEPING.sweep(config.check(SweepConfig, tree), Console(stderr=True, width=1000))

    return run


def tried(folder: Path) -> list[Point]:
    return [each["params"] for each in files.read_records(folder / "trials.jsonl")]


@pytest.mark.parametrize("search", [GRID, BAYES], ids=["grid", "bayes"])
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


def test_a_folder_is_held_and_checked_before_it_is_gone_on_with(planted: Callable[..., Swept], tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        planted(search=GRID, output_dir=str(folder), die_at=2)
    with files.locked_folder(folder), pytest.raises(FolderInUseError):
        planted(resume=str(folder))
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
            *("max_steps=30", "batch_size=16", "task.num_eval=80", "task.num_dev=80"),
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
    assert [each["number"] for each in lines] == [0, 1, 2, 3] and lines[0]["tasks"]["topic"]["n"] == 80
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

    monkeypatch.setattr(merge_evaluation, "evaluate", counted)
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
