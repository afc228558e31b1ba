"""The laws of MATH section 6.4, for every file in merging/methods/ and every option set in `merge_references.CASES`.

A law is a function that measures how far a method is from holding it. A method that exempts itself from a law must
really break it here: an exemption that is no longer true fails too.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

import merge_references
from lorica.adapters.delta import LowRank
from lorica.errors import ShapeError
from lorica.merging.method import METHODS, Method, Module, Site, Update, load
from merge_references import Array, Given

Found = TypeVar("Found")
Change = Callable[[LowRank, torch.Generator], LowRank]
Merging = list[Module]  # all modules of a merge
Options = Mapping[str, Any]

NAMES = METHODS.names()
ADAPTERS = ("sst2", "rte", "mrpc")
WEIGHTS = (1.0, 0.6, 1.5)
SHAPES = {"model.layers.0.q_proj": (24, 18), "model.layers.1.q_proj": (16, 22), "model.layers.1.down_proj": (20, 8)}
TOLERANCE = 1e-5  # relative, of each module: float32's rounding, and no entry on the wrong side of a threshold
BROKEN = 1e-3
PLAIN: dict[tuple[str, str], list[Array]] = {}


@dataclass(frozen=True)
class Modules:
    """A merge's modules, as a survey sees them."""

    modules: Merging

    def map(self, function: Callable[[Module], Found]) -> list[Found]:
        return [function(module) for module in self.modules]


# --- the laws: each returns the largest relative error of a module ---


def single(name: str, params: Options) -> float:
    """One adapter with weight 1 and the default options gives it back."""
    if METHODS.load(name, "NUM_ADAPTERS", default=None):
        pytest.skip("merges a fixed number of adapters")
    modules = picked(made(name, weights=(1.0,) * 3), [0])
    return error(run(name, {}, modules), dense(modules))


def order(name: str, params: Options) -> float:
    """The adapters in another order, their names, weights and Grams with them, give the same."""
    modules = made(name)
    other = [1, 0] if len(modules[0].updates) == 2 else [2, 0, 1]
    return error(run(name, params, picked(modules, other)), plain(name, params))


def refactoring(name: str, params: Options) -> float:
    """(B·G)·(G⁻¹·A) is the same update, also where the rounding makes a small direction of what was none."""

    def refactored(update: LowRank, generator: torch.Generator) -> LowRank:
        U, V = (torch.linalg.qr(normal(generator, update.rank, update.rank).double())[0] for _ in range(2))
        sizes = torch.linspace(0.5, 2.0, update.rank).double()
        B, A = update.B.double() @ (U * sizes) @ V, V.T / sizes @ U.T @ update.A.double()
        return LowRank(A.float(), B.float(), update.scale)

    flat = with_first(made(name), deficient)
    return max(
        error(run(name, params, changed(made(name), refactored)), plain(name, params)),
        error(run(name, params, changed(flat, refactored)), arrays(run(name, params, flat))),
    )


def scaling(name: str, params: Options) -> float:
    """(c·B)·(A/c) is the same update, and so is s·B at scale 1."""

    def one_factor(update: LowRank, generator: torch.Generator) -> LowRank:
        return LowRank(update.A / 7.3, update.B * 7.3, update.scale)

    def scale(update: LowRank, generator: torch.Generator) -> LowRank:
        return LowRank(update.A * (update.scale / 0.3), update.B, 0.3)

    both = (run(name, params, changed(made(name), each)) for each in (one_factor, scale))
    return max(error(found, plain(name, params)) for found in both)


def duplicate(name: str, params: Options) -> float:
    """[a, b, a', b'] gives what [a, b] gives."""
    if METHODS.load(name, "NUM_ADAPTERS", default=None):
        pytest.skip("merges a fixed number of adapters")
    modules = picked(made(name), [0, 1])
    names = [*ADAPTERS[:2], *map(copied, ADAPTERS[:2])]
    twice = picked(modules, [0, 1, 0, 1], names)
    few = {key: without(value, ADAPTERS[2]) for key, value in params.items()}
    return error(run(name, with_copies(few), twice), arrays(run(name, few, modules)))


