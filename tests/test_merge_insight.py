"""What is told of a merge: its plan against what it does, how its adapters lie to each other, what a merged one is."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import tiny
from lorica import tables
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank, zero
from lorica.adapters.outline import outline
from lorica.errors import AdapterFormatError, ConfigError, ShapeError
from lorica.merging import cost, diagnosis
from lorica.merging import method as methods
from lorica.merging import transform as transforms
from lorica.merging.audit import audit
from lorica.merging.diagnosis import diagnose
from lorica.merging.merge import Merged, Size, prepare, total_error
from lorica.merging.method import METHODS
from lorica.merging.plan import plan
from lorica.planning import peak_bytes

SHAPES = {f"model.layers.{layer}.{name}": (24 + 8 * layer, 40) for layer in range(3) for name in ("q_proj", "up_proj")}
HALVES = {"a": 0.5, "b": 0.5}


def lost(merged: Sequence[Merged]) -> float:
    """The relative error of all modules together."""
    return total_error([(each.error, each.norm or 0.0) for each in merged])


def adapter(seed: int, rank: int = 4, *, shapes: Mapping[str, tuple[int, int]] = SHAPES, scale: float = 2.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter({path: tiny.update(shape, rank, scale, generator) for path, shape in shapes.items()})


def pair(**options: Any) -> dict[str, Adapter]:
    return {"a": adapter(1, **options), "b": adapter(2, **options)}


def written(adapters: Mapping[str, Adapter], folder: Path) -> dict[str, Path]:
    for name, each in adapters.items():
        peft_format.write(each, folder / name)
    return {name: folder / name for name in adapters}


def dense(update: LowRank) -> Tensor:
    return update.to(torch.float64).dense()


def away(found: LowRank, expected: LowRank) -> float:
    return tiny.relative(dense(found), dense(expected))


def combined(adapters: Mapping[str, Adapter], weights: Mapping[str, float]) -> Adapter:
    total = Adapter({})
    for name, each in adapters.items():
        total = total + each * weights[name]
    return total


def printed(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


# ------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("size", [Size(), Size(rank=3)])
@pytest.mark.parametrize("name", METHODS.names())
def test_a_plan_says_what_the_merge_does(tmp_path: Path, name: str, size: Size) -> None:
    adapters, method = pair(), methods.load(name, {}, 2)
    grams = {path: (torch.eye(shape[1]),) * 2 for path, shape in SHAPES.items()} if method.needs_grams else None
    found = plan(written(adapters, tmp_path), method, size=size, num_workers=1)
    merged = list(prepare(adapters, method, size=size, grams=grams, num_workers=1).modules())
    assert [(each.path, each.rank, each.full_rank) for each in found.modules] == [
        (each.path, each.update.rank if isinstance(each.update, LowRank) else None, each.full_rank) for each in merged
    ]
    numbers = [
        (each.update.A, each.update.B) if isinstance(each.update, LowRank) else (each.update,) for each in merged
    ]
    assert found.written_bytes == sum(4 * number.numel() for each in numbers for number in each)
    if found.error is not None:
        assert found.error == pytest.approx(lost(merged), abs=1e-5)
    assert (found.error is None) == (size.rank is not None and (method.needs_grams or merged[0].full_rank is None))


@pytest.mark.parametrize("mode", ["common", "union"])
def test_a_plan_counts_files_modules_and_ranks(tmp_path: Path, mode: Any) -> None:
    few = dict(list(SHAPES.items())[1:])
    adapters = {"a": adapter(1, 4), "b": adapter(2, 6, shapes=few), "c": adapter(3, 4)}
    folders = written(adapters, tmp_path)
    found = plan(folders, methods.load("uniform_delta", {}, 3), mode=mode)
    first = next(iter(SHAPES))
    assert found.dropped == ((first,) if mode == "common" else ())
    assert found.modules[0].ranks == ((4, 6, 4) if mode == "common" else (4, 0, 4))
    assert [each.num_modules for each in found.sources] == [6, 5, 6]
    assert [each.ranks for each in found.sources] == [(4,), (6,), (4,)]
    assert found.read_bytes == sum((folder / peft_format.WEIGHTS_FILE).stat().st_size for folder in folders.values())
    assert found.memory.inputs_bytes == found.read_bytes
    assert found.memory.kept_bytes == found.written_bytes
    assert (found.error, found.num_sampled, found.needs) == (0.0, 0, ())


@pytest.mark.parametrize("size", [Size(energy=0.7), Size(rank_budget=14)])
@pytest.mark.parametrize("name", ["uniform_delta", "ties"])
def test_a_plan_of_ranks_that_headers_do_not_tell(tmp_path: Path, size: Size, name: str) -> None:
    adapters, method = pair(), methods.load(name, {}, 2)
    found = plan(written(adapters, tmp_path), method, size=size)
    assert not found.ranks_are_exact
    if name == "uniform_delta":  # six modules are few enough to look into all
        merged = list(prepare(adapters, method, size=size).modules())
        assert [each.rank for each in found.modules] == [
            each.update.rank for each in merged if isinstance(each.update, LowRank)
        ]
        assert found.error == pytest.approx(lost(merged), abs=1e-5)


@pytest.mark.parametrize("name", ["uniform_delta", "ties", "knots"])
def test_a_rank_budget_keeps_the_largest_of_all_singular_values(name: str) -> None:
    """And cuts each module just as if its rank had been asked for."""
    adapters, method = pair(), methods.load(name, {}, 2)
    whole = prepare(adapters, method, size=Size(rank_budget=14))
    kept = {each.path: each for each in whole.modules()}
    made = {each.path: each.update for each in prepare(adapters, method).modules()}
    matrices = {path: dense(each) if isinstance(each, LowRank) else each.double() for path, each in made.items()}
    values = [(float(value), path) for path, each in matrices.items() for value in torch.linalg.svdvals(each)]
    largest = [path for _, path in sorted(values, reverse=True)[:14]]
    for path, each in kept.items():
        assert isinstance(each.update, LowRank) and each.update.rank == largest.count(path)
        alone = prepare(adapters, method, size=Size(rank=each.update.rank)).module(path)
        assert isinstance(alone.update, LowRank) and each.error == pytest.approx(alone.error, abs=1e-5)
        assert tiny.relative(each.update.dense(), alone.update.dense()) < (1e-2 if name == "ties" else 1e-6)


@pytest.mark.parametrize("name", ["uniform_delta", "ties"])
def test_a_rank_budget_holds_no_module_between_its_two_looks(name: str) -> None:
    """Of many modules as much as of a few, but for the directions of dense ones."""
    shapes = {f"layers.{layer}.q": (128, 128) for layer in range(24)}
    merge = prepare(pair(shapes=shapes), methods.load(name, {}, 2), size=Size(rank_budget=24), num_workers=1)
    most = peak_bytes(lambda: deque(merge.modules(), maxlen=0).clear())
    one = 4 * (8 * 256 if name == "uniform_delta" else 128 * 128)  # bytes of what the method makes of a module
    directions = 0 if name == "uniform_delta" else 24 * 4 * 4 * 256
    assert most < 16 * one + directions


def test_a_plan_looks_into_a_few_modules_of_many(tmp_path: Path) -> None:
    many = {f"layers.{layer}.q": (16, 16) for layer in range(40)}
    adapters, method = pair(shapes=many), methods.load("uniform_delta", {}, 2)
    found = plan(written(adapters, tmp_path), method, size=Size(rank=4))
    error = lost(list(prepare(adapters, method, size=Size(rank=4)).modules()))
    assert found.num_sampled == 8
    assert found.error == pytest.approx(error, rel=0.1) and found.error != error


def test_a_plan_heeds_transforms_and_the_form_of_saving(tmp_path: Path) -> None:
    folders, method = written(pair(), tmp_path), methods.load("uniform_delta", {}, 2)
    trimmed = plan(folders, method, transforms=[transforms.load("trim", {})], as_factors=True)
    assert {(each.full_rank, each.rank) for each in trimmed.modules} == {(None, 8)}
    assert trimmed.needs == ("a look at all modules before the first, for trim",)
    assert plan(folders, methods.load("ties", {}, 2)).written_bytes == sum(4 * h * w for h, w in SHAPES.values())


@pytest.mark.parametrize(
    ("ranks", "options", "error", "message"),
    [
        ((4, 6), {}, ShapeError, "are a 4, b 6: use method=uniform_delta"),
        ((4, 4), {"weights": [1, 2]}, ConfigError, "no use for weights"),
    ],
)
def test_a_plan_refuses_what_the_merge_would(
    tmp_path: Path, ranks: Sequence[int], options: Any, error: type[Exception], message: str
) -> None:
    folders = written({"a": adapter(1, ranks[0]), "b": adapter(2, ranks[1])}, tmp_path)
    with pytest.raises(error, match=message):
        plan(folders, methods.load("uniform", {}, 2), **options)


def test_an_outline_is_the_adapter_without_its_numbers(tmp_path: Path) -> None:
    whole = Adapter(adapter(1).updates, {"score": {"weight": torch.ones(3, 5)}}, "base")
    found = outline(written({"a": whole}, tmp_path)["a"])
    for path, update in whole.updates.items():
        bare = found.adapter.updates[path]
        assert bare.A.is_meta and bare.B.is_meta
        assert (bare.shape, bare.rank, bare.scale) == (update.shape, update.rank, update.scale)
        assert away(found.load([path, "nowhere"])[path], update) == 0
    assert found.adapter.heads["score"]["weight"].shape == (3, 5)
    assert (found.adapter.base_model, found.adapter.num_parameters()) == ("base", whole.num_parameters())
    (tmp_path / "a" / peft_format.WEIGHTS_FILE).write_bytes(b"\0" * 20)
    with pytest.raises(AdapterFormatError):
        outline(tmp_path / "a")


def test_the_calibration_measures_something() -> None:
    speed = cost.calibrate()
    assert min(speed.flops_per_second, speed.bytes_per_second, speed.eigh_seconds) > 0
    work = cost.electing((64, 64), 8, 2, 1) + cost.compressing_dense((64, 64), 4)
    assert 0 < speed.seconds(work) < speed.seconds(work + cost.compressing((64, 64), 8, 4))


# -------------------------------------------------------------------------------------------------------- the diagnosis


def corner(start: int, stop: int, shape: tuple[int, int] = (12, 10), seed: int = 0) -> Adapter:
    """An update whose rows and columns outside of start:stop are zero."""
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.zeros(2, shape[1]), torch.zeros(shape[0], 2)
    A[:, start:stop] = torch.randn(2, stop - start, generator=generator)
    B[start:stop] = torch.randn(stop - start, 2, generator=generator)
    return Adapter({"q": LowRank(A, B)})


@pytest.mark.parametrize(
    ("second", "cosine", "conflict", "overlap", "advised"),
    [
        (corner(5, 10), 0, 0, 0, "method=uniform_scalar_delta"),
        (corner(0, 5), 1, 0, 1, "near duplicates"),
        (corner(0, 5) * -1.0, -1, 1, 1, "opposites"),
    ],
)
def test_orthogonal_identical_and_opposite_adapters(
    second: Adapter, cosine: float, conflict: float, overlap: float, advised: str
) -> None:
    found = diagnose({"a": corner(0, 5), "b": second})
    (both,) = found.pairs
    assert [both.cosine, both.left_overlap, both.right_overlap] == pytest.approx([cosine, overlap, overlap], abs=1e-12)
    assert both.sign_conflict == conflict
    assert any(advised in each for each in found.advice), found.advice


@pytest.mark.parametrize("limit", [diagnosis.SIGNED_ENTRIES, 900])
def test_a_diagnosis_against_dense_matrices(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(diagnosis, "SIGNED_ENTRIES", limit)
    adapters = {"a": adapter(1), "b": adapter(2, 6), "c": adapter(1) + adapter(3, 2) * 0.5}
    found = diagnose(adapters)
    matrices = {name: [dense(update).numpy() for update in each.updates.values()] for name, each in adapters.items()}
    flat = {name: np.concatenate([each.ravel() for each in parts]) for name, parts in matrices.items()}
    stride = -(-len(flat["a"]) // limit)
    assert found.row_stride == stride
    for each in found.pairs:
        one, other = flat[each.first], flat[each.second]
        assert each.cosine == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), abs=1e-6)
        signs = [
            np.concatenate([m[stride - 1 :: stride].ravel() for m in matrices[name]])
            for name in (each.first, each.second)
        ]
        assert each.sign_conflict == pytest.approx((np.sign(signs[0]) != np.sign(signs[1])).mean(), abs=1e-3)
        overlaps = np.mean(
            [_overlaps(*parts) for parts in zip(matrices[each.first], matrices[each.second], strict=True)], axis=0
        )
        assert [each.left_overlap, each.right_overlap] == pytest.approx(list(overlaps), abs=1e-5)
    for portrait in found.adapters:
        assert portrait.norm == pytest.approx(np.linalg.norm(flat[portrait.name]), rel=1e-6)
        sigma = [np.linalg.svd(each, compute_uv=False) for each in matrices[portrait.name]]
        shares = [each / each.sum() for each in sigma]
        expected = np.mean([np.exp(-(p * np.log(p + 1e-300)).sum()) for p in shares])
        assert portrait.effective_rank == pytest.approx(expected, rel=1e-4)


def _overlaps(one: Any, other: Any) -> tuple[float, float]:
    (U1, s1, V1), (U2, s2, V2) = np.linalg.svd(one), np.linalg.svd(other)
    r1, r2 = ((s > 1e-5 * s[0]).sum() for s in (s1, s2))
    squares = [(U1[:, :r1].T @ U2[:, :r2]) ** 2, (V1[:r1] @ V2[:r2].T) ** 2]
    return tuple(each.sum() / min(r1, r2) for each in squares)  # type: ignore[return-value]


def test_advice_on_sizes_ranks_zeros_and_conflicts() -> None:
    one = corner(0, 5)
    found = diagnose({"a": one * 10.0, "b": corner(5, 10), "c": one * 0.0, "d": adapter(1, 3, shapes={"q": (12, 10)})})
    said = " ".join(found.advice)
    assert all(words in said for words in ("c is zero", "layer_l2_normalize", "ranks differ")), said
    assert found.norm_imbalance == pytest.approx(
        max(p.norm for p in found.adapters) / min(p.norm for p in found.adapters if p.norm > 0)
    )
    (update,) = adapter(1, 2, shapes={"q": (12, 10)}).updates.values()
    mirrored = LowRank(update.A, update.B * torch.tensor([1.0, -1.0]))
    assert any(
        "elects signs" in each for each in diagnose({"a": Adapter({"q": update}), "b": Adapter({"q": mirrored})}).advice
    )


def test_advice_names_methods_and_transforms_that_there_are() -> None:
    source = Path(diagnosis.__file__).read_text("utf-8")
    assert set(re.findall(r"method=(\w+)", source)) <= set(METHODS.names())
    assert set(re.findall(r"transform=(\w+)", source)) <= set(transforms.TRANSFORMS.names())


# ------------------------------------------------------------------------------------------------------------ the audit


def test_the_exact_merge_is_told_with_its_weights() -> None:
    sources, weights = pair(), {"a": 0.3, "b": -0.7}
    found = audit(combined(sources, weights), sources, weights)
    assert found.distance == pytest.approx(0, abs=1e-7) and found.best_distance == 0
    assert found.coefficients == pytest.approx(weights)
    assert found.residual == pytest.approx(0, abs=1e-7)
    assert len(found.verdicts) == 1 and "the exact merge" in found.verdicts[0]
    half = Adapter({path: each.to(torch.bfloat16) for path, each in combined(sources, weights).updates.items()})
    assert "exact merge up to rounding" in audit(half, sources, weights).verdicts[0]


@pytest.mark.parametrize(
    ("factor", "scale", "cause"),
    [
        (2.0, 0.7, "the number of adapters"),
        (3.0, 3.0, "the scale, counted twice"),
        (1 / 3, 3.0, "the scale, which was left out"),
        (7**0.5, 0.3, "use_rslora"),
        (-1.3, 1.0, "-1.3 times"),
    ],
)
def test_a_common_factor_is_found_with_its_cause(factor: float, scale: float, cause: str) -> None:
    sources = pair(scale=scale, rank=7)
    found = audit(combined(sources, HALVES) * factor, sources, HALVES)
    assert found.distance == pytest.approx(abs(factor - 1), rel=1e-5)
    assert found.coefficients == pytest.approx({"a": factor / 2, "b": factor / 2})
    assert cause in found.verdicts[0]


def test_other_coefficients_are_found_even_where_sources_are_alike() -> None:
    sources = pair()
    found = audit(combined(sources, {"a": 0.9, "b": -0.2}), sources, HALVES)
    assert found.coefficients == pytest.approx({"a": 0.9, "b": -0.2})
    assert "other coefficients: a 0.9000, b -0.2000" in found.verdicts[0]
    alike = {"a": sources["a"], "b": sources["a"], "zero": sources["a"] * 0.0}
    found = audit(sources["a"] * 2.0, alike, [0.5, 0.5, 0.1])
    assert found.coefficients == pytest.approx({"a": 1.0, "b": 1.0, "zero": 0.1})


def test_a_mean_of_factors_is_named() -> None:
    sources = pair()
    found = audit(_adapter(prepare(sources, methods.load("uniform", {}, 2)).modules()), sources, HALVES)
    assert any("averaged apart" in each for each in found.verdicts)
    assert found.distance is not None and found.distance > 0.1


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_the_best_compression_is_told_from_a_worse_one(factor: float) -> None:
    sources = pair()
    best, errors = combined(sources, HALVES).compress(rank=3)
    found = audit(best * factor, sources, HALVES)
    assert "best compression" in found.verdicts[0]
    assert ("nothing wrong" in found.verdicts[0]) == (factor == 1)
    assert [each.best_distance for each in found.modules] == pytest.approx([*errors.values()], rel=1e-4)
    if factor == 1:
        assert found.distance == pytest.approx(found.best_distance, rel=1e-4)
    padded = {path: each + zero(each.shape, 9) for path, each in best.updates.items()}
    assert {each.rank for each in audit(Adapter(padded), sources, HALVES).modules} == {3}
    worse = Adapter({path: LowRank(each.A[1:], each.B[:, 1:], each.scale) for path, each in best.updates.items()})
    found = audit(worse, sources, HALVES)
    assert "not a sum of the sources" in found.verdicts[0] and "is possible" in found.verdicts[0]


def test_a_rule_on_entries_is_no_sum() -> None:
    sources = pair()
    merged = _adapter(prepare(sources, methods.load("ties", {}, 2), as_factors=True).modules())
    found = audit(merged, sources, HALVES)
    flat = [torch.cat([dense(each).flatten() for each in one.updates.values()]) for one in sources.values()]
    target = torch.cat([dense(each).flatten() for each in merged.updates.values()])
    solution = torch.linalg.lstsq(torch.stack(flat, dim=1), target[:, None]).solution.flatten()
    residual = torch.linalg.vector_norm(target - torch.stack(flat, dim=1) @ solution) / torch.linalg.vector_norm(target)
    assert [*found.coefficients.values()] == pytest.approx(solution.tolist(), rel=1e-4)
    assert found.residual == pytest.approx(float(residual), rel=1e-4)
    assert "not a sum of the sources" in found.verdicts[0]


def test_modules_missing_and_extra_are_named() -> None:
    sources = pair()
    (first, update), *others = combined(sources, HALVES).updates.items()
    found = audit(Adapter(dict(others) | {"elsewhere": update}), sources, HALVES)
    assert (found.missing, found.extra) == ((first,), ("elsewhere",))
    assert found.distance == pytest.approx(0, abs=1e-7)
    assert any("not merged" in each for each in found.verdicts)
    partial = {"a": sources["a"], "b": Adapter({first: sources["b"].updates[first]})}
    assert audit(combined(partial, HALVES), partial, HALVES).distance == pytest.approx(0, abs=1e-7)
    with pytest.raises(ShapeError, match="not its sources"):
        audit(Adapter({"elsewhere": update}), sources, HALVES)


def test_opposites_leave_nothing_to_be_near_to() -> None:
    one = adapter(1)
    sources = {"a": one, "b": one * -1.0}
    assert audit(one * 0.0, sources, HALVES).distance == 0
    found = audit(one, sources, HALVES)
    assert found.distance is None
    json.dumps(found.as_record(), allow_nan=False)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("combination", "options", "said"),
    [
        ("linear", {}, "√(weight · scale)"),
        ("cat", {}, "the exact merge"),
        ("svd", {"svd_rank": 3}, "nothing wrong"),
        ("ties", {"density": 0.5}, "not a sum of the sources"),
    ],
)
def test_what_peft_merges(tmp_path: Path, combination: str, options: Any, said: str) -> None:
    peft = pytest.importorskip("peft")
    base = tiny.model("llama", "causal", 50)
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    sources = {name: tiny.adapter(base, paths, seed=seed) for seed, name in enumerate("ab")}
    folders = written(sources, tmp_path)
    model = peft.PeftModel.from_pretrained(base, folders["a"], adapter_name="a")
    model.load_adapter(folders["b"], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "merged", combination_type=combination, **options)
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    found = audit(peft_format.read(tmp_path / "merged"), sources, {"a": 0.7, "b": 0.3})
    assert said in found.verdicts[0]


def test_all_three_are_printed_and_recorded(tmp_path: Path) -> None:
    sources = pair()
    planned = plan(written(sources, tmp_path), methods.load("uniform_delta", {}, 2), size=Size(rank=3))
    seen = diagnose(sources)
    audited = audit(combined(sources, HALVES).compress(rank=3)[0], sources, HALVES)
    for made in (planned, seen, audited):
        json.dumps(made.as_record(), allow_nan=False)
    assert "3, cut from 8" in printed(tables.merge_plan(planned))
    assert f"{seen.pairs[0].cosine:.4f}" in printed(tables.merge_diagnosis(seen))
    assert "nothing wrong" in printed(tables.merge_audit(audited))
    assert "told by the merge alone" in printed(tables.merge_plan(replace(planned, error=None)))


def _adapter(merged: Iterable[Merged]) -> Adapter:
    return Adapter({each.path: each.update for each in merged if isinstance(each.update, LowRank)})
