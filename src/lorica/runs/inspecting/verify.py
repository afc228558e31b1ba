"""`lorica verify`: named checks of an adapter on its base, each with its figure and its tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorica import files, results
from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.analysis import equivalence
from lorica.analysis.checks import Check, failed, first_line, skipped
from lorica.analysis.equivalence import Amplified, Speed
from lorica.config import VerifyConfig
from lorica.errors import LoricaError
from lorica.progress import tracked
from lorica.results import RunFolder
from lorica.runs.inspecting import verify_files
from lorica.runs.inspecting.verify_case import Case, case_of
from lorica.runs.training.tracking import log_checks

JSON = "verification.json"
NUM_CHECKS = 20
NUM_ROUNDS = 7  # of timing
LARGEST_RANK = 8  # of the fresh adapter by which learning is looked at
NO_EFFECT = "the updates change no logit, and two forms of nothing are always equal"


@dataclass(frozen=True)
class Verification:
    """Every check, what the fixed batch was, and, if it was asked for, the speed or why there is none."""

    target: str
    base_model: str
    batch: str
    checks: tuple[Check, ...]
    speed: Speed | None = None
    no_speed: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing failed; what was skipped says why."""
        return all(each.state != "fail" for each in self.checks)

    def as_record(self) -> dict[str, Any]:
        counts = {state: sum(each.state == state for each in self.checks) for state in ("pass", "fail", "skip")}
        return {"passed": self.passed, **counts, **asdict(self)}


def verify(word: str, given: VerifyConfig, say: Console) -> Verification:
    """Check a run, or an adapter folder, on its base; a run's trackers are told, and `say` takes what they warn of.

    A fault of an adapter that can be read is a failed check, never an error. Raises as `case_of` does.
    """
    if given.output_dir is not None:
        results.check_free(given.output_dir)
    case = case_of(word, given)
    taken, why_not = _timed(case) if given.speed else (None, None)
    checks = list(tracked(_checks(case), NUM_CHECKS, "checking"))
    found = Verification(word, case.base.name, case.batch.origin, tuple(checks), taken, why_not)
    _leave(found, case.run, given.output_dir)
    if case.run is not None and case.run.trainer_state.exists():
        made = {each.name: each.state == "pass" for each in checks if each.state != "skip"}
        log_checks(case.run, made, say)
    return found


def _timed(case: Case) -> tuple[Speed | None, str | None]:
    """The speed, or why it cannot be taken."""
    if (reason := case.unsound or case.unfusable) is not None:
        return None, reason
    try:
        return equivalence.speed(case.subject, NUM_ROUNDS), None
    except (LoricaError, RuntimeError) as error:
        return None, first_line(error)


def _checks(case: Case) -> Iterator[Check]:
    """Every check; PEFT's last, for PEFT leaves its own layers on the model."""
    yield from _of_kept(case)
    yield from _of_training(case)
    yield from _of_forms(case)
    yield from _looked(["base_unchanged"], lambda: [verify_files.of_base(case)])
    yield from _compared(case, ["peft"], lambda strong: [verify_files.of_peft(case, strong)])


def _leave(found: Verification, run: RunFolder | None, output_dir: str | None) -> None:
    """The outcome in the folder that was asked for, or in the run's own."""
    if output_dir is not None:
        files.write_json(files.claim_folder(Path(output_dir)) / JSON, found.as_record())
    elif run is not None:
        files.write_json(run.path / JSON, found.as_record())


def _of_kept(case: Case) -> Iterator[Check]:
    """What the folder and the run's record say, before any forward pass."""
    yield from _looked(["files", "base"], lambda: verify_files.of_record(case))
    yield from _looked(["finite"], lambda: [verify_files.of_numbers(case)])
    yield from _looked(["fits"], lambda: [verify_files.of_fit(case)])
    yield from _looked(["targets"], lambda: [verify_files.of_targets(case)])
    yield from _looked(["share"], lambda: [verify_files.of_size(case)])
    yield from _looked(["chain"], lambda: [verify_files.of_chain(case)])


def _of_training(case: Case) -> Iterator[Check]:
    """What a step of training does, and what a few do."""
    names = ["trainable", "forward", "backward", "base_gradients"]
    yield from _sound(case, names, lambda: equivalence.of_training(case.subject, only_B=case.only_B))
    yield from _sound(case, ["learns"], lambda: [equivalence.of_learning(case.subject, _fresh(case))])


def _fresh(case: Case) -> Adapter:
    """An adapter on the same modules that does nothing yet."""
    updates = case.adapter.updates
    rank = min([LARGEST_RANK, *(min(update.rank, *update.shape) for update in updates.values())])
    return injection.create(case.base.model, list(updates), rank=rank, alpha=2 * rank, heads=list(case.adapter.heads))


def _of_forms(case: Case) -> Iterator[Check]:
    """The adapter live, taken off, written and read, fused and unfused."""
    yield from _sound(case, ["removal"], lambda: [equivalence.of_removal(case.subject)])
    yield from _sound(case, ["round_trip"], lambda: [verify_files.of_round_trip(case)])
    yield from _sound(case, ["portable"], lambda: [verify_files.of_portable(case)])
    if case.unsound is None and case.unfusable is not None:
        yield from skipped(["unfuse", "fused", "top_1"], case.unfusable)
        return
    yield from _sound(case, ["unfuse"], lambda: [equivalence.of_unfusing(case.subject)])
    yield from _compared(case, ["fused", "top_1"], lambda strong: equivalence.of_fusing(case.subject, strong))


def _compared(case: Case, names: Sequence[str], look: Callable[[Amplified], Iterable[Check]]) -> list[Check]:
    """Checks that two forms are equal, which mean something only of an adapter that changes a logit."""
    return _sound(case, names, lambda: look(case.strong) if case.strong is not None else skipped(names, NO_EFFECT))


def _sound(case: Case, names: Sequence[str], look: Callable[[], Iterable[Check]]) -> list[Check]:
    """Checks that mean something only of an adapter that is finite and fits."""
    return skipped(names, case.unsound) if case.unsound is not None else _looked(names, look)


def _looked(names: Sequence[str], look: Callable[[], Iterable[Check]]) -> list[Check]:
    """The checks of these names; those that an error kept from their end have failed by it."""
    found: list[Check] = []
    try:
        for check in look():
            found.append(check)
    except (LoricaError, RuntimeError) as error:
        done = {each.name for each in found}
        found += failed([name for name in names if name not in done], first_line(error))
    return found
