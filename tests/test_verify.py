"""`lorica verify`: a sound adapter passes every check, and a fault fails exactly the checks that it should."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from command_line import lorica
from lorica import config, models, progress, runs, tables
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.lora import LoraLinear
from lorica.analysis import equivalence
from lorica.analysis.checks import Check
from lorica.analysis.equivalence import Speed, Subject
from lorica.config import InspectConfig, VerifyConfig
from lorica.demo import language
from lorica.errors import ConfigError, MissingPathError
from lorica.models import Base
from lorica.runs import Verification
from lorica.runs.inspecting import verify_case, verify_files
from lorica.runs.inspecting.verify import NUM_CHECKS
from lorica.runs.inspecting.verify_case import case_of
from lorica.runs.ready import write_adapter

SHORT = (
    *("max_steps=4", "batch_size=8", "logging_steps=4", "learning_rate=1e-2", "task.max_length=48"),
    *("task.num_train=32", "task.num_dev=8", "task.num_eval=8"),
)
BOOSTED = ("adapter.kind=xgblora", "boosting.steps_per_iteration=2")
QUIET = Console(quiet=True)
NAMES = (
    *("files", "base", "finite", "fits", "targets", "share", "chain", "trainable", "forward", "backward"),
    *("base_gradients", "learns", "removal", "round_trip", "portable", "unfuse", "fused", "top_1"),
    *("base_unchanged", "peft"),
)
KINDS = {"lora": (), "xgblora": BOOSTED}
BODIES = {"causal": "llama", "encoder": "bert"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_models: Callable[..., Path]) -> dict[tuple[str, str], Path]:
    """A finished run of each kind of adapter on each kind of model."""
    folder = tmp_path_factory.mktemp("verify")
    language.write_tasks(folder / "data")
    for kind, more in KINDS.items():
        for body, family in BODIES.items():
            words = (*SHORT, *more, f"model={tiny_models(family)}", f"task.path={folder / 'data' / 'topic'}")
            lorica("train", *words, f"output_dir={folder / f'{kind}-{body}'}")
    return {(kind, body): folder / f"{kind}-{body}" for kind in KINDS for body in BODIES}


@pytest.fixture
def copied(trained: dict[tuple[str, str], Path], tmp_path: Path) -> Callable[[str, str], Path]:
    """A copy of such a run, for a test to spoil."""

    def copy(kind: str, body: str) -> Path:
        return Path(shutil.copytree(trained[kind, body], tmp_path / "run"))

    return copy


def verify(target: object, *words: str) -> Verification:
    return runs.verify(str(target), config.read(VerifyConfig, words, {"max_trainable_share": 1}), QUIET)


def states(found: Verification, state: str) -> set[str]:
    return {each.name for each in found.checks if each.state == state}


def check(found: Verification, name: str) -> Check:
    return next(each for each in found.checks if each.name == name)


# --------------------------------------------------------------------------------------------------- sound adapters


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_run_passes_every_check(trained: dict[tuple[str, str], Path], kind: str, body: str) -> None:
    found = verify(trained[kind, body])
    assert tuple(each.name for each in found.checks) == NAMES
    assert states(found, "fail") == set()
    assert states(found, "skip") == {
        *(("chain",) if kind == "lora" else ()),
        *(("portable",) if body == "encoder" else ()),  # it has a head
    }
    assert "examples of topic" in found.batch
    record = json.loads((trained[kind, body] / "verification.json").read_text())
    assert record["passed"] and record["pass"] == len(states(found, "pass")) and len(record["checks"]) == len(NAMES)


@pytest.mark.parametrize("body", BODIES)
def test_an_adapter_alone_is_verified_as_far_as_it_says(
    trained: dict[tuple[str, str], Path], tmp_path: Path, body: str
) -> None:
    folder = trained["lora", body] / "adapter"
    found = verify(folder, f"output_dir={tmp_path / 'out'}")
    assert states(found, "fail") == set()
    assert states(found, "skip") >= {"files", "base", "chain"}
    assert "base_unchanged" in states(found, "pass")
    assert found.batch == "tokens drawn at random"
    assert json.loads((tmp_path / "out" / "verification.json").read_text())["target"] == str(folder)


def test_without_the_tasks_data_tokens_are_drawn(copied: Callable[[str, str], Path]) -> None:
    run = copied("lora", "causal")
    config_file = run / "config.yaml"
    config_file.write_text(config_file.read_text().replace("/data/topic", "/data/gone"))
    found = verify(run)
    assert found.batch.startswith("tokens drawn at random: ") and "gone" in found.batch
    assert found.passed


@pytest.mark.parametrize(
    ("family", "dtype"), [("opt", "float32"), ("gpt2", "bfloat16"), ("t5", "float32"), ("roberta", "bfloat16")]
)
def test_other_families_and_dtypes(
    tiny_models: Callable[..., Path], load: Any, tmp_path: Path, family: str, dtype: str
) -> None:
    base: Base = load(family)
    adapter = tiny.adapter(base.model, models.target_modules(base, "standard"), heads=base.heads)
    write_adapter(base, adapter, tmp_path / "adapter", profile="peft")
    found = verify(tmp_path / "adapter", f"model.name={tiny_models(family)}", f"model.dtype={dtype}")
    assert states(found, "fail") == set()
    assert states(found, "pass") >= {"fused", "top_1", "peft", "learns", "targets", "unfuse"}


def test_an_adapter_that_does_nothing_proves_nothing(
    load: Any, tiny_models: Callable[..., Path], tmp_path: Path
) -> None:
    base: Base = load("llama")
    adapter = injection.create(base.model, models.target_modules(base, "standard"), rank=2, alpha=2)
    peft_format.write(adapter, tmp_path / "adapter")
    found = verify(tmp_path / "adapter", f"model={tiny_models('llama')}")
    assert states(found, "skip") >= {"fused", "top_1", "peft"} and found.passed
    assert "two forms of nothing" in check(found, "fused").said


# ----------------------------------------------------------------------------------------------------------- faults


def of_weights(run: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def one_element(run: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        next(value for name, value in tensors.items() if "lora_B" in name)[0, 0] += 1e-6

    of_weights(run, change)


def a_missing_layer(run: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        module = next(name for name in tensors if "lora_A" in name).partition(".lora_A")[0]
        for name in [name for name in tensors if name.startswith(f"{module}.lora_")]:
            del tensors[name]

    of_weights(run, change)


def a_nan(run: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        next(value for name, value in tensors.items() if "lora_A" in name)[0, 0] = torch.nan

    of_weights(run, change)


def another_alpha(run: Path) -> None:
    file = run / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "lora_alpha": settings["lora_alpha"] * 2}))


FAULTS: Mapping[str, tuple[Callable[[Path], None], set[str]]] = {
    "one element of B": (one_element, {"files"}),
    "a missing layer": (a_missing_layer, {"files", "targets"}),
    "a NaN": (a_nan, {"files", "finite"}),
    "another alpha": (another_alpha, {"files"}),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_tampered_adapter_fails_exactly_the_checks_it_should(
    copied: Callable[[str, str], Path], fault: str, kind: str, body: str
) -> None:
    spoil, expected = FAULTS[fault]
    run = copied(kind, body)
    spoil(run)
    found = verify(run)
    assert states(found, "fail") == expected | ({"chain"} if kind == "xgblora" else set())
    if fault == "a NaN":
        assert states(found, "skip") >= {"forward", "fused", "peft", "round_trip"}
    assert not found.passed


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_changed_weight_of_the_base_fails_the_base_alone(
    trained: dict[tuple[str, str], Path], tiny_models: Callable[..., Path], tmp_path: Path, kind: str, body: str
) -> None:
    other = Path(shutil.copytree(tiny_models(BODIES[body]), tmp_path / "other"))
    assert verify(trained[kind, body], f"model={other}").passed  # the same weights in another place
    tensors = {name: value.clone() for name, value in load_file(other / "model.safetensors").items()}
    next(value for name, value in tensors.items() if value.dim() == 2)[5, 7] += 1e-4
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert states(verify(trained[kind, body], f"model={other}"), "fail") == {"base"}


def test_a_nan_in_an_adapter_alone_is_told(copied: Callable[[str, str], Path]) -> None:
    run = copied("lora", "causal")
    a_nan(run)
    found = verify(run / "adapter")
    assert states(found, "fail") == {"finite"}
    assert "holds NaN" in check(found, "finite").said and "holds NaN" in check(found, "fused").said


STRANGE: Mapping[str, tuple[dict[str, Any], set[str]]] = {
    "targets that the base lacks": ({"target_modules": ["nope"]}, {"targets", "peft"}),
    "an unknown task type": ({"task_type": "BOGUS"}, {"peft"}),
    "an unknown init": ({"init_lora_weights": "nonsense"}, {"peft"}),
    "a dropout in words": ({"lora_dropout": "much"}, {"peft"}),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_a_config_that_PEFT_cannot_take_fails_its_check(
    trained: dict[tuple[str, str], Path], tmp_path: Path, strange: str
) -> None:
    change, expected = STRANGE[strange]
    folder = Path(shutil.copytree(trained["lora", "causal"] / "adapter", tmp_path / "adapter"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **change}))
    found = verify(folder, f"output_dir={tmp_path / 'out'}")
    assert states(found, "fail") == expected
    assert "as PEFT loads it" in check(found, "peft").said and "\n" not in check(found, "peft").said
    assert json.loads((tmp_path / "out" / "verification.json").read_text())["fail"] == len(expected)


def test_what_the_checks_do_to_the_base_is_told(
    trained: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = equivalence.of_learning

    def careless(subject: Subject, fresh: Adapter) -> Check:
        with torch.no_grad():
            subject.model.get_submodule("model.norm").weight[3] += 1e-4  # type: ignore[operator, index]
        return right(subject, fresh)

    monkeypatch.setattr(equivalence, "of_learning", careless)
    for target in (trained["lora", "causal"], trained["lora", "causal"] / "adapter"):
        assert states(verify(target), "fail") == {"base_unchanged"}


def test_an_error_of_ones_own_is_not_taken_for_a_fault(
    trained: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(subject: Subject) -> Check:
        raise TypeError("a slip of the pen")

    monkeypatch.setattr(equivalence, "of_removal", mistaken)
    with pytest.raises(TypeError, match="slip"):
        verify(trained["lora", "causal"])


def test_a_spoiled_booster_fails_the_chain_alone(copied: Callable[[str, str], Path]) -> None:
    run = copied("xgblora", "causal")
    booster = run / "boosters" / "00001.safetensors"
    booster.write_bytes(booster.read_bytes()[:-1] + b"\x01")
    found = verify(run)
    assert states(found, "fail") == {"chain"} and "does not match its hash" in check(found, "chain").said
    assert check(found, "share").state == "skip" and "see the chain" in check(found, "share").said


def test_an_adapter_of_another_base_does_not_fit(trained: dict[tuple[str, str], Path]) -> None:
    found = verify(trained["lora", "causal"] / "adapter", "model=demo")
    assert states(found, "fail") == {"fits", "targets"}  # it is of fewer layers
    assert {"forward", "learns", "fused", "peft"} <= states(found, "skip")


def test_a_share_above_the_bound_fails_alone(trained: dict[tuple[str, str], Path]) -> None:
    found = verify(trained["lora", "encoder"], "max_trainable_share=0.001")
    assert states(found, "fail") == {"share"}
    base = models.load(str(found.base_model), kind="classification", num_labels=3)
    adapter = peft_format.read(trained["lora", "encoder"] / "adapter")
    factors = sum(update.A.numel() + update.B.numel() for update in adapter.updates.values())
    share = factors / sum(each.numel() for each in base.model.parameters())
    assert check(found, "share").figure == pytest.approx(share, rel=0.05)  # the task has another number of labels


def test_the_bound_is_three_in_a_thousand_unless_another_is_set(tmp_path: Path) -> None:
    base = models.load("demo", kind="causal")
    total = sum(each.numel() for each in base.model.parameters())
    path = "model.layers.0.self_attn.q_proj"
    found = {}
    for rank in (11, 12):
        adapter = injection.create(base.model, [path], rank=rank, alpha=rank, base_model="demo")
        peft_format.write(adapter, tmp_path / str(rank))
        found[rank] = verify_files.of_size(case_of(str(tmp_path / str(rank)), VerifyConfig()))
        assert found[rank].figure == pytest.approx(rank * (128 + 128) / total) and found[rank].tolerance == 0.003
    assert 0.0029 < (found[11].figure or 0) < 0.003 < (found[12].figure or 0) < 0.0033
    assert (found[11].state, found[12].state) == ("pass", "fail")
    assert "max_trainable_share=" in found[12].said and "max_trainable_share=" not in found[11].said


def test_the_share_of_a_boosted_run_is_that_of_its_largest_round(trained: dict[tuple[str, str], Path]) -> None:
    run = trained["xgblora", "causal"]
    said = check(verify(run), "share").said
    (told,) = runs.inspect([str(run)], config.read(InspectConfig, [])).adapters
    assert told.share.num_in_chain == 2 * told.share.num_trainable  # two rounds of one rank
    assert said.startswith(f"{told.share.num_trainable:,} numbers trained at once in a round")


# -------------------------------------------------------------------------- each check of the forms, by a mutation


@pytest.fixture
def subject(load: Any) -> Subject:
    base: Base = load("llama")
    adapter = tiny.adapter(base.model, models.target_modules(base, "standard"))
    given = tiny.inputs(base.model)

    def logits() -> Tensor:
        found: Tensor = base.model(**given).logits
        return found

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(logits()[:, :-1].flatten(0, 1), given["input_ids"][:, 1:].flatten())

    return Subject(base.model, adapter, logits, loss)


def failing(checks: Iterator[Check]) -> set[str]:
    return {each.name for each in checks if each.state != "pass"}


def forms(subject: Subject) -> Iterator[Check]:
    strong = equivalence.amplified(subject)
    assert strong is not None
    yield from equivalence.of_fusing(subject, strong)


def doubled(adapter: Adapter) -> Adapter:
    return adapter * 2.0


def without_a_layer(adapter: Adapter) -> Adapter:
    return Adapter(dict(list(adapter.updates.items())[1:]))


@pytest.mark.parametrize("mutation", [doubled, without_a_layer])
def test_a_wrong_fusion_is_told(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, mutation: Callable[[Adapter], Adapter]
) -> None:
    assert failing(forms(subject)) == set()
    right = injection.fuse
    monkeypatch.setattr(injection, "fuse", lambda model, adapter: right(model, mutation(adapter)))
    assert "fused" in failing(forms(subject))


def test_weights_that_are_subtracted_back_drift(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert equivalence.of_unfusing(subject).state == "pass"
    adapter = subject.adapter

    def subtracted(model: nn.Module, pristine: Mapping[str, Tensor]) -> None:
        for path in pristine:
            model.get_submodule(path).weight.sub_(adapter.updates[path].dense())  # type: ignore[operator, union-attr]

    monkeypatch.setattr(injection, "unfuse", subtracted)
    assert equivalence.of_unfusing(subject).state == "fail"


def test_a_base_that_is_trained_too_is_told(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failing(equivalence.of_training(subject)) == set()
    assert failing(equivalence.of_training(subject, only_B=True)) == set()
    right = injection.inject

    def thawed(model: nn.Module, adapter: Adapter) -> Any:
        live = right(model, adapter)
        model.get_submodule("lm_head").requires_grad_(True)
        return live

    monkeypatch.setattr(injection, "inject", thawed)
    assert failing(equivalence.of_training(subject)) == {"trainable", "base_gradients"}


def test_a_loss_that_no_gradient_reaches_is_told(subject: Subject) -> None:
    def constant() -> Tensor:
        return subject.loss() * 0.0

    still = Subject(subject.model, subject.adapter, subject.logits, constant)
    assert failing(equivalence.of_training(still)) == {"backward"}
    assert equivalence.of_learning(still, subject.adapter).state == "fail"
    assert equivalence.of_learning(subject, subject.adapter).state == "pass"


def test_an_adapter_that_stays_is_told(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert equivalence.of_removal(subject).state == "pass"
    monkeypatch.setattr(injection, "remove", lambda live: None)
    assert equivalence.of_removal(subject).state == "fail"


# ------------------------------------------------------------------------------------------------------------- speed


class Clock:
    """Seconds that pass as a test says, and not otherwise."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


