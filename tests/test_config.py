"""One schema from YAML, words and flags; every mistake is told in one line that names the key."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from lorica import cli, config, tables
from lorica.config import FLAGS, CompareConfig, EvaluateConfig, MergeConfig, SweepConfig, TrainConfig, VerifyConfig
from lorica.errors import ConfigError, LoricaError, MissingPathError, UnknownNameError


def read(*words: str) -> TrainConfig:
    return config.read(TrainConfig, list(words))


def test_words_win_over_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: sst2\nlearning_rate: 1e-5\nadapter: {rank: 4}\n")
    cfg = read(str(file), "learning_rate=1e-4", "--lora_alpha", "32", "task.num_train=10")
    assert (cfg.learning_rate, cfg.adapter.rank, cfg.adapter.alpha) == (1e-4, 4, 32)
    assert (cfg.task.name, cfg.task.num_train) == ("sst2", 10)


def test_yaml_is_read_by_the_rules_of_1_2(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-5\ntask:\n  labels: [no, yes]\n  verbalizer: {no: off, yes: on}\n")
    cfg = read(str(file))
    assert cfg.learning_rate == 1e-5
    assert cfg.task.labels == ["no", "yes"] and cfg.task.verbalizer == {"no": "off", "yes": "on"}


def test_a_dumped_config_reads_back_the_same(tmp_path: Path) -> None:
    cfg = read("--trainer", "zo", "task=file:a.csv", "task.columns.text=review", "adapter.targets=[q_proj]").resolved()
    file = tmp_path / "config.yaml"
    file.write_text(config.dump(cfg))
    assert read(str(file)) == cfg
    assert cfg.resolved() == cfg


def test_mezo_style_line_means_what_it_meant() -> None:
    words = (
        "--model_name M --task_name SST2 --trainer zo --lora --lora_r 4 --lora_alpha 16 --learning_rate 1e-5 --zo_eps "
        "1e-3 --zo_num_perturbations 5 --max_steps 7 --num_train 10 --num_dev 5 --num_eval 6 --load_bfloat16 "
        "--output_dir OUT --seed 3 --eval_steps 2 --train_set_seed 1 --max_length 64 --train_as_classification"
    )
    cfg = read(*words.split())
    assert (cfg.model.name, cfg.model.dtype, cfg.task.name, cfg.trainer) == ("M", "bfloat16", "SST2", "zo")
    assert (cfg.adapter.rank, cfg.adapter.alpha, cfg.learning_rate) == (4, 16, 1e-5)
    assert (cfg.zo.epsilon, cfg.zo.num_directions, cfg.max_steps, cfg.seed) == (1e-3, 5, 7, 3)
    assert (cfg.task.num_train, cfg.task.num_dev, cfg.task.num_eval, cfg.task.max_length) == (10, 5, 6, 64)
    assert (cfg.output_dir, cfg.eval_steps, cfg.train_as) == ("OUT", 2, "classification")


def test_every_flag_sets_a_key_that_there_is() -> None:
    known = {**config.keys(TrainConfig), **config.keys(SweepConfig)}
    assert [name for name, flag in FLAGS.items() if flag.key not in known and flag.key != "method_params.lambda"] == []


@pytest.mark.parametrize(
    ("words", "kind", "told"),
    [
        (["adapter.rnk=8"], UnknownNameError, ["adapter.rnk", "adapter.rank"]),
        (["learnin_rate=1"], UnknownNameError, ["learnin_rate", "learning_rate"]),
        (["--lora_rr", "8"], UnknownNameError, ["--lora_rr", "--lora_r"]),
        (["--lora_r", "8", "adapter.rank=4"], ConfigError, ["--lora_r 8", "adapter.rank=4", "contradict"]),
        (["--load_float16", "--load_bfloat16"], ConfigError, ["--load_float16", "--load_bfloat16", "contradict"]),
        (["max_steps=3", "num_epochs=1"], ConfigError, ["max_steps", "num_epochs", "drop one"]),
        (["adapter.rank=many"], ConfigError, ["adapter.rank", "many", "integer"]),
        (["adapter.rank=0"], ConfigError, ["adapter.rank=0", "greater than or equal to 1"]),
        (["learning_rate=nan"], ConfigError, ["learning_rate", "nan"]),
        (["trainer=sgd"], ConfigError, ["trainer", "backprop", "zo"]),
        (["adapter.init=gaussian"], ConfigError, ["adapter.init_std"]),
        (["--lora_r"], ConfigError, ["--lora_r", "needs a value"]),
        (["no_such.yaml"], MissingPathError, ["no_such.yaml"]),
        (["whatever"], ConfigError, ["whatever", "key=value"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(words: list[str], kind: type[LoricaError], told: list[str]) -> None:
    with pytest.raises(kind) as caught:
        read(*words)
    message = str(caught.value)
    assert all(part in message for part in told), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nseed: 2\n", "twice"),
        ("- a\n- b\n", "list"),
        ("a: [", "not YAML"),
        ("model: !!python/object/apply:os.system [ls]\n", "not YAML"),
    ],
)
def test_a_broken_yaml_file_is_named(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        read(str(file))
    assert str(file) in str(caught.value)


def test_every_key_states_its_bounds_by_type() -> None:
    """A leaf that takes anything would let a typo through to the middle of a run."""
    for schema in (TrainConfig, EvaluateConfig):
        for key, kind in config.keys(schema).items():
            assert kind is not object and "Any" not in str(kind), key


@pytest.mark.parametrize("policy", ["{type: scalar, value: 0.7}", "{type: per_layer, default: 0.5, overrides: {0: 1}}"])
def test_a_dumped_merge_reads_back_the_same(policy: str, tmp_path: Path) -> None:
    cfg = config.read(MergeConfig, ["adapters=[a, b]", f"lambda_policy={policy}"])
    (tmp_path / "config.yaml").write_text(config.dump(cfg))
    assert config.read(MergeConfig, [str(tmp_path / "config.yaml")]) == cfg


def test_shipped_configs_are_valid() -> None:
    shipped = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
    assert shipped
    for path in shipped:
        of_merges = SweepConfig if "_sweep_" in path.name else MergeConfig
        tree = config.read_yaml(path)
        of_runs = CompareConfig if "arms" in tree else TrainConfig
        schema = of_merges if path.parent.name == "merge" else of_runs
        assert isinstance(config.check(schema, tree), BaseModel)


def test_every_key_of_every_verb_is_listed() -> None:
    listed = set(tables.listing("keys").columns[0].cells)
    of_verbs = [getattr(config, name) for name in re.findall(r"config\.(\w+Config)", inspect.getsource(cli))]
    assert len(set(of_verbs)) >= 12
    for schema in of_verbs:
        assert {key for key, _, _ in config.documented(schema)} <= listed, schema


@pytest.mark.parametrize(
    "words",
    [
        "RUN --speed --model demo seed=3",
        "--speed RUN --model demo seed=3",
        "--speed --model demo RUN seed=3",
        "--speed true --model demo seed=3 RUN",
    ],
)
def test_what_a_verb_is_asked_about_may_stand_anywhere(words: str) -> None:
    targets, others = config.targets_apart(VerifyConfig, words.split())
    cfg = config.read(VerifyConfig, others)
    assert targets == ["RUN"]
    assert cfg.model is not None and (cfg.model.name, cfg.speed, cfg.seed) == ("demo", True, 3)


def test_words_behind_a_list_are_its_own() -> None:
    words = ["a", "--tasks", "x", "y", "task.path=d/{task}", "b=c/d", "runs/b=c", "f.yaml"]
    assert config.targets_apart(EvaluateConfig, words) == (["a", "runs/b=c"], [*words[1:6], "f.yaml"])
    with pytest.raises(UnknownNameError, match="--tusks"):
        config.targets_apart(EvaluateConfig, ["a", "--tusks", "x"])
