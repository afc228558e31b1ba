"""The merges that are sums of updates or of factors, against dense formulas in float64; and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from lorica.adapters.delta import LowRank, zero
from lorica.errors import ConfigError, ShapeError, UnknownNameError
from lorica.merging import method as methods
from lorica.merging.method import Module, Site, Update

SHAPE = (40, 24)
PATH = "model.layers.3.self_attn.q_proj"
NAMES = ("sst2", "rte", "mrpc", "squad")
THIRD = {"layer_task_coefficients": {3: {"rte": 0.1}}}


def made(num_adapters: int, ranks: Sequence[int] = (3, 5, 2, 4), seed: int = 0) -> list[LowRank]:
    """Updates with something in common, so that no angle between them is a right one."""
    generator = torch.Generator().manual_seed(seed)
    common = tiny.update(SHAPE, 1, 1.0, generator)
    own = [tiny.update(SHAPE, rank - 1, 0.5 * rank, generator) for rank in ranks[:num_adapters]]
    return [common * (0.5 + number) + each for number, each in enumerate(own)]


def merged(
    name: str,
    updates: Sequence[Update],
    params: Mapping[str, Any] | None = None,
    *,
    path: str = PATH,
    weights: Sequence[float] | None = None,
) -> Update:
    method = methods.load(name, params or {}, len(updates))
    return method(Module(Site(path, NAMES[: len(updates)]), updates, weights or [1.0] * len(updates)))


def dense(update: Update) -> Tensor:
    return update.to(torch.float64).dense() if isinstance(update, LowRank) else update.double()


def total(coefficients: Sequence[float], updates: Sequence[Update]) -> Tensor:
    """Σ c_i·Δ_i, dense."""
    return torch.stack([c * dense(each) for c, each in zip(coefficients, updates, strict=True)]).sum(dim=0)


def assert_equal(found: Update, expected: Tensor) -> None:
    torch.testing.assert_close(dense(found), expected, rtol=0, atol=2e-6 * float(expected.norm()))


def cosine(left: Update, right: Update) -> float:
    return float((dense(left) * dense(right)).sum() / (dense(left).norm() * dense(right).norm()))


def rank_of(update: Update) -> int:
    assert isinstance(update, LowRank)
    return update.rank


@pytest.mark.parametrize(("name", "params"), [("task_vector", {}), ("uniform_scalar_delta", {"scale": 0.3})])
def test_weights_count_in_a_sum(name: str, params: dict[str, float]) -> None:
    weights = [0.5, 2.0, -1.0]
    shares = [weight * params.get("scale", 1 / 3) for weight in weights]
    found = merged(name, made(3), params, weights=weights)
    assert_equal(found, total(shares, made(3)))
    assert rank_of(found) == 10


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_two_updates_interpolated(share: float) -> None:
    found = merged("weighted_delta", made(2), {"lambda": share})
    assert_equal(found, total([share, 1 - share], made(2)))
    assert rank_of(found) == 8


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_two_adapters_factors_interpolated(share: float) -> None:
    first, second = made(2, ranks=(4, 4))
    found = merged("weighted", [first * 3.0, second], {"lambda": share})
    A = share * first.A.double() + (1 - share) * second.A.double()
    B = share * 3 * first.B.double() * first.scale + (1 - share) * second.B.double() * second.scale
    assert_equal(found, B @ A)
    assert rank_of(found) == 4


def test_mean_of_factors() -> None:
    updates = [each * (1 + number) for number, each in enumerate(made(3, ranks=(4, 4, 4)))]
    found = merged("uniform", updates)
    A = torch.stack([each.A.double() for each in updates]).mean(dim=0)
    B = torch.stack([each.scale * each.B.double() for each in updates]).mean(dim=0)
    assert_equal(found, B @ A)
    assert rank_of(found) == 4


@pytest.mark.parametrize(("name", "exact"), [("uniform", "uniform_delta"), ("weighted", "weighted_delta")])
def test_factors_of_unequal_ranks_are_refused_with_a_way_out(name: str, exact: str) -> None:
    with pytest.raises(ShapeError, match=f"sst2 3, rte 5: use method={exact}"):
        merged(name, made(2))
    assert methods.METHODS.load(name, "APPROXIMATES") == exact


@pytest.mark.parametrize(
    ("params", "path", "expected"),
    [
        ({}, PATH, (1 / 3, 1 / 3, 1 / 3)),
        ({"task_coefficients": {"rte": 0.5}}, PATH, (1 / 3, 0.5, 1 / 3)),
        ({"task_coefficients": {"rte": 0.5}, "default_task_coefficients": {"rte": 0.2}}, PATH, (1 / 3, 0.2, 1 / 3)),
        (THIRD | {"default_task_coefficients": {"rte": 0.2, "sst2": 1}}, PATH, (1, 0.1, 1 / 3)),
        (THIRD, "model.layers.2.self_attn.q_proj", (1 / 3, 1 / 3, 1 / 3)),
        (THIRD, "lm_head", (1 / 3, 1 / 3, 1 / 3)),
        ({"layer_task_coefficients": {"3": {"rte": 0.1}}}, PATH, (1 / 3, 0.1, 1 / 3)),
        ({"layer_task_coefficients": {0: {"rte": 0.1}}}, "0.weight", (1 / 3, 0.1, 1 / 3)),
        ({"layer_task_coefficients": {3: {"rte": 0.1}, "model.layers.3": {"rte": 0.9}}}, PATH, (1 / 3, 0.9, 1 / 3)),
        ({"layer_task_coefficients": {"decoder.3": {"rte": 0.9}}}, PATH, (1 / 3, 1 / 3, 1 / 3)),
        ({"allow_negative_coefficients": True, "task_coefficients": {"rte": -0.5}}, PATH, (1 / 3, -0.5, 1 / 3)),
        ({"allow_unbounded": True, "task_coefficients": {"rte": -7, "sst2": 3}}, PATH, (3, -7, 1 / 3)),
    ],
)
def test_coefficients_by_adapter_and_layer(params: dict[str, Any], path: str, expected: Sequence[float]) -> None:
    plain = merged("weighted_delta_n", made(3), {**params, "normalize_coefficients": False}, path=path)
    assert_equal(plain, total(expected, made(3)))
    normalized = merged("weighted_delta_n", made(3), params, path=path)
    assert_equal(normalized, total(expected, made(3)) / sum(expected))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"task_coefficients": {"rte": 1.5}}, r"task_coefficients\.rte=1\.5 is not in \[0, 1\]: allow_unbounded=true"),
        (
            {"default_task_coefficients": {"rte": -0.5}},
            r"default_task_coefficients\.rte=-0\.5 is not in \[0, 1\]: allow_negative_coefficients=true",
        ),
        (
            {"layer_task_coefficients": {3: {"rte": -2}}, "allow_negative_coefficients": True},
            r"layer_task_coefficients\.3\.rte=-2\.0 is not in \[-1, 1\]: allow_unbounded=true",
        ),
        ({"layer_task_coefficients": {3: {}, "3": {}}}, r"layer_task_coefficients\.3 is given twice"),
        ({"task_coefficients": {"rte": math.nan}, "allow_unbounded": True}, "finite"),
    ],
)
def test_coefficients_that_are_refused_before_any_merge(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.load("weighted_delta_n", params, 2)


def test_a_coefficient_for_no_adapter_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"layer_task_coefficients\.9\.sst=0\.1: .*did you mean sst2"):
        merged("weighted_delta_n", made(2), {"layer_task_coefficients": {9: {"sst": 0.1}}})


@pytest.mark.parametrize("coefficients", [(0.0, 0.0, 0.0), (0.1, 0.2, -0.3)])
def test_normalising_by_zero_is_refused(coefficients: Sequence[float]) -> None:
    params = {"task_coefficients": dict(zip(NAMES, coefficients, strict=False)), "allow_negative_coefficients": True}
    with pytest.raises(ConfigError, match=r"q_proj it is .*sst2=0.*normalize_coefficients=false"):
        merged("weighted_delta_n", made(3), params)
    found = merged("weighted_delta_n", made(3), {**params, "normalize_coefficients": False})
    torch.testing.assert_close(dense(found), total(coefficients, made(3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("layer", "is_known"), [(3, True), ("model.layers.3", True), (4, False), ("encoder.3", False)])
def test_a_coefficient_for_no_layer_is_refused(layer: int | str, is_known: bool) -> None:
    class OneModule:
        def map(self, function: Callable[[Module], Any]) -> list[Any]:
            return [function(Module(Site(PATH, NAMES[:2]), made(2), [1.0, 1.0]))]

    method = methods.load("weighted_delta_n", {"layer_task_coefficients": {layer: {}}}, 2)
    if is_known:
        assert method.surveyed(OneModule()) is None
    else:
        with pytest.raises(ConfigError, match=rf"layer {layer}, and the adapters' layers are \[3\]"):
            method.surveyed(OneModule())


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_interpolation_along_the_arc(t: float) -> None:
    first, second = made(2)
    angle = math.acos(cosine(first, second))
    expected = total([math.sin((1 - t) * angle), math.sin(t * angle)], [first, second]) / math.sin(angle)
    found = merged("slerp", [first, second], {"t": t})
    assert_equal(found, expected)
    assert rank_of(found) == 8


@pytest.mark.parametrize("other", [1.0, 2.0, -0.5, 0.0])
def test_the_arc_is_a_line_without_an_angle(other: float) -> None:
    (update,) = made(1)
    assert_equal(merged("slerp", [update, update * other], {"t": 0.25}), total([0.75 + 0.25 * other], [update]))
    absent = update - update
    assert_equal(merged("slerp", [update, absent], {"t": 0.25}), total([0.75], [update]))


def test_the_arc_keeps_the_norm() -> None:
    first, second = (each * (1 / each.norm()) for each in made(2))
    assert float(dense(merged("slerp", [first, second])).norm()) == pytest.approx(1.0, rel=1e-6)


def test_the_mean_is_drawn_to_zero_by_disagreement() -> None:
    updates = made(3)
    c = sum(cosine(updates[i], updates[j]) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    assert c > 0.05
    ratio = 3 * c / (1 + 2 * c)
    found = merged("model_stock", updates)
    assert_equal(found, total([ratio / 3] * 3, updates))
    assert rank_of(found) == 10


@pytest.mark.parametrize(
    ("factors", "ratio"), [((1.0,), 1.0), ((1.0, 2.0), 1.0), ((1.0, -2.0), 0.0), ((1.0, 1.0, 0.0), 3 / 5)]
)
def test_the_ratio_at_its_ends(factors: Sequence[float], ratio: float) -> None:
    (update,) = made(1)
    updates = [update * factor if factor else update - update for factor in factors]
    expected = total([ratio * sum(factors) / len(factors)], [update])
    torch.testing.assert_close(dense(merged("model_stock", updates)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("params", [{}, {"lambda": 0.7, "rank_fraction": 0.5}, {"lambda": 0.0}])
def test_deviations_from_the_mean_are_cut_and_added(params: dict[str, float]) -> None:
    updates = made(4)
    expected = mean = total([1 / 4] * 4, updates)
    for each in updates:
        U, sigma, Vh = torch.linalg.svd(dense(each) - mean, full_matrices=False)
        k = math.ceil(params.get("rank_fraction", 1.0) * each.rank)
        expected = expected + params.get("lambda", 1.0) * U[:, :k] @ torch.diag(sigma[:k]) @ Vh[:k]
    found = merged("cart", updates, params)
    assert_equal(found, expected)
    assert rank_of(found) <= 14


def test_two_deviations_cancel() -> None:
    updates = made(2, ranks=(4, 4))
    assert_equal(merged("cart", updates, {"lambda": 5.0, "rank_fraction": 0.5}), total([0.5, 0.5], updates))


def test_a_whole_share_of_a_rank_is_not_rounded_up() -> None:
    updates = [tiny.update(SHAPE, 25, 1.0, torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert 0.28 * 25 > 7
    found, less = (dense(merged("cart", updates, {"rank_fraction": share})) for share in (0.28, 0.275))
    torch.testing.assert_close(found, less)


@pytest.mark.parametrize("name", ["uniform", "weighted", "slerp", "model_stock", "cart"])
def test_methods_on_factors_refuse_a_dense_update(name: str) -> None:
    first, second = made(2)
    with pytest.raises(ShapeError, match=f"method {name} works on low-rank factors"):
        merged(name, [first, second.dense()])


@pytest.mark.parametrize("name", ["task_vector", "uniform_scalar_delta", "weighted_delta", "weighted_delta_n"])
def test_sums_take_a_dense_update(name: str) -> None:
    first, second = made(2)
    assert_equal(merged(name, [first, second.dense()]), dense(merged(name, [first, second])))


@pytest.mark.parametrize("name", ["weighted", "weighted_delta", "slerp"])
@pytest.mark.parametrize("num_adapters", [1, 3])
def test_methods_of_two_adapters_refuse_another_number(name: str, num_adapters: int) -> None:
    with pytest.raises(ConfigError, match=f"method={name} merges 2 adapters, and was given {num_adapters}"):
        methods.load(name, {}, num_adapters)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *((name, "lambda", value) for name in ("weighted", "weighted_delta") for value in (-0.1, 1.1)),
        *(("slerp", "t", value) for value in (-0.1, 1.1)),
        *(("cart", "rank_fraction", value) for value in (0.0, 1.1)),
        ("cart", "lambda", -0.1),
        ("uniform_scalar_delta", "scale", math.inf),
    ],
)
def test_options_out_of_bounds_are_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"method {name}: {option}={value}"):
        methods.load(name, {option: value}, 2)


@pytest.mark.parametrize("name", ["task_vector", "weighted_delta_n", "slerp", "model_stock", "cart"])
def test_a_module_that_an_adapter_lacks_is_zero_there(name: str) -> None:
    (update,) = made(1)
    found = merged(name, [update, zero(SHAPE)])
    assert torch.isfinite(dense(found)).all()
    share = 0.0 if name == "model_stock" else 0.5
    extra = 0.5 if name == "cart" else 0.0  # the mean, and what one of them deviates from it
    torch.testing.assert_close(dense(found), (share + extra) * dense(update), rtol=0, atol=1e-6)