LIVE = [90.0, 3.0, 30.0, 3.0]  # seconds of each round; the first warms up, and an outlier moves no median
FUSED = [10.0, 2.0, 2.0, 2.0]


def test_the_speed_is_that_of_a_clock(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, live, still = Clock(), iter(LIVE), iter(FUSED)
    monkeypatch.setattr(equivalence, "time", clock)

    def logits() -> Tensor:
        is_live = any(isinstance(module, LoraLinear) for module in subject.model.modules())
        clock.now += next(live if is_live else still)
        return subject.logits()

    found = equivalence.speed(dataclasses.replace(subject, logits=logits), num_rounds=3)
    assert (found.live_seconds, found.fused_seconds, found.ratio, found.num_rounds) == (3.0, 2.0, 1.5, 3)
    assert next(live, None) is None and next(still, None) is None
    with equivalence.laid_on(subject.model, subject.adapter) as adapter:
        assert found.adapter_bytes == sum(each.nbytes for each in adapter.trainable().values())
    assert (found.live_peak_bytes, found.fused_peak_bytes) == (None, None)  # a CPU keeps no such count


def test_a_speed_is_told_in_words() -> None:
    speed = Speed(0.003, 0.002, 1.5, 7, 2_000_000, 5_000_000, 4_000_000)
    found = Verification("a", "demo", "tokens", (), speed)
    told = next(line for line in tables.verification(found) if "fused" in str(line))
    assert "live takes 1.500 times as long as fused" in str(told) and "3 ms and 2 ms" in str(told)
    assert "its factors hold 2.0 MB" in str(told) and "5.0 MB live, 4.0 MB fused" in str(told)


class Int8Linear(nn.Module):
    """A linear module in int8, as libraries write it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127  # (out, 1)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_of_a_quantised_base_all_is_told_but_what_needs_fusing(
    trained: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = verify_case.load_base

    def quantised(*given: Any) -> Base:
        base = right(*given)
        for path in models.target_modules(base, "standard"):
            parent, _, name = path.rpartition(".")
            linear = base.model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            setattr(base.model.get_submodule(parent), name, Int8Linear(linear))
        return base

    monkeypatch.setattr(verify_case, "load_base", quantised)
    monkeypatch.setitem(sys.modules, "peft", None)  # which knows its own quantised modules alone
    target = trained["lora", "causal"] / "adapter"
    found = verify(target, "speed=true")
    assert states(found, "fail") == set()
    assert states(found, "skip") >= {"unfuse", "fused", "top_1"} and "learns" in states(found, "pass")
    assert found.speed is None and "quantised" in str(found.no_speed)
    assert found.as_record()["no_speed"] == found.no_speed
    assert "no speed: the base is quantised" in lorica("verify", target, "max_trainable_share=1", "--speed")


def test_without_a_sound_adapter_there_is_no_speed(copied: Callable[[str, str], Path]) -> None:
    run = copied("lora", "causal")
    a_nan(run)
    found = verify(run, "speed=true")
    assert found.speed is None and found.no_speed == "the adapter holds NaN or infinity"


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command_says_by_its_exit_code(copied: Callable[[str, str], Path]) -> None:
    run = copied("lora", "causal")
    printed = lorica("verify", run, "--max_trainable_share", "1", "--speed")
    assert "19 passed, 0 failed, 1 skipped" in printed and "times as long as fused" in printed
    one_element(run)
    assert "1 failed: files" in lorica("verify", run, "max_trainable_share=1", code=1)


def test_alone_it_verifies_what_it_trains_on_the_spot() -> None:
    assert "20 passed, 0 failed, 0 skipped" in lorica("verify")


def test_without_peft_its_check_is_skipped(
    trained: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    found = verify(trained["lora", "causal"])
    assert check(found, "peft").state == "skip" and "pip install peft" in check(found, "peft").said
    assert found.passed


def test_what_cannot_be_verified_is_refused(tmp_path: Path, trained: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(ConfigError, match="'demo' has no low-rank updates"):
        verify("demo")
    for word in ("./nowhere", "nowhere"):
        with pytest.raises(MissingPathError, match=f"no run, adapter or model folder '{word}': give the folder"):
            verify(word)
    heads = Adapter({}, {"score": {"weight": torch.zeros(3, 4)}}, "demo")
    peft_format.write(heads, tmp_path / "heads")
    with pytest.raises(ConfigError, match="heads alone"):
        verify(tmp_path / "heads")
    with pytest.raises(ConfigError, match="verify takes one run or adapter, and was given 2"):
        lorica("verify", "a", "b")


def test_what_is_not_there_is_named_with_what_is_near(trained: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    shutil.copytree(trained["lora", "causal"], tmp_path / "runs" / "topic-lora")
    shutil.copytree(trained["lora", "causal"] / "adapter", tmp_path / "topical")
    (tmp_path / "topicals").mkdir()  # neither a run nor an adapter
    with pytest.raises(MissingPathError, match=r"did you mean runs/topic-lora or topical\?$"):
        verify("topica-lor")
    with pytest.raises(MissingPathError, match=r"'runs/topic-lara': did you mean runs/topic-lora\?$"):
        verify("runs/topic-lara", "model=demo")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_checks_are_counted_on_the_way(
    trained: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    right = progress.bar
    monkeypatch.setattr(progress, "bar", lambda transient: right())  # which leaves what was drawn last
    assert len(verify(trained["lora", "causal"]).checks) == NUM_CHECKS == len(NAMES)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "checking" in shown and f"{NUM_CHECKS}/{NUM_CHECKS}" in shown
