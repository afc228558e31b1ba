"""Adapters live under coefficients: four ways to run them, one loss and one gradient; and a model left as it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import tiny
from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank, zero
from lorica.errors import AdapterFormatError, ConfigError, ModelError, ShapeError
from lorica.merging import live, merge
from lorica.merging import method as methods
from lorica.merging.fitting.layout import Granularity, Layout, layout, ranks_of
from lorica.merging.method import Update
from lorica.merging.runtime import MergeImpl, Mounted, Residency, mount

NAMES = ("a", "b", "c")
RANKS = (2, 3, 1)
HEADS = ("lm_head", "classifier", "score")
IMPLS = get_args(MergeImpl)
GRANULARITIES = get_args(Granularity)
OTHERS = [
    (impl, residency)
    for impl, residency in itertools.product(IMPLS, get_args(Residency))
    if impl != "functional_clone_legacy"
]
# torch compiles some of its own rules for forward-mode AD by what it calls deprecated.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
Updates = Mapping[str, Sequence[Update]]


def body(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model; its attention is written out, as forward-mode AD needs it."""
    made = tiny.model(family, tiny.KINDS[family], 40).to(dtype)
    made.set_attn_implementation("eager")
    return made


def low_rank(model: nn.Module) -> dict[str, list[LowRank]]:
    """Random updates of unequal ranks for every linear module of the body; the last adapter lacks the first one."""
    generator = torch.Generator().manual_seed(0)
    shapes = injection.linear_modules(model, HEADS)
    made = {path: [tiny.update(shape, rank, 0.7, generator) for rank in RANKS] for path, shape in shapes.items()}
    first = next(iter(made))
    made[first][-1] = zero(shapes[first])
    return made


def dense(updates: Mapping[str, Sequence[LowRank]]) -> dict[str, list[Update]]:
    """The same with the second adapter's updates dense."""
    return {path: [first, second.dense(), third] for path, (first, second, third) in updates.items()}


def mounted(model: nn.Module, updates: Updates, granularity: Granularity = "module", **options: Any) -> Mounted:
    return mount(model, updates, layout(ranks_of(updates), NAMES, granularity), **options)


def coefficients(of: Layout, *, seed: int = 1) -> Tensor:
    return torch.randn(of.size, generator=torch.Generator().manual_seed(seed)) * 0.5


def loss(outputs: Any) -> Tensor:
    return outputs.logits.float().logsumexp(dim=-1).square().mean()  # type: ignore[no-any-return]


