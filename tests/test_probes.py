"""Candidates as branches of one pass: their losses are those of passes, and of models, of their own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from lorica import models
from lorica.adapters import branches, injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.branches import blocks_of, can_branch, can_share, unchanged_once
from lorica.adapters.delta import LowRank
from lorica.adapters.injection import Live
from lorica.errors import ConfigError
from lorica.models import Base
from lorica.optim import probes
from lorica.optim.probes import Probing
from lorica.optim.slopes import Flat
from lorica.tasks import batching
from lorica.tasks.batching import Batch, ChoiceBatch, HeadBatch, mapped
from lorica.tasks.objectives import LossModule, RepeatAt, TrainAs, decisive_scores, scores

Load = Callable[..., Base]
NUM_ROWS, NUM_POINTS = 4, 5
CASES = [
    *[(family, None) for family in (*tiny.FAMILIES, "bart")],
    *[(family, "classification") for family in ("opt", "llama")],
]
# The others' decoder meets the encoder's rows, or they pick a token of each row that went in, behind their blocks.
LATE = [case for case in CASES if case[1] is None and case[0] not in ("t5", "bart")]


@pytest.fixture(autouse=True)
def much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's parameters are few beside a batch's hidden states."""
    monkeypatch.setattr(branches, "KEPT_SHARE", 0.5)


@dataclass(frozen=True)
class Setup:
    live: Live
    batch: Batch
    objective: LossModule

    @property
    def model(self) -> Any:
        return self.live.model

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self.live.trainable()

    @property
    def theta(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.trainable.values()])

    def offsets(self, num: int = NUM_POINTS, spread: float = 0.1) -> Tensor:
        return torch.randn(num, len(self.theta), generator=torch.Generator().manual_seed(3)) * spread

    def losses(self, probing: Probing, offsets: Tensor | None = None) -> Tensor:
        offsets = self.offsets() if offsets is None else offsets
        return probing.losses(self.objective, self.trainable, [self.batch], offsets)


def setup(
    base: Base,
    *,
    num_rows: int = NUM_ROWS,
    num_tokens: int = 1,
    train_as: TrainAs = "classification",
    targets: Any = "standard",
) -> Setup:
    paths = models.target_modules(base, targets)
    live = injection.inject(base.model, tiny.adapter(base.model, paths, heads=base.heads))
    live.set_training(False)
    batch = mapped(batch_of(base, num_tokens, train_as), lambda tensor: tensor[:num_rows])
    return Setup(live, batch, LossModule(base.model, train_as))


