"""Adapter folders: what is written is read back to the bit, and a folder from elsewhere can do no harm."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank, zero
from lorica.adapters.peft_format import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from lorica.errors import AdapterFormatError, LoricaError, MissingPathError, ShapeError

LAYOUT = {f"layers.{i}.{name}": (6, 5) for i in range(2) for name in ("q", "v")} | {"lm_head": (9, 5)}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
A_KEY, B_KEY = f"{PREFIX}layers.0.q.lora_A.weight", f"{PREFIX}layers.0.q.lora_B.weight"


def random_update(rank: int, scale: float, seed: int) -> LowRank:
    return tiny.update((6, 5), rank, scale, torch.Generator().manual_seed(seed))


def uneven() -> Adapter:
    """Ranks, scales and a head that no single number in the config can state."""
    ranks = {"layers.0.q": (1, 2.0), "layers.1.q": (3, 0.1), "layers.0.v": (2, -1.5), "layers.1.v": (2, 1 / 3)}
    updates = {path: random_update(*given, seed) for seed, (path, given) in enumerate(ranks.items())}
    return Adapter(updates, {"score": {"weight": torch.randn(3, 5), "bias": torch.randn(3)}}, "some/base")


def assert_same(found: Adapter, expected: Adapter) -> None:
    """Factors and heads to the bit, scales to the last digit of a double."""
    assert found.updates.keys() == expected.updates.keys()
    for path, update in expected.updates.items():
        assert found.updates[path].A.dtype == update.A.dtype
        assert torch.equal(found.updates[path].A, update.A)
        assert torch.equal(found.updates[path].B, update.B)
        assert math.isclose(found.updates[path].scale, update.scale, rel_tol=1e-15)
    assert found.heads.keys() == expected.heads.keys()
    for path, head in expected.heads.items():
        assert found.heads[path].keys() == head.keys()
        assert all(torch.equal(found.heads[path][name], value) for name, value in head.items())
    assert found.base_model == expected.base_model


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    return found


def test_round_trip_is_exact(tmp_path: Path) -> None:
    adapter = uneven()
    peft_format.write(adapter, tmp_path / "adapter", task_type="SEQ_CLS")
    assert_same(peft_format.read(tmp_path / "adapter"), adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_keeps_the_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = Adapter({"q": random_update(2, 2.0, 0).to(dtype)})
    peft_format.write(adapter, tmp_path / "adapter")
    assert_same(peft_format.read(tmp_path / "adapter"), adapter)


def test_a_written_folder_says_what_it_holds(tmp_path: Path) -> None:
    peft_format.write(uneven(), tmp_path / "adapter", dropout=0.1, fan_in_fan_out=True, task_type="SEQ_CLS")
    config = config_of(tmp_path / "adapter")
    assert (config["peft_type"], config["task_type"]) == ("LORA", "SEQ_CLS")
    assert config["base_model_name_or_path"] == "some/base"
    assert (config["r"], config["lora_dropout"], config["fan_in_fan_out"]) == (2, 0.1, True)
    assert config["rank_pattern"] == {"layers.0.q": 1, "layers.1.q": 3}
    assert config["modules_to_save"] == ["score"]


def test_nothing_is_left_beside_the_folder(tmp_path: Path) -> None:
    for adapter in (uneven(), uneven() * 2.0):  # the second replaces the first
        peft_format.write(adapter, tmp_path / "adapter")
        left = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))]
        assert left == ["adapter", f"adapter/{CONFIG_FILE}", f"adapter/{WEIGHTS_FILE}"]
    assert peft_format.read(tmp_path / "adapter").updates["layers.0.q"].scale == 4.0


@pytest.mark.parametrize("failing", ["save", "rename"])
def test_a_write_that_fails_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    peft_format.write(uneven(), tmp_path / "adapter")
    rename = Path.rename

    def no_space(*args: object, **kwargs: object) -> bytes:
        raise OSError("disk full")

    def no_staged_rename(path: Path, target: Path) -> Path:
        if path.name.endswith(".staging"):
            raise OSError("disk full")
        return rename(path, target)

    if failing == "save":
        monkeypatch.setattr(peft_format, "save_file", no_space)
    else:
        monkeypatch.setattr(Path, "rename", no_staged_rename)
    with pytest.raises(OSError, match="disk full"):
        peft_format.write(uneven() * 2.0, tmp_path / "adapter")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert peft_format.read(tmp_path / "adapter").updates["layers.0.q"].scale == 2.0


def test_one_update_may_serve_two_modules(tmp_path: Path) -> None:
    update = random_update(2, 2.0, 0)
    adapter = Adapter({"layers.0.q": update, "layers.1.q": update})
    peft_format.write(adapter, tmp_path / "adapter")
    assert_same(peft_format.read(tmp_path / "adapter"), adapter)


def test_a_module_whose_name_ends_anothers_keeps_its_own_rank(tmp_path: Path) -> None:
    updates = {"fc": random_update(1, 3.0, 0), "block.fc": random_update(2, 2.0, 1), "q": random_update(2, 2.0, 2)}
    peft_format.write(Adapter(updates), tmp_path / "adapter")
    assert_same(peft_format.read(tmp_path / "adapter"), Adapter(updates))


def test_an_adapter_that_changes_nothing_is_read_back_as_such(tmp_path: Path) -> None:
    adapter = Adapter({"q": zero((6, 5)), "v": random_update(2, 1.0, 0)})
    peft_format.write(adapter, tmp_path / "adapter")
    found = peft_format.read(tmp_path / "adapter")
    assert (found - adapter).norm() < 1e-12
    assert config_of(tmp_path / "adapter")["r"] > 0


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(LoricaError):
        peft_format.write(uneven() * math.nan, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_portable_has_one_rank_and_every_layer(tmp_path: Path) -> None:
    adapter = Adapter({"layers.0.q": random_update(1, 2.0, 0), "layers.1.v": random_update(3, 0.5, 1)}, {}, "some/base")
    peft_format.write(adapter, tmp_path / "adapter", profile="portable", layout=LAYOUT)
    config = config_of(tmp_path / "adapter")
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == ["q", "v"]
    found = peft_format.read(tmp_path / "adapter")
    assert set(found.updates) == set(LAYOUT) - {"lm_head"}
    assert {(update.rank, update.scale) for update in found.updates.values()} == {(3, 1.0)}
    assert (found - adapter).norm() < 1e-6 * adapter.norm()
    assert not found.updates["layers.1.q"].B.any()


def test_portable_refuses_what_it_cannot_carry(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="head score"):
        peft_format.write(uneven(), tmp_path / "adapter", profile="portable", layout=LAYOUT)
    elsewhere = Adapter({"layers.7.q": random_update(1, 1.0, 0)})
    for layout in (LAYOUT, None):
        with pytest.raises(ShapeError, match=r"layers\.7\.q"):
            peft_format.write(elsewhere, tmp_path / "adapter", profile="portable", layout=layout)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("layout", "targets"), [(LAYOUT, ["q"]), (None, ["layers.0.q", "layers.1.q"])])
def test_targets_are_suffixes_only_where_they_pick_the_same(
    tmp_path: Path, layout: peft_format.Layout | None, targets: list[str]
) -> None:
    whole = {path: random_update(2, 1.0, 0) for path in ("layers.0.q", "layers.1.q")}
    peft_format.write(Adapter(whole), tmp_path / "whole", layout=layout)
    assert config_of(tmp_path / "whole")["target_modules"] == targets
    peft_format.write(Adapter({"layers.0.q": whole["layers.0.q"]}), tmp_path / "part", layout=layout)
    assert config_of(tmp_path / "part")["target_modules"] == ["layers.0.q"]


def place(folder: Path, config: object = CONFIG, tensors: Mapping[str, Tensor] | None = None, **changes: Any) -> Path:
    """A folder as someone else might write it."""
    folder.mkdir(exist_ok=True)
    content = {**config, **changes} if isinstance(config, dict) else config
    (folder / CONFIG_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    save_file(dict(tensors or factors()), folder / WEIGHTS_FILE)
    return folder


def factors(rank: int = 2) -> dict[str, Tensor]:
    return {A_KEY: torch.ones(rank, 5), B_KEY: torch.ones(6, rank)}


def place_raw(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A folder whose safetensors file has just this header, written by hand."""
    place(folder)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (folder / WEIGHTS_FILE).write_bytes(size + text + data)
    return folder


