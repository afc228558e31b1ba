"""`lorica inspect`: every figure against a dense float64 look at the same files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from command_line import lorica
from lorica import config, models, runs
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.analysis.portrait import portrait
from lorica.config import InspectConfig
from lorica.demo import language
from lorica.errors import ConfigError, MissingPathError, ShapeError
from lorica.runs.inspecting.inspect import NUM_CUMULATIVE, Inspection
from lorica.training.ledger import Ledger

SHORT = (
    *("model=demo", "max_steps=6", "batch_size=8", "logging_steps=6"),
    *("task.num_train=40", "task.num_dev=8", "task.num_eval=8"),
)


def inspect(*words: object) -> Inspection:
    targets = [str(word) for word in words if "=" not in str(word)]
    return runs.inspect(targets, config.read(InspectConfig, [str(word) for word in words if "=" in str(word)]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind on one task."""
    folder = tmp_path_factory.mktemp("inspect")
    language.write_tasks(folder / "data")
    boosted = ("adapter.kind=xgblora", "boosting.steps_per_iteration=2", "learning_rate=1e-2")
    probe = [word for word in SHORT if not word.startswith(("max_steps", "batch_size", "logging_steps"))]
    words: dict[str, tuple[str, ...]] = {
        "lora": (*SHORT, "learning_rate=1e-2"),
        "xgblora": (*SHORT, *boosted),
        "by_B": (*SHORT, "trainer=zo"),
        "full": (*SHORT, "adapter.kind=full"),
        "prefix": (*SHORT, "adapter.kind=prefix"),
        "head": (*probe, "adapter.kind=linear_probe", "model.kind=classification"),
    }
    for name, each in words.items():
        lorica("train", *each, f"task.path={folder / 'data' / 'topic'}", f"output_dir={folder / name}")
    return {name: folder / name for name in words}


def test_every_figure_of_a_module_is_the_dense_one(trained: dict[str, Path]) -> None:
    (found,) = inspect(trained["lora"]).adapters
    adapter = peft_format.read(trained["lora"] / "adapter")
    assert [each.path for each in found.portrait.modules] == list(adapter.updates)
    for figures in found.portrait.modules:
        update = adapter.updates[figures.path]
        A, B = update.A.double().numpy(), update.B.double().numpy()
        sigma = np.linalg.svd(update.scale * B @ A, compute_uv=False)[: update.rank]
        share = sigma / sigma.sum()
        assert (figures.kind, figures.rank, figures.shape) == (figures.path.split(".")[-1], 8, update.shape)
        assert figures.sigma == pytest.approx(sigma, abs=1e-9)
        assert figures.norm == pytest.approx(np.linalg.norm(sigma))
        assert figures.energy == pytest.approx(np.cumsum(sigma**2) / (sigma**2).sum(), abs=1e-6)
        assert figures.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
        assert figures.rank_utilisation == pytest.approx(figures.effective_rank / 8, rel=1e-9)
        assert (figures.mean_A, figures.std_A) == pytest.approx((A.mean(), A.std()), abs=1e-12)
        assert (figures.mean_B, figures.std_B) == pytest.approx((B.mean(), B.std()), abs=1e-12)
        assert figures.energy_at(100) == figures.energy[-1] == pytest.approx(1.0)


def test_the_share_is_that_of_the_loaded_base_and_the_kinds_add_up(trained: dict[str, Path]) -> None:
    (found,) = inspect(trained["lora"]).adapters
    base = models.load("demo", kind="causal")
    assert found.share.num_parameters == sum(each.numel() for each in base.model.parameters())
    assert found.share.trainable_share == found.portrait.num_parameters / sum(
        each.numel() for each in base.model.parameters()
    )
    assert sum(each.num_parameters for each in found.portrait.kinds) == found.portrait.num_parameters
    assert found.portrait.num_bytes == 4 * found.portrait.num_parameters
    assert {each.kind for each in found.portrait.kinds} == {"q_proj", "v_proj"}
    squares = sum((each.norm or 0.0) ** 2 for each in found.portrait.kinds)
    assert found.portrait.norm == pytest.approx(squares**0.5)


def test_what_stays_as_drawn_is_not_trainable(trained: dict[str, Path]) -> None:
    (found,) = inspect(trained["by_B"]).adapters
    adapter = peft_format.read(trained["by_B"] / "adapter")
    assert found.share.num_trainable == sum(update.B.numel() for update in adapter.updates.values())


def test_without_a_base_the_share_is_left_out_with_the_reason(tmp_path: Path) -> None:
    update = tiny.update((6, 5), 2, 1.0, torch.Generator().manual_seed(0))
    peft_format.write(Adapter({"layers.0.q": update}), tmp_path / "nameless")
    peft_format.write(Adapter({"layers.0.q": update}, base_model="./no_base"), tmp_path / "gone")
    nameless, gone = inspect(tmp_path / "nameless", tmp_path / "gone").adapters
    assert nameless.share.trainable_share is None and "model=NAME" in str(nameless.share.reason)
    assert gone.share.trainable_share is None and "no such folder" in str(gone.share.reason)
    assert "share of the base unknown: model.name='./no_base'" in lorica("inspect", tmp_path / "gone")
    given = inspect(tmp_path / "nameless", "model=demo").adapters[0].share
    assert given.trainable_share == pytest.approx(22 / 948_864)


