"""Elementwise merges, their coordinates, thresholds and masks, and the transforms, against dense float64 (MATH 6.1)."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorica.adapters.delta import LowRank, zero
from lorica.errors import ConfigError, ShapeError, UnknownNameError
from lorica.merging import coordinates, method, thresholds, transform
from lorica.merging.method import Module, OneModule, Site, Update
from lorica.merging.thresholds import Threshold, kth_largest
from lorica.randomness import bernoulli, uniforms

Dense = NDArray[np.float64]
NAMES = ("ada", "bea", "cleo")
WEIGHTS = (1.0, 0.5, 2.0)


def updates(shape: tuple[int, int] = (12, 10), seed: int = 0) -> list[LowRank]:
    """Three of ranks 2, 3 and 4."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return [LowRank(draw(rank, shape[1]), draw(shape[0], rank), 0.5) for rank in (2, 3, 4)]


def module(given: Sequence[Update], path: str = "layers.0.q", weights: Sequence[float] = WEIGHTS) -> Module:
    return Module(Site(path, NAMES[: len(given)]), given, weights[: len(given)])


def merged(name: str, where: Module, **params: Any) -> Dense:
    chosen = method.load(name, {each.removesuffix("_"): value for each, value in params.items()}, len(where.updates))
    found = chosen.surveyed(OneModule(where))
    return dense(chosen(dataclasses.replace(where, site=dataclasses.replace(where.site, found=found))))


def dense(update: Update) -> Dense:
    made = update.to(torch.float64).dense() if isinstance(update, LowRank) else update.double()
    return made.numpy()


def stacked(given: Sequence[Update]) -> Dense:
    return np.stack([dense(each) for each in given])


def close(found: Dense, expected: Dense) -> bool:
    return bool(np.linalg.norm(found - expected) <= 2e-6 * max(1e-30, np.linalg.norm(expected)))


