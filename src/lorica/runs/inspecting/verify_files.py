"""The checks of what is kept: an adapter's files and base against its run's record, and its ways to other programs."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lorica import models, results
from lorica.adapters import injection, peft_config, peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.adapters.peft_format import Profile
from lorica.analysis.checks import Check, counted, failed, first_line, judged, skipped
from lorica.analysis.equivalence import TOLERANCES, Amplified
from lorica.errors import AdapterFormatError
from lorica.runs.inspecting.share import at_once, rounds_of
from lorica.runs.inspecting.verify_case import Case
from lorica.runs.ready import write_adapter

FOLDED = 1e-6  # of the norm: what folding a scale into float32 factors may round


def of_record(case: Case) -> Iterator[Check]:
    """files, base: the bytes of the adapter and the bits of the base are those that the run recorded at its end."""
    recorded = case.record.get("artifacts")
    if not recorded or case.run is None:
        reason = "no run beside it that recorded checksums at its end"
        yield from skipped(["files", "base"], reason)
        return
    found = results.artifacts(case.folder, case.checksum)
    wrong = [
        f"{name} is {'not the one recorded' if name in found['files'] else 'missing'}"
        for name, sha256 in recorded["files"].items()
        if found["files"].get(name) != sha256
    ]
    yield counted("files", wrong, f"{len(recorded['files'])} files are as the run left them")
    other = [] if found["base"] == recorded["base"] else [f"{case.base.name} has other weights than the run's base"]
    yield counted("base", other, "every weight of the base is the run's")


def of_numbers(case: Case) -> Check:
    """finite: no factor and no head holds NaN or infinity."""
    tensors = _tensors(case.adapter)
    wrong = [f"{name} holds NaN or infinity" for name, each in tensors.items() if not torch.isfinite(each).all()]
    return counted("finite", wrong, f"{len(tensors)} tensors are finite")


def of_fit(case: Case) -> Check:
    """fits: the base has every module and head of the adapter, in its shape."""
    wrong = [case.misfit] if case.misfit is not None else []
    return counted("fits", wrong, f"{len(case.adapter.updates)} modules of {case.base.name} take their update")


def of_targets(case: Case) -> Check:
    """targets: every module that is to be adapted is, and no other."""
    expected = _expected_targets(case)
    if isinstance(expected, str):
        return skipped(["targets"], expected)[0]
    missing = [f"{path} has no update" for path in expected if path not in case.adapter.updates]
    beyond = [f"{path} is no target" for path in case.adapter.updates if path not in expected]
    return counted("targets", [*missing, *beyond], f"{len(expected)} targets have their update")


def _expected_targets(case: Case) -> list[str] | str:
    """The paths, or why they are not known."""
    if case.cfg is not None and case.cfg.boosting.layer_fraction < 1:
        return "each round drew its own share of the targets (boosting.layer_fraction)"
    if case.cfg is not None:
        return models.target_modules(case.base, case.cfg.adapter.targets)
    named = peft_config.read_config(case.folder).get("target_modules")
    if not isinstance(named, list):
        return "adapter_config.json names its targets by a pattern, and no pattern of a file from elsewhere is run"
    paths = injection.linear_modules(case.base.model, case.base.heads)
    return [path for path in paths if any(path == name or path.endswith(f".{name}") for name in named)]


def of_size(case: Case) -> Check:
    """share: the factors that are trained at once, in the base's parameters."""
    try:
        boosters = case.ledger.boosters if case.ledger is not None else []
    except AdapterFormatError:
        return skipped(["share"], "the rounds cannot be read: see the chain")[0]
    parts = [Adapter(each.updates) for each in rounds_of(case.adapter, boosters)]
    count = sum(at_once(parts, only_B=case.only_B).values())
    total = sum(parameter.numel() for parameter in case.base.model.parameters())
    of_round = " in a round" if boosters else ""
    said = f"{count:,} numbers trained at once{of_round}, of the base's {total:,}, heads not counted"
    advice = ": max_trainable_share= sets the bound" if count / total > case.max_trainable_share else ""
    return judged("share", count / total, case.max_trainable_share, said + advice)


