"""Hidden states of a run's stages, linear CKA and distance against independent references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import tiny
from command_line import lorica
from lorica import config, runs
from lorica.adapters import peft_format
from lorica.analysis.representations import hidden_states, linear_cka, relative_distance
from lorica.config import InspectConfig
from lorica.demo import language
from lorica.errors import ConfigError
from lorica.runs.inspecting.states import Stage

SHORT = (
    *("model=demo", "max_steps=6", "batch_size=8", "logging_steps=6", "learning_rate=1e-2"),
    *("task.num_train=40", "task.num_dev=20", "task.num_eval=8"),
)
Matrix = npt.NDArray[np.float64]


def cka(X: Matrix, Y: Matrix) -> float:
    """Kornblith et al. 2019 in feature space, as the paper's equation has it."""
    X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)
    return float(np.linalg.norm(Y.T @ X) ** 2 / (np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y)))


@st.composite
def features(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n, d, e = (draw(st.integers(2, 20)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    X = torch.randn(n, d, generator=generator) + 3.0  # a mean that must not count
    return X, torch.randn(n, e, generator=generator) + X[:, :1] * draw(st.floats(0, 3))


@given(features())
def test_cka_is_that_of_the_features(pair: tuple[Tensor, Tensor]) -> None:
    X, Y = pair
    assert linear_cka(X, Y) == pytest.approx(cka(X.double().numpy(), Y.double().numpy()), rel=1e-6)
    assert linear_cka(X, Y) == pytest.approx(linear_cka(Y, X), rel=1e-9)
    assert linear_cka(X, X) == pytest.approx(1.0)


def test_cka_knows_no_rotation_scale_or_shift_and_the_distance_does() -> None:
    X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    assert linear_cka(X, 3.0 * X @ turn + 5.0) == pytest.approx(1.0, abs=1e-6)
    assert linear_cka(X, torch.ones(30, 6)) == 0.0
    assert relative_distance(3.0 * X, X) == pytest.approx(2.0)
    assert relative_distance(X, torch.zeros(30, 6)) == pytest.approx(float(X.norm()))


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_hidden_states_are_means_over_what_is_no_padding(load: Any, family: str) -> None:
    model = load(family).model
    given = tiny.inputs(model, rows=3, length=7)
    found = hidden_states(model, given)
    assert found.shape == (3, 3, tiny.WIDTH)  # the embeddings and two layers
    padded = {name: torch.cat([value, torch.ones_like(value[:, :2])], dim=1) for name, value in given.items()}
    padded["attention_mask"][:, 7:] = 0
    if "decoder_input_ids" in given:
        padded["decoder_input_ids"] = given["decoder_input_ids"]
    torch.testing.assert_close(hidden_states(model, padded), found, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("representations")
    language.write_tasks(folder / "data")
    kinds = {
        "lora": ("save_steps=2", "eval_steps=3"),
        "xgblora": ("adapter.kind=xgblora", "boosting.steps_per_iteration=2"),
    }
    for name, words in kinds.items():
        lorica("train", *SHORT, *words, f"task.path={folder / 'data' / 'topic'}", f"output_dir={folder / name}")
    return {name: folder / name for name in kinds}


def stages(run: Path, *words: str) -> tuple[Stage, ...]:
    given = config.read(InspectConfig, ["representations=true", "num_examples=18", *words])
    return runs.inspect([str(run)], given).stages


def test_a_run_is_looked_at_stage_by_stage(trained: dict[str, Path], tmp_path: Path) -> None:
    found = stages(trained["lora"], f"output_dir={tmp_path / 'out'}")
    assert [(each.name, each.step) for each in found][-3:-1] == [("step-4", 4), ("best", 6)]
    assert (found[-1].name, found[-1].step) == ("last", 6)
    kept = {each.stem: load_file(each)["hidden_states"] for each in (tmp_path / "out" / "representations").iterdir()}
    assert set(kept) == {"base", *(each.name for each in found)}
    for each in found:
        now, base = kept[each.name].double().numpy(), kept["base"].double().numpy()
        assert now.shape == (5, 18, 128)
        assert each.cka == pytest.approx([cka(*pair) for pair in zip(now, base, strict=True)], rel=1e-6)
        apart = [np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in zip(now, base, strict=True)]
        assert each.distance == pytest.approx(apart, abs=1e-9)
        assert each.cka[0] == pytest.approx(1.0) and each.distance[0] == 0.0  # the embeddings are no target
    assert 0 < found[0].distance[-1] < found[-1].distance[-1]
    record = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert [each["name"] for each in record["stages"]] == [each.name for each in found]


def test_the_rounds_of_a_boosted_run_are_its_stages(trained: dict[str, Path]) -> None:
    found = stages(trained["xgblora"])
    assert [(each.name, each.step) for each in found] == [("round-0", 2), ("round-1", 4), ("round-2", 6), ("last", 6)]
    assert found[-1].cka == found[-2].cka and found[-1].distance == found[-2].distance
    assert len({each.distance for each in found}) == 3  # each round has moved them
    printed = lorica("inspect", trained["xgblora"], "--representations", "num_examples=18")
    assert "round-1" in printed and "CKA of the last" in printed


def test_a_checkpoint_is_the_adapter_that_was_live(trained: dict[str, Path], tmp_path: Path) -> None:
    short = tmp_path / "short"
    data = config.read_yaml(trained["lora"] / "config.yaml")["task"]["path"]
    # A constant rate, so that four steps of the longer run are those of the shorter one.
    for steps, folder in ((4, short), (6, tmp_path / "long")):
        words = [word for word in SHORT if not word.startswith("max_steps")]
        lorica(
            *("train", *words, f"max_steps={steps}", "schedule=constant", "save_steps=4"),
            *(f"task.path={data}", f"output_dir={folder}"),
        )
    (at_four, _last) = stages(tmp_path / "long")
    (end,) = stages(short)
    assert at_four.step == end.step == 4
    assert at_four.distance == pytest.approx(end.distance, rel=1e-6)


def test_one_run_is_asked_for(trained: dict[str, Path], tmp_path: Path) -> None:
    given = config.read(InspectConfig, ["representations=true"])
    with pytest.raises(ConfigError, match="one run folder"):
        runs.inspect([str(run) for run in trained.values()], given)
    peft_format.write(peft_format.read(trained["lora"] / "adapter"), tmp_path / "alone")
    with pytest.raises(ConfigError, match="one run folder"):
        runs.inspect([str(tmp_path / "alone")], given)
