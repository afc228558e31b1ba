"""What each merge method is by its definition: a few lines of numpy on dense float64 updates, of one module at a time.

A reference is the function of the method's name, with defaults of its own; `CASES` are the options that a method is
tested with beside its defaults. Random methods draw from the streams that they promise, so their masks are pinned too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorica.randomness import bernoulli, uniforms

Array = NDArray[Any]
Svd = tuple[Array, Array, Array]  # U (m, p), σ (p,), Vᵀ (p, n)
NEGLIGIBLE = 1e-5  # of the largest singular value: below it float32 factors hold no direction

SPACES: tuple[dict[str, Any], ...] = ({"space": "knots"}, {"space": "core"})
CASES: dict[str, Sequence[dict[str, Any]]] = {
    "uniform_scalar_delta": [{"scale": -0.3}],
    "weighted": [{"lambda": 0.3}, {"lambda": 1.0}],
    "weighted_delta": [{"lambda": 0.3}, {"lambda": 1.0}],
    "weighted_delta_n": [
        {"task_coefficients": {"sst2": 0.3, "rte": 0.9}},
        {"task_coefficients": {"sst2": 0.3}, "default_task_coefficients": {"rte": 0.2, "sst2": 0.4}},
        {"task_coefficients": {"sst2": 0.3, "rte": 0.9}, "normalize_coefficients": False},
        {"layer_task_coefficients": {1: {"mrpc": -0.7}}, "allow_negative_coefficients": True},
    ],
    "ties": [
        {"k": 100},
        {"preset": "peft", "density": 0.5},
        {"preset": "mergekit", "k": 60, "lambda": 0.7},
        {"scope": "module"},
        *SPACES,
    ],
    "dare": [{"drop_rate": 0}, {"density": 0.4, "lambda": 0.7, "seed": 1}, {"consensus": "ties"}, *SPACES],
    "dare_ties": [{"drop_rate": 0}, {"density": 0.4, "lambda": 0.7, "seed": 1}, *SPACES],
    "della": [{"drop_rate": 0.6, "epsilon": 0.5, "lambda": 0.7, "seed": 1}, *SPACES],
    "breadcrumbs": [{"density": 0.3, "gamma": 0.2, "lambda": 0.7}, {"density": 0.5, "gamma": 0}, *SPACES],
    "slerp": [{"t": 0.3}, {"t": 1.0}],
    "sce": [{"select_topk": 0.3, "lambda": 0.7}],
    "magmax": [{"lambda": 0.7}, *SPACES],
    "cart": [{"lambda": 0.4, "rank_fraction": 0.5}],
    "knots": [{"rule": "magmax", "lambda": 0.7}, {"rule": "dare", "rule_params": {"drop_rate": 0.5}}],
    "tsv": [{"keep": 0.5, "lambda": 0.7}],
    "iso_c": [{"lambda": 0.7}],
    "iso_cts": [{"common_space_fraction": 0.4, "lambda": 0.7}, *({"common_space_fraction": end} for end in (0, 1))],
    "regmean": [{"alpha": 0.3, "ridge": 0.1, "lambda": 0.7}, {"alpha": 1}],
    "regmean_pp": [{"alpha": 0.3, "ridge": 0.1, "lambda": 0.7}],
    "wudi": [{"lambda": 0.7}],
    "core": [
        {"rule": "ties", "rule_params": {"preset": "peft", "k": 50}},
        {"rule": "dare", "rule_params": {"density": 0.5}},
    ],
}


@dataclass(frozen=True)
class Given:
    """One module: what a reference may know."""

    path: str
    names: tuple[str, ...]
    factors: Sequence[tuple[Array, Array]]  # scale·B (out, r_i) and A (r_i, in)
    weights: Array  # (T,)
    grams: Array  # (T, in, in)
    deltas: Array  # (T, out, in)
    everywhere: Sequence[Array]  # the deltas of every module of the merge


def uniform(given: Given) -> Array:
    return _mean_of_factors(given, [1 / len(given.names)] * len(given.names))


def uniform_delta(given: Given) -> Array:
    return given.deltas.mean(axis=0)


def uniform_scalar_delta(given: Given, *, scale: float = 1.0) -> Array:
    return scale * _sum(given.weights, given.deltas)


def weighted(given: Given, *, lambda_: float = 0.5) -> Array:
    return _mean_of_factors(given, [lambda_, 1 - lambda_])


def weighted_delta(given: Given, *, lambda_: float = 0.5) -> Array:
    return lambda_ * given.deltas[0] + (1 - lambda_) * given.deltas[1]


def weighted_delta_n(
    given: Given,
    *,
    task_coefficients: Mapping[str, float] | None = None,
    default_task_coefficients: Mapping[str, float] | None = None,
    layer_task_coefficients: Mapping[int, Mapping[str, float]] | None = None,
    normalize_coefficients: bool = True,
    allow_negative_coefficients: bool = False,
) -> Array:
    layer = next((int(part) for part in given.path.split(".") if part.isdigit()), None)
    here = (layer_task_coefficients or {}).get(layer, {}) if layer is not None else {}
    found = dict.fromkeys(given.names, 1 / len(given.names))
    for table in (task_coefficients, default_task_coefficients, here):
        found |= table or {}
    c = np.array([found[name] for name in given.names])
    return _sum(c / c.sum() if normalize_coefficients else c, given.deltas)


def task_vector(given: Given) -> Array:
    return _sum(given.weights, given.deltas) / len(given.deltas)


def ties(
    given: Given,
    *,
    k: float = 20.0,
    density: float | None = None,
    lambda_: float = 1.0,
    preset: str = "paper",
    scope: str | None = None,
    space: str = "full",
) -> Array:
    share = k / 100 if density is None else density
    entries, back = _seen(given.deltas, space)
    everything = [entries]
    if scope == "adapter" or (scope is None and preset == "paper"):
        everything = [_seen(deltas, space)[0] for deltas in given.everywhere]
    kept = entries.copy()
    for adapter, values in enumerate(kept):
        largest = _falling(np.concatenate([each[adapter].ravel() for each in everything]))
        values[np.abs(values) < largest[max(1, int(share * len(largest))) - 1]] = 0
    scaled = given.weights[:, None, None] * kept
    if preset == "mergekit":
        agree = np.sign(scaled) == np.where(scaled.sum(axis=0) >= 0, 1, -1)
        divisor = (given.weights[:, None, None] * agree).sum(axis=0)
        return lambda_ * back((scaled * agree).sum(axis=0) / _or_one(divisor))
    signs = np.sign(kept.sum(axis=0)) if preset == "paper" else np.where(kept.sum(axis=0) >= 0, 1, -1)
    agree = (np.sign(kept) == signs) & (kept != 0)
    return lambda_ * back((scaled * agree).sum(axis=0) / _or_one(agree.sum(axis=0)))


def dare(
    given: Given,
    *,
    drop_rate: float = 0.9,
    density: float | None = None,
    lambda_: float = 1.0,
    consensus: str = "none",
    seed: int = 42,
    space: str = "full",
) -> Array:
    keep = 1 - drop_rate if density is None else density
    entries, back = _seen(given.deltas, space)
    block = 0  # the test's modules are of one block
    size = entries[0].size
    masks = [bernoulli(seed, "dare", n, given.path, space, block, size=size, probability=keep) for n in given.names]
    kept = np.stack([each.numpy().reshape(entries[0].shape) for each in masks]) * entries / keep
    kept = given.weights[:, None, None] * kept
    return lambda_ * back(kept.mean(axis=0) if consensus == "none" else _elected_mean(kept))


def dare_ties(given: Given, **options: Any) -> Array:
    return dare(given, consensus="ties", **options)


def della(
    given: Given,
    *,
    drop_rate: float = 0.3,
    epsilon: float = 0.14,
    lambda_: float = 1.0,
    seed: int = 42,
    space: str = "full",
) -> Array:
    entries, back = _seen(given.deltas, space)
    width = entries.shape[2]
    place = np.abs(entries).argsort(axis=2).argsort(axis=2)  # in its row, 0 for the smallest
    dropped = drop_rate + epsilon / 2 - epsilon * place / (width - 1)
    drawn = [uniforms(seed, "della", name, given.path, space, 0, size=entries[0].size) for name in given.names]
    kept = (np.stack([each.numpy() for each in drawn]).reshape(entries.shape) < 1 - dropped) * entries / (1 - dropped)
    return lambda_ * back(_elected_mean(given.weights[:, None, None] * kept))


def breadcrumbs(
    given: Given, *, density: float = 0.9, gamma: float = 0.01, lambda_: float = 1.0, space: str = "full"
) -> Array:
    entries, back = _seen(given.deltas, space)
    kept = np.zeros_like(entries)
    for values, part in zip(entries, kept, strict=True):
        order = np.abs(values).ravel().argsort()[::-1]
        chosen = order[int(gamma * values.size) : max(1, int((density + gamma) * values.size))]
        part.ravel()[chosen] = values.ravel()[chosen]
    return lambda_ * back(_sum(given.weights, kept))


def model_stock(given: Given) -> Array:
    T = len(given.deltas)
    flat = given.deltas.reshape(T, -1)
    norms = _or_one(np.linalg.norm(flat, axis=1))
    cosines = [flat[i] @ flat[j] / norms[i] / norms[j] for i, j in combinations(range(T), 2)]
    cosine = max(0.0, sum(cosines) / len(cosines)) if cosines else 1.0
    return T * cosine / (1 + (T - 1) * cosine) * given.deltas.mean(axis=0)


def slerp(given: Given, *, t: float = 0.5) -> Array:
    first, second = given.deltas
    product = np.linalg.norm(first) * np.linalg.norm(second)
    angle = math.acos(np.clip((first * second).sum() / product, -1, 1)) if product > 0 else 0.0
    if math.sin(angle) < 1e-6:
        return (1 - t) * first + t * second
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def sce(given: Given, *, select_topk: float = 1.0, lambda_: float = 1.0) -> Array:
    variance = given.deltas.var(axis=0)
    least = _falling(variance)[max(1, int(select_topk * variance.size)) - 1]
    selected = given.deltas * (variance >= least)
    c = (selected**2).sum(axis=(1, 2))[:, None, None]
    agree = np.sign(selected) == np.sign(selected.sum(axis=0))
    return lambda_ * (c * selected * agree).sum(axis=0) / _or_one((c * agree).sum(axis=0))


def magmax(given: Given, *, lambda_: float = 1.0, space: str = "full") -> Array:
    entries, back = _seen(given.deltas, space)
    entries = given.weights[:, None, None] * entries
    largest = np.abs(entries).argmax(axis=0)
    return lambda_ * back(np.take_along_axis(entries, largest[None], axis=0)[0])


def cart(given: Given, *, lambda_: float = 1.0, rank_fraction: float = 1.0) -> Array:
    mean = given.deltas.mean(axis=0)
    ranks = [math.ceil(rank_fraction * len(A)) for _, A in given.factors]
    return mean + lambda_ * sum(_cut(delta - mean, rank) for delta, rank in zip(given.deltas, ranks, strict=True))


def knots(
    given: Given, *, rule: str = "ties", rule_params: Mapping[str, Any] | None = None, lambda_: float = 1.0
) -> Array:
    return lambda_ * globals()[rule](given, space="knots", **(rule_params or {}))


def core(
    given: Given, *, rule: str = "ties", rule_params: Mapping[str, Any] | None = None, lambda_: float = 1.0
) -> Array:
    return lambda_ * globals()[rule](given, space="core", **(rule_params or {}))


def tsv(given: Given, *, keep: float = 1.0, lambda_: float = 1.0) -> Array:
    parts = [_svd(delta) for delta in _scaled(given)]
    kept = [math.ceil(keep * len(sigma)) for _, sigma, _ in parts]
    return lambda_ * _side_by_side([_first(k, part) for k, part in zip(kept, parts, strict=True)])


def iso_c(given: Given, *, lambda_: float = 1.0) -> Array:
    U, sigma, Vh = _svd(_sum(given.weights, given.deltas))
    return lambda_ * sigma.mean() * U @ Vh if len(sigma) else U @ Vh


def iso_cts(given: Given, *, common_space_fraction: float = 0.8, lambda_: float = 1.0) -> Array:
    total = _svd(_sum(given.weights, given.deltas))
    T, R = len(given.deltas), len(total[1])
    num_own = min(R // T, round((R - int(common_space_fraction * R)) / T))
    common = _first(R - num_own * T, total)
    own = [_first(num_own, _svd(delta - common[0] @ common[0].T @ delta)) for delta in _scaled(given)]
    sigma = np.concatenate([sigma for _, sigma, _ in (common, *own)])
    return lambda_ * _side_by_side([(U, np.full(len(s), sigma.mean()), Vh) for U, s, Vh in (common, *own)])


def regmean(given: Given, *, alpha: float = 0.9, ridge: float = 1e-6, lambda_: float = 1.0) -> Array:
    diagonals = given.grams * np.eye(given.grams.shape[1])
    grams = alpha * given.grams + (1 - alpha) * diagonals
    grams += ridge * diagonals.sum(axis=2).mean(axis=1)[:, None, None] * np.eye(grams.shape[1])
    return lambda_ * (_scaled(given) @ grams).sum(axis=0) @ np.linalg.inv(grams.sum(axis=0))


regmean_pp = regmean  # it differs in where the Grams come from


def wudi(given: Given, *, lambda_: float = 1.0) -> Array:
    squares = _or_one((given.deltas**2).sum(axis=(1, 2)))[:, None, None]
    grams = given.deltas.transpose(0, 2, 1) @ given.deltas / squares
    inverse = np.linalg.pinv(grams.sum(axis=0), rcond=NEGLIGIBLE**2, hermitian=True)
    return lambda_ * (_scaled(given) @ grams).sum(axis=0) @ inverse


def _scaled(given: Given) -> Array:
    return given.weights[:, None, None] * given.deltas


def _sum(coefficients: Sequence[float] | Array, deltas: Array) -> Array:
    return np.tensordot(np.asarray(coefficients), deltas, axes=1)


def _mean_of_factors(given: Given, coefficients: Sequence[float]) -> Array:
    B, A = (_sum(coefficients, np.stack(each)) for each in zip(*given.factors, strict=True))
    return B @ A


def _seen(deltas: Array, space: str) -> tuple[Array, Callable[[Array], Array]]:
    """The updates' coordinates (T, p, q) in a space, and the way back from (p, q) to (out, in)."""
    if space == "full":
        return deltas, lambda merged: merged
    U, sigma, _ = _svd(np.concatenate(deltas, axis=1))  # (out, p), (p,)
    if space == "knots":  # Vᵀ itself would be off from zero by rounding where an update is zero
        return U.T @ deltas / sigma[:, None], lambda merged: (U * sigma) @ merged
    _, _, right = _svd(np.concatenate(deltas, axis=0))  # (q, in)
    return U.T @ deltas @ right.T, lambda merged: U @ merged @ right