def test_a_boosted_run_is_told_booster_by_booster_and_in_sum(trained: dict[str, Path]) -> None:
    (found,) = inspect(trained["xgblora"]).adapters
    ledger = Ledger.open(trained["xgblora"])
    assert [each.round for each in found.boosters] == [0, 1, 2]
    assert [each.chain_rank for each in found.boosters] == [1, 2, 3]
    for number, each in enumerate(found.boosters, 1):
        chain = portrait(ledger.truncated(number).chain())
        assert each.norm == pytest.approx(Adapter(ledger.boosters[number - 1].updates).norm())
        assert each.chain_norm == pytest.approx(chain.norm)
        assert each.chain_effective_rank == pytest.approx(np.mean([one.effective_rank for one in chain.modules]))
        assert each.effective_rank == pytest.approx(1.0)
    assert found.boosters[-1].chain_norm == pytest.approx(found.portrait.norm)


def test_of_a_long_chain_some_sums_are_measured_and_the_last_among_them(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NUM_CUMULATIVE >= 3
    monkeypatch.setattr("lorica.runs.inspecting.inspect.NUM_CUMULATIVE", 2)
    (found,) = inspect(trained["xgblora"]).adapters
    assert [each.chain_norm is not None for each in found.boosters] == [True, False, True]


def test_adapters_are_compared_layer_by_layer(trained: dict[str, Path]) -> None:
    found = inspect(trained["lora"], trained["xgblora"], trained["lora"] / "adapter")
    names = [each.name for each in found.adapters]
    assert names == ["topic", "topic-2", "topic-3"]
    assert [each.layer for each in found.layers] == ["all", *(f"model.layers.{at}" for at in range(4))]
    one, two = (peft_format.read(trained[name] / "adapter") for name in ("lora", "xgblora"))
    for each in found.layers:
        paths = [path for path in one.updates if each.layer == "all" or path.startswith(f"{each.layer}.")]
        first, second = (flat(adapter, paths) for adapter in (one, two))
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        assert each.pairs[0].cosine == pytest.approx(cosine, abs=1e-6)
        assert each.pairs[0].sign_conflict == pytest.approx((first * second < 0).mean(), abs=1e-4)
        assert each.pairs[1].cosine == pytest.approx(1.0)  # a run against its own adapter
        assert each.pairs[1].overlap == pytest.approx(1.0)


def flat(adapter: Adapter, paths: list[str]) -> Any:
    """The updates at `paths` as one dense vector."""
    return np.concatenate([adapter.updates[path].dense().double().numpy().ravel() for path in paths])


def test_figures_are_saved_and_printed(trained: dict[str, Path], tmp_path: Path) -> None:
    printed = lorica("inspect", trained["lora"], trained["xgblora"], "energy_at=2", f"output_dir={tmp_path / 'out'}")
    assert printed.strip().endswith(str(tmp_path / "out"))
    for word in ("q_proj", "energy at 2", "chain's norm", "sign conflict", "948,864 parameters"):
        assert word in printed, word
    record: dict[str, Any] = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert record["adapters"][0]["share"]["trainable_share"] == pytest.approx(8 * 2 * 128 * 8 / 948_864)
    assert len(record["adapters"][1]["boosters"]) == 3 and len(record["layers"]) == 5
    with (tmp_path / "out" / "inspect.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and float(rows[0]["norm"]) == record["adapters"][0]["portrait"]["modules"][0]["norm"]


def test_many_modules_are_shown_when_asked_for(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    many = {f"layers.{at}.q": tiny.update((6, 5), 2, 1.0, generator) for at in range(30)}
    peft_format.write(Adapter(many), tmp_path / "many")
    assert "layers.29.q" not in lorica("inspect", tmp_path / "many")
    assert "--all" in lorica("inspect", tmp_path / "many")
    everything = lorica("inspect", tmp_path / "many", "--all")
    assert "layers.29.q" in everything and "largest σ" in everything


def test_a_head_alone_is_inspected_for_what_it_has(trained: dict[str, Path]) -> None:
    (found,) = inspect(trained["head"]).adapters
    assert found.portrait.modules == () and found.portrait.norm == 0.0
    assert [each.kind for each in found.portrait.kinds] == ["head score"]
    assert found.share.num_trainable == found.portrait.num_parameters > 0
    assert "no low-rank updates" in lorica("inspect", trained["head"])


def test_what_cannot_be_inspected_is_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    for name in ("full", "prefix"):
        with pytest.raises(ConfigError, match=rf"adapter\.kind={name}"):
            inspect(trained[name])
    with pytest.raises(ConfigError, match="nothing to inspect"):
        inspect()
    with pytest.raises(MissingPathError, match="no adapter 'nowhere'"):
        inspect("nowhere")
    update = tiny.update((6, 5), 2, 1.0, torch.Generator().manual_seed(0))
    peft_format.write(Adapter({"model.layers.0.self_attn.q_proj": update}), tmp_path / "small")
    with pytest.raises(ShapeError, match="different shapes"):
        inspect(trained["lora"], tmp_path / "small")
