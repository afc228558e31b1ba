"""What merges call their adapters, and what tells one adapter from another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tiny
from lorica import config, runs
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.config import MergeConfig
from lorica.runs.sources import resolve


def write(folder: Path, seed: int) -> Path:
    update = tiny.update((12, 10), 2, 1.0, torch.Generator().manual_seed(seed))
    peft_format.write(Adapter({"layers.0.q": update}, base_model="base"), folder)
    return folder


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("a", "b"), ["a", "b"]),
        (("x/lora", "y/lora"), ["lora-x", "lora-y"]),
        (("x/same/lora", "y/same/lora"), ["lora", "lora-2"]),
        (("x/lora", "y/lora", "z/other"), ["lora-x", "lora-y", "other"]),
    ],
)
def test_adapters_are_called_the_same_in_any_order(tmp_path: Path, folders: tuple[str, ...], names: list[str]) -> None:
    words = [str(write(tmp_path / folder, seed)) for seed, folder in enumerate(folders)]
    assert [each.name for each in resolve(words, tmp_path)] == names
    assert [each.name for each in resolve(words[::-1], tmp_path)] == names[::-1]


def test_an_adapter_named_twice_is_numbered(tmp_path: Path) -> None:
    word = str(write(tmp_path / "a", 0))
    assert [each.name for each in resolve([word, word], tmp_path)] == ["a", "a-2"]


def test_random_masks_know_no_order_of_equal_names(tmp_path: Path) -> None:
    words = [str(write(tmp_path / folder / "lora", seed)) for seed, folder in enumerate("xy")]
    merged = []
    for number, adapters in enumerate((words, words[::-1])):
        out = tmp_path / f"out{number}"
        tree = {"adapters": adapters, "method": "dare", "output_dir": str(out)}
        runs.merge(config.check(MergeConfig, tree), Console(quiet=True))
        merged.append(peft_format.read(out).updates["layers.0.q"].dense())
    assert torch.allclose(*merged, atol=1e-6)


@pytest.mark.parametrize("key", ["lora_alpha", "use_rslora"])
def test_an_adapters_hash_is_of_its_scale_too(tmp_path: Path, key: str) -> None:
    word = write(tmp_path / "a", 0)
    (before,) = resolve([str(word)], tmp_path)
    hash_before = before.sha256
    path = word / peft_format.CONFIG_FILE
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, key: not tree[key] if key == "use_rslora" else 2 * tree[key]}))
    (after,) = resolve([str(word)], tmp_path)
    assert before.adapter.updates["layers.0.q"].norm() != after.adapter.updates["layers.0.q"].norm()
    assert hash_before != after.sha256
