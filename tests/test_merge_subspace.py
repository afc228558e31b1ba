"""Merges by singular directions and by regression, against dense float64; Grams, against inputs collected by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank, zero
from lorica.adapters.injection import inject, linear_modules, remove
from lorica.errors import ConfigError, ModelError, ShapeError
from lorica.merging import grams, subspace
from lorica.merging import method as methods
from lorica.merging.method import Module, Site

SHAPE = (30, 20)
NAMES = ("ada", "bea", "cleo")
WEIGHTS = (1.0, -0.5, 2.0)
SUBSPACE_METHODS = ("tsv", "iso_c", "iso_cts", "wudi")
TARGETS = ("query", "key", "value", "dense")


def made(ranks: Sequence[int] = (3, 4, 2), shape: tuple[int, int] = SHAPE) -> list[LowRank]:
    generator = torch.Generator().manual_seed(0)
    return [tiny.update(shape, rank, 0.5 * rank, generator) for rank in ranks]


def merged(name: str, updates: Sequence[Any], weights: Sequence[float] = (), **params: Any) -> LowRank:
    squares = params.pop("squares", ())
    chosen = methods.load(name, {each.rstrip("_"): value for each, value in params.items()}, len(updates))
    found = chosen(Module(Site("layer.0.q", NAMES, grams=tuple(squares)), updates, weights or [1.0] * len(updates)))
    assert isinstance(found, LowRank) and found.A.dtype == found.B.dtype == torch.float32
    assert found.rank <= sum(each.rank for each in updates)
    return found


def dense(update: LowRank) -> Tensor:
    return update.to(torch.float64).dense()


def stacked(updates: Sequence[LowRank], weights: Sequence[float] = WEIGHTS) -> list[Tensor]:
    return [weight * dense(each) for each, weight in zip(updates, weights, strict=True)]


def same(found: LowRank, expected: Tensor, atol: float = 3e-6) -> bool:
    return bool((dense(found) - expected).norm() <= atol * expected.norm())


def triples(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :k], sigma[:k], Vh[:k].T


def side_by_side(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factors of the U and of the V by the SVD, as the papers have them; and the σ."""
    U, sigma, V = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    (P, _, Qh), (S, _, Th) = (torch.linalg.svd(each, full_matrices=False) for each in (U, V))
    return P @ Qh, sigma, S @ Th


@pytest.mark.parametrize(("keep", "ranks"), [(1.0, (3, 4, 2)), (0.5, (2, 2, 1))])
def test_tsv(keep: float, ranks: tuple[int, ...]) -> None:
    parts = [triples(each, rank) for each, rank in zip(stacked(made()), ranks, strict=True)]
    U, sigma, V = side_by_side(parts)
    found = merged("tsv", made(), WEIGHTS, keep=keep, lambda_=0.7)
    assert found.rank == sum(ranks) and same(found, 0.7 * (U * sigma) @ V.T)


def test_iso_c_is_flat_over_the_rank_that_the_sum_has() -> None:
    updates = [*made((3, 4)), made((3, 4))[0] * 2]  # the last one brings no direction of its own
    U, sigma, V = triples(sum(stacked(updates), torch.zeros(SHAPE).double()), 7)
    found = merged("iso_c", updates, WEIGHTS, lambda_=1.3)
    assert found.rank == 7 and same(found, 1.3 * sigma.mean() * U @ V.T)


@pytest.mark.parametrize(
    ("ranks", "fraction", "num_own"),
    [((5, 5, 5), 0.8, 1), ((3, 3, 3), 0.0, 3), ((3, 3, 3), 1.0, 0), ((4, 2, 2), 0.0, 2)],
)
def test_iso_cts(ranks: tuple[int, ...], fraction: float, num_own: int) -> None:
    updates = made(ranks)
    total = sum(stacked(updates), torch.zeros(SHAPE).double())
    common = triples(total, sum(ranks) - 3 * num_own)
    own = [triples(each - common[0] @ common[0].T @ each, num_own) for each in stacked(updates)]
    U, sigma, V = side_by_side([common, *own])
    found = merged("iso_cts", updates, WEIGHTS, common_space_fraction=fraction, lambda_=0.5)
    assert found.rank == sum(ranks) and same(found, 0.5 * sigma.mean() * U @ V.T)


