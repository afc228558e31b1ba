"""What adapters are made of, as tables: the summary first, modules where they are few or asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lorica.tables.cells import columns, size, span

if TYPE_CHECKING:
    from lorica.analysis.conflict import Pair
    from lorica.analysis.portrait import KindFigures, ModuleFigures, RankFigures
    from lorica.runs.inspecting.inspect import Inspected, Inspection
    from lorica.runs.inspecting.share import Share

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
            shown += [_rounds(each, energy_at), _chain(each, energy_at)]
    return [*shown, *([_pairs(found)] if found.layers else []), *([_stages(found)] if found.stages else [])]


def _headline(each: Inspected) -> str:
    figures = each.portrait
    ranks = span([module.rank for module in figures.modules])
    form = f"rank {ranks} on {len(figures.modules)} modules" if ranks else "no low-rank updates"
    return escape(
        f"{each.name}: {form}, norm {figures.norm:.4g}; {figures.num_parameters:,} numbers in "
        f"{size(figures.num_bytes)}; {_trainable(each.share)}"
    )


def _trainable(share: Share) -> str:
    """What is trained at once, and beside it the whole chain where that is another number."""
    counts = {"trainable at once": share.num_trainable}
    if share.is_chain:
        counts["in the whole chain"] = share.num_in_chain
    told = ", ".join(f"{what} {_count(count, share)}" for what, count in counts.items())
    if share.num_parameters is None:
        return f"{told}; share of the base unknown: {share.reason}"
    return f"{told} of {share.num_parameters:,} parameters"


def _count(count: int, share: Share) -> str:
    """So many numbers, and their share of the base where that is known."""
    of_base = share.of_base(count)
    return f"{count:,}" if of_base is None else f"{count:,} ({of_base:.3%})"


def _kinds(each: Inspected) -> Table:
    """The numbers of each kind of module; those trained at once, and in the chain, add up to the headline's."""
    trained = ["at once", "whole chain"] if each.share.is_chain else ["at once"]
    head = ["kind", "modules", "numbers", "bytes", *trained, "norm", "stable", "effective", "utilisation"]
    return columns(head, [_kind(kind, each.share) for kind in each.portrait.kinds])


def _kind(kind: KindFigures, share: Share) -> list[str]:
    trained = [share.at_once, share.in_chain] if share.is_chain else [share.at_once]
    cells = [kind.kind, str(kind.num_modules), f"{kind.num_parameters:,}", f"{kind.num_bytes:,}"]
    cells += [_count(each.get(kind.kind, 0), share) for each in trained]
    if kind.norm is None:
        return [*cells, *[EMPTY] * 4]
    ranks = (f"{kind.stable_rank:.2f}", f"{kind.effective_rank:.2f}", f"{kind.rank_utilisation:.1%}")
    return [*cells, f"{kind.norm:.4g}", *ranks]


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


def _rounds(each: Inspected, energy_at: int) -> Table:
    rows = [
        (str(one.round), "yes" if one.accepted else "no", f"{one.weight:g}", *_ranks(one.added.overall))
        for one in each.boosters
    ]
    table = columns(("round", "laid on", "weight", *_ranks_head(energy_at)), rows)
    table.caption = "what each round added, its weight in the norm"
    return table


def _chain(each: Inspected, energy_at: int) -> Table:
    """The sums of rounds that were measured."""
    rows = [(str(one.round), *_ranks(one.chain.overall)) for one in each.boosters if one.chain is not None]
    table = columns(("up to round", *_ranks_head(energy_at)), rows)
    table.caption = "the whole chain: the largest rank of a module, the norm of all, means over modules of the rest"
    return table


def _ranks_head(energy_at: int) -> tuple[str, ...]:
    return "rank", "norm", "stable", "effective", "utilisation", f"energy at {energy_at}"


def _ranks(figures: RankFigures) -> tuple[str, ...]:
    return (
        *(str(figures.rank), f"{figures.norm:.4g}", f"{figures.stable_rank:.2f}", f"{figures.effective_rank:.2f}"),
        *(f"{figures.rank_utilisation:.1%}", f"{figures.energy:.1%}"),
    )


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
