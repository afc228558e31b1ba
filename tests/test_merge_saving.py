"""What a merge is saved as, and a merge on a live model: each is the base plus the merge, and nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from lorica import models
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.adapters.lora import LoraLinear
from lorica.errors import (
    AdapterFormatError,
    ConfigError,
    DataError,
    LoricaError,
    MissingPathError,
    ModelError,
    ShapeError,
)
from lorica.merging import method as methods
from lorica.merging import saving
from lorica.merging.checkpoint import INDEX
from lorica.merging.live import attach
from lorica.merging.merge import Merge, Merged, Size, prepare
from lorica.models import Base

METHODS: dict[str, dict[str, Any]] = {"uniform_delta": {}, "ties": {"scope": "module", "k": 50}}
TOLERANCE = 1e-5
SHARD = "12KB"  # of some 50 KB: every family gets several

Load = Callable[..., Base]
Folder = Callable[..., Path]


def merge_of(model: nn.Module, paths: list[str], method: str, scale: float = 1.0, **options: Any) -> Merge:
    """Two random adapters of different ranks under a method, nothing computed yet."""
    adapters = {name: tiny.adapter(model, paths, rank=seed, seed=seed) * scale for seed, name in ((2, "a"), (3, "b"))}
    return prepare(adapters, methods.load(method, METHODS[method], 2), num_workers=1, **options)


def linear(base: Base) -> list[str]:
    return models.target_modules(base, "all-linear")


@pytest.fixture
def sharded(load: Load, tmp_path: Path) -> Folder:
    """(family, dtype) -> a checkpoint in several shards; `bare` is its body alone, without its head and prefix."""

    def folder(family: str, dtype: str = "float32", bare: bool = False) -> Path:
        base = load(family, dtype=dtype)
        path = tmp_path / "base"
        model = getattr(base.model, base.model.base_model_prefix) if bare else base.model
        with models.quiet():
            model.save_pretrained(path, max_shard_size=SHARD)
            base.tokenizer.save_pretrained(path)
        assert len(list(path.glob("*.safetensors"))) > 2
        return path

    return folder


def loaded(folder: Path, kind: str, dtype: str = "float32") -> Base:
    num_labels = tiny.NUM_LABELS if kind == "classification" else None
    return models.load(str(folder), kind=kind, num_labels=num_labels, dtype=dtype)  # type: ignore[arg-type]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def fuse(merge: Merge, base: Path, target: Path) -> None:
    saving.fused_model(merge, base, target, models.placements(str(base)))


def refused(error: type[Exception], match: str, merge: Merge, base: Path, target: Path) -> None:
    """The merge is refused by an error of one line before anything is written or merged."""
    counting = Counted(**vars(merge))
    with pytest.raises(error, match=match) as caught:
        fuse(counting, base, target)
    assert "\n" not in str(caught.value)
    assert counting.calls == [] and not target.exists() and leftovers(target.parent) == []


def leftovers(folder: Path) -> list[str]:
    """Temporary files and staged folders."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


