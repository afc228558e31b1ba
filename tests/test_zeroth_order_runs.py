"""Zeroth-order runs: what the config refuses, what a run logs and says, and that it resumes bit for bit."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lorica import config, files, runs
from lorica.adapters import peft_format
from lorica.config import TrainConfig
from lorica.demo import language
from lorica.errors import ConfigError
from lorica.runs.training import stretch_trainer
from lorica.training import fit
from lorica.training.loss_meter import LossMeter, LossTrend
from test_resume import Killed, dies_at, what_must_agree
from test_warm_start import learning_of

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

BASE = (
    *("model=demo", "trainer=zo", "batch_size=4", "max_steps=12", "save_steps=4", "learning_rate=1e-2"),
    *("adapter.rank=2", "task.num_train=24", "task.num_dev=8", "task.num_eval=8"),
)
SCALED = (
    *("zo.estimator=one_sided", "zo.num_directions=3", "zo.distribution=rademacher", "zo.space=update"),
    *("zo.normalize=rms", "zo.clip=2", "learning_rate=1e-3", "zo.branches=3"),
)


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


def words_for(data: Path, run: Path, *more: str) -> list[str]:
    keys = {word.partition("=")[0] for word in more}
    kept = [word for word in BASE if word.partition("=")[0] not in keys]
    return [*kept, *more, f"task.path={data}", f"output_dir={run}"]


def read(*words: str) -> TrainConfig:
    return config.read(TrainConfig, list(words))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["zo.epsilon=1e-2"], ["zo.epsilon", "trainer=backprop", "trainer=zo"]),
        (["trainer=spsa", "zo.estimator=one_sided"], ["trainer=spsa", "one_sided", "trainer=zo"]),
        (["trainer=zo", "zo.estimator=one_sided", "zo.num_directions=1"], ["zo.num_directions=2"]),
        (["trainer=zo", "zo.num_directions=1"], ["zo.num_directions=1", "add zo.estimator=spsa"]),
        (["trainer=zo", "--xgblora", "zo.num_directions=1"], ["zo.num_directions=1", "add zo.estimator=spsa"]),
        (["trainer=zo", "zo.estimator=forward_gradient", "zo.epsilon=1e-2"], ["zo.epsilon=0.01", "does nothing"]),
        (["trainer=zo", "zo.estimator=forward_gradient", "zo.branches=4"], ["zo.branches=4", "does nothing"]),
        (
            ["trainer=zo", "zo.estimator=forward_gradient", "zo.normalize=std", "learning_rate=1"],
            ["zo.normalize=std", "rms"],
        ),
        (["trainer=zo", "zo.estimator=forward_gradient", "zo.objective=accuracy"], ["zo.objective=accuracy", "spsa"]),
        (["trainer=zo", "zo.objective=macro_f1", "train_as=lm"], ["zo.objective=macro_f1", "train_as=lm"]),
        (["trainer=zo", "zo.space=update", "optimizer=adamw", "learning_rate=1"], ["zo.space=update", "adamw"]),
        (["trainer=zo", "zo.space=update", "max_grad_norm=1", "learning_rate=1"], ["max_grad_norm", "zo.clip"]),
        (["trainer=zo", "zo.space=update"], ["learning_rate", "zo.space=update"]),
        (["trainer=zo", "zo.normalize=rms"], ["learning_rate", "zo.normalize"]),
        (["trainer=zo", "base_dropout=true"], ["base_dropout=true"]),
        (
            ["trainer=zo", "--xgblora", "zo.train=B", "boosting.train_factors=both"],
            ["zo.train=B", "boosting.train_factors=both"],
        ),
        (["trainer=zo", "zo.branches=0"], ["zo.branches=0: ", "'auto' or 'timed', or input should be greater than"]),
        (["adapter.targets=3"], ["adapter.targets=3: ", "valid string, or input should be a valid list"]),
        (["adapter.init=discriminant", "--xgblora", "boosting.orthogonal=true"], ["discriminant", "orthogonal"]),
        (
            ["trainer=zo", "adapter.init=discriminant", "zo.space=update", "learning_rate=1"],
            ["discriminant", "zo.space=update"],
        ),
    ],
)
def test_what_contradicts_or_would_do_nothing_is_refused(words: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*words)
    assert all(part in str(caught.value) for part in told), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "factors"),
    [
        (["trainer=zo"], "B"),
        (["trainer=zo", "zo.train=both"], "both"),
        (["trainer=zo", "--xgblora"], "B"),
        (["trainer=zo", "--xgblora", "boosting.train_factors=both"], "both"),
        (["trainer=zo", "--xgblora", "zo.train=both"], "both"),
        (["--trainer", "zo", "--xgblora", "boosting.train_factors=B"], "B"),
    ],
)
def test_a_zeroth_order_run_trains_B_unless_told_otherwise(words: list[str], factors: str, tmp_path: Path) -> None:
    cfg = read(*words).resolved()
    assert cfg.zo.train == factors
    if cfg.adapter.kind == "xgblora":
        assert cfg.boosting.train_factors == factors
    (tmp_path / "config.yaml").write_text(config.dump(cfg))
    assert read(str(tmp_path / "config.yaml")) == cfg, "what a run folder keeps reads back the same"


@pytest.mark.parametrize("more", ["zo.train=both", "zo.estimator=spsa", "zo.estimator=forward_gradient"])
def test_one_direction_is_enough_where_it_is_not_one_sided(more: str) -> None:
    zo = read("trainer=zo", "zo.num_directions=1", more).resolved().zo
    assert zo.num_directions == 1 and zo.estimator != "one_sided"


def test_spsa_is_short_for_zeroth_order_by_spsa() -> None:
    assert read("trainer=spsa") == read("trainer=zo", "zo.estimator=spsa") == read("--trainer", "spsa")
    assert read("trainer=zo") == read("--trainer", "zo")
    assert read("trainer=spsa", "zo.estimator=spsa").zo.estimator == "spsa"


def test_in_update_space_alpha_changes_no_bit_of_a_run(data: Path, tmp_path: Path) -> None:
    losses = []
    for alpha in (2, 32):
        more = ["zo.space=update", "zo.branches=1", "max_steps=6", f"adapter.alpha={alpha}"]
        run, said = train(*words_for(data, tmp_path / str(alpha), *more))
        losses.append([step["loss"] for step in files.read_records(run / "training_loss.jsonl")])
        assert "warning" not in said
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["adapter.kind=lora", "adapter.kind=xgblora"])
def test_a_run_with_scaled_slopes_resumes_bit_for_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    more = [*SCALED, kind, "max_steps=16", "gradient_accumulation_steps=2", "eval_steps=8"]
    more += ["boosting.steps_per_iteration=10"] if kind.endswith("xgblora") else []
    unbroken, _ = train(*words_for(data, tmp_path / "unbroken", *more))
    words = words_for(data, tmp_path / "run", *more)
    for kill in (3, 9, 14):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(fit, "_told", dies_at(kill))
            train(*words)
        torch.manual_seed(kill)
        words = [f"resume={tmp_path / 'run'}"]
    train(*words)
    assert what_must_agree(tmp_path / "run") == what_must_agree(unbroken)


@pytest.mark.parametrize(
    ("more", "forwards"),
    [
        ([], 8),
        (["zo.num_directions=3"], 3),
        (["zo.num_directions=3", "zo.estimator=spsa"], 6),
        (["zo.num_directions=3", "zo.estimator=one_sided", "gradient_accumulation_steps=2"], 6),
        (["zo.num_directions=2", "zo.estimator=forward_gradient"], 4),
        (["zo.objective=accuracy", "zo.epsilon=0.1"], 8),
    ],
)
def test_a_step_counts_every_candidate_as_a_forward(data: Path, tmp_path: Path, more: list[str], forwards: int) -> None:
    run, said = train(*words_for(data, tmp_path / "run", "max_steps=3", *more))
    steps = files.read_records(run / "training_loss.jsonl")
    first = 24 // 4  # the look at the classes, a batch a forward
    assert [step["forwards"] for step in steps] == [first + forwards * number for number in (1, 2, 3)]
    assert all(step["trend_t"] is None and step["num_left_out"] == 0 for step in steps)
    assert "A stays as drawn" in said


def test_B_alone_moves_unless_both_are_asked_for(data: Path, tmp_path: Path) -> None:
    adapters = {}
    for name, more in (("start", ["learning_rate=0"]), ("B", []), ("both", ["zo.train=both", "zo.epsilon=0.1"])):
        run, _ = train(*words_for(data, tmp_path / name, "max_steps=8", *more))
        adapters[name] = peft_format.read(run / "adapter").updates
    for path, start in adapters["start"].items():
        assert torch.equal(adapters["B"][path].A, start.A)
        assert not torch.equal(adapters["B"][path].B, start.B)
        assert not torch.equal(adapters["both"][path].A, start.A)


def test_a_diverging_run_is_not_silent(data: Path, tmp_path: Path) -> None:
    """alpha 16 at rank 1 makes a step in weight space 256 times that of alpha 1."""
    more = [
        "adapter.rank=1",
        "adapter.init=kaiming",
        "max_steps=60",
        "task.num_train=64",
        "learning_rate=0.3",
        "adapter.targets=all-linear",
        "train_as=lm",
        "zo.num_directions=3",
    ]
    _, calm = train(*words_for(data, tmp_path / "calm", *more, "adapter.alpha=1"))
    _, said = train(*words_for(data, tmp_path / "wild", *more, "adapter.alpha=16"))
    assert "warning" not in calm
    assert "alpha/rank = 16" in said
    assert "the loss has risen" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.dtype=bfloat16"], True),
        (["model.dtype=bfloat16", "zo.epsilon=1e-2"], False),
        (["model.dtype=bfloat16", "zo.estimator=forward_gradient", "zo.num_directions=1"], False),
        ([], False),
    ],
)
def test_probes_finer_than_the_base_s_numbers_are_told(data: Path, words: list[str], expected: bool) -> None:
    said = learning_of(f"task.path={data}", *words).tuning.told()
    assert any("zo.epsilon=0.001 is finer than bfloat16" in line and "1e-2" in line for line in said) == expected


def test_a_run_that_learns_nothing_says_so_and_logs_the_trend(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretch_trainer, "LossMeter", lambda: LossMeter(LossTrend(window=20)))
    run, said = train(*words_for(data, tmp_path / "run", "max_steps=24", "learning_rate=0"))
    steps = files.read_records(run / "training_loss.jsonl")
    assert [step["trend_t"] is None for step in steps] == [True] * 19 + [False] * 5
    assert said.count("no fall over the last 20 steps") == 1


def test_dropout_that_is_off_is_told(data: Path, tmp_path: Path) -> None:
    _, said = train(*words_for(data, tmp_path / "run", "max_steps=1", "adapter.dropout=0.1"))
    assert "adapter.dropout=0.1 is off" in said
