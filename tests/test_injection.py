"""An adapter on a live model, in every family: what is adapted, what that does, and that removal leaves no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tiny
from lorica import models
from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.adapters.lora import LoraLinear
from lorica.errors import AdapterFormatError, LoricaError, ModelError, ShapeError, TargetError
from lorica.models import Base

Load = Callable[..., Base]

T5_ATTENTION = (
    *(f"encoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)),
    *(f"decoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)),
    *(f"decoder.block.{i}.layer.1.EncDecAttention" for i in (0, 1)),
)
T5_DENSE = (
    *(f"encoder.block.{i}.layer.1.DenseReluDense" for i in (0, 1)),
    *(f"decoder.block.{i}.layer.2.DenseReluDense" for i in (0, 1)),
)


def named(roots: tuple[str, ...], names: str) -> set[str]:
    return {f"{root}.{name}" for root in roots for name in names.split()}


def in_layers(pattern: str, names: str) -> set[str]:
    """`pattern` for layers 0 and 1, with each of the names behind it."""
    return named((pattern.format(0), pattern.format(1)), names)


LLAMA_LAYER = "model.layers.{}"
LLAMA = {
    "standard": in_layers(LLAMA_LAYER, "self_attn.q_proj self_attn.v_proj"),
    "extended": in_layers(LLAMA_LAYER, "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"),
    "all-linear": in_layers(
        LLAMA_LAYER,
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
    ),
}


def encoder(family: str) -> dict[str, set[str]]:
    layer = family + ".encoder.layer.{}"
    attention = "attention.self.query attention.self.key attention.self.value attention.output.dense"
    pooler = {"bert.pooler.dense"} if family == "bert" else set()
    return {
        "standard": in_layers(layer, "attention.self.query attention.self.value"),
        "extended": in_layers(layer, attention),
        "all-linear": in_layers(layer, attention + " intermediate.dense output.dense") | pooler,
    }


PRESETS = {
    "opt": {
        "standard": in_layers("model.decoder.layers.{}.self_attn", "q_proj v_proj"),
        "extended": in_layers("model.decoder.layers.{}.self_attn", "q_proj k_proj v_proj out_proj"),
        "all-linear": in_layers("model.decoder.layers.{}.self_attn", "q_proj k_proj v_proj out_proj")
        | in_layers("model.decoder.layers.{}", "fc1 fc2"),
    },
    "llama": LLAMA,
    "qwen2": LLAMA,
    "gpt2": {
        "standard": in_layers("transformer.h.{}", "attn.c_attn"),
        "extended": in_layers("transformer.h.{}", "attn.c_attn attn.c_proj"),
        "all-linear": in_layers("transformer.h.{}", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    },
    "bert": encoder("bert"),
    "roberta": encoder("roberta"),
    "t5": {
        "standard": named(T5_ATTENTION, "q v"),
        "extended": named(T5_ATTENTION, "q k v o"),
        "all-linear": named(T5_ATTENTION, "q k v o") | named(T5_DENSE, "wi wo"),
    },
}

families = pytest.mark.parametrize("family", tiny.FAMILIES)
presets = pytest.mark.parametrize("preset", ["standard", "extended", "all-linear"])
half = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@pytest.fixture
def opt(load: Load) -> Base:
    return load("opt")


def everywhere(base: Base, *, seed: int = 1, heads: bool = True) -> Adapter:
    """A random adapter of every linear module, and of the heads where the model has one."""
    return tiny.adapter(
        base.model, models.target_modules(base, "all-linear"), seed=seed, heads=base.heads if heads else ()
    )


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every parameter's and buffer's very bytes, by name."""
    return {name: value.contiguous().view(torch.uint8).numpy().tobytes() for name, value in model.state_dict().items()}


@families
@presets
def test_presets_pick_the_expected_modules(load: Load, family: str, preset: str) -> None:
    targets = models.target_modules(load(family), preset)
    assert set(targets) == PRESETS[family][preset]
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "qwen2"])
@presets
def test_a_decoders_classification_head_is_never_a_target(load: Load, family: str, preset: str) -> None:
    base = load(family, "classification")
    assert base.heads == ("score",)
    assert set(models.target_modules(base, preset)) == PRESETS[family][preset]


