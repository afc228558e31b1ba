"""XGBLoRA: what existing code gets wrong, each as a law here; whole runs on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import tiny
from lorica import config, files, models, runs
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.config import TrainConfig
from lorica.demo import language
from lorica.errors import AdapterFormatError, LoricaError
from lorica.evaluation.evaluate import Evaluation
from lorica.models import Base
from lorica.optim.updates import update_rule
from lorica.runs.training import steps
from lorica.training.boosting import Foundation, improves
from lorica.training.ledger import Entry, Ledger

SHORT = ("model=demo", "batch_size=4", "task.num_train=64", "task.num_eval=40", "learning_rate=1e-2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder


def train(data: Path, folder: Path, *words: str) -> Path:
    given = dict(word.split("=", 1) for word in [*SHORT, *words])
    lines = [f"{key}={value}" for key, value in given.items()]
    cfg = config.read(TrainConfig, [*lines, f"task.path={data / 'topic'}", f"output_dir={folder}"])
    return runs.train(cfg, Console(quiet=True)).run.path


def losses(run: Path) -> list[float]:
    return [step["loss"] for step in files.read_records(run / "training_loss.jsonl")]


def ledger_lines(run: Path) -> list[dict[str, Any]]:
    return files.read_records(run / "ledger.jsonl")


@pytest.mark.parametrize("trainer", ["backprop", "spsa"])
def test_one_round_is_plain_lora_of_rank_1(data: Path, tmp_path: Path, trainer: str) -> None:
    common = ("max_steps=12", f"trainer={trainer}", "adapter.rank=1", "adapter.alpha=1", "adapter.dropout=0.1")
    plain = train(data, tmp_path / "plain", *common)
    boosted = train(data, tmp_path / "boosted", *common, "adapter.kind=xgblora", "boosting.steps_per_iteration=12")
    assert losses(plain) == losses(boosted)
    assert [line["last_step"] for line in ledger_lines(boosted)] == [12]
    left, right = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (plain, boosted))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("every", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_rounds_of_so_many_steps_are_20_lay_ons_and_none_at_epochs(data: Path, tmp_path: Path, every: int) -> None:
    steps_words = (f"max_steps={20 * every}", f"boosting.steps_per_iteration={every}", "boosting.merge_frequency=1")
    words = ("adapter.kind=xgblora", "batch_size=1", "task.num_train=8", "task.num_eval=4", "save_steps=null")
    run = train(data, tmp_path / "run", *words, *steps_words)
    assert [line["last_step"] for line in ledger_lines(run)] == list(range(every, 20 * every + 1, every))


def test_epoch_rounds_are_whole_epochs_and_the_last_booster_is_laid_on(data: Path, tmp_path: Path) -> None:
    run = train(data, tmp_path / "run", "adapter.kind=xgblora", "max_steps=40", "boosting.merge_frequency=1")
    assert [line["last_step"] for line in ledger_lines(run)] == [16, 32, 40]
    assert [line["reason"] for line in ledger_lines(run)] == ["epochs", "epochs", "max_steps"]


@pytest.mark.parametrize("trainer", ["backprop", "spsa"])
def test_every_round_has_a_fresh_optimizer_over_its_own_booster(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    """Moments of the booster before would act on the new one."""
    made: list[tuple[list[Tensor], torch.optim.Optimizer]] = []

    def recorded(name: Any, parameters: Any, **options: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        made.append(
            ([parameter.detach().clone() for parameter in parameters], update_rule(name, parameters, **options))
        )
        assert not made[-1][1].state
        return made[-1][1]

    monkeypatch.setattr(steps, "update_rule", recorded)
    words = ("max_steps=9", "boosting.steps_per_iteration=3", "optimizer=momentum", f"trainer={trainer}")
    run = train(data, tmp_path / "run", "adapter.kind=xgblora", "boosting.train_factors=both", *words)
    assert len(made) == 3 and len({id(optimizer) for _, optimizer in made}) == 3
    base = models.load("demo", kind="causal")
    targets = models.target_modules(base, "standard")
    for booster, (start, _) in zip(Ledger.open(run).boosters, made, strict=True):
        drawn = injection.create(base.model, targets, rank=1, alpha=1, round=booster.entry.round)
        expected = [factor for path in targets for factor in (drawn.updates[path].A, drawn.updates[path].B)]
        assert all(torch.equal(*pair) for pair in zip(start, expected, strict=True))  # whatever was drawn in between


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_1000_boosters_are_one_cast_of_the_fp32_sum(load: Callable[..., Base], dtype: str) -> None:
    base = load("llama", dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    path = models.target_modules(base, "standard")[0]
    pristine = base.model.get_submodule(path).weight.clone()
    foundation, chain, updates = Foundation(base.model), [], torch.zeros(pristine.shape, dtype=torch.float64)
    for _ in range(1000):
        A = torch.randn(1, pristine.shape[1], generator=generator)
        B = torch.randn(pristine.shape[0], 1, generator=generator) * 1e-4
        chain.append(LowRank(A, B))
        updates += B.double() @ A.double()
    joined = LowRank(torch.cat([each.A for each in chain]), torch.cat([each.B for each in chain], dim=1))
    for count in (10, 500, 1000):  # lay-ons on the way must leave no trace
        part = LowRank(joined.A[:count], joined.B[:, :count])
        foundation.lay_on(Adapter({path: part}))
    live = base.model.get_submodule(path).weight
    expected = (pristine.float() + joined.dense()).to(pristine.dtype)
    assert torch.equal(live, expected)
    kept = (live.double() - pristine.double()).flatten() @ updates.flatten() / updates.square().sum()
    assert kept > 0.98
    foundation.take_off()
    assert torch.equal(base.model.get_submodule(path).weight, pristine)


@pytest.mark.parametrize("unfused", [False, True])
@pytest.mark.parametrize("family", ["opt", "llama", "bert"])
def test_a_lay_on_preserves_the_function(load: Callable[..., Base], family: str, unfused: bool) -> None:
    base = load(family)
    adapter = tiny.adapter(base.model, models.target_modules(base, "standard"))
    inputs = tiny.inputs(base.model)
    bare = tiny.logits(base.model, inputs)
    live = injection.inject(base.model, adapter)
    before = tiny.logits(base.model, inputs)
    assert tiny.relative(before, bare) > 1e-2
    injection.remove(live)
    foundation = Foundation(base.model, unfused)
    foundation.lay_on(adapter)
    assert tiny.relative(tiny.logits(base.model, inputs), before) <= 1e-5
    foundation.take_off()
    assert torch.equal(tiny.logits(base.model, inputs), bare)


@pytest.mark.parametrize(
    "extra", [(), ("boosting.ensemble=true",), ("boosting.shrinkage=0.5",), ("boosting.ranks=[3,1]",)]
)
def test_the_export_on_the_untouched_base_is_the_boosted_model(
    data: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    run = train(
        data, tmp_path / "run", "adapter.kind=xgblora", "max_steps=24", "boosting.steps_per_iteration=6", *extra
    )
    base = models.load("demo", kind="causal")
    tokens = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    ledger = Ledger.open(run)
    with torch.no_grad():
        bare = base.model(tokens).logits
        foundation = Foundation(base.model, unfused="boosting.ensemble=true" in extra)
        foundation.lay_on(ledger.chain())
        boosted = base.model(tokens).logits
        foundation.take_off()
        exported = peft_format.read(run / "adapter")
        injection.inject(base.model, exported)
        live = base.model(tokens).logits
    assert tiny.relative(boosted, bare) > 1e-2
    assert tiny.relative(live, boosted) <= 1e-5
    assert {update.rank for update in exported.updates.values()} == {
        sum(b.updates[p].rank for b in ledger.boosters) for p in exported.updates
    }


@pytest.mark.peers
# PEFT asks transformers for a property by the name that it had before it was renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_exported_chain(data: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    words = ("max_steps=24", "boosting.steps_per_iteration=6", "boosting.layer_fraction=0.5")
    run = train(data, tmp_path / "run", "adapter.kind=xgblora", *words)
    tokens = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    ours, theirs = models.load("demo", kind="causal"), models.load("demo", kind="causal")
    injection.inject(ours.model, peft_format.read(run / "adapter"))
    wrapped = peft.PeftModel.from_pretrained(theirs.model, str(run / "adapter"))
    with torch.no_grad():
        assert tiny.relative(wrapped(tokens).logits, ours.model(tokens).logits) <= 1e-5


def test_a_ledger_truncates_reweights_and_tells_tampering(data: Path, tmp_path: Path) -> None:
    run = train(data, tmp_path / "run", "adapter.kind=xgblora", "max_steps=18", "boosting.steps_per_iteration=6")
    ledger = Ledger.open(run)
    whole = ledger.chain()
    assert (ledger.truncated(2).chain() + boosters_of(ledger, 2) - whole).norm() < 1e-6 * whole.norm()
    dropped = ledger.reweighted(1, 0.0).chain()
    assert (dropped + boosters_of(ledger, 1) - whole).norm() < 1e-6 * whole.norm()
    assert Ledger.open(run).chain().norm() == pytest.approx(whole.norm(), rel=1e-12)
    file = run / "boosters" / "00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(AdapterFormatError, match="00001"):
        Ledger.open(run)


def boosters_of(ledger: Ledger, round: int) -> Adapter:
    return Adapter(ledger.boosters[round].updates)


def test_a_rejected_booster_is_kept_and_counts_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    update = LowRank(torch.ones(1, 3), torch.ones(2, 1))
    for number, accepted in enumerate((True, False)):
        ledger.append(entry(number, accepted), Adapter({"m": update}))
    assert ledger.chain().updates["m"].rank == 1 and len(Ledger.open(tmp_path).boosters) == 2


def entry(number: int, accepted: bool) -> Entry:
    return Entry(
        number, number, number + 1, "steps", accepted, False, 1.0 if accepted else 0.0, None, None, 0.0, "", ""
    )


def test_the_probe_wants_more_than_its_standard_error() -> None:
    before = torch.ones(16)
    assert improves(before, before - 0.1, 1.0)
    assert not improves(before, before, 1.0)
    noise = torch.tensor([1.0, -1.0] * 8)
    assert not improves(before, before - 0.1 + noise, 1.0)
    assert not improves(before, torch.full((16,), float("nan")), 1.0)


def test_the_probe_rejects_a_booster_that_harms_and_heads_go_back(data: Path, tmp_path: Path) -> None:
    words = (
        "max_steps=12",
        "boosting.steps_per_iteration=4",
        "boosting.judge=probe",
        "learning_rate=3.0",
        "optimizer=sgd",
    )
    run = train(
        data, tmp_path / "run", "adapter.kind=xgblora", *words, "task.kind=classification", "boosting.probe_size=16"
    )
    lines = ledger_lines(run)
    assert not lines[0]["accepted"] and lines[0]["weight"] == 0.0
    first, second = Ledger.open(run).boosters[:2]
    assert torch.equal(first.heads["score"]["weight"], second.heads["score"]["weight"]) or second.entry.accepted


def test_adaptive_rounds_lay_on_their_best(data: Path, tmp_path: Path) -> None:
    words = (
        "max_steps=60",
        "boosting.use_adaptive_merge=true",
        "boosting.patience=5",
        "boosting.improvement_threshold=0.2",
    )
    lines = ledger_lines(train(data, tmp_path / "run", "adapter.kind=xgblora", *words))
    assert {line["reason"] for line in lines} <= {"patience", "max_steps"}
    assert any(line["rolled_back"] for line in lines) and lines[-1]["last_step"] == 60
    assert all(line["best_loss"] is not None for line in lines)


def test_training_B_alone_leaves_A_as_drawn(data: Path, tmp_path: Path) -> None:
    words = ("max_steps=4", "boosting.steps_per_iteration=2", "boosting.train_factors=B")
    run = train(data, tmp_path / "run", "adapter.kind=xgblora", *words)
    base = models.load("demo", kind="causal")
    targets = models.target_modules(base, "standard")
    for booster in Ledger.open(run).boosters:
        drawn = injection.create(base.model, targets, rank=1, alpha=1, round=booster.entry.round)
        assert all(torch.equal(booster.updates[path].A, drawn.updates[path].A) for path in targets)


def test_a_fraction_of_the_layers_is_drawn_anew_each_round(data: Path, tmp_path: Path) -> None:
    words = ("max_steps=8", "boosting.steps_per_iteration=2", "boosting.layer_fraction=0.5")
    chosen = [
        set(b.updates) for b in Ledger.open(train(data, tmp_path / "run", "adapter.kind=xgblora", *words)).boosters
    ]
    assert {len(each) for each in chosen} == {4} and len({frozenset(each) for each in chosen}) > 1


def test_orthogonal_boosters_share_no_input_direction(data: Path, tmp_path: Path) -> None:
    words = ("max_steps=6", "boosting.steps_per_iteration=2", "boosting.orthogonal=true", "boosting.train_factors=B")
    ledger = Ledger.open(train(data, tmp_path / "run", "adapter.kind=xgblora", *words))
    for path in ledger.boosters[0].updates:
        A: Tensor = ledger.chain().updates[path].A
        gram = A @ A.T
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-5 * gram.abs().max()


def test_a_large_scale_under_spsa_is_warned_of(data: Path, tmp_path: Path) -> None:
    said: list[str] = []

    class Listening(Console):
        def print(self, *objects: Any, **_: Any) -> None:  # type: ignore[override]
            said.extend(map(str, objects))

    given = [*SHORT, f"task.path={data / 'topic'}", f"output_dir={tmp_path / 'run'}", "max_steps=2"]
    words = [*given, "adapter.kind=xgblora", "adapter.alpha=16", "trainer=spsa", "boosting.steps_per_iteration=2"]
    runs.train(config.read(TrainConfig, words), Listening())
    assert any("alpha/rank = 16" in line for line in said)
    assert any("rounds: every 2 steps" in line for line in said)
    assert any(line.startswith("round 0 ended at step 2 (steps)") for line in said)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["step"] == 2 and state["num_rounds"] == 1


def test_activation_informed_boosters_read_new_directions(data: Path, tmp_path: Path) -> None:
    words = ("max_steps=6", "boosting.steps_per_iteration=2", "adapter.init=activations", "boosting.train_factors=B")
    ledger = Ledger.open(train(data, tmp_path / "run", "adapter.kind=xgblora", *words))
    base = models.load("demo", kind="causal")
    path = next(iter(ledger.boosters[0].updates))
    A: Tensor = ledger.chain().updates[path].A
    assert torch.allclose(A @ A.T, torch.eye(3), atol=1e-5)
    rows: list[Tensor] = []
    hook = base.model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][0]))
    with torch.no_grad():
        base.model(torch.randint(0, 500, (1, 64), generator=torch.Generator().manual_seed(0)))
    hook.remove()
    random = torch.nn.functional.normalize(
        torch.randn(1, A.shape[1], generator=torch.Generator().manual_seed(0)), dim=1
    )
    assert (rows[0] @ A[:1].T).norm() > 2 * (rows[0] @ random.T).norm()


@pytest.mark.parametrize("kind", ["choice", "classification"])
def test_an_export_is_the_run_in_another_form(data: Path, tmp_path: Path, kind: str) -> None:
    words = ("max_steps=18", "boosting.steps_per_iteration=3", f"task.kind={kind}")
    run = train(data, tmp_path / "run", "adapter.kind=xgblora", *words)
    whole = Ledger.open(run).chain()

    def exported(name: str, *options: str) -> runs.Exported:
        return runs.export(str(run), config.read(config.ExportConfig, [f"output_dir={tmp_path / name}", *options]))

    part = exported("part", "rounds=3", "drop=[1]")
    assert (part.rank, part.num_boosters, part.total_error) == (2, 2, 0.0)
    small = exported("small", "rank=2")
    error = (peft_format.read(tmp_path / "small") - Adapter(whole.updates)).norm() / whole.norm()
    assert small.total_error == pytest.approx(error, rel=1e-4) and 0 < small.total_error <= small.worst_error
    exported("model", "fuse=true")
    fused = evaluated(f"model={tmp_path / 'model'}", data, kind)
    live = evaluated(str(run), data, kind)
    assert fused.loss == pytest.approx(live.loss, rel=1e-4)
    with pytest.raises(LoricaError, match="nothing is written over"):
        exported("part")


def evaluated(target: str, data: Path, kind: str) -> Evaluation:
    task = (f"task.path={data / 'topic'}", f"task.kind={kind}", "task.num_eval=40")
    if target.startswith("model="):
        return runs.evaluate_target(None, config.read(config.EvaluateConfig, [target, *task]))
    return runs.evaluate_target(target, config.read(config.EvaluateConfig, []))