def _elected_mean(values: Array) -> Array:
    """(T, ...) -> (...): of each entry the mean of the non-zero values that have the sign of their sum."""
    agree = (np.sign(values) == np.sign(values.sum(axis=0))) & (values != 0)
    return (values * agree).sum(axis=0) / _or_one(agree.sum(axis=0))


def _svd(matrix: Array) -> Svd:
    """U·Σ·Vᵀ of the directions that are not negligible."""
    U, sigma, Vh = np.linalg.svd(matrix, full_matrices=False)
    kept = sigma > NEGLIGIBLE * sigma[:1]
    return U[:, kept], sigma[kept], Vh[kept]


def _first(k: int, parts: Svd) -> Svd:
    U, sigma, Vh = parts
    return U[:, :k], sigma[:k], Vh[:k]


def _side_by_side(parts: Sequence[Svd]) -> Array:
    """P(U)·Σ·P(V)ᵀ of all the parts' U, Σ and V put together, P the polar factor."""
    U, sigma, Vh = zip(*parts, strict=True)
    return (_polar(np.concatenate(U, axis=1)) * np.concatenate(sigma)) @ _polar(np.concatenate(Vh, axis=0))


def _polar(matrix: Array) -> Array:
    """The partial isometry nearest to the matrix: its singular values made one, those that are zero left so."""
    U, _, Vh = _svd(matrix)
    return U @ Vh


def _cut(matrix: Array, rank: int) -> Array:
    U, sigma, Vh = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]


def _falling(values: Array) -> Array:
    return np.sort(np.abs(values), axis=None)[::-1]


def _or_one(divisor: Array) -> Array:
    return np.where(divisor == 0, 1, divisor)