@families
def test_output_embedding_and_heads_are_never_targets(load: Load, family: str) -> None:
    base = load(family)
    forbidden = {"classification": "classifier"}.get(base.kind, "lm_head")
    assert base.untouched == (forbidden,)
    for entry in (forbidden, f".*{forbidden}.*"):
        with pytest.raises(TargetError, match=forbidden):
            models.target_modules(base, entry)
    assert not [path for path in models.target_modules(base, ".*") if path.startswith(forbidden)]


@families
@presets
def test_a_new_adapter_changes_nothing(load: Load, family: str, preset: str) -> None:
    base = load(family)
    before = tiny.logits(base.model)
    adapter = injection.create(
        base.model, models.target_modules(base, preset), rank=2, alpha=4, heads=base.heads, base_model=base.name
    )
    injection.inject(base.model, adapter)
    assert torch.equal(tiny.logits(base.model), before)


@families
def test_live_and_fused_give_the_same_logits(load: Load, family: str) -> None:
    base = load(family)
    adapter = everywhere(base, heads=False)
    before = tiny.logits(base.model)
    live = injection.inject(base.model, adapter)
    beside = tiny.logits(base.model)
    injection.remove(live)
    injection.fuse(base.model, adapter)
    assert tiny.relative(beside, before) > 1e-2, "the adapter does nothing, so the comparison says nothing"
    assert tiny.relative(tiny.logits(base.model), beside) < 1e-5


@families
@half
def test_a_fused_weight_is_one_rounding_of_the_exact_sum(load: Load, family: str, dtype: str) -> None:
    base = load(family, dtype=dtype)
    adapter = everywhere(base, heads=False)
    pristine = injection.fuse(base.model, adapter)
    for path, update in adapter.updates.items():
        dense = update.dense().T if family == "gpt2" else update.dense()
        weight = base.model.get_submodule(path).weight
        assert torch.equal(weight, (pristine[path].float() + dense).to(weight.dtype)), path


@families
@half
def test_a_live_adapter_runs_on_a_half_precision_base(load: Load, family: str, dtype: str) -> None:
    base, single = load(family, dtype=dtype), load(family)
    adapter = everywhere(base)
    injection.inject(base.model, adapter)
    injection.inject(single.model, adapter)
    assert tiny.relative(tiny.logits(base.model), tiny.logits(single.model)) < 0.1


@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_unfuse_is_bit_identical(load: Load, family: str, dtype: str) -> None:
    base = load(family, dtype=dtype)
    before = bits(base.model)
    pristine = injection.fuse(base.model, everywhere(base, heads=False))
    assert bits(base.model) != before
    injection.unfuse(base.model, pristine)
    assert bits(base.model) == before


@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remove_restores_the_model(load: Load, family: str, dtype: str) -> None:
    base = load(family, dtype=dtype)
    next(base.model.parameters()).requires_grad_(False)
    modules = dict(base.model.named_modules())
    flags = {name: parameter.requires_grad for name, parameter in base.model.named_parameters()}
    before, answers = bits(base.model), tiny.logits(base.model)
    live = injection.inject(base.model, everywhere(base))
    for parameter in live.trainable().values():
        parameter.data.add_(1.0)
    injection.remove(live)
    assert {name: id(module) for name, module in base.model.named_modules()} == {
        name: id(module) for name, module in modules.items()
    }
    assert {name: parameter.requires_grad for name, parameter in base.model.named_parameters()} == flags
    assert bits(base.model) == before
    assert torch.equal(tiny.logits(base.model), answers)


@families
def test_extract_gives_back_what_was_injected(load: Load, family: str) -> None:
    base = load(family)
    adapter = everywhere(base)
    found = injection.extract(injection.inject(base.model, adapter))
    assert list(found.updates) == list(adapter.updates)
    for path, update in adapter.updates.items():
        assert torch.equal(found.updates[path].A, update.A)
        assert torch.equal(found.updates[path].B, update.B)
        assert found.updates[path].scale == update.scale
    assert found.heads.keys() == adapter.heads.keys()
    for path, head in adapter.heads.items():
        assert all(torch.equal(found.heads[path][name], value) for name, value in head.items())


def test_extract_is_a_copy(opt: Base) -> None:
    live = injection.inject(opt.model, everywhere(opt))
    found = injection.extract(live)
    before = next(iter(found.updates.values())).A.clone()
    next(iter(live.layers.values())).A.data.zero_()
    assert torch.equal(next(iter(found.updates.values())).A, before)