class AllModules:
    """Several modules, and how often they were looked at."""

    def __init__(self, modules: Sequence[Module]) -> None:
        self.modules = modules
        self.num_passes = 0

    def map(self, function: Callable[[Module], Any]) -> list[Any]:
        self.num_passes += 1
        return [function(each) for each in self.modules]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows of ten columns: 12 rows make three blocks, the last of them smaller."""
    monkeypatch.setattr(coordinates, "BLOCK_ENTRIES", 50)


# References ----------------------------------------------------------------------------------------------------------


def trimmed(stack: Dense, k: int) -> Dense:
    """Each with its k largest magnitudes."""
    least = [np.sort(np.abs(each), axis=None)[-k] for each in stack]
    return np.where(np.abs(stack) >= np.array(least)[:, None, None], stack, 0.0)


def elected(stack: Dense, weights: Sequence[float], *, weighted_vote: bool, by_weights: bool = False) -> Dense:
    w = np.array(weights[: len(stack)])[:, None, None]
    sign = np.sign((stack * w if weighted_vote else stack).sum(0))
    agrees = np.sign(stack) * sign > 0
    number = (agrees * (w if by_weights else 1)).sum(0)
    return (agrees * stack * w).sum(0) / np.where(number == 0, 1, number)


@pytest.mark.parametrize(
    ("preset", "vote"), [("paper", (False, False)), ("peft", (False, False)), ("mergekit", (True, True))]
)
def test_ties(preset: str, vote: tuple[bool, bool]) -> None:
    where = module(updates())
    expected = elected(trimmed(stacked(where.updates), 36), WEIGHTS, weighted_vote=vote[0], by_weights=vote[1])
    assert close(merged("ties", where, k=30, lambda_=0.7, preset=preset), 0.7 * expected)
    assert close(merged("ties", where, density=0.3, lambda_=0.7, preset=preset), 0.7 * expected)


def test_ties_trims_an_adapter_over_all_its_modules_or_over_each() -> None:
    one, other = module(updates()), module([each * 3.0 for each in updates(seed=1)], "layers.1.q")
    for scope, (k_one, k_other) in {"adapter": (None, None), "module": (24, 24)}.items():
        ties = method.load("ties", {"scope": scope}, 3)
        found = ties.surveyed(AllModules([one, other]))
        for where, k in ((one, k_one), (other, k_other)):
            stack = stacked(where.updates)
            if k is None:  # 48 of the 240 entries that both modules have
                both = np.concatenate([stacked(one.updates), stacked(other.updates)], axis=1)
                least = np.sort(np.abs(both).reshape(3, -1))[:, -48, None, None]
                stack = np.where(np.abs(stack) >= least, stack, 0.0)
            else:
                stack = trimmed(stack, k)
            made = dense(ties(dataclasses.replace(where, site=dataclasses.replace(where.site, found=found))))
            assert close(made, elected(stack, WEIGHTS, weighted_vote=False))


def test_only_the_modules_own_threshold_counts_exactly() -> None:
    level = torch.ones(12, 10)
    where = module([level], weights=[1.0])
    assert (merged("ties", where, k=25, preset="peft") != 0).sum() == 30
    assert (merged("ties", where, k=25, preset="peft", scope="adapter") != 0).sum() == 120
    assert (merged("ties", where, k=25, preset="paper", scope="module") != 0).sum() == 120


@pytest.mark.peers
@pytest.mark.parametrize("density", [0.1, 0.5, 0.99])
def test_the_peft_preset_is_pefts_ties(density: float) -> None:
    peft = pytest.importorskip("peft.utils.merge_utils")
    for seed in range(4):
        given: list[Update] = [each.dense() for each in updates((31, 17), seed)]
        expected = peft.ties(given, torch.tensor(WEIGHTS), density)
        assert close(merged("ties", module(given), density=density, preset="peft"), dense(expected))


def masks(where: Module, space_shape: tuple[int, int] = (12, 10)) -> Dense:
    """What `drop` leaves of ones: the masks of dare."""
    ones: list[Update] = [torch.ones(space_shape) for _ in where.updates]
    drop = transform.load("drop", {"drop_rate": 0.6, "rescale": False})
    return stacked(drop(dataclasses.replace(where, updates=ones)))


def test_dare() -> None:
    where = module(updates())
    kept = stacked(where.updates) * masks(where) / 0.4
    mean = np.einsum("t,tij->ij", WEIGHTS, kept) / 3
    assert close(merged("dare", where, drop_rate=0.6, lambda_=0.7), 0.7 * mean)
    with_election = 0.7 * elected(kept, WEIGHTS, weighted_vote=True)
    assert close(merged("dare", where, density=0.4, lambda_=0.7, consensus="ties"), with_election)
    assert close(merged("dare_ties", where, drop_rate=0.6, lambda_=0.7), with_election)


def test_dare_that_drops_nothing_is_the_mean_in_factors() -> None:
    where = module(updates(), weights=[1.0] * 3)
    dare, mean = (method.load(*args, 3)(where) for args in (("dare", {"drop_rate": 0}), ("uniform_delta", {})))
    assert isinstance(dare, LowRank) and isinstance(mean, LowRank)
    assert torch.equal(dare.A, mean.A) and torch.equal(dare.B, mean.B)


def test_dare_is_drop_and_then_the_mean() -> None:
    where = module(updates(), weights=[1.0] * 3)
    dropped = dataclasses.replace(where, updates=transform.load("drop", {})(where))
    assert close(merged("dare", where), merged("uniform_delta", dropped))


def test_della(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinates, "BLOCK_ENTRIES", 1 << 17)
    where = module(updates())
    stack = stacked(where.updates)
    ranks = np.abs(stack).argsort(-1).argsort(-1)  # of each entry in its row, 0 for the smallest
    keep = 0.4 + 0.3 * (ranks / 9 - 0.5)
    drawn = [uniforms(42, "della", name, "layers.0.q", "full", 0, size=120).view(12, 10) for name in NAMES]
    expected = elected(np.where(stacked(drawn) < keep, stack / keep, 0.0), WEIGHTS, weighted_vote=True)
    assert close(merged("della", where, drop_rate=0.6, epsilon=0.3, lambda_=0.7), 0.7 * expected)
    everything = elected(stack, WEIGHTS, weighted_vote=True)
    assert close(merged("della", where, drop_rate=0, epsilon=0), everything)


def test_della_keeps_the_large_and_is_right_on_average() -> None:
    ramp = torch.arange(1.0, 11.0).repeat(4000, 1) * torch.tensor([1.0, -1.0]).repeat(5)
    kept = merged("della", module([ramp]), density=0.5, epsilon=0.6)
    shares = (kept != 0).mean(0)
    assert np.abs(shares - np.linspace(0.2, 0.8, 10)).max() < 0.04  # five standard errors
    assert np.abs(kept.mean(0) / ramp[0].numpy() - 1).max() < 0.2


@pytest.mark.parametrize(("density", "gamma", "num_outliers"), [(0.5, 0.25, 30), (0.9, 0.001, 0), (1.0, 0.0, 0)])
def test_breadcrumbs(density: float, gamma: float, num_outliers: int) -> None:
    where = module(updates())
    stack = stacked(where.updates)
    kept = trimmed(stack, int((density + gamma) * 120))
    if num_outliers:
        kept = kept - trimmed(stack, num_outliers)
    expected = 0.7 * np.einsum("t,tij->ij", WEIGHTS, kept)
    assert close(merged("breadcrumbs", where, density=density, gamma=gamma, lambda_=0.7), expected)


def test_breadcrumbs_counts_exactly_where_magnitudes_are_equal() -> None:
    level = module([torch.ones(12, 10)], weights=[1.0])
    assert merged("breadcrumbs", level, density=0.5, gamma=0.25).sum() == 60


def test_magmax() -> None:
    where = module(updates())
    stack = stacked(where.updates) * np.array(WEIGHTS)[:, None, None]
    expected = np.take_along_axis(stack, np.abs(stack).argmax(0)[None], 0)[0]
    assert close(merged("magmax", where, lambda_=0.7), 0.7 * expected)
    tie: list[Update] = [torch.tensor([[-2.0, 1.0]]), torch.tensor([[2.0, -3.0]])]
    for given in (tie, tie[::-1]):
        assert merged("magmax", module(given, weights=[1.0, 1.0])).tolist() == [[2.0, -3.0]]


@pytest.mark.parametrize("topk", [0.25, 1.0])
def test_sce(topk: float) -> None:
    where = module(updates())
    stack = stacked(where.updates)
    variance = stack.var(0)
    stack = np.where(variance >= np.sort(variance, axis=None)[-int(topk * 120)], stack, 0.0)
    energy = (stack**2).sum((1, 2))
    expected = elected(stack, list(energy / energy.sum()), weighted_vote=False, by_weights=True)
    assert close(merged("sce", where, select_topk=topk, lambda_=0.7), 0.7 * expected)


def test_sce_with_nothing_to_tell_apart_keeps_everything() -> None:
    same = updates()[:1] * 2
    assert close(merged("sce", module(same), select_topk=0.1), dense(same[0]))


# Spaces --------------------------------------------------------------------------------------------------------------


def test_knots_and_core() -> None:
    where = module(updates())
    stack = stacked(where.updates)
    U, sigma, Vh = np.linalg.svd(np.concatenate(stack, axis=1), full_matrices=False)
    U, sigma, Vh = U[:, :9], sigma[:9], Vh[:9]
    V = np.stack(np.split(Vh, 3, axis=1))
    rule = elected(trimmed(V, 18), WEIGHTS, weighted_vote=False)
    assert close(merged("knots", where, lambda_=0.7), 0.7 * (U * sigma) @ rule)
    right = np.linalg.svd(np.concatenate(stack, axis=0), full_matrices=False)[2][:9]
    cores = np.stack([U.T @ each @ right.T for each in stack])
    rule = elected(trimmed(cores, 40), WEIGHTS, weighted_vote=False)
    assert close(merged("core", where, rule_params={"density": 0.5}), U @ rule @ right)
    assert close(merged("ties", where, k=50, space="core"), U @ rule @ right)


@pytest.mark.parametrize("space", ["knots", "core"])
@pytest.mark.parametrize("rule", ["ties", "dare", "dare_ties", "della", "breadcrumbs", "magmax"])
def test_a_rule_in_a_space_is_the_method_with_that_space(space: str, rule: str) -> None:
    where = module(updates())
    assert np.array_equal(merged(space, where, rule=rule), merged(rule, where, space=space))
    made = method.load(space, {"rule": rule}, 3)(module([zero((12, 10)), zero((12, 10), 2), zero((12, 10))]))
    assert isinstance(made, LowRank) and made.norm() == 0


def test_rules_survey_all_modules() -> None:
    where = [module(updates()), module([each * 9.0 for each in updates(seed=1)], "layers.1.q")]
    for space in ("knots", "core"):
        found = method.load(space, {}, 3).surveyed(AllModules(where))
        assert found == method.load("ties", {"space": space}, 3).surveyed(AllModules(where))
        assert method.load(space, {"rule_params": {"scope": "module"}}, 3).surveyed(AllModules(where)) is None


@pytest.mark.parametrize("space", ["knots", "core"])
def test_a_dense_update_has_no_factors_to_align(space: str) -> None:
    with pytest.raises(ShapeError, match=f"space={space}.*a transform has made an update dense"):
        merged("magmax", module([each.dense() for each in updates()]), space=space)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("dare", {"drop_rate": 1.0}, "drop_rate=1.0"),
        ("dare", {"drop_rate": 0.5, "density": 0.5}, "both given"),
        ("della", {"drop_rate": 0.95, "epsilon": 0.2}, "from 0.85 to 1.05.*make epsilon smaller"),
        ("della", {"drop_rate": 0.05}, "from -0.02"),
        ("breadcrumbs", {"density": 0.9, "gamma": 0.2}, "density=0.9 and gamma=0.2"),
        ("sce", {"select_topk": 0.0}, "select_topk=0.0"),
        ("magmax", {"lambda": -1}, "lambda=-1"),
        ("knots", {"rule": "sce"}, "rule=sce does not work entry by entry: .*breadcrumbs, dare, dare_ties, della"),
        ("core", {"rule_params": {"space": "full"}}, "rule_params has space=full"),
        ("core", {"rule_params": {"k": 0}}, "method ties: k=0"),
    ],
)
def test_options_that_cannot_be_used(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method.load(name, params, 3)


def test_unknown_rules_and_transforms() -> None:
    with pytest.raises(UnknownNameError, match="did you mean ties"):
        method.load("knots", {"rule": "tiess"}, 3)
    with pytest.raises(UnknownNameError, match="option of method dare"):
        method.load("core", {"rule": "dare", "rule_params": {"droprate": 0.5}}, 3)
    with pytest.raises(UnknownNameError, match="unknown transform 'trimm': did you mean trim"):
        transform.load("trimm", {})
    with pytest.raises(UnknownNameError, match="transform identity has no options"):
        transform.load("identity", {"k": 3})
    with pytest.raises(ConfigError, match="transform trim: k=0"):
        transform.load("trim", {"k": 0})


def test_entries_that_are_not_numbers_have_no_order() -> None:
    with pytest.raises(ShapeError, match="not a number"):
        kth_largest(OneModule(module([torch.full((12, 10), torch.nan)])), 0.9)


# Thresholds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0001, 0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("margin", [0.006, 1e-6])
def test_thresholds_are_exact_whatever_the_sample(monkeypatch: pytest.MonkeyPatch, share: float, margin: float) -> None:
    monkeypatch.setattr(thresholds, "SAMPLED_ENTRIES", 40)
    monkeypatch.setattr(thresholds, "MARGIN", margin)
    shapes = [(12, 10), (3, 70), (40, 1), (25, 31)]
    given = [module([each.dense() * 3**at for each in updates(shape, at)]) for at, shape in enumerate(shapes)]
    modules = AllModules(given)
    k = max(1, int(share * sum(rows * width for rows, width in shapes)))
    expected = [
        torch.topk(torch.cat([torch.as_tensor(each.updates[i]).abs().flatten() for each in given]), k).values[-1]
        for i in range(3)
    ]
    assert kth_largest(modules, share) == [Threshold(float(value), 0) for value in expected]
    assert modules.num_passes > 3 or margin > 1e-6 or share in (0.0001, 1.0), "the bracket never missed"


def test_thresholds_count_what_equals_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "SAMPLED_ENTRIES", 40)
    steps = (torch.arange(120) // 10).float().view(12, 10)  # ten each of 0 to 11
    assert kth_largest(OneModule(module([steps, -steps])), 0.125) == [Threshold(10.0, 5)] * 2
    assert kth_largest(OneModule(module([zero((12, 10))])), 0.5) == [Threshold(0.0, 60)]


@pytest.mark.parametrize("bits", [3, 12])
def test_thresholds_are_exact_however_few_the_bins(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(thresholds, "SAMPLED_ENTRIES", 40)
    monkeypatch.setattr(thresholds, "BINS_BITS", bits)
    given = [module([each.dense() for each in updates((30, 20), at)]) for at in range(3)]
    expected = [
        torch.topk(torch.cat([torch.as_tensor(each.updates[i]).abs().flatten() for each in given]), 360).values[-1]
        for i in range(3)
    ]
    assert kth_largest(AllModules(given), 0.2) == [Threshold(float(value), 0) for value in expected]


def test_thresholds_hold_no_more_for_more_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that lacks most modules, as a union has them, has the threshold 0, which as many entries equal."""
    monkeypatch.setattr(thresholds, "SAMPLED_ENTRIES", 40)
    monkeypatch.setattr(thresholds, "BINS_BITS", 10)
    peaks = []
    for num_modules in (4, 40):
        empty = [module([zero((100, 100))]) for _ in range(num_modules)]
        tracemalloc.start()
        found = kth_largest(AllModules(empty), 0.5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found == [Threshold(0.0, num_modules * 5000)]
    assert peaks[1] < peaks[0] + 10_000 * 4  # one module's entries


def test_a_sample_stands_for_rows_and_columns_of_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 512, generator=generator), torch.randn(256, 4, generator=generator)
    update = LowRank(
        A * torch.randn(512, generator=generator).exp(), B * torch.randn(256, 1, generator=generator).exp()
    )
    magnitudes = update.dense().abs().flatten()
    for stride in (2, 7, 16):
        (sample,) = coordinates.coordinates([update], "full").sample(stride).abs()
        assert abs(len(sample) * stride / len(magnitudes) - 1) < 0.05
        for share in (0.2, 0.8):
            value = magnitudes.kthvalue(int((1 - share) * len(magnitudes))).values
            assert abs(float((sample > value).float().mean()) - share) < 0.006
    tiny = coordinates.coordinates([updates((2, 3))[0], torch.ones(2, 3)], "full").sample(1000)
    assert tiny.shape == (2, 1)


# Masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dare", "dare_ties", "della"])
def test_masks_do_not_depend_on_who_else_is_merged_or_in_which_order(name: str) -> None:
    given = updates()
    there, back = module(given), Module(Site("layers.0.q", NAMES[::-1]), given[::-1], WEIGHTS[::-1])
    assert close(merged(name, there), merged(name, back))
    silent = module([given[0], zero((12, 10)), zero((12, 10))], weights=[3.0, 1.0, 1.0])
    alone = module(given[:1], weights=[3.0 if name != "dare" else 1.0])
    assert close(merged(name, silent), merged(name, alone))
    assert not close(merged(name, there), merged(name, there, seed=43))
    assert not close(merged(name, there), merged(name, dataclasses.replace(there, site=Site("layers.1.q", NAMES))))


def test_masks_of_blocks_do_not_depend_on_the_blocks_before() -> None:
    kept = masks(module(updates()))
    assert {*np.unique(kept)} == {0.0, 1.0}
    for block in (2, 0, 1):
        rows = kept[1, 5 * block : 5 * block + 5]
        drawn = bernoulli(42, "dare", "bea", "layers.0.q", "full", block, size=rows.size, probability=0.4)
        assert np.array_equal(rows.ravel(), drawn.double().numpy())


@pytest.mark.parametrize("probability", [0.0, 0.001, 0.1, 0.5, 1 / 3, 0.999, 1.0])
def test_draws_are_true_as_often_as_they_should_be(probability: float) -> None:
    size = 1_000_001
    drawn = bernoulli(3, "coin", size=size, probability=probability)
    error = (probability * (1 - probability) / size) ** 0.5
    assert drawn.shape == (size,) and abs(float(drawn.double().mean()) - probability) <= 4 * error
    assert torch.equal(drawn, bernoulli(3, "coin", size=size, probability=probability))
    assert not torch.equal(drawn, bernoulli(3, "other", size=size, probability=probability)) or error == 0