def test_iso_cts_leaves_out_what_the_common_space_holds() -> None:
    Q, P = (torch.linalg.qr(torch.randn(size, 4, generator=torch.Generator().manual_seed(1)))[0] for size in SHAPE)
    large = LowRank(P[:, :3].T, Q[:, :3] * torch.tensor([5.0, 2.0, 1.0]))
    held = LowRank(P[:, 3:].T, Q[:, :1])  # of the left space that is common
    found = merged("iso_cts", [large, held], common_space_fraction=0.5)
    common = Q[:, :1] @ (5 * P[:, :1] + P[:, 3:]).T / math.sqrt(26)
    expected = (math.sqrt(26) + 2) / 2 * (common + Q[:, 1:2] @ P[:, 1:2].T)
    assert found.rank == 2 and same(found, expected.double())


@pytest.mark.parametrize("shape", [(30, 20), (8, 20), (30, 7)])  # also narrower than Σ r
def test_wudi(shape: tuple[int, int]) -> None:
    deltas = stacked(made(shape=shape))
    squares = [each.T @ each / each.norm() ** 2 for each in deltas]
    left = sum((each @ G for each, G in zip(deltas, squares, strict=True)), torch.zeros(shape).double())
    inverse = torch.linalg.pinv(torch.stack(squares).sum(dim=0), rtol=1e-11, hermitian=True)
    assert same(merged("wudi", made(shape=shape), WEIGHTS, lambda_=2.0), 2 * left @ inverse, 1e-5)


def test_wudi_keeps_updates_of_orthogonal_inputs_whole() -> None:
    A = torch.linalg.qr(torch.randn(20, 5, generator=torch.Generator().manual_seed(1)))[0].T
    first, second = (LowRank(A[rows], made((3, 2))[number].B) for number, rows in ((0, slice(3)), (1, slice(3, 5))))
    assert same(merged("wudi", [first, second]), dense(first) + dense(second))


@pytest.mark.parametrize("name", SUBSPACE_METHODS)
def test_zeros_copies_and_lost_ranks_bring_no_nan(name: str) -> None:
    first, second, _ = made()
    doubled = LowRank(torch.cat([first.A, first.A]), torch.cat([first.B, first.B], dim=1), first.scale / 2)
    updates = [doubled, second, zero(SHAPE, rank=2)]
    assert same(merged(name, updates), dense(merged(name, [first, second, zero(SHAPE)])))
    assert merged(name, [first, first]).is_finite()
    assert merged(name, [zero(SHAPE, rank=2)] * 2).norm() == 0
    with pytest.raises(ShapeError, match="dense"):
        merged(name, [first, torch.zeros(SHAPE)])


def test_polar_factor_of_dependent_columns() -> None:
    column = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    torch.testing.assert_close(
        subspace.polar(torch.cat([column, column], dim=1)), column.expand(2, 2) / 5 / math.sqrt(2)
    )


def seen(num_rows: int = 40, width: int = SHAPE[1], seed: int = 3) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["regmean", "regmean_pp"])
@pytest.mark.parametrize("params", [{}, {"alpha": 0.3, "ridge": 0.2, "lambda_": 0.5}])
def test_regmean(name: str, params: dict[str, Any]) -> None:
    squares = [(X.T @ X) for X in (seen(seed=seed) * (seed + 1) for seed in range(3))]
    alpha, ridge = params.get("alpha", 0.9), params.get("ridge", 1e-6)
    shrunk = [alpha * G.double() + (1 - alpha) * G.double().diag().diag() for G in squares]
    shrunk = [G + ridge * G.trace() / len(G) * torch.eye(len(G)).double() for G in shrunk]
    left = sum((each @ G for each, G in zip(stacked(made()), shrunk, strict=True)), torch.zeros(SHAPE).double())
    expected = params.get("lambda_", 1.0) * left @ torch.stack(shrunk).sum(dim=0).inverse()
    found = merged(name, made(), WEIGHTS, squares=squares, **params)
    assert found.rank == 9 and same(found, expected)


