"""How far an adapter that another tool has merged is from the exact merge, and what went wrong on the way.

Everything comes from the factors: distances and the best coefficients from inner products, what a compression had to
lose from the singular values of the exact merge. At a module that a source does not have its update is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.adapters.adapter import Adapter, aligned
from lorica.adapters.compression import spectrum
from lorica.adapters.delta import LowRank, combination, zero
from lorica.analysis.conflict import inner_products
from lorica.analysis.spectrum import directions
from lorica.errors import ConfigError, ShapeError
from lorica.merging.coefficients import adapter_weights
from lorica.merging.parallel import default_num_workers, ordered_map

ROUNDING = 5e-3  # relative: what factors kept in bfloat16 are off by
NEARLY = 0.01  # relative: two numbers that are meant to be the same
NOISE = 1e-14  # relative, of squares: float32 factors hold no less
UNDETERMINED = 1e-9  # of the largest eigenvalue of the sources' cosines: coefficients there are not told by the merge


@dataclass(frozen=True)
class AuditedModule:
    """One module; distances are relative to the exact merge's norm there."""

    path: str
    rank: int  # of the merged update, whatever the factors' size
    distance: float | None  # ‖Δ_out - Δ_exact‖; None where the exact merge is zero and the merged update is not
    best_distance: float  # the least that is possible at `rank`


@dataclass(frozen=True)
class Audit:
    """A merged adapter against the exact merge Σ w_i·Δ_i, in total over the modules that are in both."""

    modules: tuple[AuditedModule, ...]
    distance: float | None  # as of one module
    best_distance: float  # at the ranks of the merged updates
    weights: Mapping[str, float]
    coefficients: Mapping[str, float]  # c of the nearest Σ c_i·Δ_i; w where the merge does not tell
    residual: float  # ‖Δ_out - Σ c_i·Δ_i‖ / ‖Δ_out‖
    missing: tuple[str, ...]  # modules of the sources that the merged adapter does not have
    extra: tuple[str, ...]  # modules that no source has
    verdicts: tuple[str, ...]

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Sums:
    """One module, or several added up: inner products of the sources, the merged update and the updates of APART."""

    gram: Tensor  # (T + 1 + len(APART),) squared
    least_loss: float  # squared, of the exact merge at the merged update's rank
    has_apart: bool  # equal ranks, so that factors can be added up

    def __add__(self, other: _Sums) -> _Sums:
        loss = self.least_loss + other.least_loss
        return _Sums(self.gram + other.gram, loss, self.has_apart and other.has_apart)

    def norm(self, coefficients: Sequence[float]) -> float:
        """‖Σ c_i·Δ_i‖, with coefficients as of `inner`; 0 where it drowns in the rounding of what is added up."""
        square = self.inner(coefficients, coefficients)
        parts = sum(c * c * float(part) for c, part in zip(coefficients, self.gram.diagonal(), strict=False))
        return square**0.5 if square > NOISE * parts else 0.0

    def inner(self, left: Sequence[float], right: Sequence[float]) -> float:
        """<Σ c_i·Δ_i, Σ d_i·Δ_i> of sources, merged update, updates of APART, in this order; what is left out is 0."""
        block = self.gram[: len(left), : len(right)]
        return float(torch.tensor(left, dtype=torch.float64) @ block @ torch.tensor(right, dtype=torch.float64))


def audit(
    merged: Adapter,
    sources: Mapping[str, Adapter],
    weights: Mapping[str, float] | Sequence[float],
    *,
    num_workers: int | None = None,
) -> Audit:
    """Hold `merged` against Σ w_i·Δ_i of the sources. The verdicts name what fits, mistakes by their causes.

    Raises ConfigError for weights that do not fit, ShapeError for modules of different shapes or none in common.
    """
    if not sources:
        raise ConfigError("no sources to audit against: name at least one")
    w = adapter_weights(weights, list(sources))
    aligned([merged, *sources.values()], "union")
    known = dict.fromkeys(path for source in sources.values() for path in source.updates)
    paths = [path for path in known if path in merged.updates]
    if not paths:
        raise ShapeError("the merged adapter has none of the sources' modules: these are not its sources")

    def measured(path: str) -> tuple[int, _Sums]:
        return _measured(merged.updates[path], _at(path, sources), w)

    found = list(ordered_map(measured, paths, default_num_workers() if num_workers is None else num_workers))
    total = sum((sums for _, sums in found[1:]), found[0][1])
    coefficients, residual = _fitted(total, w)
    missing = [path for path in known if path not in merged.updates]
    extra = [path for path in merged.updates if path not in known]
    return Audit(
        modules=tuple(
            AuditedModule(path, rank, _distance(sums, w), _best_distance(sums, w))
            for path, (rank, sums) in zip(paths, found, strict=True)
        ),
        distance=_distance(total, w),
        best_distance=_best_distance(total, w),
        weights=dict(zip(sources, w, strict=True)),
        coefficients=dict(zip(sources, coefficients, strict=True)),
        residual=residual,
        missing=tuple(missing),
        extra=tuple(extra),
        verdicts=(
            *_of_updates(total, w, dict(zip(sources, coefficients, strict=True)), residual, list(sources.values())),
            *_of_modules(missing, extra, sources, w, total),
        ),
    )