def of_chain(case: Case) -> Check:
    """chain: the boosters of the ledger, added up, are the adapter that the run exported."""
    try:
        ledger = case.ledger
    except AdapterFormatError as error:
        return counted("chain", [str(error)], "")
    if ledger is None or case.cfg is None:
        return skipped(["chain"], "no boosted run: there is no ledger")[0]
    chain, number = ledger.chain(), len(ledger.boosters)
    if not chain.updates:
        wrong = [f"{path} is not zero" for path, update in case.adapter.updates.items() if update.B.any()]
        return counted("chain", wrong, f"none of {number} boosters was laid on, and the adapter is zero")
    if case.cfg.adapter.profile == "portable" and case.adapter.is_finite():
        return judged("chain", _distance(chain, case.adapter), FOLDED, f"distance of {number} boosters' sum, relative")
    return counted("chain", _differing(chain, case.adapter), f"{number} boosters add up to the adapter, bit for bit")


def of_round_trip(case: Case) -> Check:
    """round_trip: written and read again, every factor, scale and head is the same to the last bit."""
    wrong = _differing(case.adapter, _rewritten(case, "peft"))
    return counted("round_trip", wrong, "saved and read again, the adapter is the same, bit for bit")


def of_portable(case: Case) -> Check:
    """portable: what the inference servers' profile holds is the same update."""
    if case.adapter.heads:
        heads = ", ".join(case.adapter.heads)
        return skipped(["portable"], f"the loaders that profile=portable is for take no head, and this has {heads}")[0]
    distance = _distance(case.adapter, _rewritten(case, "portable"))
    return judged("portable", distance, FOLDED, "distance of profile=portable from the adapter, relative")


def of_base(case: Case) -> Check:
    """base_unchanged: what training, fusing and taking off have left of the base is what was loaded, bit for bit."""
    wrong = [] if models.checksum(case.base) == case.checksum else ["the checks have left other weights in the base"]
    return counted("base_unchanged", wrong, "after the checks above every weight of the base is as it was loaded")


def of_peft(case: Case, strong: Amplified) -> Check:
    """peft: the folder, as PEFT loads it, gives the live logits. PEFT leaves its layers on the model: ask it last."""
    try:
        import peft  # noqa: F401
    except ImportError:
        return skipped(["peft"], "peft is not installed: pip install peft")[0]
    try:
        found = _logits_of_peft(case, strong.factor)
    except Exception as error:  # of any kind: PEFT takes a strange config at its word, and fails where that leads
        return failed(["peft"], f"as PEFT loads it, the adapter gives {type(error).__name__}: {first_line(error)}")[0]
    tolerance = TOLERANCES[case.subject.dtype]
    return judged("peft", strong.difference(found), tolerance, f"as PEFT loads it against live, {strong.said}")


@torch.no_grad()
def _logits_of_peft(case: Case, factor: float) -> Tensor:
    """Of the fixed batch, the updates times `factor`."""
    import peft
    from peft.tuners.lora import LoraLayer

    with warnings.catch_warnings(), torch.random.fork_rng():  # PEFT draws its factors before it loads them
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(case.base.model, str(case.folder)).eval()
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(factor)
        found: Tensor = model(**case.batch.inputs).logits.float()
    return found


def _rewritten(case: Case, profile: Profile) -> Adapter:
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(case.base, case.adapter, Path(folder) / "adapter", profile=profile)
        found = peft_format.read(Path(folder) / "adapter")
        # What was read is mapped from a file that is about to go.
        copied = {path: LowRank(each.A.clone(), each.B.clone(), each.scale) for path, each in found.updates.items()}
        heads = {path: {part: value.clone() for part, value in head.items()} for path, head in found.heads.items()}
    return Adapter(copied, heads, found.base_model)


def _distance(one: Adapter, other: Adapter) -> float:
    """‖Δ1 - Δ2‖ / ‖Δ1‖; the distance itself of a zero."""
    return (one - Adapter(other.updates)).norm() / (one.norm() or 1.0)


def _differing(one: Adapter, other: Adapter) -> list[str]:
    """The names of tensors and scales that are not the same bits on both sides."""
    first, second = _tensors(one), _tensors(other)
    differing = [name for name in first if name not in second or not torch.equal(first[name], second[name])]
    beyond = [name for name in second if name not in first]
    scales = [path for path in one.updates if path in other.updates and _scale(one, path) != _scale(other, path)]
    return [f"{name} differs" for name in [*differing, *beyond, *(f"the scale of {path}" for path in scales)]]


def _scale(adapter: Adapter, path: str) -> float:
    return adapter.updates[path].scale


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    found = {f"{path}.{name}": getattr(each, name) for path, each in adapter.updates.items() for name in "AB"}
    return found | {f"{path}.{part}": value for path, head in adapter.heads.items() for part, value in head.items()}