def zero(name: str, params: Options) -> float:
    """Updates of zero give zero exactly, whichever factor it is that is zero."""
    zeros: tuple[Change, ...] = (
        lambda update, _: LowRank(update.A, 0 * update.B, update.scale),
        lambda update, _: LowRank(0 * update.A, 0 * update.B, update.scale),
        lambda update, _: LowRank(update.A[:0], update.B[:, :0], update.scale),
    )
    found = [array for each in zeros for array in arrays(run(name, params, changed(made(name), each)))]
    return max(float(np.abs(array).max()) if np.isfinite(array).all() else np.inf for array in found)


def reference(name: str, params: Options) -> float:
    """The definition in float64 gives the same: with an update of zero, one not of full rank, any weights."""
    expected = getattr(merge_references, name, None)
    if expected is None:
        pytest.fail(
            f"method {name} has no reference: write `def {name}(given, *, options) -> array` in "
            f'merge_references.py, or say in its file why none can be: EXEMPT = {{"reference": "..."}}'
        )
    options = {"lambda_" if key == "lambda" else key: value for key, value in params.items()}
    inputs = [made(name), with_first(made(name), absent), with_first(made(name), deficient)]
    if METHODS.load(name, "USES_WEIGHTS", default=True):
        inputs.append(made(name, weights=(1.0, 0.0, -0.7)))
    return max(
        error(run(name, params, modules), [expected(given, **options) for given in givens(modules)])
        for modules in inputs
    )


LAWS = {law.__name__: law for law in (single, order, refactoring, scaling, duplicate, zero, reference)}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", NAMES)
def test_law(name: str, law: str) -> None:
    tried = [{}] if law == "single" else cases(name)
    errors = {str(params): LAWS[law](name, params) for params in tried}
    reason = METHODS.load(name, "EXEMPT", default={}).get(law)
    if reason is None:
        allowed = 0.0 if law == "zero" else TOLERANCE
        broken = {params: found for params, found in errors.items() if not found <= allowed}
        assert not broken, f"method {name} breaks the law {law!r}: {LAWS[law].__doc__} Relative errors: {broken}"
    else:
        assert max(errors.values()) > BROKEN, f"method {name} holds the law {law!r}: its exemption is out of date"
        assert max(errors.values()) < np.inf


@pytest.mark.parametrize("name", NAMES)
def test_exemptions_are_reasoned(name: str) -> None:
    exempt = METHODS.load(name, "EXEMPT", default={})
    assert set(exempt) <= set(LAWS), f"the laws are {', '.join(LAWS)}"
    assert all(len(reason.split()) > 2 for reason in exempt.values()), "say in a sentence what breaks the law"
    assert not ("reference" in exempt and hasattr(merge_references, name)), "it has a reference"


# --- what else every method must do ---


@pytest.mark.parametrize("name", NAMES)
def test_results_fit(name: str) -> None:
    for params in cases(name):
        modules = made(name)
        for module, found in zip(modules, run(name, params, modules), strict=True):
            assert found.shape == module.updates[0].shape
            if isinstance(found, LowRank):
                assert found.rank <= sum(factored(update).rank for update in module.updates)
                assert (found.A.dtype, found.B.dtype, found.is_finite()) == (torch.float32, torch.float32, True)
            else:
                assert (found.dtype, bool(found.isfinite().all())) == (torch.float32, True)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_differ_or_it_is_said_that_they_must_not(name: str) -> None:
    modules = updates(num_adapters(name), ranks=(2, 3, 4))
    try:
        run(name, {}, modules)
    except ShapeError as refusal:
        assert f"method {name} needs equal ranks" in str(refusal)
        assert "sst2 2, rte 3" in str(refusal)


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_update_is_merged_as_its_factors_or_refused(name: str) -> None:
    modules = made(name)
    try:
        found = run(name, {}, [dataclasses.replace(each, updates=[*map(as_tensor, each.updates)]) for each in modules])
    except ShapeError as refusal:
        assert "works on low-rank factors" in str(refusal)
    else:
        assert error(found, arrays(run(name, {}, modules))) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_taken(name: str) -> None:
    modules = changed(made(name, scales=(2.0,) * 3), lambda update, _: update.to(torch.bfloat16))
    same = changed(modules, lambda update, _: update.to(torch.float32))
    assert error(run(name, {}, modules), arrays(run(name, {}, same))) < 0.01  # bfloat16 has eight bits


