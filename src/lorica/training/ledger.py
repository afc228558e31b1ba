"""Every booster of a run, append-only: fp32 factors on the disk, one line each in `ledger.jsonl`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load, save

from lorica import files
from lorica.adapters.adapter import Adapter, Head
from lorica.adapters.delta import LowRank
from lorica.errors import AdapterFormatError, ConfigError
from lorica.processes import ALONE, Processes
from lorica.training.checkpoints import adapter_of, adapter_tensors


@dataclass(frozen=True)
class Entry:
    """One round: the steps it took, why it ended, what was laid on. A rejected booster is kept with weight 0."""

    round: int
    first_step: int  # steps done before the round
    last_step: int  # steps done after it
    reason: str
    accepted: bool
    rolled_back: bool
    weight: float  # what the booster counts in the sum: the shrinkage, or 0
    best_loss: float | None  # best smoothed loss of the round, if its rule smooths
    last_loss: float | None  # the current smoothed loss at its end, or the raw one
    norm: float
    file: str
    sha256: str
    kept_step: int | None = None  # the step after which the booster was taken; ledgers of old lack it


@dataclass(frozen=True)
class Booster:
    """An entry and its factors; the heads are those in force at the end of its round."""

    entry: Entry
    updates: Mapping[str, LowRank]
    heads: Mapping[str, Head]


class Ledger:
    """The boosters of one run, in order. `append` and `forget_after` write, in the first process alone.

    A booster's file is written before the line that names it, so a crash between the two leaves a file that no line
    names; the resumed run writes the same bytes over it.
    """

    def __init__(self, folder: Path, processes: Processes = ALONE) -> None:
        self.lines = folder / "ledger.jsonl"
        self.folder = folder / "boosters"
        self.processes = processes
        self.boosters: list[Booster] = []

    @classmethod
    def open(cls, folder: Path, processes: Processes = ALONE) -> Ledger:
        """The ledger that a run left, every file checked against its hash (AdapterFormatError if one differs)."""
        ledger = cls(folder, processes)
        records = files.read_records(ledger.lines) if processes.is_first and ledger.lines.exists() else []
        ledger.boosters = processes.of_first([ledger._read(Entry(**record)) for record in records])
        return ledger

    def append(self, entry: Entry, booster: Adapter) -> None:
        """Keep a booster: its file first, then its line."""
        whole = self._written(entry, booster) if self.processes.is_first else entry
        self.boosters.append(Booster(whole, booster.updates, booster.heads))

    def _written(self, entry: Entry, booster: Adapter) -> Entry:
        self.folder.mkdir(exist_ok=True)
        tensors = adapter_tensors("booster", booster)
        content = save({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()})
        name = f"{entry.round:05d}.safetensors"
        files.write_atomic(self.folder / name, content)
        whole = replace(entry, file=name, sha256=hashlib.sha256(content).hexdigest())
        files.append_record(self.lines, asdict(whole))
        return whole

    def truncated(self, num_rounds: int) -> Ledger:
        """The first rounds alone, for staged evaluation; nothing on the disk changes."""
        return self._with(self.boosters[:num_rounds])

    def reweighted(self, round: int, weight: float) -> Ledger:
        """The same boosters, one of them counted `weight` times (0 drops it); nothing on the disk changes."""
        if not 0 <= round < len(self.boosters):
            raise ConfigError(f"round {round} is not in the ledger, which has rounds 0 to {len(self.boosters) - 1}")
        return self._with(
            [
                replace(each, entry=replace(each.entry, weight=weight)) if each.entry.round == round else each
                for each in self.boosters
            ]
        )

    def forget_after(self, step: int) -> None:
        """Cut the rounds that ended after `step` off the disk's list: a resumed run makes them again."""
        self.boosters = [each for each in self.boosters if each.entry.last_step <= step]
        if self.processes.is_first:
            lines = "".join(files.record_line(asdict(each.entry)) for each in self.boosters)
            files.write_atomic(self.lines, lines)

    def chain(self, base_model: str | None = None) -> Adapter:
        """The chain as one adapter, exact: A = [A_k], B = [weight·s_k·B_k], scale 1; heads as of the last round."""
        parts: dict[str, list[LowRank]] = {}
        for booster in self.boosters:
            for path, update in booster.updates.items():
                if booster.entry.weight != 0:
                    parts.setdefault(path, []).append(update * booster.entry.weight)
        heads = self.boosters[-1].heads if self.boosters else {}
        return Adapter({path: joined(updates) for path, updates in parts.items()}, heads, base_model)

    def _with(self, boosters: list[Booster]) -> Ledger:
        view = Ledger(self.lines.parent)
        view.boosters = boosters
        return view

    def _read(self, entry: Entry) -> Booster:
        if entry.file != f"{entry.round:05d}.safetensors":
            raise AdapterFormatError(f"{self.lines}: round {entry.round} names the file {entry.file!r}")
        with files.open_regular(self.folder / entry.file) as file:
            content = file.read()
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise AdapterFormatError(f"{self.folder / entry.file} does not match its hash in the ledger")
        booster = adapter_of("booster", load(content))
        return Booster(entry, dict(booster.updates) if booster else {}, dict(booster.heads) if booster else {})


def joined(updates: Sequence[LowRank]) -> LowRank:
    """The sum of updates in one concatenation, at scale 1, in the order given."""
    A = torch.cat([update.A for update in updates])  # (K, in)
    B = torch.cat([update.scaled_B() for update in updates], dim=1)  # (out, K)
    return LowRank(A, B)