@families
def test_only_the_adapter_is_trainable_and_in_float32(load: Load, family: str) -> None:
    base = load(family, dtype="bfloat16")
    live = injection.inject(base.model, everywhere(base))
    trainable = live.trainable()
    factors = {f"{path}.{letter}" for path in live.layers for letter in "AB"}
    heads = {f"{path}.{name}" for path, head in live.heads.items() for name, _ in head.named_parameters()}
    assert set(trainable) == factors | heads
    assert {parameter.dtype for parameter in trainable.values()} == {torch.float32}


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_a_head_on_a_half_precision_base_is_float32(load: Load, family: str) -> None:
    base = load(family, "classification", dtype="bfloat16")
    adapter = everywhere(base)
    live = injection.inject(base.model, adapter)
    logits = base.model(**tiny.inputs(base.model)).logits
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in live.trainable().values())


def test_a_head_answers_with_the_adapters_values(load: Load) -> None:
    base = load("bert")
    adapter = Adapter({}, {"classifier": {"weight": torch.zeros(3, tiny.WIDTH), "bias": torch.tensor([1.0, 2.0, 3.0])}})
    injection.inject(base.model, adapter)
    assert torch.equal(tiny.logits(base.model), torch.tensor([[1.0, 2.0, 3.0]] * 3))


class Int8Linear(nn.Module):
    """A quantised linear module as libraries write them: int8 weight and scale, no float matrix anywhere."""

    def __init__(self, linear: nn.Linear, as_buffers: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127  # (out, 1)
        weight = (linear.weight.detach() / scale).round().to(torch.int8)  # (out, in)
        for name, value in {"weight": weight, "scale": scale, "bias": linear.bias.detach()}.items():
            if as_buffers:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("as_buffers", [False, True], ids=["parameters", "buffers"])
def test_a_quantised_module_is_adapted_live_and_not_fused(opt: Base, as_buffers: bool) -> None:
    for path in models.target_modules(opt, "standard"):
        parent, _, name = path.rpartition(".")
        module = opt.model.get_submodule(parent)
        setattr(module, name, Int8Linear(module.get_submodule(name), as_buffers))
    targets = models.target_modules(opt, "standard")
    assert set(targets) == PRESETS["opt"]["standard"]
    before, state = tiny.logits(opt.model), bits(opt.model)
    adapter = tiny.adapter(opt.model, targets)
    with pytest.raises(ModelError, match="not a float matrix"):
        injection.fuse(opt.model, adapter)
    live = injection.inject(opt.model, adapter)
    assert tiny.relative(tiny.logits(opt.model), before) > 1e-2
    opt.model(**tiny.inputs(opt.model)).logits.sum().backward()
    injection.remove(live)
    assert bits(opt.model) == state
    assert torch.equal(tiny.logits(opt.model), before)


@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_branches_of_one_forward_are_each_their_own_adapter(load: Load, family: str, dtype: str) -> None:
    base = load(family, dtype=dtype)
    given = tiny.inputs(base.model, rows=2)
    branches = [everywhere(base, seed=seed, heads=False) for seed in (1, 2, 3)]
    alone = [_logits_with(base, branch, given) for branch in branches]
    live = injection.inject(base.model, branches[0])
    factors = {
        f"{path}.{letter}": torch.stack([getattr(branch.updates[path], letter) for branch in branches])  # (G, ...)
        for path in live.layers
        for letter in "AB"
    }
    stacked = {name: value.repeat(len(branches), 1) for name, value in given.items()}  # G branches' rows in turn
    with torch.no_grad():
        together = torch.func.functional_call(base.model, factors, (), stacked).logits.float()
    assert tiny.relative(alone[0], alone[1]) > 1e-2
    for found, expected in zip(together.chunk(len(branches)), alone, strict=True):
        assert tiny.relative(found, expected) < (1e-5 if dtype == "float32" else 0.05)


def _logits_with(base: Base, adapter: Adapter, given: dict[str, Tensor]) -> Tensor:
    live = injection.inject(base.model, adapter)
    found = tiny.logits(base.model, given)
    injection.remove(live)
    return found


def test_branches_must_share_out_the_rows() -> None:
    layer = LoraLinear(nn.Linear(4, 4), LowRank(torch.ones(1, 4), torch.ones(4, 1)))
    factors = {"A": torch.ones(2, 1, 4), "B": torch.ones(2, 4, 1)}
    with pytest.raises(ShapeError, match="3 rows cannot be shared out to 2 branches"):
        torch.func.functional_call(layer, factors, (torch.ones(3, 4),))


def test_dropout_draws_from_its_own_generator_alone(opt: Base) -> None:
    live = injection.inject(opt.model, everywhere(opt), dropout=0.5)
    live.set_training(True)
    draws = []
    state = torch.get_rng_state()
    for seed in (7, 7, 8):
        live.set_dropout_generator(torch.Generator().manual_seed(seed))
        draws.append(tiny.logits(opt.model))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_dropout_is_inverted_and_off_outside_training() -> None:
    layer = LoraLinear(nn.Linear(400, 2), LowRank(torch.eye(400), torch.ones(2, 400)), dropout=0.25)
    layer.dropout.generator = torch.Generator().manual_seed(0)
    x = torch.ones(50, 400)
    dropped = layer.train().dropout(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(layer.eval().dropout(x), x)


def test_a_live_adapter_takes_on_the_models_mode(opt: Base) -> None:
    assert not opt.model.training
    state = torch.get_rng_state()
    live = injection.inject(opt.model, everywhere(opt), dropout=0.5)
    assert torch.equal(tiny.logits(opt.model), tiny.logits(opt.model))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer.training for layer in live.layers.values())


def test_inject_leaves_the_global_generator_alone(opt: Base) -> None:
    state = torch.get_rng_state()
    adapter = injection.create(opt.model, models.target_modules(opt, "all-linear"), rank=2, alpha=2, seed=3)
    injection.remove(injection.inject(opt.model, adapter))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_a_new_adapter_is_a_function_of_seed_round_and_path(opt: Base, init: str) -> None:
    targets = models.target_modules(opt, "standard")

    def drawn(**key: int) -> dict[str, Tensor]:
        made = injection.create(opt.model, targets, rank=4, alpha=8, init=init, init_std=0.1, **key)  # type: ignore[arg-type]
        assert all(not update.B.any() and update.scale == 2.0 for update in made.updates.values())
        return {path: update.A for path, update in made.updates.items()}

    first, same = drawn(seed=1), drawn(seed=1)
    assert all(torch.equal(first[path], same[path]) for path in targets)
    others = (drawn(seed=2), drawn(seed=1, round=1))
    assert not any(torch.equal(first[path], other[path]) for path in targets for other in others)
    assert not torch.equal(first[targets[0]], first[targets[1]])


def test_inits_have_the_stated_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    kaiming = injection.initial_A(16, 400, "kaiming", None, generator)
    assert float(kaiming.abs().max()) <= 1 / 20
    assert float(kaiming.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.05)
    assert float(injection.initial_A(16, 400, "gaussian", 0.3, generator).std()) == pytest.approx(0.3, rel=0.05)
    rows = injection.initial_A(16, 400, "orthogonal", None, generator)
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), atol=1e-5, rtol=0)
    with pytest.raises(LoricaError, match="init_std"):
        injection.initial_A(1, 2, "gaussian", None, generator)


