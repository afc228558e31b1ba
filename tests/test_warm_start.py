"""A zeroth-order run's warm start: its last block fitted by gradients that end there, before the first probe."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from lorica import config, files, models, runs
from lorica.adapters import branches, peft_format
from lorica.config import TrainConfig
from lorica.demo import language
from lorica.errors import ConfigError
from lorica.models import Kind
from lorica.runs import Trained
from lorica.runs.ready import prepare
from lorica.runs.training import warm_start
from lorica.runs.training.learning import Learning, encode_splits
from lorica.tasks.objectives import scores
from lorica.training import fit
from test_resume import Killed, dies_at, what_must_agree

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

SMALL = ("batch_size=8", "task.num_train=160", "task.num_dev=40", "task.num_eval=40")
NUM_BATCHES = 20
LOOKED_AT = 160 // 8  # batches, before the warm start


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder


def train(folder: Path, *words: str, rate: float = 0.0, model: str = "demo") -> tuple[Trained, str]:
    said = io.StringIO()
    cfg = config.read(
        TrainConfig, [f"model={model}", "trainer=zo", f"learning_rate={rate}", *SMALL, *words, f"output_dir={folder}"]
    )
    return runs.train(cfg, Console(file=said, soft_wrap=True)), said.getvalue()


def factors(found: Trained) -> dict[str, torch.Tensor]:
    """Path.A and path.B of what a run left."""
    updates = peft_format.read(found.run.adapter).updates
    return {f"{path}.{name}": getattr(update, name) for path, update in updates.items() for name in "AB"}


def in_last_block(names: list[str], model: str = "demo", kind: Kind = "causal") -> set[str]:
    base = models.load(model, kind=kind)
    paths = branches.of_last_block(base.model, sorted({name[:-2] for name in names}))
    assert paths and len(paths) < len(names) // 2
    return {f"{path}.{name}" for path in paths for name in "AB"}


def test_the_last_block_alone_is_fitted_and_every_pass_is_counted(data: Path, tmp_path: Path) -> None:
    words = (f"task.path={data / 'topic'}", "max_steps=1")
    with_it, said = train(tmp_path / "with", *words, f"zo.warm_start_steps={NUM_BATCHES}")
    without, _ = train(tmp_path / "without", *words, "zo.warm_start_steps=0")
    found, drawn = factors(with_it), factors(without)
    last = in_last_block(list(found))
    assert {name for name in found if not torch.equal(found[name], drawn[name])} == last
    (step,), (bare,) = (files.read_records(each.run.training_loss) for each in (with_it, without))
    assert bare["forwards"] == LOOKED_AT + 8
    assert step["forwards"] == bare["forwards"] + 2 * NUM_BATCHES + NUM_BATCHES // 4
    assert step["tokens"] > bare["tokens"]
    assert with_it.evaluation.loss < without.evaluation.loss - 0.02
    assert "left out" not in said


def test_targets_outside_the_last_block_have_none_and_it_is_said(data: Path, tmp_path: Path) -> None:
    words = (f"task.path={data / 'topic'}", "max_steps=1", r"adapter.targets=.*layers\.0\..*q_proj")
    found, said = train(tmp_path / "run", *words, "zo.warm_start_steps=4")
    assert "warning: no target lies in the last block, so there is no warm start" in said
    (step,) = files.read_records(found.run.training_loss)
    assert step["forwards"] == LOOKED_AT + 8


@pytest.mark.parametrize(("family", "kind"), [("bert", "classification"), ("gpt2", "causal"), ("t5", "seq2seq")])
def test_every_family_has_a_last_block(
    family: str, kind: Kind, tiny_models: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    model = str(tiny_models(family, kind))
    words = (
        f"task.path={data / 'sentiment'}",
        "max_steps=1",
        "adapter.rank=2",
        "adapter.init=kaiming",
        f"model.kind={kind}",
    )
    found, drawn = (
        factors(train(tmp_path / f"{count}", *words, f"zo.warm_start_steps={count}", model=model)[0])
        for count in (4 * NUM_BATCHES, 0)
    )
    changed = {name for name in found if not torch.equal(found[name], drawn[name])}
    assert changed == in_last_block(list(found), model, kind)


def test_the_fit_is_adamw_on_the_last_block(data: Path) -> None:
    """Against a plain loop over the same batches, which backpropagates through the whole model."""
    learning = learning_of(f"task.path={data / 'topic'}", "zo.warm_start_steps=6")
    new = learning.tuning.first
    found = warm_start.warm_started(learning, new)
    model, last = learning.ready.base.model, in_last_block([f"{path}.{name}" for path in new.updates for name in "AB"])
    values = {
        f"{path}.{name}": getattr(update, name).clone().requires_grad_()
        for path, update in new.updates.items()
        for name in "AB"
    }
    for path, update in new.updates.items():
        module = model.get_submodule(path)
        module.register_forward_hook(
            lambda module, inputs, y, path=path, s=update.scale: (
                y + s * (inputs[0] @ values[f"{path}.A"].T) @ values[f"{path}.B"].T
            )
        )
    trained = [values[name] for name in sorted(last)]
    optimizer, collate = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0), learning.ready.collate()
    for step, batch in zip(range(6), learning.stream.indices(), strict=False):
        optimizer.param_groups[0]["lr"] = warm_start.LEARNING_RATE * (1 - step / 6)
        made = collate([learning.rows["train"][index] for index in batch])
        optimizer.zero_grad()
        F.cross_entropy(scores(model, made), made.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name in last:
        path, factor = name[:-2], name[-1]
        expected = values[name].detach()
        torch.testing.assert_close(getattr(found.updates[path], factor), expected, rtol=2**-7, atol=1e-5)  # bfloat16


def test_nothing_below_the_last_block_has_a_gradient_and_the_base_stays(data: Path) -> None:
    learning = learning_of(f"task.path={data / 'topic'}", "zo.warm_start_steps=2")
    model, seen = learning.ready.base.model, []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for block in branches.blocks_of(model):
        block.register_forward_pre_hook(lambda block, inputs: seen.append((block, inputs[0].requires_grad)))
    warm_start.warm_started(learning, learning.tuning.first)
    assert len(seen) == (2 + 1) * len(branches.blocks_of(model)) and not any(tracked for _, tracked in seen)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_fit_that_lowers_nothing_is_left_out_and_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"task.path={data / 'topic'}", "max_steps=1")
    without, _ = train(tmp_path / "without", *words, "zo.warm_start_steps=0")
    for rate, count in ((5e-3, 1), (1e38, 8)):  # the loss before its only step; NaN
        monkeypatch.setattr(warm_start, "LEARNING_RATE", rate)
        found, said = train(tmp_path / f"{rate:g}", *words, f"zo.warm_start_steps={count}")
        assert f"warning: the warm start of {count} batches did not lower their loss: it is left out" in said
        assert all(torch.equal(value, factors(without)[name]) for name, value in factors(found).items())


def test_the_first_booster_holds_it(data: Path, tmp_path: Path) -> None:
    """It has LoRA's rank, and the others, of rank 1, begin with nothing."""
    words = ("adapter.kind=xgblora", "boosting.steps_per_iteration=2", "max_steps=6", f"task.path={data / 'topic'}")
    found, said = train(tmp_path / "run", *words, "zo.warm_start_steps=4")
    assert "rank 8, then 1, scale 2" in said
    steps = files.read_records(found.run.training_loss)
    assert [step["forwards"] for step in steps] == [LOOKED_AT + (2 * 4 + 1) + 8 * step["step"] for step in steps]
    chain = peft_format.read(found.run.adapter).updates
    last = {name[:-2] for name in in_last_block([f"{path}.{name}" for path in chain for name in "AB"])}
    for path, update in chain.items():
        assert (update.B.norm(dim=0) > 0).tolist() == [path in last] * 8 + [False] * 2


