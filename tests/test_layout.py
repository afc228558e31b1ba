"""The places of learned coefficients: what each stands for, and the merge that weighted_delta_n makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import tiny
from lorica.adapters.delta import LowRank, zero
from lorica.errors import ConfigError, ShapeError, UnknownNameError
from lorica.merging import method as methods
from lorica.merging.fitting.layout import Granularity, Layout, layout, ranks_of
from lorica.merging.method import Module, OneModule, Site, Update

NAMES = ("sst2", "rte")
SHAPE = (10, 8)
RANKS = {
    "encoder.layer.0.query": (2, 3),
    "encoder.layer.0.value": (1, 0),
    "decoder.layer.0.query": (1, 1),
    "pooler": (2, 1),
    "head": (1, 1),
}
SIZES = {"task": 2, "layer": 8, "module": 10, "direction": 13}
GRANULARITIES = get_args(Granularity)


def updates() -> dict[str, list[Update]]:
    generator = torch.Generator().manual_seed(0)
    return {
        path: [tiny.update(SHAPE, rank, 0.5, generator) if rank else zero(SHAPE) for rank in ranks]
        for path, ranks in RANKS.items()
    }


def coefficients(of: Layout) -> Tensor:
    return torch.randn(of.size, generator=torch.Generator().manual_seed(1))


def merged(path: str, of: Sequence[Update], params: Mapping[str, Any]) -> Tensor:
    """weighted_delta_n's merge of one module, dense."""
    found = methods.load("weighted_delta_n", params, len(of))(Module(Site(path, NAMES), of, [1.0] * len(of)))
    return found.to(torch.float64).dense() if isinstance(found, LowRank) else found.double()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_merge_of_every_module_is_the_one_that_the_coefficients_mean(granularity: Granularity) -> None:
    given = updates()
    of = layout(ranks_of(given), NAMES, granularity)
    assert of.size == len(set(of.keys)) == SIZES[granularity]
    c = coefficients(of)
    for path, (first, second) in given.items():
        assert isinstance(first, LowRank)
        assert isinstance(second, LowRank)
        A, B = torch.cat([first.A, second.A]), torch.cat([first.scaled_B(), second.scaled_B()], dim=1)
        expected = B.double() * c.double()[of.directions(path)] @ A.double()
        torch.testing.assert_close(merged(path, given[path], of.params(c)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_each_place_belongs_to_its_adapter_and_group(granularity: Granularity) -> None:
    of = layout(RANKS, NAMES, granularity)
    for path, ranks in RANKS.items():
        owners = [of.keys[place] for place in of.directions(path)]
        assert [name for _, name in owners] == [NAMES[0]] * ranks[0] + [NAMES[1]] * ranks[1]
        tower, _, rest = path.partition(".0.")
        groups = {
            "task": {""},
            "layer": {f"{tower}.0" if rest else path},
            "module": {path},
            "direction": {f"{path}#{at}" for at in range(max(ranks))},
        }
        assert {group for group, _ in owners} == groups[granularity]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_one_adapter_alone(granularity: Granularity) -> None:
    given = updates()
    of = layout(RANKS, NAMES, granularity)
    for at, name in enumerate(NAMES):
        for path, each in given.items():
            own = each[at]
            assert isinstance(own, LowRank)
            torch.testing.assert_close(merged(path, each, of.params(of.one_hot(name))), own.dense().double())
    torch.testing.assert_close(of.one_hot("sst2") + of.one_hot("rte"), of.uniform(1.0))


def test_params_allow_what_the_coefficients_need_and_no_more() -> None:
    of = layout(RANKS, NAMES, "task")

    def switches(*c: float) -> tuple[bool, bool]:
        params = of.params(torch.tensor(c))
        return params["allow_negative_coefficients"], params["allow_unbounded"]

    assert switches(0.0, 1.0) == (False, False)
    assert switches(-0.5, 1.0) == (True, False)
    assert switches(0.5, 1.5) == (False, True)
    exact = of.params(torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert exact["task_coefficients"] == {"sst2": 0.1, "rte": 0.2}


def test_what_a_layout_refuses() -> None:
    with pytest.raises(ConfigError, match="unknown granularity 'modul': did you mean module"):
        layout(RANKS, NAMES, "modul")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"query has updates of 2 adapters, and there are 1"):
        layout(RANKS, ["sst2"], "task")
    of = layout(RANKS, NAMES, "module")
    with pytest.raises(ShapeError, match=r"shape \(3,\), and the layout has \(10,\)"):
        of.params(torch.zeros(3))
    with pytest.raises(UnknownNameError, match="did you mean sst2"):
        of.one_hot("sst")


def test_a_dense_update_is_of_full_rank() -> None:
    assert ranks_of({"m": [torch.zeros(SHAPE), zero(SHAPE, rank=3)]}) == {"m": (8, 3)}


PATH = "encoder.layer.0.query"
MODULE = {"module_task_coefficients": {PATH: {"sst2": 0.1}}}
LAYER = {"layer_task_coefficients": {0: {"sst2": 0.7, "rte": 0.9}}}
EXACT = {"normalize_coefficients": False}


@pytest.mark.parametrize(
    ("params", "path", "expected"),
    [
        (MODULE, PATH, (0.1, 0.5)),
        (MODULE | LAYER, PATH, (0.1, 0.9)),
        (MODULE | LAYER, "encoder.layer.0.value", (0.7, 0.9)),
        (MODULE | {"default_task_coefficients": {"sst2": 0.2, "rte": 0.3}}, PATH, (0.1, 0.3)),
    ],
)
def test_a_modules_coefficients_come_before_its_layers(
    params: dict[str, Any], path: str, expected: tuple[float, float]
) -> None:
    given = updates()[PATH]
    first, second = (each.to(dtype=torch.float64).dense() for each in given if isinstance(each, LowRank))
    total = expected[0] * first + expected[1] * second
    torch.testing.assert_close(merged(path, given, params | EXACT), total, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged(path, given, params), total / sum(expected), rtol=0, atol=1e-6)


def by_direction(*values: float) -> dict[str, Any]:
    return {"module_task_coefficients": {PATH: {"sst2": list(values)}}}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (by_direction(0.1, 0.2), r"query\.sst2 lists coefficients of directions.*normalize_coefficients=false"),
        (by_direction(0.1, 2.0) | EXACT, r"query\.sst2=2\.0 is not in \[0, 1\]: allow_unbounded=true"),
        (by_direction(0.1, -0.2) | EXACT, r"query\.sst2=-0\.2 is not in \[0, 1\]: allow_negative_coefficients=true"),
        (by_direction(0.1, math.nan) | EXACT, r"query.*nan.* should be a valid number"),
    ],
)
def test_coefficients_of_directions_that_are_refused_before_any_merge(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.load("weighted_delta_n", params, 2)


def test_coefficients_of_directions_must_fit_the_update() -> None:
    first, second = updates()[PATH]
    with pytest.raises(ConfigError, match=r"lists 3 coefficients of directions, and the update is of rank 2"):
        merged(PATH, [first, second], by_direction(0.1, 0.2, 0.3) | EXACT)
    with pytest.raises(ConfigError, match=r"lists 2 coefficients of directions, and the update is dense"):
        merged(PATH, [torch.zeros(SHAPE), second], by_direction(0.1, 0.2) | EXACT)


def test_coefficients_of_no_module_are_refused_with_the_nearest() -> None:
    module = OneModule(Module(Site(PATH, NAMES), updates()[PATH], [1.0, 1.0]))
    methods.load("weighted_delta_n", MODULE, 2).surveyed(module)
    lost = methods.load("weighted_delta_n", {"module_task_coefficients": {"encoder.layer.0.quary": {}}}, 2)
    with pytest.raises(UnknownNameError, match=r"did you mean encoder\.layer\.0\.query"):
        lost.surveyed(module)