def test_uniforms() -> None:
    drawn = uniforms(3, "u", size=100_001)
    assert drawn.dtype == torch.float32 and drawn.shape == (100_001,)
    assert 0 <= drawn.min() < 1e-4 and 1 - 1e-4 < drawn.max() < 1
    assert abs(float(drawn.mean()) - 0.5) < 5 * (1 / 12 / len(drawn)) ** 0.5
    assert torch.equal(drawn[:7], uniforms(3, "u", size=7))
    assert (drawn[:3] * 2**24).tolist() == [1588244, 14277369, 933461]  # on every platform: Philox is fixed


# Transforms ----------------------------------------------------------------------------------------------------------


def transformed(name: str, where: Sequence[Module], **params: Any) -> list[list[Update]]:
    chosen = transform.load(name, params)
    found = chosen.surveyed(AllModules(where))
    return [chosen(dataclasses.replace(each, site=dataclasses.replace(each.site, found=found))) for each in where]


@pytest.mark.parametrize(
    ("name", "params"), [("identity", {}), ("ties_scaffold", {}), ("trim", {"density": 1}), ("drop", {"drop_rate": 0})]
)
def test_transforms_that_change_nothing_stay_in_factors(name: str, params: dict[str, Any]) -> None:
    where = module(updates())
    (made,) = transformed(name, [where], **params)
    assert all(mine is given for mine, given in zip(made, where.updates, strict=True))


