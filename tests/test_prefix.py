"""Prefix tuning: the same logits as PEFT, the same loss however it is asked for, and folders that are not trusted."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

import tiny
from lorica import config, models, runs
from lorica.adapters import prefix as prefixes
from lorica.adapters.prefix import LivePrefix, Prefix
from lorica.config import TrainConfig
from lorica.demo import language
from lorica.errors import AdapterFormatError, ConfigError, MissingPathError, ModelError
from lorica.models import Base
from lorica.optim.backprop import backprop
from lorica.optim.directions import Directions
from lorica.optim.probes import Probing
from lorica.optim.zeroth_order import ZerothOrder
from lorica.processes import ALONE
from lorica.runs.training import train
from lorica.runs.training.prefix import draw, lay_on
from lorica.tasks.batching import ChoiceBatch, collate
from lorica.tasks.objectives import LossModule, scores
from lorica.tasks.prompting import Choice

Load = Callable[..., Base]
FAMILIES = ("opt", "llama", "gpt2", "qwen2")
NUM = 5
# PEFT asks transformers by a name of old.
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(params=FAMILIES)
def base(load: Load, request: pytest.FixtureRequest) -> Base:
    return load(request.param)


def padded(base: Base) -> dict[str, Tensor]:
    """Inputs of which the first row is padded on the left."""
    given = tiny.inputs(base.model)
    given["attention_mask"][0, :3] = 0
    given["position_ids"] = (given["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return given


def drawn(base: Base, seed: int = 0) -> Prefix:
    return draw(base, NUM, init="real_activations", seed=seed)


@OLD_NAME
@pytest.mark.peers
def test_peft_loads_what_was_written_and_has_the_same_logits(base: Base, tmp_path: Path) -> None:
    import peft

    given, bare = padded(base), tiny.logits(base.model, padded(base))
    prefix = drawn(base)
    prefixes.write(prefix, tmp_path / "adapter")
    live = lay_on(base, prefix)
    ours = tiny.logits(base.model, given)
    prefixes.remove(live)
    theirs = tiny.logits(peft.PeftModel.from_pretrained(base.model, tmp_path / "adapter"), given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert float((ours - bare).abs().max()) > 0.1, "the prefix does nothing, so that both agree says nothing"


@OLD_NAME
@pytest.mark.peers
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_prefix_of_peft_is_read(load: Load, family: str, tmp_path: Path) -> None:
    import peft

    base, given = load(family), tiny.inputs(load(family).model)
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM)
    theirs = peft.get_peft_model(load(family).model, settings)
    theirs.save_pretrained(tmp_path)
    expected = tiny.logits(theirs.eval(), given)
    lay_on(base, prefixes.read(tmp_path))
    torch.testing.assert_close(tiny.logits(base.model, given), expected, rtol=1e-5, atol=1e-5)


def test_a_prefix_is_what_the_model_makes_of_real_tokens(base: Base) -> None:
    """Before a prompt it stands for these tokens themselves: the logits are those of the longer prompt."""
    tokens = torch.tensor([7, 11, 5, 9, 6])
    given = tiny.inputs(base.model)
    longer = torch.cat([tokens.expand(3, -1), given["input_ids"]], dim=1)
    expected = tiny.logits(base.model, {"input_ids": longer, "attention_mask": torch.ones_like(longer)})[:, NUM:]
    lay_on(base, Prefix(models.past(base, tokens)))
    torch.testing.assert_close(tiny.logits(base.model, given), expected, rtol=1e-4, atol=1e-4)


def test_a_prefix_comes_and_goes(base: Base) -> None:
    given, bare = padded(base), tiny.logits(base.model, padded(base))
    names = set(base.model.state_dict())
    prefix = drawn(base)
    live = lay_on(base, prefix)
    laid = tiny.logits(base.model, given)
    assert torch.equal(live.extract().values, prefix.values)
    assert set(live.trainable()) == {"prefix.values"}
    assert [name for name, parameter in base.model.named_parameters() if parameter.requires_grad] == ["prefix.values"]
    prefixes.remove(live)
    assert torch.equal(tiny.logits(base.model, given), bare)
    assert set(base.model.state_dict()) == names
    network = lay_on(base, prefix, reparameterize=True)
    torch.testing.assert_close(tiny.logits(base.model, given), laid, rtol=0, atol=0)
    assert set(network.trainable()) == {"prefix.tokens", "prefix.hidden", "prefix.out"}


def test_the_draw_depends_on_the_seed_alone(load: Load) -> None:
    base, state = load("llama"), torch.get_rng_state()
    first, again, other = drawn(base), drawn(base), drawn(base, seed=1)
    random = draw(base, NUM, init="random", seed=0)
    assert torch.equal(first.values, again.values) and not torch.equal(first.values, other.values)
    assert float(random.values.std()) == pytest.approx(0.02, rel=0.1)
    assert first.values.shape == (2, 2, 2, NUM, 8), "keys and values are those of two heads, which four share"
    assert torch.equal(torch.get_rng_state(), state)


def option(length: int, at: int) -> Tensor:
    """The tokens of option number `at`."""
    return torch.arange(8 + 5 * at, 8 + 5 * at + length)


def choice_batch(base: Base, lengths: tuple[int, ...], **options: Any) -> ChoiceBatch:
    """Three prompts of several lengths, each with options of these lengths."""
    rows = []
    for label, size in enumerate((4, 7, 5)):
        prompt = tuple(range(6, 6 + size))
        rows.append(
            Choice(
                (prompt,) * len(lengths),
                tuple(tuple(option(n, at).tolist()) for at, n in enumerate(lengths)),
                label % len(lengths),
            )
        )
    made = collate(rows, pad_token_id=base.tokenizer.pad_token_id, **options)
    assert isinstance(made, ChoiceBatch)
    return made


def one_by_one(base: Base, live: LivePrefix, lengths: tuple[int, ...]) -> Tensor:
    """(3, options) mean log-probabilities by a plain loop over unpadded rows, the prefix by PEFT's own layout."""
    found = []
    for size in (4, 7, 5):
        prompt = torch.arange(6, 6 + size)
        for at, length in enumerate(lengths):
            words = option(length, at)
            tokens = torch.cat([prompt, words])[None]
            logits = base.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0]
            log_p = logits.log_softmax(dim=-1)[size - 1 : -1].gather(1, words[:, None])
            found.append(log_p.mean())
    return torch.stack(found).view(3, -1)