def batch_of(base: Base, num_tokens: int = 1, train_as: TrainAs = "classification") -> Batch:
    """Rows of which the second begins or ends with padding, for a head or with two options of `num_tokens` tokens."""
    inputs = tiny.inputs(base.model, rows=NUM_ROWS)
    inputs["attention_mask"][1, slice(0, 2) if base.kind == "causal" else slice(-2, None)] = 0
    labels = torch.tensor([0, 1, 1, 0])
    if base.kind == "classification":
        return HeadBatch(inputs, labels)
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :num_tokens]
    generator = torch.Generator().manual_seed(9)
    if num_tokens == 1:
        targets = torch.stack([torch.randperm(20, generator=generator)[:2] + 4 for _ in labels])
        return ChoiceBatch(inputs, targets, labels, 2, one_token=True)
    targets = torch.randint(4, 20, (NUM_ROWS, num_tokens), generator=generator)
    if train_as == "lm":
        return ChoiceBatch(inputs, targets, labels, 1, one_token=False)
    return ChoiceBatch(inputs, targets, labels[: NUM_ROWS // 2], 2, one_token=False)


def at(setup: Setup, offset: Tensor) -> Adapter:
    """The adapter at θ + offset."""
    points = iter((setup.theta + offset).split([parameter.numel() for parameter in setup.trainable.values()]))
    values = {name: part.view(p.shape) for (name, p), part in zip(setup.trainable.items(), points, strict=True)}
    updates = {
        path: LowRank(values[f"{path}.A"], values[f"{path}.B"], layer.scale)
        for path, layer in setup.live.layers.items()
    }
    heads = {
        path: {name: values[f"{path}.{name}"] for name in head.state_dict()} for path, head in setup.live.heads.items()
    }
    return Adapter(updates, heads)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_each_branch_has_the_loss_of_a_model_with_its_weights_fused(load: Load, family: str, kind: str | None) -> None:
    ready = setup(load(family, kind))
    found = ready.losses(Probing(max_branches=3))
    for loss, offset in zip(found, ready.offsets(), strict=True):
        apart = load(family, kind).model
        injection.fuse_whole(apart, at(ready, offset))
        assert float(loss) == pytest.approx(plain_loss(apart, ready.batch), rel=1e-5, abs=1e-5)
    assert float(found.std()) > 1e-3, "the points are too close to tell branches apart"


@torch.no_grad()
def plain_loss(model: Any, batch: Batch) -> float:
    """Cross-entropy over the classes or one-token options, by the model's own logits of everything."""
    logits = model(**batch.inputs).logits.double()
    if isinstance(batch, ChoiceBatch):
        logits = logits[:, -1].log_softmax(-1).gather(1, batch.targets)
    return float(F.cross_entropy(logits, batch.labels))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_where_rows_are_repeated_changes_nothing(load: Load, family: str, kind: str | None) -> None:
    ready, probing = setup(load(family, kind)), Probing(max_branches=NUM_POINTS)
    expected = ready.losses(Probing(max_branches=1))
    torch.testing.assert_close(ready.losses(probing), expected, rtol=1e-5, atol=1e-5)
    assert probing.repeat_at == ("blocks" if (family, kind) in LATE else "inputs")
    at_inputs = ready.losses(Probing(max_branches=NUM_POINTS, repeat_at="inputs"))
    torch.testing.assert_close(at_inputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "bert"])
def test_a_batch_of_one_row_takes_branches(load: Load, family: str) -> None:
    ready, probing = setup(load(family), num_rows=1), Probing(max_branches=NUM_POINTS)
    found = ready.losses(probing)
    assert probing.repeat_at == "blocks"
    torch.testing.assert_close(found, ready.losses(Probing(max_branches=1)), rtol=1e-5, atol=1e-5)


def test_a_head_alone_takes_branches(load: Load) -> None:
    ready = setup(load("roberta"))
    for layer in ready.live.layers.values():
        layer.requires_grad_(False)
    probing = Probing(max_branches=NUM_POINTS)
    found = ready.losses(probing)
    assert probing.repeat_at == "inputs"
    torch.testing.assert_close(found, ready.losses(Probing(max_branches=1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train_as", ["classification", "lm"])
@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
def test_answers_of_several_tokens_take_branches(load: Load, family: str, train_as: TrainAs) -> None:
    ready = setup(load(family), num_tokens=3, train_as=train_as)
    found = ready.losses(Probing(max_branches=2))
    torch.testing.assert_close(found, ready.losses(Probing(max_branches=1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_branches", [2, 3])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_options_that_go_on_from_one_prompt_take_branches(load: Load, family: str, num_branches: int) -> None:
    ready = with_continuations(setup(load(family)), num_branches)
    probing = Probing(max_branches=num_branches)
    found = ready.losses(probing)
    assert probing.repeat_at == "blocks"
    torch.testing.assert_close(found, ready.losses(Probing(max_branches=1)), rtol=1e-5, atol=1e-5)


def with_continuations(ready: Setup, num_options: int) -> Setup:
    """Three prompts, and options of several tokens that go on from what the model keeps of them."""
    inputs = {name: rows[:3] for name, rows in ready.batch.inputs.items()}
    targets = torch.tensor([[5, 6, 7], [8, -100, -100], [6, 9, -100]]).repeat(3, 1)[: 3 * num_options]
    inputs |= {"continuation_ids": targets[:, :-1].clamp(min=1), "continuation_mask": (targets[:, :-1] != -100).long()}
    return replace(ready, batch=ChoiceBatch(inputs, targets, torch.tensor([0, 1, 1]), num_options, one_token=False))


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_a_metric_is_taken_of_each_branch(load: Load, metric: Any) -> None:
    ready = setup(load("bert"))
    ready.objective.metric = metric
    offsets = ready.offsets(spread=0.5)
    found = ready.losses(Probing(max_branches=3, repeat_at="blocks"), offsets)
    assert torch.equal(found, ready.losses(Probing(max_branches=1), offsets))
    assert len(set(found.tolist())) > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["opt", "bert"])
def test_branches_over_a_base_of_half_precision(load: Load, family: str, dtype: str) -> None:
    ready = setup(load(family, dtype=dtype))
    found = ready.losses(Probing(max_branches=NUM_POINTS, repeat_at="blocks"))
    torch.testing.assert_close(found, ready.losses(Probing(max_branches=1)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_one_factor_alone_may_be_stacked(load: Load, frozen: str) -> None:
    ready = setup(load("opt"))
    for layer in ready.live.layers.values():
        layer.get_parameter(frozen).requires_grad_(False)
    assert all(not name.endswith(frozen) for name in ready.trainable)
    found = ready.losses(Probing(max_branches=NUM_POINTS))
    torch.testing.assert_close(found, ready.losses(Probing(max_branches=1)), rtol=1e-5, atol=1e-5)


def test_what_lies_below_the_first_adapted_block_runs_once(load: Load) -> None:
    ready = setup(load("llama"), targets=r"model\.layers\.1\.self_attn\.[qv]_proj")
    rows: dict[str, int] = {}
    for path in ("model.embed_tokens", "model.layers.0.mlp", "model.layers.1.mlp", "model.norm"):
        ready.model.get_submodule(path).register_forward_hook(
            lambda _, __, out, path=path: rows.update({path: len(out)})
        )
    ready.losses(Probing(max_branches=NUM_POINTS, repeat_at="blocks"))
    whole = NUM_POINTS * NUM_ROWS
    expected = [NUM_ROWS, NUM_ROWS, whole, whole]
    assert list(rows.values()) == expected


def test_a_decoder_with_adapters_shares_its_encoder(load: Load) -> None:
    ready = setup(load("t5"), targets=r"decoder\.block\.1\..*\.q")
    encoder: list[int] = []
    ready.model.encoder.register_forward_hook(lambda _, __, out: encoder.append(len(out[0])))
    probing = Probing(max_branches=2)
    found = ready.losses(probing)
    assert probing.repeat_at == "blocks"
    assert set(encoder) == {NUM_ROWS}
    torch.testing.assert_close(found, ready.losses(Probing(max_branches=1)), rtol=1e-5, atol=1e-5)


LAST_BLOCK = {
    "opt": r"layers\.1\.",
    "llama": r"layers\.1\.",
    "gpt2": r"h\.1\.",
    "bert": r"layer\.1\.",
    "t5": r"decoder\.block\.1\.",
}


def counted(ready: Setup, names: Sequence[str]) -> Counter[str]:
    """How often the modules of these names run, from here on."""
    runs: Counter[str] = Counter()
    for name in names:
        module, forward = ready.model.get_submodule(name), ready.model.get_submodule(name).forward

        def run(*given: Any, name: str = name, forward: Any = forward, **options: Any) -> Any:
            runs[name] += 1
            return forward(*given, **options)

        module.forward = run
    return runs


def blocks(ready: Setup) -> list[str]:
    return [name for name, module in ready.model.named_modules() if module in blocks_of(ready.model)]


@pytest.mark.parametrize("num_branches", [1, 2])
@pytest.mark.parametrize("family", list(LAST_BLOCK))
def test_what_lies_below_runs_once_however_many_passes_there_are(load: Load, family: str, num_branches: int) -> None:
    ready = setup(load(family), targets=rf".*{LAST_BLOCK[family]}.*(q|v|query|value|q_proj|v_proj|c_attn)")
    probing, offsets = Probing(num_branches, repeat_at="blocks"), ready.offsets()
    apart = [ready.losses(probing, each) for each in offsets.split(num_branches)]
    runs = counted(ready, blocks(ready))
    assert torch.equal(ready.losses(probing, offsets), torch.cat(apart)), "not the same bits"
    num_passes = -(-NUM_POINTS // num_branches)
    assert list(runs.values()) == [*[1] * (len(runs) - 1), num_passes]
    assert all("forward" in vars(ready.model.get_submodule(name)) for name in runs), "what ran a block before is gone"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
def test_slopes_along_directions_share_what_lies_below(load: Load) -> None:
    ready = setup(load("llama"), targets=r".*layers\.1\..*q_proj")
    flat = Flat(ready.objective, ready.trainable, [ready.batch], Probing(), ready.offsets())
    expected = [replace(flat, moves=move).along()[0] for move in flat.moves.split(1)]
    runs = counted(ready, blocks(ready))
    assert flat.along() == expected
    assert list(runs.values()) == [1, NUM_POINTS]


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_cache_is_filled_by_every_pass(load: Load, family: str) -> None:
    ready = setup(load(family), targets=rf".*{LAST_BLOCK[family]}.*[qv]_proj")
    with torch.no_grad(), unchanged_once(ready.model, list(ready.trainable)):
        found = [ready.model(**ready.batch.inputs, use_cache=True).past_key_values for _ in range(2)]
    assert torch.equal(found[0].layers[0].keys, found[1].layers[0].keys)
    ready = with_continuations(ready, 2)
    apart = [ready.losses(Probing(1), each) for each in ready.offsets().split(1)]
    assert torch.equal(ready.losses(Probing(1)), torch.cat(apart))


def test_what_is_kept_of_the_blocks_below_has_a_limit(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = setup(load("llama"), targets=r".*layers\.1\..*q_proj")
    expected = ready.losses(Probing(1))
    size = tiny.WIDTH * ready.batch.inputs["input_ids"].numel() * 4  # bytes of hidden states: into a block, out of it
    total = sum(parameter.nbytes for parameter in ready.model.parameters())
    for share, times in ((2.1 * size / total, 1), (1.9 * size / total, NUM_POINTS)):
        monkeypatch.setattr(branches, "KEPT_SHARE", share)
        runs = counted(ready, blocks(ready))
        assert torch.equal(ready.losses(Probing(1)), expected)
        assert list(runs.values()) == [times, NUM_POINTS]


def test_what_was_kept_and_written_since_is_made_anew(load: Load) -> None:
    """A block that adds to its hidden states in place writes into what the block below it gave."""
    ready = setup(load("llama"), targets=r".*layers\.1\..*q_proj")
    last = ready.model.model.layers[1]
    forward = last.forward
    last.forward = lambda hidden, *given, **options: forward(hidden.add_(1.0), *given, **options)
    apart = [ready.losses(Probing(1), each) for each in ready.offsets().split(1)]
    assert torch.equal(ready.losses(Probing(1)), torch.cat(apart))


@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
def test_the_output_embedding_is_asked_for_the_options_alone(load: Load, family: str) -> None:
    ready = setup(load(family))
    assert isinstance(ready.batch, ChoiceBatch)
    shapes: list[Sequence[int]] = []
    ready.model.get_output_embeddings().register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    found = decisive_scores(ready.model, ready.batch)
    assert shapes == [(NUM_ROWS, 1, 2)]
    torch.testing.assert_close(found.log_softmax(1), scores(ready.model, ready.batch).log_softmax(1))
    assert shapes[1][-1] == ready.model.config.vocab_size


def test_logits_that_are_added_to_are_taken_whole(load: Load) -> None:
    ready = setup(load("bart"))
    ready.model.final_logits_bias.copy_(torch.linspace(-1, 1, ready.model.config.vocab_size))
    found = decisive_scores(ready.model, ready.batch)
    assert torch.equal(found, scores(ready.model, ready.batch))


def test_parameters_that_take_no_branches_are_run_one_by_one(load: Load) -> None:
    ready = setup(load("opt"))
    ready.model.requires_grad_(True)
    assert not can_branch(ready.model, list(ready.trainable))
    probing, offsets = Probing(timed=True), ready.offsets(2, spread=1e-3)
    assert torch.equal(ready.losses(probing, offsets), ready.losses(Probing(max_branches=1), offsets))
    assert probing.repeat_at == "never"
    with pytest.raises(ConfigError, match=r"zo.branches=2: .* zo.branches=1 or auto"):
        ready.losses(Probing(max_branches=2), offsets)


class Mixing(nn.Module):
    """A base layer that centres its rows: what a branch gives then depends on the branches beside it."""

    in_features = out_features = tiny.WIDTH

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y - y.mean(dim=0)


def test_branches_that_meet_are_found_out(load: Load) -> None:
    ready = setup(load("bert"))
    for layer in ready.live.layers.values():
        layer.base = Mixing(layer.base)
    probing = Probing(timed=True)
    found = ready.losses(probing)
    assert probing.repeat_at == "never"
    assert torch.equal(found, ready.losses(Probing(max_branches=1)))


def test_live_layers_outside_the_blocks_forbid_to_share_what_comes_before(load: Load) -> None:
    ready = setup(load("bert"), targets=["query", "pooler.dense"])
    assert not can_share(ready.model, list(ready.trainable))
    probing = Probing(max_branches=2)
    found = ready.losses(probing)
    assert probing.repeat_at == "inputs"
    torch.testing.assert_close(found, ready.losses(Probing(max_branches=1)), rtol=1e-5, atol=1e-5)


def test_the_fastest_is_chosen_once_for_each_kind_of_batch(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, timed = setup(load("opt")), []
    seconds = {1: 8.0, 2: 5.0, 3: 6.0, 4: 4.9, 5: 1.0}  # 4 is not worth it, and so 5 is not looked at

    def took(of: Any, points: Tensor, num_branches: int, repeat_at: str) -> float:
        timed.append(num_branches)
        return seconds[num_branches]

    monkeypatch.setattr(probes, "_seconds", took)
    probing = Probing(timed=True)
    first, second = ready.losses(probing), ready.losses(probing)
    assert sorted(set(timed)) == [1, 2, 4]
    assert len(timed) == 3 * probes.NUM_TIMINGS
    assert probing.chosen == {"5 candidates, up to 31 tokens": 2}
    assert torch.equal(first, second)
    assert torch.equal(first, ready.losses(Probing(max_branches=2)))
    ready.losses(probing, ready.offsets(3))
    assert len(probing.chosen) == 2


def test_a_pass_takes_no_more_tokens_than_the_cap(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, probing = setup(load("opt")), Probing(timed=True)
    monkeypatch.setattr(probes, "_seconds", lambda of, points, num_branches, repeat_at: 1 / num_branches)
    monkeypatch.setattr(batching, "MAX_TOKENS", {"cpu": 2 * 28})
    ready.losses(probing)
    assert list(probing.chosen.values()) == [2]


@pytest.mark.parametrize("timed", [False, True])
def test_what_memory_does_not_suffice_for_is_taken_in_halves(
    load: Load, monkeypatch: pytest.MonkeyPatch, timed: bool
) -> None:
    ready, probing, asked, room = setup(load("opt")), Probing(timed=timed, repeat_at="blocks"), list[int](), 2
    monkeypatch.setattr(probes, "_fastest", lambda of, points, most, repeat_at: most)
    original = LossModule.losses_at

    def losses_at(self: LossModule, parameters: Any, batch: Batch, **options: Any) -> Tensor:
        asked.append(len(next(iter(parameters.values()))))
        if asked[-1] > room:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, parameters, batch, **options)

    monkeypatch.setattr(LossModule, "losses_at", losses_at)
    found = [ready.losses(probing), ready.losses(probing)]
    assert asked == [NUM_POINTS, 2, 2, 2, 2], "the second time it is known"
    assert probing.state()["chosen"] == {"5 candidates, up to 31 tokens": 2}
    assert all(torch.equal(each, ready.losses(Probing(2, repeat_at="blocks"))) for each in found)
    with pytest.raises(torch.OutOfMemoryError):
        ready.losses(Probing(4, repeat_at="blocks"))  # as many as were asked for, or none
    room = 0
    assert torch.isfinite(ready.losses(probing)).all()
    assert probing.chosen == {"5 candidates, up to 31 tokens": 1}


def test_a_restored_state_is_not_measured_again(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, probing = setup(load("bert")), Probing(timed=True)
    expected = ready.losses(probing)
    resumed = Probing(timed=True)
    resumed.restore(probing.state())
    monkeypatch.setattr(probes, "_seconds", lambda *_: pytest.fail("timed again"))
    assert torch.equal(ready.losses(resumed), expected)


@pytest.mark.parametrize("repeat_at", ["inputs", "blocks"])
def test_nothing_is_left_on_the_model(load: Load, repeat_at: RepeatAt) -> None:
    ready = setup(load("bert"))
    before = {name: (value, value.clone()) for name, value in ready.model.named_parameters()}
    ready.losses(Probing(max_branches=2, repeat_at=repeat_at))
    broken = Setup(ready.live, HeadBatch({"no_such_input": torch.ones(1)}, torch.zeros(1)), ready.objective)
    with pytest.raises(ValueError, match="input_ids"):
        broken.losses(Probing(max_branches=2, repeat_at=repeat_at))
    for name, value in ready.model.named_parameters():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1]), name
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in ready.model.modules())


def test_accumulated_batches_are_averaged_in_double_precision(load: Load) -> None:
    ready = setup(load("opt"))
    once = ready.losses(Probing(max_branches=2))
    assert once.dtype == torch.float64
    thrice = Probing(max_branches=2).losses(ready.objective, ready.trainable, [ready.batch] * 3, ready.offsets())
    assert thrice.tolist() == pytest.approx(once.tolist(), rel=1e-14)
    assert all(map(math.isfinite, once.tolist()))
