"""What `lorica sweep` takes: its config, its words, and where a point's values go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorica import config
from lorica.config import MergeConfig, SweepConfig
from lorica.errors import ConfigError
from lorica.runs.merging.settling import settings
from lorica.runs.studying.sweep_bench import merge_at

SHIPPED = Path(__file__).parents[1] / "configs" / "merge" / "merge_weighted_delta_sweep_bayes.yaml"
GRID = {"type": "grid", "grid": {"lambda": [0.0, 0.25, 0.5, 0.75, 1.0]}}


def sweep_config(*words: object, **tree: Any) -> SweepConfig:
    return config.check(SweepConfig, {"adapters": ["a", "b"], "method": "weighted_delta", **tree, **dict(words)})  # type: ignore[arg-type]


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


def test_every_value_of_a_policy_is_checked_before_a_sweep() -> None:
    cfg = sweep_config(search=GRID, lambda_policy={"type": "per_layer", "default": 0.5})
    assert settings(merge_at(cfg, {"lambda_policy.overrides.0": 1.0}), 2)["policy"].overrides == {"0": 1.0}
    for key, named in (("overrides.0", "weighted_delta, layer 0"), ("default", "weighted_delta")):
        with pytest.raises(ConfigError, match=f"lambda_policy of method {named}: lambda=1.5"):
            settings(merge_at(cfg, {f"lambda_policy.{key}": 1.5}), 2)
    with pytest.raises(ConfigError, match="both set lambda"):
        merge_at(cfg, {"lambda": 0.5})


def test_a_sweeps_constraint_is_not_its_merges() -> None:
    cfg = sweep_config(search=GRID, constraint_nonnegative=True)
    assert not merge_at(cfg, {"lambda": 0.5}).constraint_nonnegative


def test_an_acquisition_is_of_bayes() -> None:
    space = {"lambda": {"min": 0, "max": 1}}
    search = sweep_config(search={"type": "bayes", "space": space, "acquisition": "composite"}).search
    assert search is not None and search.acquisition == "composite"
    with pytest.raises(ConfigError, match="acquisition=composite"):
        sweep_config(search={**GRID, "acquisition": "composite"})