@pytest.mark.parametrize("kind", ["lora", "xgblora"])
def test_a_run_that_was_stopped_counts_it_once(
    kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends as the unbroken run, bit for bit."""
    words = [f"adapter.kind={kind}", "max_steps=6", "zo.warm_start_steps=3", "save_steps=2", "eval_steps=3"]
    words += ["boosting.steps_per_iteration=4"] if kind == "xgblora" else []
    words.append(f"task.path={data / 'topic'}")
    whole, _ = train(tmp_path / "whole", *words, rate=1e-3)
    for number, kill in enumerate((4, 5)):  # the second checkpoint stands where a round ends
        broken = tmp_path / f"broken {number}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(fit, "_told", dies_at(kill))
            train(broken, *words, rate=1e-3)
        again = runs.train(config.read(TrainConfig, [f"resume={broken}"]), Console(file=io.StringIO()))
        assert what_must_agree(broken) == what_must_agree(whole.run.path)
        taken, expected = (files.read_records(each.run.training_loss) for each in (again, whole))
        assert [step["forwards"] for step in taken] == [step["forwards"] for step in expected]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        (["adapter.kind=xgblora"], True),
        (["zo.train=both"], False),
        (["zo.train=both", "zo.warm_start_steps=5"], True),
        (["adapter.init=kaiming"], False),
        (["adapter.init=kaiming", "zo.warm_start_steps=5"], True),
        (["zo.objective=accuracy"], False),
        (["zo.space=update", "learning_rate=1e-6"], False),
        (["model.quantization=int8"], False),
        (["adapter.kind=xgblora", "boosting.orthogonal=true"], False),
        (["adapter.kind=full"], False),
        (["zo.warm_start_steps=0"], False),
    ],
)
def test_who_begins_so(words: list[str], expected: bool) -> None:
    cfg = config.read(TrainConfig, ["model=demo", "task=sst2", "trainer=zo", *words])
    assert cfg.warm_starts() == cfg.resolved().warm_starts() == expected
    assert not config.read(TrainConfig, ["model=demo", "task=sst2"]).warm_starts()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [8, 1]),
        (["zo.warm_start_steps=0"], None),
        (["adapter.rank=1"], None),
        (["adapter.rank=8"], None),
        (["boosting.ranks=[2, 1]"], [2, 1]),
        (["zo.train=both"], None),
    ],
)
def test_what_boosting_begins_with_is_as_large_as_a_lora(words: list[str], expected: list[int] | None) -> None:
    cfg = config.read(TrainConfig, ["model=demo", "task=sst2", "trainer=zo", "adapter.kind=xgblora", *words]).resolved()
    assert cfg.boosting.ranks == expected
    assert config.check(TrainConfig, cfg.model_dump(mode="json")).resolved() == cfg


def test_it_costs_at_most_a_tenth_of_the_steps_passes() -> None:
    def count(steps: int, *words: str) -> int:
        words = ("model=demo", "task=sst2", "trainer=zo", f"max_steps={steps}", *words)
        return warm_start.num_batches(config.read(TrainConfig, words).resolved(), steps)

    assert [count(steps) for steps in (0, 1, 9, 10, 100, 10_000)] == [0, 0, 0, 4, 40, 200]
    assert count(10, "gradient_accumulation_steps=2") == 8
    assert count(100, "zo.estimator=spsa", "zo.num_directions=1") == 10
    assert count(1, "zo.warm_start_steps=7") == 7
    assert count(1000, "adapter.init=kaiming") == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["max_steps=100"], 13),
        ([], 125),
        (["max_steps=100", "zo.warm_start_steps=0"], None),
        (["max_steps=100", "boosting.merge_frequency=2"], None),
        (["max_steps=100", "boosting.use_adaptive_merge=true"], None),
        (["max_steps=100", "boosting.steps_per_iteration=7"], 7),
        (["num_epochs=3"], None),
        (["max_seconds=60"], None),
    ],
)
def test_a_boosted_run_has_eight_rounds_unless_a_rule_is_given(words: list[str], expected: int | None) -> None:
    cfg = config.read(TrainConfig, ["model=demo", "task=sst2", "trainer=zo", "adapter.kind=xgblora", *words]).resolved()
    assert cfg.boosting.steps_per_iteration == expected
    again = config.check(TrainConfig, cfg.model_dump(mode="json")).resolved()
    assert again == cfg


def test_an_adapter_without_factors_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"zo\.warm_start_steps=3 fits low-rank factors, and adapter\.kind=full has none"
    ):
        config.read(TrainConfig, ["trainer=zo", "adapter.kind=full", "zo.warm_start_steps=3"])


def learning_of(*words: str) -> Any:
    cfg = config.read(TrainConfig, ["model=demo", "trainer=zo", *SMALL, *words]).resolved()
    ready = prepare(cfg.model, cfg.task, "cpu", cfg.seed)
    return Learning(cfg, ready, encode_splits(cfg, ready), Console(file=io.StringIO()))