@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_twice_and_nothing_is_overwritten(name: str) -> None:
    for params in cases(name):
        modules = made(name)
        first, second = (digest(run(name, params, modules)) for _ in range(2))
        assert first == second
        assert digest([update for module in modules for update in module.updates]) == digest(
            [update for module in made(name) for update in module.updates]
        )


def test_same_bytes_in_another_process() -> None:
    code = "import json, test_merge_laws as laws; print(json.dumps(laws.digests()))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    there = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout) == digests()


def digests() -> dict[str, str]:
    """By method, of what it makes with its defaults; or the error that it raises, which other tests are about."""
    found = {}
    for name in NAMES:
        try:
            found[name] = digest(run(name, {}, made(name)))
        except Exception as failure:
            found[name] = repr(failure)
    return found


# --- merging ---


def cases(name: str) -> list[Options]:
    return [{}, *merge_references.CASES.get(name, ())]


def run(name: str, params: Options, modules: Merging) -> list[Update]:
    """The merged update of each module, behind the method's own survey of all."""
    method: Method = load(name, params, len(modules[0].updates))
    found = method.surveyed(Modules(modules))
    return [method(dataclasses.replace(each, site=dataclasses.replace(each.site, found=found))) for each in modules]


def plain(name: str, params: Options) -> list[Array]:
    """The merge of the modules as they are made, which several laws compare with: merged once."""
    key = name, str(params)
    if key not in PLAIN:
        PLAIN[key] = arrays(run(name, params, made(name)))
    return PLAIN[key]


def error(found: Sequence[Update], expected: Sequence[Array]) -> float:
    """max over the modules of ‖found - expected‖ / ‖expected‖; infinite where something is not a number."""
    worst = 0.0
    for one, other in zip(arrays(found), expected, strict=True):
        size = np.linalg.norm(other)
        distance = np.linalg.norm(one - other) / (size if size > 0 else 1.0)
        worst = max(worst, float(distance) if np.isfinite(distance) else np.inf)
    return worst


def arrays(updates: Sequence[Update]) -> list[Array]:
    """Each (out, in), float64."""
    return [
        each.scale * (each.B.double() @ each.A.double()).numpy() if isinstance(each, LowRank) else each.double().numpy()
        for each in updates
    ]


def as_tensor(update: Update) -> Tensor:
    return torch.from_numpy(arrays([update])[0]).float()


def digest(updates: Sequence[Update]) -> str:
    found = hashlib.sha256()
    for each in updates:
        for tensor in (each.A, each.B) if isinstance(each, LowRank) else (each,):
            found.update(str(tensor.dtype).encode() + tensor.contiguous().numpy().tobytes())
        found.update(repr(each.scale).encode() if isinstance(each, LowRank) else b"")
    return found.hexdigest()


# --- inputs ---


@functools.cache
def num_adapters(name: str) -> int:
    return METHODS.load(name, "NUM_ADAPTERS", default=None) or len(ADAPTERS)


@functools.cache
def needs_equal_ranks(name: str) -> bool:
    try:
        run(name, {}, updates(num_adapters(name), ranks=(2, 3, 4)))
    except ShapeError:
        return True
    return False


def made(name: str, **others: Any) -> Merging:
    """Modules to merge by this method: of different ranks where it can, with weights where it uses them."""
    return updates(
        num_adapters(name),
        ranks=(3, 3, 3) if needs_equal_ranks(name) else (2, 3, 4),
        **{"weights": WEIGHTS if METHODS.load(name, "USES_WEIGHTS", default=True) else (1.0,) * 3, **others},
    )