def entry(shape: object, start: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def pair(a: dict[str, object], b: dict[str, object]) -> dict[str, object]:
    return {A_KEY: a, B_KEY: b}


WHOLE = pair(entry([2, 5], 0, 40), entry([6, 2], 40, 88))


def test_the_hand_written_folder_is_read_when_nothing_is_wrong(tmp_path: Path) -> None:
    for folder in (place(tmp_path / "saved"), place_raw(tmp_path / "raw", WHOLE, bytes(88))):
        found = peft_format.read(folder).updates["layers.0.q"]
        assert (found.rank, found.shape, found.scale) == (2, (6, 5), 2.0)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"alpha_pattern": {"q": 6}}, 3.0),
        ({"alpha_pattern": {"layers.0.q": 6}, "rank_pattern": {"layers.0.q": 2}, "r": 8}, 3.0),
        ({"alpha_pattern": {r"^layers\.0\.q$": 6}}, 3.0),
        ({"alpha_pattern": {"^q": 6, "0.v": 8, "ayers.0.q": 5}}, 2.0),
        ({"lora_alpha": 1.5}, 0.75),
    ],
)
def test_scale_follows_the_config(tmp_path: Path, changes: dict[str, Any], scale: float) -> None:
    assert peft_format.read(place(tmp_path / "adapter", **changes)).updates["layers.0.q"].scale == pytest.approx(scale)