@pytest.mark.parametrize("params", [{"alpha": 1.0, "ridge": 1e-9}, {}])
def test_regmean_gives_each_task_its_own_outputs_where_inputs_are_orthogonal(params: dict[str, Any]) -> None:
    """In any orthogonal subspaces without shrinkage, and with it where the subspaces are those of coordinates."""
    basis = torch.linalg.qr(seen(20))[0] if params else torch.eye(20)
    first, second = made((3, 4))
    inputs = seen(width=8) @ basis[:8], seen(width=12, seed=4) @ basis[8:]
    found = merged("regmean", [first, second], squares=[X.T @ X for X in inputs], **params)
    for X, update in zip(inputs, (first, second), strict=True):
        torch.testing.assert_close(X @ found.dense().T, X @ update.dense().T, rtol=0, atol=1e-4)
        assert tiny.relative(X @ (first + second).dense().T / 2, X @ update.dense().T) > 0.3  # the mean does not


def test_regmean_of_one_adapter_is_the_adapter_however_its_gram_is_rounded() -> None:
    X = seen() * torch.logspace(0, -3, 20)
    gram = X.T @ X
    gram *= 1 + 1e-7 * torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    gram[5] = gram[:, 5] = 0  # an input that is always zero
    assert same(merged("regmean", made((3,)), squares=[gram]), dense(made((3,))[0]))


def test_regmean_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"inputs of layer\.0\.q under each adapter, and knows 1 of 2"):
        merged("regmean", made((2, 2)), squares=[torch.eye(20)])
    with pytest.raises(ConfigError, match=r"do not determine .* larger ridge"):
        merged("regmean_pp", made((2, 2)), squares=[torch.zeros(20, 20)] * 2)
    with pytest.raises(ConfigError, match="alpha"):
        merged("regmean", made((2, 2)), alpha=0)


@pytest.fixture
def model() -> Any:
    return tiny.model("bert", "classification", 40)


@pytest.fixture
def paths(model: Any) -> list[str]:
    return [path for path in linear_modules(model) if ".layer." in path and path.endswith(TARGETS)]


@pytest.fixture
def adapters(model: Any, paths: list[str]) -> dict[str, Adapter]:
    return {name: tiny.adapter(model, paths, seed=seed) for seed, name in enumerate(NAMES[:2])}


def batches(model: Any, seed: int) -> list[dict[str, Tensor]]:
    found = [tiny.inputs(model, seed=10 * seed + number) for number in range(2)]
    for each in found:
        each["attention_mask"][0, 4:] = 0
    return found


