"""`lorica inspect`: every figure against a dense float64 look at the same files."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from command_line import lorica
from lorica import config, models, progress, runs
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.analysis.portrait import Ranks
from lorica.config import InspectConfig
from lorica.demo import language
from lorica.errors import ConfigError, MissingPathError, ShapeError
from lorica.runs.inspecting.boosters import NUM_CUMULATIVE
from lorica.runs.inspecting.inspect import Inspection
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
        "layers": (*SHORT, *boosted, "boosting.layer_fraction=0.3", "boosting.ranks=[1,2,1]"),
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
    assert all(each.num_bytes == 4 * each.num_parameters for each in found.portrait.kinds)
    assert {each.kind for each in found.portrait.kinds} == {"q_proj", "v_proj"}
    squares = sum((each.norm or 0.0) ** 2 for each in found.portrait.kinds)
    assert found.portrait.norm == pytest.approx(squares**0.5)


def test_what_stays_as_drawn_is_not_trainable(trained: dict[str, Path]) -> None:
    (found,) = inspect(trained["by_B"]).adapters
    adapter = peft_format.read(trained["by_B"] / "adapter")
    assert found.share.num_trainable == sum(update.B.numel() for update in adapter.updates.values())


@pytest.mark.parametrize("name", ["lora", "by_B", "xgblora", "layers"])
def test_the_table_of_kinds_adds_up_to_the_headline(trained: dict[str, Path], name: str) -> None:
    printed = lorica("inspect", trained[name])
    (found,) = inspect(trained[name]).adapters
    head, rows = cells(printed, "kind")
    headline, share = printed.splitlines()[0], found.share
    totals = {"at once": share.num_trainable, **({"whole chain": share.num_in_chain} if share.is_chain else {})}
    assert f"trainable at once {share.num_trainable:,} ({share.trainable_share:.3%})" in headline
    assert ("in the whole chain" in headline) == share.is_chain == (name in ("xgblora", "layers"))
    for column, total in totals.items():
        counts, shares = zip(*(row[head.index(column)].split(" (") for row in rows), strict=True)
        assert sum(int(count.replace(",", "")) for count in counts) == total, column
        assert sum(float(each.rstrip("%)")) for each in shares) == pytest.approx(100 * total / 948_864, abs=0.0011)
    assert sum(int(row[head.index("bytes")].replace(",", "")) for row in rows) == found.portrait.num_bytes


def cells(printed: str, first: str) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table whose first column is called so."""
    lines = [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in printed.splitlines()]
    begin = next(at for at, line in enumerate(lines) if line[:1] == [first])
    return lines[begin], list(itertools.takewhile(bool, lines[begin + 2 :]))


@pytest.mark.parametrize("name", ["lora", "by_B", "xgblora"])
def test_the_trainable_share_is_the_one_that_the_run_recorded(trained: dict[str, Path], name: str) -> None:
    (found,) = inspect(trained[name]).adapters
    recorded = json.loads((trained[name] / "record.json").read_text())["efficiency"]
    assert (found.share.num_trainable, found.share.num_parameters, found.share.trainable_share) == tuple(
        recorded[key] for key in ("num_trainable", "num_parameters", "trainable_share")
    )
    assert found.share.is_chain == (name == "xgblora")


def test_of_rounds_on_different_modules_the_largest_is_trained_at_once(trained: dict[str, Path]) -> None:
    (found,) = inspect(trained["layers"]).adapters
    rounds = [sum(map(numbers, booster.updates.values())) for booster in Ledger.open(trained["layers"]).boosters]
    assert found.share.num_trainable == max(rounds) == rounds[1] == 2 * rounds[0]
    assert found.share.num_in_chain == sum(rounds) == sum(map(numbers, chain_of(trained["layers"]).updates.values()))
    deepest = max(update.rank for update in chain_of(trained["layers"]).updates.values())
    assert found.boosters[-1].chain is not None
    assert found.boosters[-1].chain.overall.rank == deepest < 4  # no module was drawn in all three rounds


def numbers(update: LowRank) -> int:
    return update.A.numel() + update.B.numel()


def chain_of(run: Path) -> Adapter:
    return Ledger.open(run).chain()


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
    (found,) = inspect(trained["xgblora"], "energy_at=2").adapters
    ledger = Ledger.open(trained["xgblora"])
    assert [each.round for each in found.boosters] == [0, 1, 2]
    for number, each in enumerate(found.boosters, 1):
        assert_ranks(each.added, ledger.boosters[number - 1].updates, k=2)
        assert each.chain is not None
        assert_ranks(each.chain, ledger.truncated(number).chain().updates, k=2)
        assert (each.added.overall.rank, each.chain.overall.rank) == (1, number)
    assert found.boosters[-1].chain is not None
    assert found.boosters[-1].chain.overall.norm == pytest.approx(found.portrait.norm)
    assert found.boosters[-1].chain.overall.energy < 1.0  # of rank 3, at 2: there is something to tell