@pytest.mark.parametrize("spelling", ["lora_A.weight", "lora_A.default.weight", "lora_A"])
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_factors_are_known_by_every_spelling(tmp_path: Path, spelling: str, prefix: str) -> None:
    keys = {f"{prefix}layers.0.q.{spelling.replace('A', letter)}": letter for letter in "AB"}
    tensors = {key: factors()[A_KEY if letter == "A" else B_KEY] for key, letter in keys.items()}
    assert list(peft_format.read(place(tmp_path / "adapter", tensors=tensors)).updates) == ["layers.0.q"]


@pytest.mark.parametrize(
    "key", ["score.weight", "score.modules_to_save.weight", "score.modules_to_save.default.weight"]
)
def test_a_declared_head_is_read(tmp_path: Path, key: str) -> None:
    tensors = {**factors(), PREFIX + key: torch.ones(3, 5)}
    found = peft_format.read(place(tmp_path / "adapter", tensors=tensors, modules_to_save=["classifier", "score"]))
    assert {path: list(head) for path, head in found.heads.items()} == {"score": ["weight"]}


@pytest.mark.parametrize("missing", ["folder", CONFIG_FILE, WEIGHTS_FILE])
def test_what_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    folder = place(tmp_path / "adapter")
    if missing == "folder":
        folder = tmp_path / "elsewhere"
    else:
        (folder / missing).unlink()
    with pytest.raises(MissingPathError, match=folder.name if missing == "folder" else missing):
        peft_format.read(folder)


def refused(folder: Path, match: str = "") -> None:
    """`folder` is refused with a typed error of one line, at once."""
    begin = time.process_time()
    with pytest.raises(AdapterFormatError, match=match or None) as caught:
        peft_format.read(folder)
    assert time.process_time() - begin < 0.5  # 50 ms and a wide margin for a slow machine
    assert "\n" not in str(caught.value)