def test_a_target_that_matches_nothing_names_the_near_ones(opt: Base) -> None:
    with pytest.raises(TargetError, match=r"'q_porj' matches no module.*q_proj"):
        models.target_modules(opt, ["q_porj"])
    with pytest.raises(TargetError, match="'fc3'"):
        models.target_modules(opt, ["q_proj", "fc3"])


@pytest.mark.parametrize(
    "targets",
    [r".*\.(q|v)_proj", ["q_proj", "v_proj"], ["v_proj", "self_attn.q_proj", "q_proj"], [r".*q_proj", "v_proj"]],
)
def test_targets_are_suffixes_paths_or_a_regex(opt: Base, targets: str | list[str]) -> None:
    assert set(models.target_modules(opt, targets)) == PRESETS["opt"]["standard"]


def test_a_full_path_is_one_target(opt: Base) -> None:
    path = "model.decoder.layers.1.fc1"
    assert models.target_modules(opt, path) == models.target_modules(opt, [path]) == [path]


@pytest.mark.parametrize("target", ["self_attn", "embed_tokens", "final_layer_norm"])
def test_a_target_that_is_not_linear_is_refused(opt: Base, target: str) -> None:
    with pytest.raises(TargetError, match="only linear modules"):
        models.target_modules(opt, [target])
    with pytest.raises(TargetError, match="not a linear module"):
        injection.create(opt.model, ["model.decoder.layers.0.self_attn"], rank=1, alpha=1)


