"""The algebra of whole adapters is that of their updates, module by module; heads are kept, never scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter, aligned
from lorica.adapters.delta import LowRank
from lorica.errors import ConfigError, ShapeError

SHAPES = {"q": (5, 4), "v": (3, 4), "o": (4, 5)}


def adapter(paths: str, seed: int, base_model: str | None = None, heads: Mapping[str, float] | None = None) -> Adapter:
    """A random float64 adapter of the modules of SHAPES whose letters are in `paths`; heads filled with a value."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    updates = {
        path: LowRank(normal(2, SHAPES[path][1]), normal(SHAPES[path][0], 2), 0.5 + seed)
        for path in SHAPES
        if path in paths
    }
    return Adapter(
        updates, {name: {"weight": torch.full((2,), fill)} for name, fill in (heads or {}).items()}, base_model
    )


def flat(each: Adapter) -> Tensor:
    """All of an adapter's dense updates in one vector, absent modules as zero."""
    parts = [
        each.updates[path].dense().flatten() if path in each.updates else torch.zeros(math.prod(shape)).double()
        for path, shape in SHAPES.items()
    ]
    return torch.cat(parts)


LEFT, RIGHT = adapter("qv", 1), adapter("vo", 2)


def test_sums_and_scalars_act_on_the_updates() -> None:
    torch.testing.assert_close(flat(LEFT + RIGHT), flat(LEFT) + flat(RIGHT))
    torch.testing.assert_close(flat(LEFT - RIGHT), flat(LEFT) - flat(RIGHT))
    torch.testing.assert_close(flat(0.3 * LEFT), 0.3 * flat(LEFT))
    torch.testing.assert_close(flat(LEFT * 0.3), 0.3 * flat(LEFT))
    assert torch.equal(flat(-LEFT), -flat(LEFT))


def test_norm_and_inner_product_are_those_of_the_whole() -> None:
    assert LEFT.norm() == pytest.approx(float(flat(LEFT).norm()))
    assert LEFT.inner(RIGHT) == pytest.approx(float(flat(LEFT) @ flat(RIGHT)))
    assert LEFT.inner(LEFT) == pytest.approx(LEFT.norm() ** 2)
    assert (LEFT - LEFT).norm() < 1e-13 * LEFT.norm()


def test_the_empty_adapter_is_zero() -> None:
    nothing = Adapter({})
    assert nothing.norm() == nothing.inner(LEFT) == LEFT.inner(nothing) == 0.0
    assert torch.equal(flat(LEFT + nothing), flat(LEFT))
    assert torch.equal(flat(nothing - LEFT), -flat(LEFT))
    assert nothing.num_parameters() == 0
    assert nothing.is_finite()


def test_shapes_that_differ_do_not_add() -> None:
    other = Adapter({"q": LowRank(torch.zeros(1, 9), torch.zeros(5, 1))})
    with pytest.raises(ShapeError):
        LEFT + other


def test_heads_are_kept_and_not_scaled() -> None:
    headed = adapter("q", 1, heads={"score": 2.0})
    for changed in (headed * 3.0, -headed, headed + LEFT, LEFT + headed, headed - headed, headed.compress(1)[0]):
        assert torch.equal(changed.heads["score"]["weight"], torch.full((2,), 2.0))


def test_two_heads_of_one_name_do_not_add() -> None:
    one, other = adapter("q", 1, heads={"score": 2.0}), adapter("q", 2, heads={"score": 3.0})
    with pytest.raises(ShapeError, match="score"):
        one + other
    assert set((one + adapter("q", 2, heads={"classifier": 3.0})).heads) == {"score", "classifier"}


def test_the_base_model_is_kept_where_both_agree() -> None:
    one, same, other = adapter("q", 1, "a"), adapter("q", 2, "a"), adapter("q", 3, "b")
    assert (one + same).base_model == (one * 2.0).base_model == "a"
    assert (one + other).base_model is None


def test_adapters_are_values() -> None:
    given = dict(LEFT.updates)
    made = Adapter(given)
    given.clear()
    assert list(made.updates) == ["q", "v"]
    with pytest.raises(TypeError):
        made.updates["q"] = LEFT.updates["q"]  # type: ignore[index]


def test_compress_states_every_modules_error() -> None:
    doubled = LEFT + RIGHT
    smaller, errors = doubled.compress(rank=1)
    assert set(errors) == set(doubled.updates)
    for path, error in errors.items():
        lost = (doubled.updates[path].dense() - smaller.updates[path].dense()).norm()
        assert error == pytest.approx(float(lost / doubled.updates[path].dense().norm()), rel=1e-8)
    with pytest.raises(ConfigError):
        doubled.compress()


def test_num_parameters_counts_factors_and_heads() -> None:
    assert adapter("qv", 1, heads={"score": 1.0}).num_parameters() == 2 * (5 + 4) + 2 * (3 + 4) + 2


def test_is_finite_sees_updates_and_heads() -> None:
    assert not adapter("q", 1, heads={"score": math.nan}).is_finite()
    assert not (LEFT * math.inf).is_finite()
    assert LEFT.is_finite()


def test_aligned_common_keeps_what_all_have() -> None:
    kept, dropped = aligned([LEFT, RIGHT])
    assert [list(each.updates) for each in kept] == [["v"], ["v"]]
    assert dropped == ["q", "o"]
    assert kept[0].updates["v"] is LEFT.updates["v"]


def test_aligned_union_keeps_everything_and_strict_refuses() -> None:
    assert aligned([LEFT, RIGHT], "union") == ([LEFT, RIGHT], [])
    assert aligned([LEFT, LEFT], "strict") == ([LEFT, LEFT], [])
    with pytest.raises(ShapeError, match=r"q.*o"):
        aligned([LEFT, RIGHT], "strict")


def test_aligned_keeps_heads_and_base_models() -> None:
    (kept, _), _ = aligned([adapter("qv", 1, "a", {"score": 1.0}), RIGHT])
    assert kept.base_model == "a"
    assert list(kept.heads) == ["score"]


@pytest.mark.parametrize("mode", ["common", "strict", "union"])
def test_aligned_refuses_shapes_that_differ(mode: str) -> None:
    other = Adapter({"q": LowRank(torch.zeros(1, 9), torch.zeros(5, 1)), "v": LEFT.updates["v"]})
    with pytest.raises(ShapeError, match="q has different shapes"):
        aligned([LEFT, other], mode)  # type: ignore[arg-type]


def test_aligned_refuses_adapters_with_nothing_in_common() -> None:
    with pytest.raises(ShapeError, match="no module in common"):
        aligned([adapter("q", 1), adapter("o", 2)])