CONFIGS: dict[str, tuple[object, str]] = {
    "not JSON": ("{", "not JSON"),
    "not text": ("\x00\x00", "not JSON"),
    "a list": ([1, 2], "list"),
    "a number": (3, "int"),
    "empty": ("", "not JSON"),
    "deeply nested": ("[" * 100_000, "not JSON"),
    "deeply nested inside": ('{"peft_type": "LORA", "r": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}", ""),
    "a key twice": ('{"peft_type": "LORA", "r": 2, "r": 3}', "'r' is given twice"),
    "a huge number": ('{"peft_type": "LORA", "lora_alpha": 4, "r": ' + "9" * 5000 + "}", ""),
    "larger than a megabyte": (json.dumps(CONFIG) + " " * (1 << 20), "bytes"),
    "IA3": ({**CONFIG, "peft_type": "IA3"}, "IA3"),
    "no type": ({"r": 2, "lora_alpha": 4}, "only LORA"),
    "DoRA": ({**CONFIG, "use_dora": True}, "DoRA.*merge_and_unload"),
    "bias": ({**CONFIG, "bias": "lora_only"}, "bias='lora_only'.*merge_and_unload"),
    "bias of factors": ({**CONFIG, "lora_bias": True}, "lora_bias.*merge_and_unload"),
    "layer_replication": ({**CONFIG, "layer_replication": [[0, 1000]] * 1000}, "layer_replication"),
    "target_parameters": ({**CONFIG, "target_parameters": ["experts.gate"]}, "target_parameters"),
    "trainable tokens": ({**CONFIG, "trainable_token_indices": [1]}, "trainable_token_indices"),
    "pissa": ({**CONFIG, "init_lora_weights": "pissa_niter_4"}, "pissa.*path_initial_model_for_weight_conversion"),
    "olora": ({**CONFIG, "init_lora_weights": "OLoRA"}, "OLoRA.*path_initial_model_for_weight_conversion"),
    "loftq": ({**CONFIG, "init_lora_weights": "loftq"}, "loftq.*another init"),
    "BD-LoRA": ({**CONFIG, "use_bdlora": {"target_modules_bd_a": ["q"], "nblocks": 2}}, "use_bdlora"),
    "KaSA": ({**CONFIG, "kasa_config": {"beta": 1e-4}}, "kasa_config.*merge_and_unload"),
    "Arrow": ({**CONFIG, "arrow_config": {"top_k": 2}}, "arrow_config.*name those adapters"),
    "MonteCLoRA": ({**CONFIG, "monteclora_config": {"num_samples": 8}}, "monteclora_config"),
    "regex rank_pattern": ({**CONFIG, "rank_pattern": {"(a+)+$": 2}}, "no regex is run"),
    "regex alpha_pattern": ({**CONFIG, "alpha_pattern": {".*q": 2}}, "no regex is run"),
    "rank_pattern a list": ({**CONFIG, "rank_pattern": ["q"]}, "rank_pattern"),
    "huge rank": ({**CONFIG, "r": 4_000_000}, "r=4000000"),
    "other rank": ({**CONFIG, "r": 3}, "rank 2"),
    "other rank by pattern": ({**CONFIG, "rank_pattern": {"q": 1}}, "rank 2"),
    "no rank": ({"peft_type": "LORA", "lora_alpha": 4}, "r=None"),
    "rank as text": ({**CONFIG, "r": "2"}, "r='2'"),
    "no alpha": ({"peft_type": "LORA", "r": 2}, "lora_alpha=None"),
    "alpha as text": ({**CONFIG, "lora_alpha": "4"}, "lora_alpha"),
    "alpha NaN": ({**CONFIG, "lora_alpha": math.nan}, "lora_alpha"),
    "alpha infinite": ({**CONFIG, "lora_alpha": math.inf}, "lora_alpha"),
    "alpha beyond a double": ('{"peft_type": "LORA", "r": 2, "lora_alpha": 1' + "0" * 400 + "}", "lora_alpha"),
    "heads a string": ({**CONFIG, "modules_to_save": "score"}, "modules_to_save"),
    "heads of numbers": ({**CONFIG, "modules_to_save": [1]}, "modules_to_save"),
    "a base model that is no name": ({**CONFIG, "base_model_name_or_path": {"a": 1}}, "base_model_name_or_path"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_configs_are_refused(tmp_path: Path, case: str) -> None:
    config, match = CONFIGS[case]
    refused(place(tmp_path / "adapter", config), match)


TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no lora_B": ({A_KEY: torch.ones(2, 5)}, "has no lora_B"),
    "no lora_A": ({B_KEY: torch.ones(6, 2)}, "has no lora_A"),
    "ranks that differ": ({A_KEY: torch.ones(2, 5), B_KEY: torch.ones(6, 3)}, "must be"),
    "a number": ({A_KEY: torch.tensor(1.0), B_KEY: torch.ones(6, 2)}, "must be"),
    "a vector": ({A_KEY: torch.ones(2), B_KEY: torch.ones(6, 2)}, "must be"),
    "three dimensions": ({A_KEY: torch.ones(2, 5, 1), B_KEY: torch.ones(6, 2)}, "must be"),
    "a convolution": ({A_KEY: torch.ones(2, 5, 1, 1), B_KEY: torch.ones(6, 2, 1, 1)}, "convolution"),
    "rank 0": ({A_KEY: torch.ones(0, 5), B_KEY: torch.ones(6, 0)}, "rank 0"),
    "integers": ({A_KEY: torch.ones(2, 5).long(), B_KEY: torch.ones(6, 2)}, "I64"),
    "NaN": ({A_KEY: torch.full((2, 5), math.nan), B_KEY: torch.ones(6, 2)}, "NaN"),
    "infinity": ({A_KEY: torch.ones(2, 5), B_KEY: torch.full((6, 2), -math.inf)}, "NaN or infinity"),
    "output embedding": ({**factors(), "base_model.model.lm_head.weight": torch.ones(9, 5)}, "neither a factor"),
    "a base weight": ({**factors(), f"{PREFIX}layers.0.q.base_layer.weight": torch.ones(6, 5)}, "neither a factor"),
    "a bias": ({**factors(), f"{PREFIX}layers.0.q.bias": torch.ones(6)}, "neither a factor"),
    "a head not declared": ({**factors(), f"{PREFIX}score.weight": torch.ones(3, 5)}, "modules_to_save"),
    "DoRA": ({**factors(), f"{PREFIX}layers.0.q.lora_magnitude_vector": torch.ones(6)}, "DoRA"),
    "an embedding": ({**factors(), f"{PREFIX}wte.lora_embedding_A": torch.ones(2, 9)}, "embedding"),
    "a nameless module": ({"lora_A.weight": torch.ones(2, 5), "lora_B.weight": torch.ones(6, 2)}, "neither a factor"),
    "one factor in two spellings": ({**factors(), A_KEY.removeprefix(PREFIX): torch.zeros(2, 5)}, "twice"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_hostile_tensors_are_refused(tmp_path: Path, case: str) -> None:
    tensors, match = TENSORS[case]
    refused(place(tmp_path / "adapter", tensors=tensors), match)


def test_a_declared_head_opens_no_way_to_the_base(tmp_path: Path) -> None:
    tensors = {**factors(), f"{PREFIX}score.base_layer.weight": torch.ones(3, 5)}
    refused(place(tmp_path / "adapter", tensors=tensors, modules_to_save=["score"]))


def test_rank_zero_is_refused_whatever_the_config_says(tmp_path: Path) -> None:
    refused(place(tmp_path / "adapter", tensors=factors(rank=0), r=0), "rank|r=0")


def test_a_head_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = {**factors(), f"{PREFIX}score.weight": torch.full((3, 5), math.nan)}
    refused(place(tmp_path / "adapter", tensors=tensors, modules_to_save=["score"]), "NaN")


HEADERS: dict[str, tuple[object, bytes, int | None]] = {
    "no JSON": (b"\xff\xfe{}", b"", None),
    "a list": ([WHOLE], bytes(88), None),
    "text": ("header", b"", None),
    "a number": (7, b"", None),
    "deeply nested": (b"[" * 100_000, b"", None),
    "a key twice": (json.dumps(WHOLE).encode()[:-1] + b"," + json.dumps(WHOLE).encode()[1:], bytes(88), None),
    "an entry that is no tensor": (pair({"a": 1}, entry([6, 2], 40, 88)), bytes(88), None),
    "an entry that is a list": ({A_KEY: [1, 2, 3]}, bytes(88), None),
    "an unknown dtype": (pair(entry([2, 5], 0, 40, "Q4"), entry([6, 2], 40, 88)), bytes(88), None),
    "a dtype that is a list": (pair(entry([2, 5], 0, 40, ["F32"]), entry([6, 2], 40, 88)), bytes(88), None),
    "offsets that overlap": (pair(entry([2, 5], 0, 40), entry([6, 2], 20, 68)), bytes(88), None),
    "offsets with a gap": (pair(entry([2, 5], 0, 40), entry([6, 2], 48, 96)), bytes(96), None),
    "offsets out of range": (pair(entry([2, 5], 0, 40), entry([6, 2], 1 << 40, (1 << 40) + 48)), bytes(88), None),
    "offsets below zero": (pair(entry([2, 5], -40, 0), entry([6, 2], 40, 88)), bytes(88), None),
    "offsets backwards": (pair(entry([2, 5], 40, 0), entry([6, 2], 40, 88)), bytes(88), None),
    "offsets as text": (pair(entry([2, 5], "0", "40"), entry([6, 2], 40, 88)), bytes(88), None),
    "offsets as nothing": (pair(entry([2, 5], None, None), entry([6, 2], 40, 88)), bytes(88), None),
    "offsets as fractions": (pair(entry([2, 5], 0.5, 40.5), entry([6, 2], 40, 88)), bytes(88), None),
    "a shape larger than the file": (pair(entry([1 << 40, 5], 0, 40), entry([6, 2], 40, 88)), bytes(88), None),
    "a shape below zero": (pair(entry([-2, -5], 0, 40), entry([6, 2], 40, 88)), bytes(88), None),
    "an infinite shape": (pair(entry([math.inf, 5], 0, 40), entry([6, 2], 40, 88)), bytes(88), None),
    "a shape that is a number": (pair(entry(10, 0, 40), entry([6, 2], 40, 88)), bytes(88), None),
    "a shape as text": (pair(entry("25", 0, 40), entry([6, 2], 40, 88)), bytes(88), None),
    "data behind the last tensor": (WHOLE, bytes(96), None),
    "a header longer than the file": (WHOLE, bytes(88), 1 << 20),
    "a header of 2^63 bytes": (WHOLE, bytes(88), (1 << 63) - 1),
    "a header of 2^64 bytes": (WHOLE, bytes(88), (1 << 64) - 1),
    "a header of no bytes": (WHOLE, bytes(88), 0),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers_are_refused(tmp_path: Path, case: str) -> None:
    refused(place_raw(tmp_path / "adapter", *HEADERS[case]))


@pytest.mark.parametrize("bit", range(0, 64, 5))
def test_a_flipped_bit_of_the_headers_length_is_noticed(tmp_path: Path, bit: int) -> None:
    folder = place(tmp_path / "adapter")
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (folder / WEIGHTS_FILE).write_bytes(content)
    refused(folder)


def test_a_truncated_file_is_noticed_at_every_length(tmp_path: Path) -> None:
    folder = place(tmp_path / "adapter")
    content = (folder / WEIGHTS_FILE).read_bytes()
    for length in [*range(24), *range(24, len(content), 17), len(content) - 1]:
        (folder / WEIGHTS_FILE).write_bytes(content[:length])
        refused(folder)


def test_a_file_without_tensors_is_an_empty_adapter(tmp_path: Path) -> None:
    folder = place_raw(tmp_path / "adapter", {})
    assert not peft_format.read(folder).updates


def test_a_pickle_alone_is_refused_unopened(tmp_path: Path) -> None:
    folder = place(tmp_path / "adapter")
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    refused(folder, "pickle")


FILES: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a folder": os.mkdir,
    "a link to a file": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_only_regular_files_are_opened(tmp_path: Path, name: str, case: str) -> None:
    folder = place(tmp_path / "adapter")
    (folder / name).rename(folder / "elsewhere")
    FILES[case](folder / name)
    refused(folder, "symbolic link" if "link" in case else "not a regular file")


def test_a_name_of_many_dots_does_not_take_long(tmp_path: Path) -> None:
    refused(place_raw(tmp_path / "adapter", {**WHOLE, "s." * 50_000: entry([0], 0, 0)}, bytes(88)), "neither a factor")


def test_many_modules_and_patterns_do_not_take_long(tmp_path: Path) -> None:
    """Every module against every pattern would take seconds."""
    shapes = {"A": [2, 0], "B": [0, 2]}
    modules = {f"m{i}.lora_{letter}.weight": entry(shapes[letter], 0, 0) for i in range(2_000) for letter in "AB"}
    folder = place_raw(tmp_path / "adapter", modules)
    (folder / CONFIG_FILE).write_text(json.dumps({**CONFIG, "rank_pattern": {f"p{i}": 2 for i in range(2_000)}}))
    begin = time.process_time()
    assert len(peft_format.read(folder).updates) == 2_000
    assert time.process_time() - begin < 2.0


def test_reading_runs_and_writes_nothing(tmp_path: Path) -> None:
    folder = place(tmp_path / "adapter", base_model_name_or_path="../../etc", auto_mapping={"a": "os.system"})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert peft_format.read(folder).base_model == "../../etc"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_written_file_is_plain_safetensors(tmp_path: Path) -> None:
    peft_format.write(uneven(), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert {key.removeprefix(PREFIX) for key in tensors} == {
        *(f"layers.{i}.{name}.lora_{letter}.weight" for i in (0, 1) for name in "qv" for letter in "AB"),
        *("score.weight", "score.bias"),
    }
