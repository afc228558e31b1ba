"""What adapters are made of, as tables: the summary first, modules where they are few or asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lorica.tables.cells import columns, size, span

if TYPE_CHECKING:
    from lorica.analysis.conflict import Pair
    from lorica.analysis.portrait import KindFigures, ModuleFigures
    from lorica.runs.inspecting.inspect import Inspected, Inspection

NUM_MODULES = 24  # rows of modules that are shown unasked
EMPTY = "–"


def inspection(found: Inspection, *, energy_at: int, every_module: bool) -> list[Table | str]:
    """Each adapter by itself, then all of them against each other."""
    shown: list[Table | str] = []
    for each in found.adapters:
        shown += [_headline(each), _kinds(each)]
        if every_module or len(each.portrait.modules) <= NUM_MODULES:
            shown.append(_modules(each, energy_at, every_module))
        else:
            shown.append(f"{len(each.portrait.modules)} modules: --all shows each")
        if each.boosters:
            shown.append(_boosters(each))
    return [*shown, *([_pairs(found)] if found.layers else []), *([_stages(found)] if found.stages else [])]


def _headline(each: Inspected) -> str:
    figures, share = each.portrait, each.share
    of_base = (
        f"{share.trainable_share:.3%} of {share.num_parameters:,} parameters"
        if share.trainable_share is not None
        else f"share of the base unknown: {share.reason}"
    )
    ranks = span([module.rank for module in figures.modules])
    form = f"rank {ranks} on {len(figures.modules)} modules" if ranks else "no low-rank updates"
    return escape(
        f"{each.name}: {form}, norm {figures.norm:.4g}; {figures.num_parameters:,} numbers in "
        f"{size(figures.num_bytes)}, {share.num_trainable:,} trainable, {of_base}"
    )


def _kinds(each: Inspected) -> Table:
    head = ("kind", "modules", "numbers", "of the base", "norm", "stable", "effective", "utilisation")
    return columns(head, [_kind(kind, each.share.num_parameters) for kind in each.portrait.kinds])


def _kind(kind: KindFigures, num_parameters: int | None) -> list[str]:
    share = EMPTY if num_parameters is None else f"{kind.num_parameters / num_parameters:.3%}"
    counts = [kind.kind, str(kind.num_modules), f"{kind.num_parameters:,}", share]
    if kind.norm is None:
        return [*counts, *[EMPTY] * 4]
    ranks = (f"{kind.stable_rank:.2f}", f"{kind.effective_rank:.2f}", f"{kind.rank_utilisation:.1%}")
    return [*counts, f"{kind.norm:.4g}", *ranks]


def _modules(each: Inspected, energy_at: int, everything: bool) -> Table:
    """The ranks of every module; with `everything` the factors' means and standard deviations too."""
    head = ["module", "rank", "norm", "stable", "effective", "numerical", f"energy at {energy_at}"]
    rows = [_module(module, energy_at) for module in each.portrait.modules]
    if everything:
        head += ["utilisation", "largest σ", "A", "B"]
        rows = [[*row, *_factors(module)] for row, module in zip(rows, each.portrait.modules, strict=True)]
    return columns(head, rows)


def _module(module: ModuleFigures, energy_at: int) -> list[str]:
    return [
        *(module.path, str(module.rank), f"{module.norm:.4g}", f"{module.stable_rank:.2f}"),
        *(f"{module.effective_rank:.2f}", str(module.numerical_rank), f"{module.energy_at(energy_at):.1%}"),
    ]


def _factors(module: ModuleFigures) -> list[str]:
    return [
        *(f"{module.rank_utilisation:.1%}", f"{max(module.sigma, default=0.0):.4g}"),
        *(f"{module.mean_A:.1e} ± {module.std_A:.1e}", f"{module.mean_B:.1e} ± {module.std_B:.1e}"),
    ]


def _boosters(each: Inspected) -> Table:
    rows = [
        (
            *(str(one.round), "yes" if one.accepted else "no", f"{one.weight:g}", str(one.rank), f"{one.norm:.4g}"),
            *(f"{one.effective_rank:.2f}", str(one.chain_rank)),
            EMPTY if one.chain_norm is None else f"{one.chain_norm:.4g}",
            EMPTY if one.chain_effective_rank is None else f"{one.chain_effective_rank:.2f}",
        )
        for one in each.boosters
    ]
    head = ("round", "laid on", "weight", "rank", "norm", "effective rank")
    return columns((*head, "chain's rank", "chain's norm", "chain's effective rank"), rows)


def _pairs(found: Inspection) -> Table:
    head = ("layer", "pair", "cosine", "sign conflict", "overlap of outputs", "overlap of inputs")
    table = columns(head, [_pair(each.layer, pair) for each in found.layers for pair in each.pairs])
    table.caption = "a module that one adapter does not have is zero there"
    return table


def _stages(found: Inspection) -> Table:
    rows = [
        (
            *(each.name, EMPTY if each.step is None else str(each.step)),
            *(f"{min(each.cka):.4f}", f"{each.cka[-1]:.4f}", f"{max(each.distance):.3g}", f"{each.distance[-1]:.3g}"),
        )
        for each in found.stages
    ]
    table = columns(("stage", "step", "least CKA", "CKA of the last", "largest distance", "of the last"), rows)
    table.caption = "hidden states of the layers against those of the base; distances are relative"
    return table


def _pair(layer: str, pair: Pair) -> list[str]:
    return [
        *(layer, f"{pair.first}, {pair.second}", f"{pair.cosine:.4f}", f"{pair.sign_conflict:.2%}"),
        *(f"{pair.left_overlap:.2%}", f"{pair.right_overlap:.2%}"),
    ]
