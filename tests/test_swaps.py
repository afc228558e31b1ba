"""What a loaded model computes faster is what transformers computes: outputs, gradients, forward mode, saved files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

import tiny
from lorica import models, swaps

LENGTHS = (3, 60, 100)  # of the rows; the window of the local layers is shorter, and 100 no multiple of 16
Output = Callable[..., Tensor]


@pytest.fixture(scope="module")
def neo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-Neo with a global and a local layer, scores as large as an unscaled product makes them."""
    folder = tmp_path_factory.mktemp("neo")
    words = tiny.tokenizer("causal")
    words.save_pretrained(folder)
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = transformers.GPTNeoConfig(
        **ids,
        vocab_size=len(words),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=20,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in made.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    made.save_pretrained(folder)
    return folder


def ours(folder: Path, **options: Any) -> Any:
    return models.load(str(folder), kind="causal", **options).model


def theirs(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def batch(side: str, vocabulary: int) -> tuple[dict[str, Tensor], Tensor]:
    """Rows of LENGTHS padded on the side, and which of their positions are tokens."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(len(tiny.SPECIAL), vocabulary, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": tokens, "attention_mask": mask.long(), "position_ids": positions}, mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["neo", "gpt2"])
def test_logits_are_those_of_transformers(family: str, side: str, neo: Path, tiny_models: Callable[..., Path]) -> None:
    folder = neo if family == "neo" else tiny_models(family)
    expected, found = theirs(folder), ours(folder)
    inputs, mask = batch(side, found.config.vocab_size)
    torch.testing.assert_close(found(**inputs).logits[mask], expected(**inputs).logits[mask], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_follows_a_past_sees_it(neo: Path) -> None:
    model = ours(neo)
    inputs, _ = batch("left", model.config.vocab_size)
    whole, parts, past = model(**inputs).logits, [], None
    for first, end in ((0, 50), (50, 99), (99, 100)):
        piece = {name: inputs[name][:, first:end] for name in ("input_ids", "position_ids")}
        made = model(**piece, attention_mask=inputs["attention_mask"][:, :end], past_key_values=past, use_cache=True)
        parts.append(made.logits)
        past = made.past_key_values
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask], whole[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["neo", "gpt2"])
def test_gradients_are_those_of_transformers(
    family: str, side: str, neo: Path, tiny_models: Callable[..., Path]
) -> None:
    folder = neo if family == "neo" else tiny_models(family)
    expected, found = theirs(folder), ours(folder).requires_grad_(True)
    inputs, mask = batch(side, found.config.vocab_size)
    for model in (expected, found):
        model(**inputs).logits[mask].log_softmax(dim=-1)[:, 5].mean().backward()
    for (name, parameter), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert tiny.relative(parameter.grad, other.grad) < 1e-5 or float(other.grad.norm()) < 1e-6, name


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, of forward mode
@torch.no_grad()
def test_forward_mode_finds_the_slope(neo: Path) -> None:
    """Where the model is transformers' own, and where it is ours."""
    slopes = []
    for model in (theirs(neo), ours(neo)):
        inputs, mask = batch("left", model.config.vocab_size)
        values = {name: value for name, value in model.named_parameters() if ".mlp.c_fc" in name or ".k_proj" in name}
        generator = torch.Generator().manual_seed(4)
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(value.detach(), torch.randn(value.shape, generator=generator))
                for name, value in values.items()
            }
            loss = functional_call(model, duals, (), inputs).logits[mask].square().mean()
            slopes.append(float(forward_ad.unpack_dual(loss).tangent))
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-4)
    assert abs(slopes[0]) > 1e-3


@torch.no_grad()
def test_half_precision_overflows_no_more_than_theirs(neo: Path) -> None:
    expected, found = theirs(neo, dtype=torch.bfloat16), ours(neo, dtype="bfloat16")
    inputs, mask = batch("left", found.config.vocab_size)
    assert tiny.relative(found(**inputs).logits[mask].float(), expected(**inputs).logits[mask].float()) < 0.02


def test_an_attention_that_was_asked_for_stays(neo: Path) -> None:
    model = ours(neo, attention="eager")
    inputs, _ = batch("left", model.config.vocab_size)
    with torch.no_grad():
        shown = model(**inputs, output_attentions=True).attentions
    assert [weights.shape for weights in shown] == [(3, 4, 100, 100)] * 2
    assert [type(m) for m in model.modules() if "_attn" in vars(m)] == []


def test_names_parameters_and_saved_files_stay(neo: Path, tmp_path: Path) -> None:
    expected, found = theirs(neo), ours(neo)
    assert [name for name, _ in found.named_modules()] == [name for name, _ in expected.named_modules()]
    assert sum(type(module) is swaps.TanhGelu for module in found.modules()) == 2
    assert sum("_attn" in vars(m) for m in found.modules() if type(m) is GPTNeoSelfAttention) == 2
    for side, model in (("theirs", expected), ("ours", found)):
        model.save_pretrained(tmp_path / side)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


@pytest.mark.parametrize("with_grad", [False, True], ids=["alone", "with gradients"])
def test_gelu_by_its_tanh_form(with_grad: bool) -> None:
    """Exactly, in float64, and far from zero, where a sigmoid has underflowed."""
    x = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([-100.0, 100.0])])
    exact = x.double() * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)))
    with torch.set_grad_enabled(with_grad):
        torch.testing.assert_close(swaps.TanhGelu()(x).double(), exact, atol=1e-6, rtol=1e-6)