def _at(path: str, sources: Mapping[str, Adapter]) -> list[LowRank]:
    found = [source.updates.get(path) for source in sources.values()]
    shape = next(each.shape for each in found if each is not None)
    return [zero(shape) if each is None else each for each in found]


def _measured(out: LowRank, updates: Sequence[LowRank], w: Sequence[float]) -> tuple[int, _Sums]:
    """The merged update's rank, and the module's sums."""
    exact = combination([each.to(torch.float32) for each in updates], w)
    has_apart = len({each.rank for each in updates}) == 1
    apart = [_apart(updates, w, shares) if has_apart else zero(out.shape) for shares in APART.values()]
    rank = len(directions(out)[1])
    best = spectrum(exact)
    loss = (best.error(rank) * best.norm) ** 2
    return rank, _Sums(inner_products([*updates, out, *apart]), loss, has_apart)


def _averaged(weight: float, scale: float) -> tuple[float, float]:
    return weight, weight * scale


def _rooted(weight: float, scale: float) -> tuple[float, float]:
    root = abs(weight * scale) ** 0.5
    return math.copysign(root, weight * scale), root


# Ways to add up factors where updates are meant: what happened -> the shares of A_i and of B_i
APART: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "A and B were averaged apart": _averaged,
    "A and B were added up apart, each times √(weight · scale), as by PEFT's combination_type=linear": _rooted,
}


def _apart(
    updates: Sequence[LowRank], w: Sequence[float], shares: Callable[[float, float], tuple[float, float]]
) -> LowRank:
    pairs = [shares(weight, each.scale) for each, weight in zip(updates, w, strict=True)]
    A = torch.stack([share * each.A.double() for each, (share, _) in zip(updates, pairs, strict=True)]).sum(dim=0)
    B = torch.stack([share * each.B.double() for each, (_, share) in zip(updates, pairs, strict=True)]).sum(dim=0)
    return LowRank(A, B)


def _distance(sums: _Sums, w: Sequence[float], factor: float = 1.0) -> float | None:
    """‖Δ_out / factor - Δ_exact‖ / ‖Δ_exact‖; None for a merged update where the exact merge is zero."""
    exact, apart = sums.norm(w), sums.norm([*w, -1 / factor])
    if exact == 0:
        return None if apart > 0 else 0.0
    return apart / exact


def _best_distance(sums: _Sums, w: Sequence[float]) -> float:
    exact = sums.norm(w)
    return sums.least_loss**0.5 / exact if exact > 0 else 0.0


def _fitted(sums: _Sums, w: Sequence[float]) -> tuple[list[float], float]:
    """The coefficients of the nearest combination of the sources (of several the nearest to `w`), and its residual."""
    num_sources = len(w)
    gram, onto = sums.gram[:num_sources, :num_sources], sums.gram[:num_sources, num_sources]
    norms = gram.diagonal().clamp(min=0).sqrt()
    unit = torch.where(norms > 0, 1 / norms, 0.0)
    weights = torch.tensor(w, dtype=torch.float64)
    cosines = unit[:, None] * gram * unit
    inverse = torch.linalg.pinv(cosines, rtol=UNDETERMINED, hermitian=True)
    c = weights + unit * (inverse @ (unit * (onto - gram @ weights)))
    merged = sums.norm([0.0] * num_sources + [1.0])
    return c.tolist(), sums.norm([*c.tolist(), -1.0]) / merged if merged > 0 else 0.0