class Runner:
    """Runs its batches, and knows the mask of the one that is running."""

    def __init__(self, model: nn.Module, given: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> None:
        self.mask: Tensor | None = None
        self.run: dict[str, Callable[[], None]] = {
            name: lambda batches=batches: self._forward(model, batches)  # type: ignore[misc]
            for name, batches in given.items()
        }

    @torch.inference_mode()
    def _forward(self, model: nn.Module, given: Sequence[Mapping[str, Tensor]]) -> None:
        for batch in given:
            self.mask = batch["attention_mask"]
            model(**batch)


@pytest.fixture
def runner(model: Any) -> Runner:
    return Runner(model, {name: batches(model, seed) for seed, name in enumerate(NAMES[:2])})


def by_hand(model: Any, adapter: Adapter, path: str, seed: int, masked: bool = False) -> Tensor:
    """XᵀX of the rows that the module at `path` gets under the adapter, float64."""
    live = inject(model, adapter)
    total = torch.zeros(())
    for batch in batches(model, seed):
        got: list[Tensor] = []
        with model.get_submodule(path).register_forward_pre_hook(lambda _, x, got=got: got.append(x[0])):
            tiny.logits(model, batch)
        rows = got[0][batch["attention_mask"].bool()] if masked else got[0].flatten(0, 1)
        total = total + rows.double().T @ rows.double()
    remove(live)
    return total


@pytest.mark.parametrize("masked", [False, True])
def test_grams_are_those_of_inputs_under_each_adapter(
    model: Any, paths: list[str], adapters: dict[str, Adapter], runner: Runner, masked: bool
) -> None:
    mask = (lambda: runner.mask) if masked else None
    found = grams.collect(model, adapters, paths, runner.run, mask)
    assert list(found) == paths
    for path in paths:
        for seed, (gram, adapter) in enumerate(zip(found[path], adapters.values(), strict=True)):
            assert gram.dtype == torch.float32
            assert tiny.relative(gram, by_hand(model, adapter, path, seed, masked)) < 1e-6
    query, key, value = (found[f"bert.encoder.layer.1.attention.self.{name}"] for name in TARGETS[:3])
    assert all(left is mid is right for left, mid, right in zip(query, key, value, strict=True))


def test_a_module_that_one_adapter_lacks_is_looked_at_too(
    model: Any, paths: list[str], adapters: dict[str, Adapter], runner: Runner
) -> None:
    adapters["bea"] = tiny.adapter(model, paths[:2])
    found = grams.collect(model, adapters, paths[-1:], runner.run)[paths[-1]]
    assert tiny.relative(found[1], by_hand(model, adapters["bea"], paths[-1], 1)) < 1e-6


def test_inputs_that_are_one_tensor_written_over_are_not_taken_for_the_same() -> None:
    linear = nn.Sequential(nn.Linear(4, 3))
    x, rows = torch.empty(5, 4), seen(10, 4)

    def run() -> None:
        for part in (rows[:5], rows[5:], rows[5:]):
            linear(x.copy_(part))

    found = grams.collect(linear, {"ada": Adapter({})}, ["0"], {"ada": run})["0"][0]
    torch.testing.assert_close(found, rows.T @ rows + rows[5:].T @ rows[5:])


def test_the_model_is_left_as_it_was(
    model: Any, paths: list[str], adapters: dict[str, Adapter], runner: Runner
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken() -> None:
        runner.run["ada"]()
        raise RuntimeError("out of memory")

    grams.collect(model, adapters, paths, runner.run)
    with pytest.raises(RuntimeError, match="out of memory"):
        grams.collect(model, adapters, [*paths, "classifier"], {**runner.run, "bea": broken})
    with pytest.raises(AttributeError):
        grams.collect(model, adapters, ["classifier", "no.such"], runner.run)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_module_that_no_batch_reaches_is_named(model: Any, adapters: dict[str, Adapter], runner: Runner) -> None:
    with pytest.raises(ModelError, match="no batch of bea reaches classifier"):
        grams.collect(model, adapters, ["classifier"], {**runner.run, "bea": lambda: None})


def test_regmean_pp_sees_each_layer_behind_merged_ones(
    model: Any, paths: list[str], adapters: dict[str, Adapter], runner: Runner
) -> None:
    layers = [[path for path in paths if f".layer.{number}." in path] for number in range(2)]

    def merge_layer(layer: Sequence[str], found: grams.Grams) -> dict[str, LowRank]:
        return {
            path: merged("regmean_pp", [each.updates[path] for each in adapters.values()], squares=found[path])
            for path in layer
        }

    found = grams.merge_sequentially(model, adapters, layers, runner.run, merge_layer)
    own = merge_layer(paths, grams.collect(model, adapters, paths, runner.run))
    assert list(found) == paths
    assert all(torch.equal(found[path].A, own[path].A) for path in layers[0])  # nothing is merged before it
    for path in layers[1]:
        mixed = [
            Adapter({**{each: found[each] for each in layers[0]}, **{each: task.updates[each] for each in layers[1]}})
            for task in adapters.values()
        ]
        squares = [by_hand(model, each, path, seed) for seed, each in enumerate(mixed)]
        updates = [each.updates[path] for each in adapters.values()]
        assert same(merged("regmean_pp", updates, squares=squares), dense(found[path]), 1e-4)
        assert not same(own[path], dense(found[path]), 1e-3)
