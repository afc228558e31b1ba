"""lorica-mezo: the variables of mezo.sh mean what they meant, the words behind it win, and a typo is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorica import cli, config, files
from lorica.config import TrainConfig, mezo
from lorica.demo import language
from lorica.errors import ConfigError, UnknownNameError

COMMAND = CliRunner()
GIVEN = {
    "TASK": "RTE", "MODEL": "M", "BS": "8", "LR": "2e-5", "EPS": "1e-2", "SEED": "3", "TRAIN": "100", "DEV": "50",
    "EVAL": "60", "STEPS": "700", "EVAL_STEPS": "70",
}  # fmt: skip


def read(environment: dict[str, str], *words: str) -> TrainConfig:
    return config.read(TrainConfig, list(words), mezo.tree_of(environment))


def test_every_variable_is_read() -> None:
    cfg = read({**GIVEN, "MODE": "lora"})
    assert (cfg.model.name, cfg.task.name, cfg.trainer, cfg.train_as) == ("M", "RTE", "zo", "classification")
    assert (cfg.batch_size, cfg.learning_rate, cfg.zo.epsilon, cfg.task.train_set_seed) == (8, 2e-5, 1e-2, 3)
    assert (cfg.task.num_train, cfg.task.num_dev, cfg.task.num_eval) == (100, 50, 60)
    assert (cfg.max_steps, cfg.eval_steps, cfg.save_steps) == (700, 70, 70)
    assert (cfg.adapter.kind, cfg.adapter.rank, cfg.adapter.alpha, cfg.zo.train) == ("lora", 8, 16.0, "both")


def test_what_is_not_set_is_as_mezo_has_it() -> None:
    cfg = read({"MODE": "lora", "TASK": "SST2", "BS": ""})
    assert (cfg.model.name, cfg.batch_size, cfg.learning_rate) == ("facebook/opt-1.3b", 16, 1e-5)
    assert (cfg.zo.epsilon, cfg.max_steps, cfg.eval_steps, cfg.task.num_dev) == (1e-3, 20000, 4000, 500)
    assert cfg.resolved().stratified is False, "its batches are drawn from all examples alike"
    assert read({"TASK": "CB", "MODE": "lora"}).task.num_dev == 100
    assert read({"TASK": "CB", "MODE": "lora", "DEV": "70"}).task.num_dev == 70
    assert read({"TASK": "SQuAD", "MODE": "lora"}).train_as == "lm"


def test_xgblora_boosts_by_steps() -> None:
    assert read({"TASK": "SST2", "MODE": "xgblora"}).boosting.steps_per_iteration == 1000
    cfg = read({"TASK": "RTE", "MODE": "xgblora", "XGBLORA_STEPS": "500"}).resolved()
    assert (cfg.adapter.kind, cfg.adapter.rank, cfg.boosting.steps_per_iteration) == ("xgblora", 1, 500)


def test_ft_and_prefix_train_what_they_trained() -> None:
    assert read({"TASK": "SST2"}).adapter.kind == "full", "MODE is ft unless given"
    cfg = read({"TASK": "SST2", "MODE": "prefix"})
    assert cfg.adapter.kind == "prefix"
    assert (cfg.prefix.num_tokens, cfg.prefix.reparameterize, cfg.prefix.init) == (5, False, "real_activations")


def test_the_words_behind_it_win() -> None:
    cfg = read({**GIVEN, "MODE": "lora"}, "--lora_r", "4", "learning_rate=1e-3", "task.num_dev=7", "--load_bfloat16")
    assert (cfg.adapter.rank, cfg.adapter.alpha, cfg.learning_rate) == (4, 16.0, 1e-3)
    assert (cfg.task.name, cfg.task.num_dev, cfg.model.dtype) == ("RTE", 7, "bfloat16")


@pytest.mark.parametrize(
    ("environment", "error", "told"),
    [
        ({"MODE": "xgblor", "TASK": "SST2"}, UnknownNameError, "did you mean xgblora"),
        ({"MODE": "FT", "TASK": "SST2"}, UnknownNameError, "did you mean ft"),
        ({"MODE": "lora"}, ConfigError, "TASK is not set"),
        ({"MODE": "lora", "TASK": "SST2", "BS": "many"}, ConfigError, "BS='many'"),
        ({"MODE": "lora", "TASK": "SST2", "LR": "1e"}, ConfigError, "LR='1e'"),
        ({"MODE": "lora", "TASK": "SST2", "XGBLORA_STEPS": "5"}, ConfigError, "MODE=xgblora, or drop it"),
    ],
)
def test_a_mistake_is_told_in_the_words_that_were_typed(
    environment: dict[str, str], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        read(environment)


def test_nothing_that_is_read_is_shared_between_two_readings() -> None:
    before = repr(mezo.MODES)
    read({**GIVEN, "MODE": "prefix"}, "prefix.num_tokens=9")
    read({**GIVEN, "MODE": "lora"}, "zo.train=B")
    assert repr(mezo.MODES) == before


def test_flags_of_run_py_that_name_what_is_always_so() -> None:
    words = ["--trainer", "zo", "--only_train_option", "true", "--non_diff", "--train_as_classification"]
    cfg = config.read(TrainConfig, words)
    assert (cfg.train_as, cfg.zo.objective) == ("classification", "accuracy")
    assert config.read(TrainConfig, ["--only_train_option"]) == config.read(TrainConfig, [])
    with pytest.raises(ConfigError, match=r"--only_train_option false: .*answer's tokens.*drop it"):
        config.read(TrainConfig, ["--only_train_option", "false"])


@pytest.mark.parametrize("mode", list(mezo.MODES))
def test_the_command_trains(tmp_path: Path, mode: str) -> None:
    language.write_tasks(tmp_path)
    run = tmp_path / "run"
    small = {"BS": "2", "STEPS": "2", "TRAIN": "8", "DEV": "8", "EVAL": "8", "EVAL_STEPS": "2"}
    words = [f"task.path={tmp_path / 'topic'}", f"output_dir={run}"]
    done = COMMAND.invoke(cli.mezo_app, words, env={"MODE": mode, "TASK": "here", "MODEL": "demo", **small})
    assert done.exit_code == 0, done.output
    assert len(files.read_records(run / "training_loss.jsonl")) == 2


def test_a_mode_that_does_not_exist_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorica-mezo", "seed=1", f"output_dir={tmp_path / 'run'}"])
    monkeypatch.setenv("MODE", "xgblor")
    monkeypatch.setenv("TASK", "here")
    with pytest.raises(SystemExit) as left:
        cli.mezo()
    said = capsys.readouterr().err
    assert left.value.code == 2 and "did you mean xgblora" in said and said.count("\n") == 1