def test_trim() -> None:
    one, other = module(updates()), module([each * 3.0 for each in updates(seed=1)], "head")
    (made,) = transformed("trim", [one], k=25, scope="module")
    assert close(stacked(made), trimmed(stacked(one.updates), 30))
    together = np.concatenate([stacked(each) for each in transformed("trim", [one, other], density=0.25)], axis=1)
    both = np.concatenate([stacked(one.updates), stacked(other.updates)], axis=1)
    assert close(together, trimmed(both, 60))
    assert all(each.shape == (12, 10) for each in made)


def test_drop_is_rescaled_or_not() -> None:
    where = module([updates()[0], updates()[1].dense()])
    (kept,) = transformed("drop", [where], drop_rate=0.6, rescale=False)
    (rescaled,) = transformed("drop", [where], density=0.4)
    assert close(stacked(kept), stacked(where.updates) * masks(where))
    assert close(stacked(rescaled), stacked(kept) / 0.4)


def test_layers_are_normalized_in_factors() -> None:
    paths = ("layers.0.q", "layers.0.v", "tower.0.q", "head")
    where = [module([*updates(seed=at)[:2], zero((12, 10), 1)], path) for at, path in enumerate(paths)]
    made = transformed("layer_l2_normalize", where, target_norm=2.0)
    assert all(isinstance(each, LowRank) for each in made[0])
    for at in range(2):
        norms = [np.linalg.norm(dense(each[at])) for each in made]
        assert np.allclose([np.hypot(*norms[:2]), *norms[2:]], 2.0)
        ratio = norms[0] / norms[1]
        assert np.isclose(
            ratio, np.linalg.norm(dense(where[0].updates[at])) / np.linalg.norm(dense(where[1].updates[at]))
        )
        assert dense(made[0][2]).any() == 0
    partly = transformed("layer_l2_normalize", where, include_non_layer_keys=False)
    assert partly[3] == list(where[3].updates)
    as_dense = [dataclasses.replace(each, updates=[one.dense() for one in each.updates]) for each in where]
    for mine, expected in zip(transformed("layer_l2_normalize", as_dense, target_norm=2.0), made, strict=True):
        assert close(stacked(mine), stacked(expected))