def _of_updates(
    total: _Sums, w: Sequence[float], coefficients: Mapping[str, float], residual: float, sources: Sequence[Adapter]
) -> Iterator[str]:
    """What the merged updates are, from the nearest to the exact merge to what no combination explains."""
    distance = _distance(total, w)
    if distance is not None and distance < ROUNDING:
        yield f"the exact merge up to rounding: distance {distance:.1e}"
        return
    factor = _factor(total, w)
    turned = math.inf if factor is None else _distance(total, w, factor) or 0.0
    least = _best_distance(total, w)
    apart = list(_of_factors(total, w, distance))
    if factor is not None and turned < ROUNDING:
        yield f"every update is {factor:.4g} times what it should be{_hint(factor, sources)}"
    elif residual < ROUNDING:
        listed = ", ".join(f"{name} {value:.4f}" for name, value in coefficients.items())
        yield f"a sum of the sources with other coefficients: {listed}"
    elif factor is not None and _is_best(turned, least):
        but = f"it is {factor:.4g} times that{_hint(factor, sources)}" if abs(factor - 1) > NEARLY else "nothing wrong"
        yield f"the best compression of the exact merge to these ranks (distance {least:.2%}): {but}"
    elif not apart:
        need = f"; at these ranks {least:.2%} away from the exact merge is possible, and it is {distance:.2%} away"
        yield f"not a sum of the sources: {residual:.2%} of it is in none{need if least > 0 and distance else ''}"
    yield from apart


def _factor(total: _Sums, w: Sequence[float]) -> float | None:
    """f for which Δ_out / f is nearest to the exact merge, were it a part of f times that; None if at right angles."""
    merged = [0.0] * len(w) + [1.0]
    across = total.inner(merged, w)
    return total.norm(merged) ** 2 / across if abs(across) > NOISE * total.norm(merged) * total.norm(w) else None


def _is_best(distance: float, least: float) -> bool:
    """Whether what is lost is the least that can be, and so is what is kept: near 1 any distance is near any other."""
    kept, most = 1 - distance**2, 1 - least**2
    return distance < (1 + NEARLY) * math.hypot(least, ROUNDING) and kept > (1 - NEARLY) * most > 0


def _hint(factor: float, sources: Sequence[Adapter]) -> str:
    """What is known to be off by such a factor, given the sources' ranks and scales."""
    updates = [update for source in sources for update in source.updates.values()]
    ranks, scales = {update.rank for update in updates}, {update.scale for update in updates}
    causes = {float(len(sources)): "the number of adapters: a sum where a mean is meant"}
    if len(ranks) == 1:
        root = math.sqrt(ranks.pop())
        causes |= dict.fromkeys((root, 1 / root), "√rank: use_rslora was heeded on one side alone")
    if len(scales) == 1:
        scale = scales.pop()
        causes[scale] = "the scale, counted twice"
        if scale:
            causes[1 / scale] = "one over the scale, which was left out"
    fitting = [cause for value, cause in causes.items() if value != 1 and abs(factor - value) < NEARLY * abs(value)]
    return f" ({' or '.join(fitting)})" if fitting else ""


def _of_factors(total: _Sums, w: Sequence[float], distance: float | None) -> Iterator[str]:
    """Merges that added up factors where updates are meant."""
    if not total.has_apart:
        return
    for number, happened in enumerate(APART):
        itself = [0.0] * (len(w) + 1 + number) + [1.0]
        away = [0.0] * len(w) + [-1.0] + itself[len(w) + 1 :]
        if total.norm(away) < ROUNDING * total.norm(itself):
            away_from_exact = "" if distance is None else f", which is {distance:.2%} away from the exact merge"
            yield f"{happened}{away_from_exact}"


def _of_modules(
    missing: Sequence[str], extra: Sequence[str], sources: Mapping[str, Adapter], w: Sequence[float], total: _Sums
) -> Iterator[str]:
    if missing:
        lost = math.fsum(combination(_at(path, sources), w).norm() ** 2 for path in missing)
        share = lost / (lost + total.norm(w) ** 2) if lost > 0 else 0.0
        yield f"{_some(missing)} of the sources not merged: {share:.2%} of the exact merge's energy"
    if extra:
        yield f"{_some(extra)} that no source has"


def _some(paths: Sequence[str]) -> str:
    listed = ", ".join(paths[:3]) + (", …" if len(paths) > 3 else "")
    return f"{len(paths)} module{'s' if len(paths) > 1 else ''} ({listed})"