class Counted(Merge):
    """A merge that counts how many of its results are alive whenever it is asked for another."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        object.__setattr__(self, "calls", [])
        object.__setattr__(self, "alive", weakref.WeakSet())

    calls: list[tuple[str, int]]
    alive: Any

    def module(self, path: str) -> Merged:
        self.calls.append((path, len(self.alive)))
        made = super().module(path)
        for tensor in (made.update.A, made.update.B) if isinstance(made.update, LowRank) else (made.update,):
            self.alive.add(tensor)
        return made


# --- a whole model ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bert body", "t5"])
def test_a_fused_model_answers_as_the_base_with_the_merge(
    sharded: Folder, tmp_path: Path, family: str, method: str
) -> None:
    family, _, bare = family.partition(" ")
    kind = tiny.KINDS[family]
    folder = sharded(family, bare=bool(bare))
    base = loaded(folder, kind)
    merge = merge_of(base.model, linear(base), method)
    fuse(merge, folder, tmp_path / "fused")
    before = tiny.logits(base.model)
    with attach(base.model, merge.modules()):
        expected = tiny.logits(base.model)
    assert tiny.relative(expected, before) > 1e-2
    assert tiny.relative(tiny.logits(loaded(tmp_path / "fused", kind).model), expected) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_every_shard_is_the_bases_but_for_the_merged_bits(
    sharded: Folder, tmp_path: Path, family: str, method: str
) -> None:
    folder, target = sharded(family, "bfloat16"), tmp_path / "fused"
    model = loaded(folder, "causal", "bfloat16").model
    paths = linear(Base(model, None, "causal", ""))[::2]
    merge = merge_of(model, paths, method)
    fuse(merge, folder, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in folder.iterdir())
    for shard in folder.glob("*.safetensors"):
        assert header(target / shard.name) == header(shard)
    found, expected = tensors(target), tensors(folder)
    for path in paths:
        update = merge.module(path).update
        dense = update.dense() if isinstance(update, LowRank) else update
        weight = expected[f"{path}.weight"]
        assert weight.dtype == torch.bfloat16
        expected[f"{path}.weight"] = (weight.float() + (dense.T if family == "gpt2" else dense)).bfloat16()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert any(not torch.equal(found[f"{path}.weight"], tensors(folder)[f"{path}.weight"]) for path in paths)


def header(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: 8 + struct.unpack("<Q", content[:8])[0]]


@pytest.mark.parametrize("method", METHODS)
def test_one_modules_result_is_alive_at_a_time(sharded: Folder, tmp_path: Path, method: str) -> None:
    folder = sharded("llama")
    base = loaded(folder, "causal")
    merge = Counted(**vars(merge_of(base.model, linear(base), method)))
    layout = models.placements(str(folder))
    saving.fused_model(merge, folder, tmp_path / "fused", layout)
    assert sorted(path for path, _ in merge.calls) == sorted(merge.paths)
    shapes = {path: layout[path].shape for path in merge.paths}
    saving.dense_patch((merge.module(path) for path in merge.paths), shapes, tmp_path / "delta.safetensors")
    assert len(merge.calls) == 2 * len(merge.paths)
    assert {alive for _, alive in merge.calls} == {0}


def test_one_dense_result_is_alive_at_a_time_while_it_is_attached(load: Load) -> None:
    base = load("llama")
    merge = Counted(**vars(merge_of(base.model, linear(base), "ties")))
    attach(base.model, map(merge.module, merge.paths)).detach()
    assert {alive for _, alive in merge.calls} == {0}


def test_what_belongs_to_the_model_goes_along_and_nothing_else(sharded: Folder, tmp_path: Path) -> None:
    folder = sharded("llama")
    for name in ("LICENSE", "tokenizer.model", "modeling_own.py", "chat_template.jinja"):
        (folder / name).write_text(name)
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "pytorch_model.bin.index.json", "x.md"):
        (folder / name).write_text("not the model's")
    (folder / "original.json").mkdir()
    base = loaded(folder, "causal")
    fuse(merge_of(base.model, linear(base)[:1], "uniform_delta"), folder, tmp_path / "fused")
    found = {path.name for path in (tmp_path / "fused").iterdir()}
    assert {"LICENSE", "tokenizer.model", "modeling_own.py", "chat_template.jinja", "config.json", INDEX} <= found
    assert not found & {"training_args.bin", "optimizer.pt", "trainer_state.json", "x.md", "original.json"}
    assert "pytorch_model.bin.index.json" not in found


def test_a_model_in_one_file_needs_no_index(tiny_models: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_models("llama"), folder)
    (folder / INDEX).write_text("of another save, and not what transformers reads")
    base = loaded(folder, "causal")
    fuse(merge_of(base.model, linear(base), "uniform_delta"), folder, tmp_path / "fused")
    assert {path.name for path in (tmp_path / "fused").iterdir()} == {path.name for path in folder.iterdir()} - {INDEX}


def test_integers_beside_the_weights_are_kept(tiny_models: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_models("bert"), folder)
    kept = load_file(folder / "model.safetensors") | {"bert.embeddings.position_ids": torch.arange(128)[None]}
    save_file(kept, folder / "model.safetensors")
    base = loaded(folder, "classification")
    fuse(merge_of(base.model, linear(base), "uniform_delta"), folder, tmp_path / "fused")
    assert torch.equal(tensors(tmp_path / "fused")["bert.embeddings.position_ids"], torch.arange(128)[None])


# --- what is refused before anything is written ---


INDICES: dict[str, tuple[object, type[LoricaError], str]] = {
    "a shard above": ({"weight_map": {"a": "../model.safetensors"}}, ModelError, "'../model.safetensors'"),
    "a shard inside": ({"weight_map": {"a": "sub/model.safetensors"}}, ModelError, "'sub/model.safetensors'"),
    "an absolute shard": ({"weight_map": {"a": "/etc/model.safetensors"}}, ModelError, "'/etc/model.safetensors'"),
    "a pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, ModelError, "pytorch_model.bin"),
    "a number": ({"weight_map": {"a": 3}}, ModelError, "3 is not the name"),
    "a dot": ({"weight_map": {"a": "."}}, ModelError, "'.' is not the name"),
    "a missing shard": ({"weight_map": {"a": "gone.safetensors"}}, MissingPathError, "gone.safetensors"),
    "no weight_map": ({"metadata": {}}, ModelError, "no weight_map"),
    "an empty weight_map": ({"weight_map": {}}, ModelError, "no table"),
    "a list": ([1, 2], ModelError, "no weight_map"),
    "a weight_map that is a list": ({"weight_map": ["model.safetensors"]}, ModelError, "no table"),
    "no JSON": ("{", ModelError, "no weight_map"),
    "nesting": ("[" * 100_000, ModelError, "no weight_map"),
}


@pytest.mark.parametrize("case", INDICES)
def test_hostile_indices_are_refused(sharded: Folder, tmp_path: Path, case: str) -> None:
    folder = sharded("llama")
    base = loaded(folder, "causal")
    merge = merge_of(base.model, linear(base), "uniform_delta")
    content, error, match = INDICES[case]
    (tmp_path / "model.safetensors").write_bytes(next(folder.glob("*.safetensors")).read_bytes())
    (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))
    refused(error, match, merge, folder, tmp_path / "fused")


def test_an_index_that_sends_a_key_to_another_shard_is_refused(sharded: Folder, tmp_path: Path) -> None:
    folder = sharded("llama")
    base = loaded(folder, "causal")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    merge = merge_of(base.model, linear(base), "uniform_delta")
    refused(ModelError, r"does not hold 'model.norm.weight'", merge, folder, tmp_path / "fused")


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-", INDEX])
def test_links_and_pipes_in_the_base_are_refused(sharded: Folder, tmp_path: Path, name: str) -> None:
    folder = sharded("llama")
    base = loaded(folder, "causal")
    merge, layout = merge_of(base.model, linear(base), "uniform_delta"), models.placements(str(folder))
    file = next(folder.glob(name + "*"))
    file.rename(tmp_path / "elsewhere")
    for place in (lambda: file.symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(file)):
        place()
        with pytest.raises(DataError, match=r"symbolic link|regular file"):
            saving.fused_model(merge, folder, tmp_path / "fused", layout)
        assert not (tmp_path / "fused").exists()
        file.unlink()


def test_the_hubs_cache_is_read_and_a_link_out_of_it_is_not(sharded: Folder, tmp_path: Path) -> None:
    folder = sharded("llama")
    blobs, snapshot = tmp_path / "models--some--base" / "blobs", tmp_path / "models--some--base" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    base = loaded(snapshot, "causal")
    merge = merge_of(base.model, linear(base), "uniform_delta")
    fuse(merge, snapshot, tmp_path / "fused")
    assert not any(path.is_symlink() for path in (tmp_path / "fused").iterdir())
    fuse(merge, folder, tmp_path / "expected")
    assert all(
        torch.equal(each, tensors(tmp_path / "expected")[key]) for key, each in tensors(tmp_path / "fused").items()
    )
    (snapshot / "LICENSE").symlink_to("/etc/hostname")
    with pytest.raises(DataError, match="out of the hub's cache"):
        fuse(merge, snapshot, tmp_path / "other")


def test_a_checkpoint_of_the_hub_that_is_not_there_is_told_in_one_line() -> None:
    with pytest.raises(ModelError, match="some/base") as caught:
        models.checkpoint_folder("some/base")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_folder_is_itself(tiny_models: Folder) -> None:
    assert models.checkpoint_folder(str(tiny_models("llama"))) == tiny_models("llama")


def test_a_base_in_pickles_is_refused(sharded: Folder, tmp_path: Path) -> None:
    folder = sharded("llama")
    base = loaded(folder, "causal")
    merge = merge_of(base.model, linear(base), "uniform_delta")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    refused(MissingPathError, "model.safetensors", merge, folder, tmp_path / "fused")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(ConfigError, r"pytorch_model.bin.*save_pretrained", merge, folder, tmp_path / "fused")
    with pytest.raises(MissingPathError, match="nowhere"):
        saving.fused_model(merge, tmp_path / "nowhere", tmp_path / "fused", models.placements(str(folder)))


def test_a_corrupt_shard_is_refused(sharded: Folder, tmp_path: Path) -> None:
    folder = sharded("llama")
    base = loaded(folder, "causal")
    merge = merge_of(base.model, linear(base), "uniform_delta")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-4])
    refused(ModelError, f"{last.name} is corrupt", merge, folder, tmp_path / "fused")


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite a checkpoint as one file with its tensors edited."""
    found = tensors(folder)
    edit(found)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(found, folder / "model.safetensors")


