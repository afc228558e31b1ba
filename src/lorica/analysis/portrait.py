"""One adapter in figures: of each module, of each kind of module, and in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.analysis import spectrum


@dataclass(frozen=True)
class ModuleFigures:
    """The update of one module. Singular values fall; `energy[i]` is the share of ‖Δ‖² in the first i + 1 of them."""

    path: str
    kind: str
    shape: tuple[int, int]  # (out, in)
    rank: int
    scale: float
    num_parameters: int
    num_bytes: int
    norm: float
    mean_A: float
    std_A: float
    mean_B: float
    std_B: float
    stable_rank: float
    effective_rank: float
    numerical_rank: int
    rank_utilisation: float
    sigma: tuple[float, ...]
    energy: tuple[float, ...]

    def energy_at(self, k: int) -> float:
        """The share of ‖Δ‖² in the first k directions; 1 for any k above the rank."""
        return self.energy[min(k, len(self.energy)) - 1] if self.energy else 0.0


@dataclass(frozen=True)
class KindFigures:
    """All modules of one kind (q_proj, v_proj, ...), or one head; the ranks are means over modules, None of a head."""

    kind: str
    num_modules: int
    num_parameters: int
    num_bytes: int
    norm: float | None
    stable_rank: float | None
    effective_rank: float | None
    rank_utilisation: float | None


@dataclass(frozen=True)
class Portrait:
    """A whole adapter; bytes are those of its numbers, as they are stored."""

    modules: tuple[ModuleFigures, ...]
    kinds: tuple[KindFigures, ...]
    num_parameters: int
    num_bytes: int
    norm: float


@dataclass(frozen=True)
class RankFigures:
    """How an update uses its rank. Of several modules: the largest rank, the norm of all, else means."""

    rank: int
    norm: float
    stable_rank: float
    effective_rank: float
    rank_utilisation: float
    energy: float  # the share of ‖Δ‖² in the first directions, as many as were asked about


@dataclass(frozen=True)
class Ranks:
    """How updates use their ranks, over all modules and in each."""

    overall: RankFigures
    modules: Mapping[str, RankFigures]


def portrait(adapter: Adapter) -> Portrait:
    """Every figure of an adapter, from its factors; no update is formed as a matrix."""
    modules = tuple(of_module(path, update) for path, update in adapter.updates.items())
    heads = tuple(_of_head(path, list(head.values())) for path, head in adapter.heads.items())
    kinds = dict.fromkeys(each.kind for each in modules)
    all_kinds = (*(_of_kind(kind, [each for each in modules if each.kind == kind]) for kind in kinds), *heads)
    return Portrait(
        modules=modules,
        kinds=all_kinds,
        num_parameters=sum(each.num_parameters for each in all_kinds),
        num_bytes=sum(each.num_bytes for each in all_kinds),
        norm=_length([each.norm for each in modules]),
    )


def numbers_by_kind(adapter: Adapter, *, only_B: bool = False) -> dict[str, int]:
    """Kind of module, or head -> how many numbers it has, as `portrait` counts them; or how many of them are in B."""
    found: dict[str, int] = {}
    for path, update in adapter.updates.items():
        count = update.B.numel() + (0 if only_B else update.A.numel())
        found[_kind(path)] = found.get(_kind(path), 0) + count
    heads = {_head(path): sum(each.numel() for each in head.values()) for path, head in adapter.heads.items()}
    return found | heads


def ranks(updates: Mapping[str, LowRank], k: int, weight: float = 1.0) -> Ranks:
    """How updates that count `weight` times use their ranks; norms have the weight in them, and energy is that at k."""
    modules = {path: _ranks_of(update, k, weight) for path, update in updates.items()}
    found = list(modules.values())
    overall = RankFigures(
        rank=max((each.rank for each in found), default=0),
        norm=_length([each.norm for each in found]),
        stable_rank=_mean([each.stable_rank for each in found]),
        effective_rank=_mean([each.effective_rank for each in found]),
        rank_utilisation=_mean([each.rank_utilisation for each in found]),
        energy=_mean([each.energy for each in found]),
    )
    return Ranks(overall, modules)


def _ranks_of(update: LowRank, k: int, weight: float) -> RankFigures:
    found = spectrum.of_update(update)
    return RankFigures(
        rank=update.rank,
        norm=abs(weight) * found.norm,
        stable_rank=found.stable_rank,
        effective_rank=found.effective_rank,
        rank_utilisation=found.rank_utilisation,
        energy=found.energy(k),
    )


def of_module(path: str, update: LowRank) -> ModuleFigures:
    """The figures of one update; the standard deviations are over the entries of a factor, 0 of none."""
    found = spectrum.of_update(update)
    mean_A, std_A = _moments(update.A)
    mean_B, std_B = _moments(update.B)
    return ModuleFigures(
        path=path,
        kind=_kind(path),
        shape=update.shape,
        rank=update.rank,
        scale=update.scale,
        num_parameters=update.A.numel() + update.B.numel(),
        num_bytes=update.A.nbytes + update.B.nbytes,
        norm=found.norm,
        mean_A=mean_A,
        std_A=std_A,
        mean_B=mean_B,
        std_B=std_B,
        stable_rank=found.stable_rank,
        effective_rank=found.effective_rank,
        numerical_rank=found.numerical_rank,
        rank_utilisation=found.rank_utilisation,
        sigma=tuple(found.sigma.tolist()),
        energy=tuple(found.energy(k) for k in range(1, len(found.sigma) + 1)),
    )


def _of_kind(kind: str, modules: Sequence[ModuleFigures]) -> KindFigures:
    return KindFigures(
        kind=kind,
        num_modules=len(modules),
        num_parameters=sum(each.num_parameters for each in modules),
        num_bytes=sum(each.num_bytes for each in modules),
        norm=_length([each.norm for each in modules]),
        stable_rank=_mean([each.stable_rank for each in modules]),
        effective_rank=_mean([each.effective_rank for each in modules]),
        rank_utilisation=_mean([each.rank_utilisation for each in modules]),
    )


def _of_head(path: str, tensors: Sequence[Tensor]) -> KindFigures:
    num_parameters, num_bytes = sum(each.numel() for each in tensors), sum(each.nbytes for each in tensors)
    return KindFigures(_head(path), 1, num_parameters, num_bytes, None, None, None, None)


def _kind(path: str) -> str:
    return path.rpartition(".")[2]


def _head(path: str) -> str:
    return f"head {path}"


def _moments(factor: Tensor) -> tuple[float, float]:
    if not factor.numel():
        return 0.0, 0.0
    values = factor.double()
    return float(values.mean()), float(values.std(correction=0))


def _length(norms: Sequence[float]) -> float:
    return sum(norm**2 for norm in norms) ** 0.5


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