@pytest.mark.parametrize("lengths", [(1, 1), (2, 3)])
def test_options_are_scored_behind_prefix_and_prompt(base: Base, lengths: tuple[int, ...]) -> None:
    """Also where a prompt is read once for all its options, which go on from what the model keeps of it."""
    live = lay_on(base, drawn(base))
    with torch.no_grad():
        found = scores(base.model, choice_batch(base, lengths))
        torch.testing.assert_close(found, one_by_one(base, live, lengths), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [(1, 1), (2, 3)])
def test_branches_have_the_losses_of_passes_of_their_own(base: Base, lengths: tuple[int, ...]) -> None:
    live, batch = lay_on(base, drawn(base)), choice_batch(base, lengths)
    objective, trainable = LossModule(base.model, "classification"), live.trainable()
    offsets = 0.1 * Directions(5)(0, sum(parameter.numel() for parameter in trainable.values()))
    apart, together = Probing(1), Probing(5)
    expected = apart.losses(objective, trainable, [batch], offsets)
    found = together.losses(objective, trainable, [batch], offsets)
    assert together.repeat_at == "inputs", "no branches were taken"
    assert len(set(expected.tolist())) == 5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reparameterize", [False, True])
def test_zeroth_order_follows_the_slope_that_backprop_has(load: Load, reparameterize: bool) -> None:
    base = load("llama")
    live = lay_on(base, drawn(base), reparameterize=reparameterize)
    objective, batch, trainable = LossModule(base.model, "classification"), choice_batch(base, (1, 1)), live.trainable()
    backprop(objective, trainable, [batch], 0)
    gradient = torch.cat([p.grad.flatten() for p in trainable.values() if p.grad is not None])
    assert float(gradient.norm()) > 1e-3
    zeroth = ZerothOrder("spsa", 1e-2, Directions(4))
    found = zeroth(objective, trainable, [batch], 0)
    slopes = [float(z @ gradient) for z in Directions(4)(0, len(gradient))]
    assert found.projected == pytest.approx(slopes, rel=0.05, abs=0.02 * float(gradient.norm()))


