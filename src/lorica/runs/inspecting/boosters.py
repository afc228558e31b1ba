"""A boosted run round by round: what each booster adds to every module, and what the chain up to it comes to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorica.analysis.portrait import Ranks, ranks
from lorica.progress import tracked
from lorica.results import RunFolder
from lorica.training.ledger import Ledger

LEDGER = "ledger.jsonl"
NUM_CUMULATIVE = 32  # of a long chain: so many of its sums are measured, evenly spread, the last among them


@dataclass(frozen=True)
class BoosterFigures:
    """One round of a boosted run, and the chain up to it; `chain` is None where that sum was not measured."""

    round: int
    accepted: bool
    weight: float
    added: Ranks
    chain: Ranks | None


def ledger_of(run: RunFolder) -> Ledger | None:
    """Of a boosted run; None of any other. Raises AdapterFormatError for a booster that its line does not match."""
    return Ledger.open(run.path) if (run.path / LEDGER).exists() else None


def booster_figures(ledger: Ledger, k: int) -> Iterator[BoosterFigures]:
    """The rounds in their order, with energies at k; of a long chain some sums alone are measured."""
    count = len(ledger.boosters)
    step = max(1, -(-count // NUM_CUMULATIVE))
    for number, booster in enumerate(tracked(ledger.boosters, count, "measuring rounds"), 1):
        is_measured = (count - number) % step == 0
        yield BoosterFigures(
            round=booster.entry.round,
            accepted=booster.entry.accepted,
            weight=booster.entry.weight,
            added=ranks(booster.updates, k, booster.entry.weight),
            chain=ranks(ledger.truncated(number).chain().updates, k) if is_measured else None,
        )