def updates(
    num: int, *, ranks: Sequence[int], weights: Sequence[float] = WEIGHTS, scales: Sequence[float] = (0.5, 2.0, 1.3)
) -> Merging:
    """`num` random adapters that agree in part, as fine-tuned ones do, and Grams of random inputs."""
    generator = torch.Generator().manual_seed(1)
    modules = []
    for path, (rows, width) in SHAPES.items():
        shared_A, shared_B = normal(generator, max(ranks), width), normal(generator, rows, max(ranks))
        factors = [
            LowRank(
                shared_A[:rank] + normal(generator, rank, width),
                shared_B[:, :rank] + normal(generator, rows, rank),
                scale,
            )
            for rank, scale in zip(ranks, scales, strict=True)
        ]
        inputs = [normal(generator, 3 * width, width) for _ in ranks]
        grams = tuple(X.T @ X for X in inputs)
        modules.append(Module(Site(path, ADAPTERS, grams=grams), factors, weights))
    return picked(modules, range(num))


def normal(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=generator)


def picked(modules: Merging, adapters: Sequence[int], names: Sequence[str] | None = None) -> Merging:
    """These of the adapters in this order, under other names where they are given."""
    return [
        Module(
            dataclasses.replace(
                each.site,
                names=tuple(names or [each.site.names[i] for i in adapters]),
                grams=tuple(each.site.grams[i] for i in adapters),
            ),
            [each.updates[i] for i in adapters],
            [each.weights[i] for i in adapters],
        )
        for each in modules
    ]


def changed(modules: Merging, change: Change) -> Merging:
    generator = torch.Generator().manual_seed(2)
    return [
        dataclasses.replace(each, updates=[change(factored(update), generator) for update in each.updates])
        for each in modules
    ]


def with_first(modules: Merging, change: Callable[[LowRank], LowRank]) -> Merging:
    return [
        dataclasses.replace(each, updates=[change(factored(each.updates[0])), *each.updates[1:]]) for each in modules
    ]


def absent(update: LowRank) -> LowRank:
    """Of the same nominal rank, and zero."""
    return LowRank(update.A, 0 * update.B, update.scale)


def deficient(update: LowRank) -> LowRank:
    """Of a true rank one below the nominal."""
    return LowRank(torch.cat([update.A[:1], update.A[:-1]]), update.B, update.scale)


def factored(update: Update) -> LowRank:
    assert isinstance(update, LowRank)
    return update


def dense(modules: Merging) -> list[Array]:
    """The first adapter's updates."""
    return arrays([module.updates[0] for module in modules])


def givens(modules: Merging) -> list[Given]:
    """The modules as the references see them."""
    factors = [[_in_float64(factored(update)) for update in each.updates] for each in modules]
    everywhere = [np.stack([B @ A for B, A in each]) for each in factors]
    return [
        Given(
            path=each.site.path,
            names=each.site.names,
            factors=pairs,
            weights=np.array(each.weights),
            grams=np.stack([gram.double().numpy() for gram in each.site.grams]),
            deltas=deltas,
            everywhere=everywhere,
        )
        for each, pairs, deltas in zip(modules, factors, everywhere, strict=True)
    ]


def _in_float64(update: LowRank) -> tuple[Array, Array]:
    return update.scale * update.B.double().numpy(), update.A.double().numpy()


def copied(name: str) -> str:
    return f"{name}-copy"


def without(value: Any, adapter: str) -> Any:
    """An option's value without what it says of one adapter."""
    if not isinstance(value, Mapping):
        return value
    return {key: without(inner, adapter) for key, inner in value.items() if key != adapter}


def with_copies(value: Any) -> Any:
    """An option's value that says of each adapter's copy what it says of the adapter."""
    if not isinstance(value, Mapping):
        return value
    said = {key: with_copies(inner) for key, inner in value.items()}
    return said | {copied(key): inner for key, inner in said.items() if key in ADAPTERS}