def test_a_model_that_takes_no_prefix_is_refused(load: Load) -> None:
    for family, kind in (("t5", None), ("bert", None), ("opt", "classification")):
        with pytest.raises(ModelError, match=r"known to work for causal models of gpt2, llama, opt, qwen2"):
            drawn(load(family, kind))


@pytest.mark.parametrize("num_tokens", [249, 5000])
def test_a_prefix_that_leaves_a_prompt_no_room_is_refused(tmp_path: Path, num_tokens: int) -> None:
    language.write_tasks(tmp_path)
    words = ["model=demo", "adapter.kind=prefix", f"prefix.num_tokens={num_tokens}", f"task.path={tmp_path / 'topic'}"]
    with pytest.raises(ConfigError, match=rf"prefix\.num_tokens={num_tokens} takes too many of the 256 positions"):
        runs.train(config.read(TrainConfig, words), Console(quiet=True))


@pytest.mark.parametrize(
    ("more", "warns"),
    [("model.dtype=bfloat16", True), ("model.dtype=bfloat16 zo.epsilon=0.1", False), ("model.dtype=float32", False)],
)
def test_probes_that_half_precision_rounds_away_are_told(tmp_path: Path, more: str, warns: bool) -> None:
    """At ε = 1e-3 slopes in bfloat16 had nothing to do with the gradient; at 0.1 they correlate with it by 0.9."""
    language.write_tasks(tmp_path)
    words = ["model=demo", "adapter.kind=prefix", "trainer=zo", f"task.path={tmp_path / 'topic'}", *more.split()]
    cfg = config.read(TrainConfig, [*words, "task.num_train=4", "task.num_eval=4"]).resolved()
    told = train._prepared(cfg, ALONE, Console(quiet=True)).tuning.told()
    assert any("lost in the rounding" in line and "zo.epsilon=0.1" in line for line in told) == warns


def test_a_prefix_of_another_model_is_refused(load: Load) -> None:
    with pytest.raises(AdapterFormatError, match=r"\(2, 2, 4, 5, 8\).*takes \(2, 2, 2, 5, 8\)"):
        lay_on(load("llama"), drawn(load("opt")))


def folder(path: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """A folder that PEFT might have written, with these things changed."""
    path.mkdir(exist_ok=True)
    whole = {
        "peft_type": "PREFIX_TUNING",
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_virtual_tokens": 3,
        "token_dim": 8,
        "base_model_name_or_path": None,
    }
    (path / "adapter_config.json").write_text(json.dumps({**whole, **config}))
    save_file(tensors or {"prompt_embeddings": torch.ones(3, 32)}, path / "adapter_model.safetensors")
    return path


def test_a_sound_folder_is_read(tmp_path: Path) -> None:
    found = prefixes.read(folder(tmp_path))
    assert found.values.shape == (2, 2, 2, 3, 4) and found.values.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "LORA"}, "no prefix"),
        ({"num_layers": 4_000_000}, "holds .* and the config asks for"),
        ({"num_layers": "2"}, "num_layers='2'"),
        ({"num_layers": True}, "num_layers=True"),
        ({"token_dim": 7}, "heads of one size"),
        ({"num_transformer_submodules": 2}, "causal"),
        ({"base_model_name_or_path": 3}, "must be a name"),
        ({"tensors": {"prompt_embeddings": torch.full((3, 32), torch.nan)}}, "NaN"),
        ({"tensors": {"lm_head.weight": torch.ones(3, 32)}}, "holds"),
        ({"tensors": {"prompt_embeddings": torch.ones(3, 32), "lm_head.weight": torch.ones(2)}}, "holds"),
    ],
)
def test_a_folder_that_cannot_be_trusted_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=told) as caught:
        prefixes.read(folder(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingPathError):
        prefixes.read(path)
    (path / "adapter_model.bin").write_bytes(pickle.dumps({"prompt_embeddings": 1}))
    with pytest.raises(AdapterFormatError, match="pickle"):
        prefixes.read(path)


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="nothing was written"):
        prefixes.write(Prefix(torch.full((2, 2, 2, 3, 4), torch.inf)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