def test_a_broken_regex_is_named(opt: Base) -> None:
    with pytest.raises(TargetError, match="neither a module name nor a regex"):
        models.target_modules(opt, "(q_proj")


def test_targets_on_a_live_model_are_the_layers_themselves(opt: Base) -> None:
    injection.inject(opt.model, everywhere(opt))
    for preset, expected in PRESETS["opt"].items():
        assert set(models.target_modules(opt, preset)) == expected
    assert set(models.target_modules(opt, r".*fc1.*")) == in_layers("model.decoder.layers.{}", "fc1")


def test_a_rank_above_the_matrix_is_refused(opt: Base) -> None:
    targets = models.target_modules(opt, "standard")
    with pytest.raises(ShapeError, match=r"adapter\.rank=33.*at most 32"):
        injection.create(opt.model, targets, rank=33, alpha=1)


def _does_not_fit() -> dict[str, Adapter]:
    good = LowRank(torch.ones(1, tiny.WIDTH), torch.ones(tiny.WIDTH, 1))
    path = "model.decoder.layers.0.self_attn.q_proj"
    return {
        "no such module": Adapter({path: good, "model.decoder.layers.9.self_attn.q_proj": good}),
        "not linear": Adapter({path: good, "model.decoder.layers.0.self_attn": good}),
        "other shape": Adapter({path: good, "model.decoder.layers.0.fc1": good}),
        "no such head": Adapter({path: good}, {"score": {"weight": torch.ones(3, tiny.WIDTH)}}),
        "other head": Adapter({path: good}, {"lm_head": {"weight": torch.ones(3, tiny.WIDTH)}}),
        "head with more": Adapter({path: good}, {"lm_head": {"weight": torch.ones(57, 32), "bias": torch.ones(57)}}),
    }


@pytest.mark.parametrize("case", _does_not_fit())
def test_an_adapter_that_does_not_fit_changes_nothing(opt: Base, case: str) -> None:
    before, flags = bits(opt.model), [parameter.requires_grad for parameter in opt.model.parameters()]
    modules = [id(module) for module in opt.model.modules()]
    with pytest.raises(AdapterFormatError):
        injection.inject(opt.model, _does_not_fit()[case])
    assert bits(opt.model) == before
    assert [parameter.requires_grad for parameter in opt.model.parameters()] == flags
    assert [id(module) for module in opt.model.modules()] == modules


def test_an_update_inside_a_head_is_refused_whole(load: Load) -> None:
    """A head is saved and replaced whole: an update inside it would be lost, and would stay behind after remove."""
    base = load("roberta")
    before = bits(base.model)
    adapter = tiny.adapter(base.model, ["classifier.dense"], heads=["classifier"])
    with pytest.raises(AdapterFormatError, match="classifier"):
        injection.inject(base.model, adapter)
    assert bits(base.model) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_fuse_that_fails_leaves_every_weight(opt: Base, bad: float) -> None:
    adapter = everywhere(opt)
    last = list(adapter.updates)[-1]
    broken = Adapter({**adapter.updates, last: adapter.updates[last] * bad})
    before = bits(opt.model)
    with pytest.raises(ModelError, match=last):
        injection.fuse(opt.model, broken)
    assert bits(opt.model) == before


def test_a_fuse_that_overflows_leaves_every_weight(load: Load) -> None:
    base = load("opt", dtype="float16")
    before = bits(base.model)
    with pytest.raises(ModelError, match=r"fc2|float16|overflow|infinit"):
        injection.fuse(base.model, everywhere(base) * 1e6)
    assert bits(base.model) == before


def test_a_live_adapter_is_not_fused_over(opt: Base) -> None:
    adapter = everywhere(opt)
    injection.inject(opt.model, adapter)
    with pytest.raises(ModelError, match="remove it before fusing"):
        injection.fuse(opt.model, adapter)


def test_a_second_adapter_is_laid_on_the_first(opt: Base) -> None:
    first, second = everywhere(opt, seed=1), everywhere(opt, seed=2)
    both = _logits_with(opt, first + second, tiny.inputs(opt.model))
    injection.inject(opt.model, first)
    assert tiny.relative(_logits_with(opt, second, tiny.inputs(opt.model)), both) < 1e-5