QUERY = "model.layers.0.self_attn.q_proj"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], type[LoricaError], str]] = {
    "no weight": (lambda found: found.pop(f"{QUERY}.weight"), ModelError, f"no tensor for {QUERY}"),
    "a weight with and without prefix": (
        lambda found: found.update({f"{QUERY}.weight".removeprefix("model."): torch.ones(32, 32)}),
        ModelError,
        f"more than one tensor for {QUERY}: {QUERY}.weight in .* and {QUERY.removeprefix('model.')}.weight in",
    ),
    "a quantised weight": (
        lambda found: found.update({f"{QUERY}.weight": torch.ones(32, 32, dtype=torch.uint8)}),
        ModelError,
        f"{QUERY}.weight in .* is U8",
    ),
    "an 8-bit float": (
        lambda found: found.update({f"{QUERY}.weight": torch.ones(32, 32).to(torch.float8_e4m3fn)}),
        ModelError,
        f"{QUERY}.weight in .* is F8",
    ),
    "a weight of another shape": (
        lambda found: found.update({f"{QUERY}.weight": torch.ones(32, 31)}),
        ShapeError,
        rf"{QUERY} as \(32, 32\).*\(32, 31\)",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_module_without_its_one_weight_is_refused(sharded: Folder, tmp_path: Path, case: str) -> None:
    folder = sharded("llama")
    base = loaded(folder, "causal")
    edit, error, match = TENSORS[case]
    change(folder, edit)  # type: ignore[arg-type]
    refused(error, match, merge_of(base.model, linear(base), "uniform_delta"), folder, tmp_path / "fused")


def test_a_weight_in_two_shards_is_refused(sharded: Folder, tmp_path: Path) -> None:
    folder = sharded("llama")
    base = loaded(folder, "causal")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | {f"{QUERY}.weight": torch.ones(32, 32)}, first)
    save_file(load_file(second) | {f"{QUERY}.weight": torch.ones(32, 32)}, second)
    merge = merge_of(base.model, linear(base), "uniform_delta")
    refused(ModelError, f"{first.name}.*{second.name}", merge, folder, tmp_path / "fused")


def test_a_module_that_the_base_lacks_or_ties_is_refused(sharded: Folder, tmp_path: Path) -> None:
    folder = sharded("gpt2")
    base = loaded(folder, "causal")
    tied = merge_of(base.model, ["lm_head"], "uniform_delta")
    refused(ModelError, "lm_head shares its weight with transformer.wte.weight", tied, folder, tmp_path / "fused")
    other = merge_of(nn.ModuleDict({"elsewhere": nn.Linear(3, 4)}), ["elsewhere"], "uniform_delta")
    refused(AdapterFormatError, "'elsewhere', which the model does not have", other, folder, tmp_path / "fused")


def test_what_cannot_be_meant_is_refused(sharded: Folder, tmp_path: Path) -> None:
    folder = sharded("llama")
    base = loaded(folder, "causal")
    merge = merge_of(base.model, linear(base), "uniform_delta")
    for target in (folder, tmp_path, folder / ".." / "base"):
        with pytest.raises(ConfigError, match="holds the base model"):
            fuse(merge, folder, target)
    budget = merge_of(base.model, linear(base), "uniform_delta", size=Size(rank_budget=20))
    refused(ConfigError, "rank_budget=20", budget, folder, tmp_path / "fused")


# --- what fails half way ---


def test_an_overflow_is_an_error_and_leaves_nothing(sharded: Folder, tmp_path: Path) -> None:
    folder = sharded("llama", "float16")
    base = loaded(folder, "causal")
    merge = merge_of(base.model, linear(base), "uniform_delta", scale=1e6)
    with pytest.raises(ModelError, match=r"overflows torch.float16"):
        fuse(merge, folder, tmp_path / "fused")
    assert not (tmp_path / "fused").exists() and leftovers(tmp_path) == []


class Failing(Merge):
    """A merge whose last module cannot be made."""

    def module(self, path: str) -> Merged:
        if path == self.paths[-1]:
            raise RuntimeError("in the middle")
        return super().module(path)


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_the_middle_leaves_what_was_there(sharded: Folder, tmp_path: Path, method: str) -> None:
    folder = sharded("llama")
    base = loaded(folder, "causal")
    merge = Failing(**vars(merge_of(base.model, linear(base), method)))
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "old").write_text("old")
    (tmp_path / "delta.safetensors").write_text("old")
    layout = models.placements(str(folder))
    shapes = {path: layout[path].shape for path in merge.paths}
    with pytest.raises(RuntimeError, match="in the middle"):
        saving.fused_model(merge, folder, tmp_path / "fused", layout)
    with pytest.raises(RuntimeError, match="in the middle"):
        saving.dense_patch(map(merge.module, merge.paths), shapes, tmp_path / "delta.safetensors")
    with untouched(base.model), pytest.raises(RuntimeError, match="in the middle"):
        attach(base.model, map(merge.module, merge.paths))
    assert [path.name for path in (tmp_path / "fused").iterdir()] == ["old"]
    assert (tmp_path / "delta.safetensors").read_text() == "old" and leftovers(tmp_path) == []