def assert_ranks(found: Ranks, updates: Mapping[str, LowRank], k: int) -> None:
    """Each module's figures are those of its dense matrix, and the overall ones their means."""
    assert list(found.modules) == list(updates)
    for path, update in updates.items():
        sigma = np.linalg.svd(update.dense().double().numpy(), compute_uv=False)[: update.rank]
        spread = np.exp(-(sigma / sigma.sum() * np.log(sigma / sigma.sum())).sum())
        figures = found.modules[path]
        assert (figures.rank, figures.norm) == (update.rank, pytest.approx(np.linalg.norm(sigma), rel=1e-5))
        assert figures.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-5)
        assert figures.effective_rank == pytest.approx(spread, rel=1e-5)
        assert figures.rank_utilisation == pytest.approx(spread / update.rank, rel=1e-5)
        assert figures.energy == pytest.approx((sigma[:k] ** 2).sum() / (sigma**2).sum(), rel=1e-5)
    for name in ("stable_rank", "effective_rank", "rank_utilisation", "energy"):
        mean = np.mean([getattr(each, name) for each in found.modules.values()])
        assert getattr(found.overall, name) == pytest.approx(mean), name
    assert found.overall.norm == pytest.approx(np.linalg.norm([each.norm for each in found.modules.values()]))


def test_of_a_long_chain_some_sums_are_measured_and_the_last_among_them(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NUM_CUMULATIVE >= 3
    monkeypatch.setattr("lorica.runs.inspecting.boosters.NUM_CUMULATIVE", 2)
    (found,) = inspect(trained["xgblora"]).adapters
    assert [each.chain is not None for each in found.boosters] == [True, False, True]
    assert len(cells(lorica("inspect", trained["xgblora"]), "up to round")[1]) == 2


def test_adapters_are_compared_layer_by_layer(trained: dict[str, Path]) -> None:
    found = inspect(trained["lora"], trained["xgblora"], trained["lora"] / "adapter")
    names = [each.name for each in found.adapters]
    assert names == ["topic-lora", "topic-xgblora", "topic-lora-2"]
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
    for word in ("q_proj", "energy at 2", "the whole chain", "sign conflict", "948,864 parameters"):
        assert word in printed, word
    record: dict[str, Any] = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert record["adapters"][0]["share"]["trainable_share"] == pytest.approx(8 * 2 * 128 * 8 / 948_864)
    boosters = record["adapters"][1]["boosters"]
    assert len(boosters) == 3 and len(record["layers"]) == 5 and record["energy_at"] == 2
    for whose in ("added", "chain"):
        assert len(boosters[2][whose]["modules"]) == 8
        for name in ("stable_rank", "effective_rank", "rank_utilisation", "energy"):
            assert all(name in each for each in boosters[2][whose]["modules"].values()), name
    last = boosters[2]["chain"]["overall"]
    shown = (f"{last['stable_rank']:.2f}", f"{last['rank_utilisation']:.1%}", f"{last['energy']:.1%}")
    head, rows = cells(printed, "up to round")
    columns = ("stable", "utilisation", "energy at 2")
    assert tuple(rows[2][head.index(name)] for name in columns) == shown
    assert {"num_trainable", "num_in_chain", "chain_share"} <= set(record["adapters"][1]["share"])
    with (tmp_path / "out" / "inspect.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and float(rows[0]["norm"]) == record["adapters"][0]["portrait"]["modules"][0]["norm"]


class NothingAsLarge(TorchDispatchMode):
    """Within it no tensor of as many numbers is made."""

    def __init__(self, num_entries: int) -> None:
        super().__init__()
        self.num_entries = num_entries

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            is_real = isinstance(each, Tensor) and each.device.type != "meta"  # the base is found there
            assert not is_real or each.numel() < self.num_entries, f"{func} makes {tuple(each.shape)}"
        return made


def test_no_update_is_formed_as_a_matrix(trained: dict[str, Path], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        peft_format.write(Adapter({"layers.0.q": tiny.update((700, 600), 2, 1.0, generator)}), tmp_path / name)
    with NothingAsLarge(700 * 600):
        assert len(inspect(tmp_path / "one", tmp_path / "two", "all=true").layers) == 2
        with pytest.raises(AssertionError, match=r"makes \(700, 600\)"):
            peft_format.read(tmp_path / "one").updates["layers.0.q"].dense()
    with NothingAsLarge(128 * 128):
        assert len(inspect(trained["xgblora"]).adapters[0].boosters) == 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_takes_long_is_shown_on_the_way(trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    right = progress.bar
    monkeypatch.setattr(progress, "bar", lambda transient: right())  # which leaves what was drawn last
    inspect(trained["xgblora"], trained["lora"])
    inspect(trained["xgblora"], "representations=true", "num_examples=2")
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    for word in ("measuring adapters", "measuring rounds", "comparing modules", "looking at stages"):
        assert word in shown, word
    assert "2/2" in shown and "3/3" in shown and "8/8" in shown and "4/4" in shown


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
