"""Boosting as a callback of a stock transformers Trainer: the same ledger as our own loop for the same data order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorica
import tiny
from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.lora import LoraLinear
from lorica.errors import ConfigError, NonFiniteLossError, OutputExistsError
from lorica.models import Base
from lorica.optim.backprop import backprop
from lorica.optim.schedules import multiplier
from lorica.optim.updates import update_rule
from lorica.randomness import torch_generator
from lorica.tasks.batching import Batch, HeadBatch
from lorica.tasks.objectives import LossModule
from lorica.training.boosting import Foundation, Round, boost
from lorica.training.fit import Progress, Step, fit
from lorica.training.hf_callback import BoostingCallback
from lorica.training.ledger import Entry, Ledger
from lorica.training.rounds import Adaptive, EverySteps, RoundRule, Verdict

pytest.importorskip("accelerate")

pytestmark = pytest.mark.peers

Load = Callable[..., Base]
RATE, NUM_STEPS, BATCH_SIZE, CLIP = 2e-2, 24, 4, 1.0
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
# Both loops do the same float32 operations in the same order, so they agree to the bit where the kernels are the same;
# what is left is the rounding of kernels that split their sums otherwise (another thread count, another machine).
TOLERANCE = 1e-5
RULES: dict[str, Callable[[], RoundRule]] = {
    "steps": lambda: EverySteps(7),
    "adaptive": lambda: Adaptive(patience=4, beta=0.5, threshold=0.05),
}


@pytest.mark.parametrize("rule", ["steps", "adaptive"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_ledger_is_that_of_our_own_loop(load: Load, tmp_path: Path, family: str, rule: str) -> None:
    base, ours = classifier(load, family), classifier(load, family)
    heads = base.heads
    callback = boosting(base, tmp_path / "theirs", rule=RULES[rule](), heads=heads)
    train(base, tmp_path, callback, rows())
    expected = own_loop(ours, tmp_path / "ours", RULES[rule](), heads=heads)
    same_ledger(callback.ledger, expected)
    assert len(expected.boosters) > 2
    assert rule == "steps" or any(each.entry.rolled_back for each in expected.boosters)
    assert tiny.relative(tiny.logits(base.model), tiny.logits(ours.model)) <= TOLERANCE


def test_micro_batches_count_as_one_step(load: Load, tmp_path: Path) -> None:
    base, ours = classifier(load, "bert"), classifier(load, "bert")
    base.model.accepts_loss_kwargs = False  # else this Trainer sums the micro-batches' gradients of such a model
    callback = boosting(base, tmp_path / "theirs", rule=RULES["adaptive"]())
    train(base, tmp_path, callback, rows(), gradient_accumulation_steps=2)
    same_ledger(callback.ledger, own_loop(ours, tmp_path / "ours", RULES["adaptive"](), batches_per_step=2))


def test_dropout_on_the_booster_draws_the_same(load: Load, tmp_path: Path) -> None:
    base, ours = classifier(load, "bert"), classifier(load, "bert")
    callback = boosting(base, tmp_path / "theirs", rule=EverySteps(7), dropout=0.3, shrinkage=0.5)
    train(base, tmp_path, callback, rows())
    same_ledger(callback.ledger, own_loop(ours, tmp_path / "ours", EverySteps(7), dropout=0.3, shrinkage=0.5))


@pytest.mark.parametrize("rule", ["steps", "adaptive"])
def test_the_written_chain_on_the_untouched_base_is_the_trained_model(load: Load, tmp_path: Path, rule: str) -> None:
    base, untouched = classifier(load, "bert"), classifier(load, "bert")
    names = set(base.model.state_dict())
    told: list[Entry] = []
    callback = boosting(base, tmp_path / "run", rule=RULES[rule](), heads=base.heads, on_round=told.append)
    train(base, tmp_path, callback, rows())
    lorica.save_adapter(callback.chain(), tmp_path / "adapter")
    before = tiny.logits(untouched.model)
    injection.inject(untouched.model, lorica.load_adapter(tmp_path / "adapter"))
    trained = tiny.logits(base.model.eval())
    assert tiny.relative(trained, before) > 1e-2
    assert tiny.relative(tiny.logits(untouched.model), trained) <= TOLERANCE
    assert set(base.model.state_dict()) == names, "a live layer was left on the model"
    assert Ledger.open(tmp_path / "run").chain().norm() == pytest.approx(callback.chain().norm())
    assert [entry.last_step for entry in told] == [each.entry.last_step for each in callback.ledger.boosters]
    assert told[-1].last_step == NUM_STEPS


def test_the_optimizer_forgets_at_a_lay_on(load: Load, tmp_path: Path) -> None:
    base = classifier(load, "bert")
    seen = Watching()
    train(base, tmp_path, boosting(base, tmp_path / "run", rule=EverySteps(7)), rows(), watching=seen)
    assert seen.moments == [0 if step % 7 == 0 else step % 7 for step in range(1, NUM_STEPS + 1)]
    assert len({frozenset(step) for step in seen.parameters}) == 1, "the optimizer's parameters were exchanged"


def test_the_rule_is_fed_the_raw_loss_and_not_the_logged_average(load: Load, tmp_path: Path) -> None:
    base, rule = classifier(load, "bert"), Listening()
    looks = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 10}  # no evidence
    trainer = train(base, tmp_path, boosting(base, tmp_path / "run", rule=rule), rows(), logging_steps=6, **looks)
    raw = [step.loss for step in rule.steps]
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(raw) == NUM_STEPS and len(logged) == NUM_STEPS // 6
    averages = [sum(raw[at : at + 6]) / 6 for at in range(0, NUM_STEPS, 6)]
    assert averages == pytest.approx(logged, rel=1e-4) and raw[5] != pytest.approx(logged[0], rel=1e-3)
    assert [step.learning_rate for step in rule.steps] == pytest.approx(rates(NUM_STEPS))


def test_a_language_models_shares_add_up_to_the_mean_over_its_tokens(load: Load, tmp_path: Path) -> None:
    base, rule = load("llama"), Listening()
    lines = texts()
    expected = []
    with torch.no_grad():
        for start in range(0, 4 * BATCH_SIZE, 2 * BATCH_SIZE):
            micro = [stacked(lines[at : at + BATCH_SIZE]) for at in (start, start + BATCH_SIZE)]
            means = [float(base.model(**each).loss) for each in micro]
            counts = [int((each["labels"][:, 1:] != -100).sum()) for each in micro]
            expected.append(sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts))
            assert counts[0] != counts[1]
    callback = boosting(base, tmp_path / "run", rule=rule)
    train(base, tmp_path, callback, lines, gradient_accumulation_steps=2, max_steps=2, learning_rate=0.0)
    assert [step.loss for step in rule.steps] == pytest.approx(expected, rel=1e-5)


def test_a_loss_from_outside_the_model_is_asked_for_and_can_be_told(load: Load, tmp_path: Path) -> None:
    base = classifier(load, "bert")
    callback = boosting(base, tmp_path / "deaf", rule=EverySteps(7))
    with pytest.raises(ConfigError, match="hears='caller'"):
        train(base, tmp_path, callback, rows(), label_smoothing_factor=0.1)
    callback.finish()
    assert not any(isinstance(module, LoraLinear) for module in base.model.modules())
    rule = Listening()
    told = boosting(base, tmp_path / "told", rule=rule, hears="caller")

    def my_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss = nn.functional.cross_entropy(outputs.logits, labels)
        told.hear(loss)
        return loss

    trainer = train(base, tmp_path, told, rows(), my_loss=my_loss, logging_steps=1)
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [step.loss for step in rule.steps] == pytest.approx(logged, rel=1e-4)


def test_a_loss_that_is_not_finite_is_no_evidence_and_moves_nothing(load: Load, tmp_path: Path) -> None:
    base, rule = classifier(load, "bert"), Listening()
    callback = boosting(base, tmp_path / "run", rule=rule)
    broken = [4, 5]
    count = itertools.count(1)

    def sometimes_nan(model: nn.Module, inputs: Any, outputs: Any) -> Any:
        if next(count) in broken:
            outputs["loss"] = outputs["loss"] * float("nan")
        return outputs

    hook = base.model.register_forward_hook(sometimes_nan, prepend=True)
    train(base, tmp_path, callback, rows())
    hook.remove()
    assert [step.step for step in rule.steps if not step.applied] == broken
    assert callback.chain().is_finite() and callback.chain().norm() > 0


def test_a_training_that_is_nothing_but_nan_is_stopped(load: Load, tmp_path: Path) -> None:
    base = classifier(load, "bert")
    callback = boosting(base, tmp_path / "run", rule=EverySteps(50))
    base.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="10 of 10 steps"):
        train(base, tmp_path, callback, rows())


def test_an_early_end_lays_the_last_booster_on(load: Load, tmp_path: Path) -> None:
    base = classifier(load, "bert")
    callback = boosting(base, tmp_path / "run", rule=EverySteps(7))
    train(base, tmp_path, callback, rows(), watching=Watching(stop_at=10))
    entries = [each.entry for each in callback.ledger.boosters]
    assert [(entry.last_step, entry.reason) for entry in entries] == [(7, "steps"), (10, "max_steps")]


def test_what_boosting_cannot_live_in_is_refused(load: Load, tmp_path: Path) -> None:
    base, other = classifier(load, "bert"), classifier(load, "bert")
    callback = boosting(base, tmp_path / "run", rule=EverySteps(7))
    with pytest.raises(ConfigError, match="make the callback first"):
        train(other, tmp_path, callback, rows())
    train(base, tmp_path, callback, rows())
    with pytest.raises(ConfigError, match="make a new one"):
        train(base, tmp_path, callback, rows())
    with pytest.raises(OutputExistsError, match="ledger already"):
        boosting(base, tmp_path / "run", rule=EverySteps(7))
    late = boosting(base, tmp_path / "late", rule=EverySteps(7))
    with pytest.raises(ConfigError, match="load_best_model_at_end"):
        best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5, "save_steps": 5}
        train(base, tmp_path, late, rows(), load_best_model_at_end=True, **best)


class Listening(EverySteps):
    """Rounds of 9 steps that remember what they were shown."""

    def __init__(self) -> None:
        super().__init__(9)
        self.steps: list[Step] = []

    def after(self, step: Step) -> Verdict:
        self.steps.append(step)
        return super().after(step)


class Watching(transformers.TrainerCallback):
    """After each step: how many steps the optimizer's moments have seen, and which parameters it holds."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.moments: list[int] = []
        self.parameters: list[list[int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        moments = {int(each["step"]) for each in kwargs["optimizer"].state.values()}
        assert len(moments) <= 1
        self.moments.append(max(moments, default=0))
        groups = kwargs["optimizer"].param_groups
        self.parameters.append([id(parameter) for group in groups for parameter in group["params"]])
        if state.global_step == self.stop_at:
            control.should_training_stop = True


def classifier(load: Load, family: str) -> Base:
    """A classifier of `family` without dropout, which the Trainer would switch on and our own loop would not."""
    base = load(family, "classification")
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


def boosting(base: Base, folder: Path, **options: Any) -> BoostingCallback:
    return BoostingCallback(base.model, TARGETS[base.model.config.model_type], folder=folder, seed=3, **options)


def train(
    base: Base,
    folder: Path,
    callback: BoostingCallback,
    lines: Sequence[dict[str, Tensor]],
    *,
    watching: transformers.TrainerCallback | None = None,
    my_loss: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Any:
    """A stock Trainer over the rows in their order, with the hyperparameters of `own_loop`."""
    given: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH_SIZE,
        "train_sampling_strategy": "sequential",
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "max_grad_norm": CLIP,
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = transformers.Trainer(
        base.model,
        transformers.TrainingArguments(**(given | options)),
        train_dataset=lines,
        eval_dataset=lines,
        callbacks=[callback] if watching is None else [callback, watching],
        compute_loss_func=my_loss,
    )
    trainer.train()
    return trainer


def own_loop(
    base: Base,
    folder: Path,
    rule: RoundRule,
    *,
    heads: Sequence[str] = (),
    batches_per_step: int = 1,
    dropout: float = 0.0,
    shrinkage: float = 1.0,
) -> Ledger:
    """The ledger of `boost` over the same batches; the model is left with everything laid on, heads too."""
    folder.mkdir()
    ledger, progress = Ledger(folder), Progress()
    targets = injection.find_targets(base.model, TARGETS[base.model.config.model_type], heads)
    stream = batches()

    def new_booster(number: int) -> Adapter:
        new = injection.create(base.model, targets, rank=1, alpha=1, seed=3, round=number, heads=heads)
        return Adapter(new.updates, ledger.boosters[-1].heads if number else new.heads)

    def train_round(round: Round) -> str:
        round.live.set_training(True)
        round.live.set_dropout_generator(torch_generator(3, "dropout", round.number))
        return fit(
            LossModule(base.model, "classification"),
            round.live.trainable(),
            stream,
            estimator=backprop,
            optimizer=update_rule("adamw", round.live.trainable().values(), learning_rate=RATE),
            learning_rate=lambda step: rates(NUM_STEPS)[step],
            num_steps=NUM_STEPS,
            progress=progress,
            batches_per_step=batches_per_step,
            max_grad_norm=CLIP,
            on_step=round.watch,
        )

    boost(
        Foundation(base.model),
        ledger,
        rule=rule,
        new_booster=new_booster,
        train_round=train_round,
        num_steps=NUM_STEPS,
        progress=progress,
        shrinkage=shrinkage,
        dropout=dropout,
    )
    for path, head in ledger.chain().heads.items():
        base.model.get_submodule(path).load_state_dict(dict(head))
    return ledger


def same_ledger(found: Ledger, expected: Ledger) -> None:
    """Round by round: what happened is equal, and what was computed is equal up to rounding."""
    assert len(found.boosters) == len(expected.boosters)
    for left, right in zip(found.boosters, expected.boosters, strict=True):
        for name in ("round", "first_step", "last_step", "reason", "accepted", "rolled_back", "weight"):
            assert getattr(left.entry, name) == getattr(right.entry, name), name
        measured = [(each.entry.best_loss or 0.0, each.entry.last_loss, each.entry.norm) for each in (left, right)]
        assert measured[0] == pytest.approx(measured[1], rel=TOLERANCE)
        for path, update in right.updates.items():
            assert tiny.relative(left.updates[path].A, update.A) <= TOLERANCE
            assert tiny.relative(left.updates[path].B, update.B) <= TOLERANCE
        assert left.heads.keys() == right.heads.keys()
        for path, head in right.heads.items():
            assert all(tiny.relative(left.heads[path][part], head[part]) <= TOLERANCE for part in head)


def rates(num_steps: int) -> list[float]:
    return [RATE * multiplier("linear", step, num_steps) for step in range(num_steps)]


def rows() -> list[dict[str, Tensor]]:
    """Rows of random tokens whose label is told by their first one: something to learn, and something to forget."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(4, 20, (10 * BATCH_SIZE, 8), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % tiny.NUM_LABELS} for row in tokens
    ]


def texts() -> list[dict[str, Tensor]]:
    """Random tokens of which a random number at the start bears no loss."""
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(4, 20, (4 * BATCH_SIZE, 9), generator=generator)
    silent = torch.randint(1, 8, (len(tokens),), generator=generator)
    labels = tokens.masked_fill(torch.arange(9) < silent[:, None], -100)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(tokens, labels, strict=True)
    ]


def stacked(lines: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([line[name] for line in lines]) for name in lines[0]}


def batches() -> Iterator[Batch]:
    """The batches that the Trainer makes of `rows`, epoch after epoch."""
    lines = rows()
    while True:
        for start in range(0, len(lines), BATCH_SIZE):
            inputs = stacked(lines[start : start + BATCH_SIZE])
            labels = inputs.pop("labels")
            yield HeadBatch(inputs, labels)