# --- a dense patch ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_a_patch_comes_back(load: Load, tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    base = load("gpt2")
    merge = merge_of(base.model, linear(base), method)
    shapes = {path: injection.linear_modules(base.model)[path] for path in reversed(merge.paths)}
    path = tmp_path / "delta.safetensors"
    saving.dense_patch(merge.modules(), shapes, path, dtype)
    found = saving.read_dense_patch(path)
    assert set(found) == set(merge.paths) and not leftovers(tmp_path)
    for each in merge.modules():
        dense = each.update.dense() if isinstance(each.update, LowRank) else each.update
        assert torch.equal(found[each.path], dense.to(dtype))


def test_a_patch_is_just_the_modules_that_were_announced(load: Load, tmp_path: Path) -> None:
    base = load("llama")
    merge = merge_of(base.model, linear(base), "uniform_delta")
    modules = list(merge.modules())
    shapes = {each.path: tuple(each.update.shape) for each in modules}
    first = modules[0].path
    cases: list[tuple[list[Merged], Mapping[str, tuple[int, ...]], str]] = [
        (modules[1:], shapes, f"does not give {first}"),
        ([*modules, modules[0]], shapes, f"gives {first} twice"),
        (modules, {path: shape for path, shape in shapes.items() if path != first}, "not among"),
        (modules, {**shapes, first: (5, 5)}, r"not \(5, 5\)"),
    ]
    for given, announced, match in cases:
        with pytest.raises(ShapeError, match=match):
            saving.dense_patch(given, announced, tmp_path / "delta.safetensors")
    with pytest.raises(ConfigError, match="int32"):
        saving.dense_patch(modules, shapes, tmp_path / "delta.safetensors", torch.int32)
    huge = [Merged(first, torch.full(shapes[first], 1e6), None)]
    with pytest.raises(ModelError, match=f"{first} .*float16"):
        saving.dense_patch(huge, {first: shapes[first]}, tmp_path / "delta.safetensors", torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_patch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    with pytest.raises(MissingPathError):
        saving.read_dense_patch(path)
    for content, match in (({"a": torch.ones(3)}, r"'a' is \(3,\)"), ({"a": torch.ones(3, 3).long()}, "I64")):
        save_file(content, path)
        with pytest.raises(AdapterFormatError, match=match):
            saving.read_dense_patch(path)
    save_file({"a": torch.ones(3, 3)}, path)
    whole = path.read_bytes()
    for length in (0, 4, 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterFormatError, match=r"truncated|corrupt"):
            saving.read_dense_patch(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(AdapterFormatError, match="corrupt"):
        saving.read_dense_patch(path)


# --- an adapter ---


def test_a_low_rank_merge_is_an_adapter_and_a_dense_one_is_not(load: Load) -> None:
    base = load("llama")
    paths = linear(base)
    merge = merge_of(base.model, paths, "uniform_delta")
    found = saving.adapter(merge.modules())
    expected = sum((each * 0.5 for each in merge.adapters), Adapter({}))
    assert (found - expected).norm() < TOLERANCE * expected.norm()
    with pytest.raises(ShapeError, match=f"{paths[0]} is dense.*rank=.*save=dense.*save=model"):
        saving.adapter(merge_of(base.model, paths, "ties").modules())
    assert saving.adapter(merge_of(base.model, paths, "ties", size=Size(rank=3)).modules()).updates[paths[0]].rank == 3


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_peft_reads_an_exported_merge(load: Load, tmp_path: Path, family: str, method: str) -> None:
    peft = pytest.importorskip("peft")
    base = load(family)
    merge = merge_of(base.model, linear(base), method, size=Size(rank=5))
    peft_format.write(
        saving.adapter(merge.modules()), tmp_path / "merged", fan_in_fan_out=models.is_transposed(base, merge.paths)
    )
    with attach(base.model, merge.modules()):
        expected = tiny.logits(base.model)
    assert tiny.relative(expected, tiny.logits(base.model)) > 1e-2
    theirs = peft.PeftModel.from_pretrained(load(family).model, tmp_path / "merged").eval()
    assert tiny.relative(tiny.logits(theirs), expected) < TOLERANCE


def by_every_method(name: str, base: Base, as_factors: bool) -> Merge:
    """Two adapters of one rank under the method's defaults; inputs, where it needs them, are white."""
    paths, method = linear(base), methods.load(name, {}, 2)
    adapters = {each: tiny.adapter(base.model, paths, rank=3, seed=seed) for seed, each in ((2, "a"), (3, "b"))}
    grams = {path: (torch.eye(update.shape[1]),) * 2 for path, update in adapters["a"].updates.items()}
    return prepare(adapters, method, grams=grams if method.needs_grams else None, as_factors=as_factors, num_workers=1)


@pytest.mark.parametrize("name", methods.METHODS.names())
def test_every_methods_adapter_states_the_error_that_is_measured(load: Load, tmp_path: Path, name: str) -> None:
    base = load("llama")
    made = {each.path: each.update for each in by_every_method(name, base, as_factors=False).modules()}
    kept = list(by_every_method(name, base, as_factors=True).modules())
    peft_format.write(saving.adapter(kept), tmp_path / "merged")
    reloaded = peft_format.read(tmp_path / "merged").updates
    for each in kept:
        update = made[each.path]
        exact = update.dense() if isinstance(update, LowRank) else update
        lost, norm = (
            float(torch.linalg.vector_norm(matrix)) for matrix in (reloaded[each.path].dense() - exact, exact)
        )
        assert lost == pytest.approx(each.error * norm, abs=1e-5)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", methods.METHODS.names())
def test_peft_reads_every_methods_adapter(load: Load, tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    base = load("llama")
    merge = by_every_method(name, base, as_factors=True)
    peft_format.write(saving.adapter(merge.modules()), tmp_path / "merged")
    with attach(base.model, merge.modules()):
        expected = tiny.logits(base.model)
    theirs = peft.PeftModel.from_pretrained(load("llama").model, tmp_path / "merged").eval()
    assert tiny.relative(tiny.logits(theirs), expected) < TOLERANCE


# --- a merge on a live model ---


class untouched:
    """Within the block the model may change; after it, its modules, parameters, bits and flags are the very same."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modules = dict(self.model.named_modules())
        self.parameters = dict(self.model.named_parameters())
        self.bits = {name: each.detach().clone() for name, each in self.parameters.items()}
        self.flags = {name: each.requires_grad for name, each in self.parameters.items()}

    def __exit__(self, *failure: Any) -> None:
        modules, parameters = dict(self.model.named_modules()), dict(self.model.named_parameters())
        assert list(modules) == list(self.modules) and list(parameters) == list(self.parameters)
        assert all(modules[name] is each for name, each in self.modules.items())
        assert all(parameters[name] is each for name, each in self.parameters.items())
        assert all(torch.equal(parameters[name], each) for name, each in self.bits.items())
        assert {name: each.requires_grad for name, each in parameters.items()} == self.flags


def mixed(model: nn.Module, paths: list[str]) -> Iterator[Merged]:
    """Low-rank and dense updates in turn."""
    low, dense = merge_of(model, paths[::2], "uniform_delta"), merge_of(model, paths[1::2], "ties")
    yield from low.modules()
    yield from dense.modules()


MERGES: dict[str, Callable[[nn.Module, list[str]], Iterator[Merged]]] = {
    "low-rank": lambda model, paths: merge_of(model, paths, "uniform_delta").modules(),
    "dense": lambda model, paths: merge_of(model, paths, "ties").modules(),
    "mixed": mixed,
}


@pytest.mark.parametrize("case", MERGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_merge_comes_off_without_a_trace(load: Load, family: str, dtype: str, case: str) -> None:
    base = load(family, dtype=dtype)
    base.model.get_submodule(linear(base)[0]).requires_grad_(True)
    before = tiny.logits(base.model)
    with untouched(base.model):
        attached = attach(base.model, MERGES[case](base.model, linear(base)))
        merged = tiny.logits(base.model)
        attached.detach()
        attached.detach()
    assert torch.equal(tiny.logits(base.model), before) and tiny.relative(merged, before) > 1e-2
    with untouched(base.model):
        with attach(base.model, MERGES[case](base.model, linear(base))):
            assert torch.equal(tiny.logits(base.model), merged)
        with pytest.raises(KeyError), attach(base.model, MERGES[case](base.model, linear(base))):
            raise KeyError


@pytest.mark.parametrize("case", MERGES)
def test_a_live_merge_is_the_base_plus_the_merge(load: Load, case: str) -> None:
    base = load("gpt2")
    expected = load("gpt2").model
    modules = list(MERGES[case](base.model, linear(base)))
    with torch.no_grad():
        for each in modules:
            dense = each.update.dense() if isinstance(each.update, LowRank) else each.update
            expected.get_submodule(each.path).weight.add_(dense.T)
    with attach(base.model, modules):
        assert tiny.relative(tiny.logits(base.model), tiny.logits(expected)) < TOLERANCE


def test_a_merge_that_does_not_fit_leaves_the_model_alone(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("llama")
    paths = linear(base)
    good = list(mixed(base.model, paths))
    wrong = {
        "which the model does not have": Merged("elsewhere", torch.ones(3, 3), None),
        "and the model has": Merged(paths[0], torch.ones(3, 3), None),
        "NaN or infinity": Merged(paths[0], torch.full((32, 32), torch.nan), None),
    }
    for match, each in wrong.items():
        with untouched(base.model), pytest.raises(LoricaError, match=match):
            attach(base.model, [*good, each])
    build, layers = LoraLinear.__init__, []

    def out_of_memory(layer: LoraLinear, *arguments: Any) -> None:
        layers.append(layer)
        if len(layers) > 3:
            raise MemoryError
        build(layer, *arguments)

    monkeypatch.setattr(LoraLinear, "__init__", out_of_memory)
    with untouched(base.model.requires_grad_(True)), pytest.raises(MemoryError):
        attach(base.model, good)


def test_a_tied_weight_is_changed_for_its_own_module_alone(load: Load) -> None:
    base = load("gpt2")
    embedding = base.model.transformer.wte.weight
    with attach(base.model, merge_of(base.model, ["lm_head"], "ties").modules()):
        assert base.model.lm_head.weight is not embedding and base.model.transformer.wte.weight is embedding
    assert base.model.lm_head.weight is embedding