def loss_and_gradient(on: Mounted, model: nn.Module) -> tuple[Tensor, Tensor]:
    c = coefficients(on.layout).requires_grad_()
    found = loss(on(model, coefficients=c, **tiny.inputs(model)))
    return found.detach(), torch.autograd.grad(found, c)[0]


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert expected[1].norm() > 0.01
    for mine, other in zip(found, expected, strict=True):
        assert tiny.relative(mine, other) < 1e-5


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", ["opt", "llama", "bert", "gpt2"])
def test_four_ways_one_loss_and_one_gradient(family: str, granularity: Granularity) -> None:
    model = body(family)
    updates = low_rank(model)
    with mounted(model, updates, granularity, merge_impl="functional_clone_legacy") as plain:
        expected = loss_and_gradient(plain, model)
    for impl, residency in OTHERS:
        with mounted(model, updates, granularity, merge_impl=impl, delta_residency=residency) as on:
            assert_same(loss_and_gradient(on, model), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dense_updates_beside_low_rank_ones(family: str) -> None:
    model = body(family)
    updates = low_rank(model)
    with mounted(model, updates) as on:
        expected = loss_and_gradient(on, model)
    for impl in IMPLS[1:]:
        with mounted(model, dense(updates), merge_impl=impl) as on:
            assert_same(loss_and_gradient(on, model), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_live_model_is_the_merge_that_weighted_delta_n_makes(granularity: Granularity) -> None:
    model = body("llama")
    updates = low_rank(model)
    adapters = {name: Adapter({path: each[at] for path, each in updates.items()}) for at, name in enumerate(NAMES)}
    of = layout(ranks_of(updates), NAMES, granularity)
    c = coefficients(of)
    method = methods.load("weighted_delta_n", of.params(c), len(NAMES))
    with live.attach(model, merge.prepare(adapters, method).modules()):
        expected = tiny.logits(model)
    assert tiny.relative(tiny.logits(model), expected) > 0.01
    with mount(model, updates, of) as on, on.at(c):
        assert tiny.relative(tiny.logits(model), expected) < 1e-5


class Stack(nn.Module):
    """Two linear layers, small enough for finite differences."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


@FORWARD_MODE
@pytest.mark.parametrize("granularity", ["module", "direction"])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_against_finite_differences(impl: MergeImpl, granularity: Granularity) -> None:
    model = Stack().double()
    on = mounted(model, low_rank(model), granularity, merge_impl=impl)
    x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(4, 2, 5).requires_grad_()
    inputs = (x, coefficients(on.layout).double().requires_grad_())

    def run(x: Tensor, c: Tensor) -> Any:
        return on(model, x, coefficients=c)

    is_fused = impl == "fused_lora_linear"
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=is_fused)
    if is_fused:
        branches = torch.stack([coefficients(on.layout, seed=seed).double() for seed in (1, 2)]).requires_grad_()
        assert torch.autograd.gradcheck(run, (x, branches), check_forward_ad=True)
    if granularity == "module" and not is_fused:
        with mounted(model, dense(low_rank(model)), merge_impl=impl) as on:
            assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_branches_are_passes_of_their_own(family: str, dtype: torch.dtype) -> None:
    model = body(family, dtype)
    with mounted(model, low_rank(model), "direction") as on:
        candidates = torch.stack([coefficients(on.layout, seed=seed) for seed in range(3)])
        given = tiny.inputs(model, rows=2)
        stacked = {name: value.repeat(3, 1) for name, value in given.items()}
        together = on(model, coefficients=candidates, **stacked).logits.float()
        apart = torch.cat([on(model, coefficients=c, **given).logits.float() for c in candidates])
        assert tiny.relative(together, apart) < (1e-5 if dtype == torch.float32 else 0.02)
        with pytest.raises(ShapeError, match="2 rows cannot be shared out to 3 branches"):
            on(model, coefficients=candidates, **given)


@FORWARD_MODE
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_forward_mode_gives_the_slope_along_a_direction(family: str) -> None:
    model = body(family)
    with mounted(model, low_rank(model)) as on:

        def at(c: Tensor) -> Tensor:
            return loss(on(model, coefficients=c, **tiny.inputs(model)))

        c, direction = coefficients(on.layout), coefficients(on.layout, seed=2)
        slope = float(loss_and_gradient(on, model)[1] @ direction)
        assert float(torch.func.jvp(at, (c,), (direction,))[1]) == pytest.approx(slope, rel=1e-5)
        with forward_ad.dual_level():
            dual = at(forward_ad.make_dual(c, direction))  # type: ignore[no-untyped-call]
            tangent = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
        assert float(tangent) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gpt2", "float32"), ("llama", "bfloat16")])
def test_what_the_coefficients_keep_for_the_backward_pass(family: str, dtype: str) -> None:
    num_tokens, model = 13, body(family, getattr(torch, dtype))
    updates = low_rank(model)
    x = torch.randn(1, num_tokens, tiny.WIDTH, dtype=getattr(torch, dtype))

    def kept(run: Callable[[], Any]) -> int:
        found: dict[int, Tensor] = {}

        def pack(saved: Tensor) -> Tensor:
            if num_tokens in saved.shape:
                found[saved.untyped_storage().data_ptr()] = saved
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            outputs = run()
        del outputs
        return sum(each.untyped_storage().nbytes() // each.element_size() for each in found.values())

    model.requires_grad_(False)
    frozen = kept(lambda: model(inputs_embeds=x.clone().requires_grad_()))
    with mounted(model, updates, "layer") as on:
        c = coefficients(on.layout).requires_grad_()
        extra = kept(lambda: on(model, coefficients=c, inputs_embeds=x.clone().requires_grad_())) - frozen
        outputs = on(model, coefficients=c.detach(), inputs_embeds=x)
    assert 0 < extra <= num_tokens * sum(map(sum, on.layout.ranks.values()))
    assert outputs.logits.grad_fn is None


@pytest.mark.parametrize("impl", IMPLS)
def test_a_half_precision_base_under_single_precision_factors(impl: MergeImpl) -> None:
    model = body("llama", torch.bfloat16)
    updates = low_rank(model)
    with mounted(model.float(), updates) as on:
        expected = loss_and_gradient(on, model)
    with mounted(model.bfloat16(), updates, merge_impl=impl) as on:
        found = loss_and_gradient(on, model)
        assert on(model, coefficients=coefficients(on.layout), **tiny.inputs(model)).logits.dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    for mine, other in zip(found, expected, strict=True):
        assert tiny.relative(mine, other) < 0.05


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_is_the_very_one_before(family: str, impl: MergeImpl) -> None:
    model = body(family)
    next(model.parameters()).requires_grad_(False)
    expected = tiny.logits(model)

    def parts() -> list[Any]:
        named = [(name, id(each), each.requires_grad) for name, each in model.named_parameters()]
        return [*named, *((name, id(each), type(each), sorted(vars(each))) for name, each in model.named_modules())]

    before, bits = parts(), {name: value.clone() for name, value in model.state_dict().items()}
    with mounted(model, low_rank(model), merge_impl=impl) as on:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(tiny.logits(model), expected)
        c = coefficients(on.layout).requires_grad_()
        loss(on(model, coefficients=c, **tiny.inputs(model))).backward()  # type: ignore[no-untyped-call]
        assert c.grad is not None
        assert torch.equal(tiny.logits(model), expected)
    assert parts() == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(model.state_dict()) == list(bits)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())


def test_another_view_of_the_same_body_is_run_too() -> None:
    model = Stack()
    view = nn.Sequential(model.first, nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3, 5)
    with mounted(model, low_rank(model)) as on:
        c = coefficients(on.layout)
        first = on(model.first, x, coefficients=c)
        torch.testing.assert_close(on(view, x, coefficients=c), view[2](torch.tanh(first)))
        assert not torch.equal(first, model.first(x))


def test_what_a_mount_refuses() -> None:
    model = Stack()
    updates = low_rank(model)
    of = layout(ranks_of(updates), NAMES, "module")
    with pytest.raises(ConfigError, match="unknown merge_impl 'fused_lora': did you mean fused_lora_linear"):
        mount(model, updates, of, merge_impl="fused_lora")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown delta_residency 'gpu_cached': did you mean gpu_cache"):
        mount(model, updates, of, delta_residency="gpu_cached")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"update of first by b is dense.*merge_impl=streaming_parametrize"):
        mounted(model, dense(updates))
    with pytest.raises(
        ConfigError, match="update of first by b is dense and has no directions: use granularity=module"
    ):
        mounted(model, dense(updates), "direction", merge_impl="fused_linear")
    with pytest.raises(ShapeError, match="second is in the layout and not in the updates"):
        mount(model, {"first": updates["first"]}, of)
    with pytest.raises(ShapeError, match=r"second has updates of ranks \[3, 2, 1\], and the layout has \[2, 3, 1\]"):
        first, second, third = updates["second"]
        mount(model, {**updates, "second": [second, first, third]}, of)
    with pytest.raises(AdapterFormatError, match=r"updates second as \(4, 5\), and the model has \(3, 4\)"):
        mounted(model, {"second": updates["first"]})
    live_layer = injection.inject(model, Adapter({"first": updates["first"][0]}))
    with pytest.raises(ModelError, match="first carries a live adapter"):
        mount(model, updates, of)
    injection.remove(live_layer)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_coefficients_are_refused() -> None:
    model = Stack()
    on = mounted(model, low_rank(model), "task", merge_impl="fused_linear")
    with pytest.raises(ShapeError, match=r"shape \(2,\): give \(3,\), or \(G, 3\)"):
        on(model, torch.zeros(1, 5), coefficients=torch.zeros(2))
    with pytest.raises(ConfigError, match=r"merge_impl=fused_linear runs one set.*use merge_impl=fused_lora_linear"):
        on(model, torch.zeros(2, 5), coefficients=torch.zeros(2, 3))


@pytest.mark.parametrize("impl", ["streaming_parametrize", "functional_clone_legacy"])
def test_a_weight_that_is_no_float_matrix_runs_in_the_fused_ways_alone(impl: MergeImpl) -> None:
    class Quantised(nn.Module):
        in_features, out_features = 5, 4

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.arange(20, dtype=torch.int8).view(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.get_buffer("qweight").to(x.dtype))

    model = nn.Sequential(Quantised())
    updates = low_rank(model)
    with pytest.raises(ModelError, match=f"0 is not a float matrix.*merge_impl={impl} needs one"):
        mounted(model, updates, merge_impl=impl)
    x = torch.randn(3, 5)
    with mounted(model, updates) as on:
        found = on(model, x, coefficients=on.layout.one_hot("b"))
    second = updates["0"][1]
    torch.testing.assert_close(found, model(x) + x @ second.dense().T)
