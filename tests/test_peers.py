"""PEFT and lorica give one model the same logits, whichever of the two wrote the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from lorica import models
from lorica.adapters import injection, peft_format
from lorica.adapters.adapter import Adapter
from lorica.errors import AdapterFormatError
from lorica.models import Base

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.peers,
    # PEFT asks transformers for a property by the name that it had before it was renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Load = Callable[..., Base]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def a_generator_of_its_own() -> Any:
    """PEFT draws its factors from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def ours(base: Base, adapter: Adapter) -> Tensor:
    """The logits under the live adapter, after a look that it does something."""
    before = tiny.logits(base.model)
    injection.inject(base.model, adapter)
    found = tiny.logits(base.model)
    assert tiny.relative(found, before) > 1e-2, "the adapter does nothing, so the comparison says nothing"
    return found


def theirs(base: Base, folder: Path) -> Tensor:
    """The logits of the same checkpoint under the folder as PEFT loads it."""
    return tiny.logits(peft.PeftModel.from_pretrained(base.model, folder).eval())


def write(base: Base, adapter: Adapter, folder: Path, profile: peft_format.Profile) -> Path:
    peft_format.write(
        adapter,
        folder,
        profile=profile,
        layout=injection.linear_modules(base.model),
        task_type=models.TASK_TYPES[base.kind],
        fan_in_fan_out=models.is_transposed(base, adapter.updates),
    )
    return folder


def uneven(base: Base, targets: str, heads: tuple[str, ...] = ()) -> Adapter:
    """Ranks and alphas that differ between layers, so that rank_pattern and alpha_pattern are written."""
    paths = models.target_modules(base, targets)
    parts = [tiny.adapter(base.model, paths[at::3], rank=1 + at, alpha=3, seed=at) for at in range(3)]
    head = tiny.adapter(base.model, [], heads=heads)
    return parts[0] + parts[1] + parts[2] + head


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "qwen2", "bert", "roberta", "t5"])
@pytest.mark.parametrize("targets", ["standard", "all-linear"])
@pytest.mark.parametrize("profile", ["peft", "portable"])
def test_peft_reads_what_lorica_writes(
    load: Load, tmp_path: Path, family: str, targets: str, profile: peft_format.Profile
) -> None:
    base = load(family)
    heads = base.heads if profile == "peft" else ()
    adapter = uneven(base, targets, heads)
    folder = write(base, adapter, tmp_path / "adapter", profile)
    assert tiny.relative(theirs(load(family), folder), ours(base, adapter)) < TOLERANCE


def test_peft_reads_a_part_of_the_layers(load: Load, tmp_path: Path) -> None:
    base = load("opt")
    adapter = tiny.adapter(base.model, models.target_modules(base, "standard")[:1])
    for profile in ("peft", "portable"):
        write(base, adapter, tmp_path / profile, profile)  # type: ignore[arg-type]
    logits = ours(base, adapter)
    for profile in ("peft", "portable"):
        assert tiny.relative(theirs(load("opt"), tmp_path / profile), logits) < TOLERANCE


def test_the_comparison_notices_a_doubled_alpha(load: Load, tmp_path: Path) -> None:
    base = load("opt")
    adapter = uneven(base, "standard")
    folder = write(base, adapter * 2.0, tmp_path / "adapter", "peft")
    assert tiny.relative(theirs(load("opt"), folder), ours(base, adapter)) > 100 * TOLERANCE


PLAIN = {"r": 4, "lora_alpha": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {**PLAIN, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {**PLAIN, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "rank_pattern": {
        **PLAIN,
        "target_modules": ["q_proj", "fc1"],
        "rank_pattern": {"fc1": 2, "layers.0.self_attn.q_proj": 3},
    },
    "alpha_pattern": {**PLAIN, "target_modules": ["q_proj", "fc1"], "alpha_pattern": {"fc1": 32, "q_proj": 5}},
    "anchored": {
        **PLAIN,
        "target_modules": ["q_proj"],
        "rank_pattern": {r"^model.decoder.layers.0.self_attn.q_proj": 2},
    },
    "both patterns": {
        **PLAIN,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 1},
        "use_rslora": True,
    },
    "all-linear": {**PLAIN, "target_modules": "all-linear"},
    "regex targets": {**PLAIN, "target_modules": r".*layers\.1\..*(q|k)_proj"},
    "half of the layers": {**PLAIN, "target_modules": ["q_proj"], "layers_to_transform": [1]},
}


def written_by_peft(base: Base, folder: Path, options: dict[str, Any]) -> Tensor:
    """A random PEFT adapter saved in `folder`; its logits."""
    config = peft.LoraConfig(task_type=models.TASK_TYPES[base.kind], init_lora_weights=False, **options)
    model = peft.get_peft_model(base.model, config).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.normal_()
    model.save_pretrained(folder)
    return tiny.logits(model)


def assert_read(base: Base, folder: Path, expected: Tensor) -> None:
    assert tiny.relative(ours(base, peft_format.read(folder)), expected) < TOLERANCE


@pytest.mark.parametrize("case", OPTIONS)
def test_lorica_reads_what_peft_writes(load: Load, tmp_path: Path, case: str) -> None:
    expected = written_by_peft(load("opt"), tmp_path / "adapter", OPTIONS[case])
    assert_read(load("opt"), tmp_path / "adapter", expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lorica_reads_all_linear_of_every_family(load: Load, tmp_path: Path, family: str) -> None:
    transposed = {"fan_in_fan_out": True} if family == "gpt2" else {}
    options = {**PLAIN, "target_modules": "all-linear", **transposed}
    expected = written_by_peft(load(family), tmp_path / "adapter", options)
    assert_read(load(family), tmp_path / "adapter", expected)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["classifier"]}], ids=["by task type", "stated"])
def test_lorica_reads_a_classification_head_of_peft(
    load: Load, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    given = {**PLAIN, "target_modules": ["query", "value"], **options}
    expected = written_by_peft(load(family), tmp_path / "adapter", given)
    assert list(peft_format.read(tmp_path / "adapter").heads) == ["classifier"]
    assert_read(load(family), tmp_path / "adapter", expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lorica_reads_a_decoders_classification_head_of_peft(load: Load, tmp_path: Path, family: str) -> None:
    given = {**PLAIN, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    options = given if family == "gpt2" else {**PLAIN, "target_modules": ["q_proj"]}
    expected = written_by_peft(load(family, "classification"), tmp_path / "adapter", options)
    assert_read(load(family, "classification"), tmp_path / "adapter", expected)


def test_a_folder_of_peft_written_again_stays_the_same(load: Load, tmp_path: Path) -> None:
    expected = written_by_peft(load("bert"), tmp_path / "first", {**PLAIN, "target_modules": ["query"]})
    base = load("bert")
    write(base, peft_format.read(tmp_path / "first"), tmp_path / "second", "peft")
    assert tiny.relative(theirs(base, tmp_path / "second"), expected) < TOLERANCE


# PEFT warns of the conversion that it is about to do.
@pytest.mark.filterwarnings("ignore:.* changes the base weights of the model:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}])
def test_an_adapter_that_rewrote_the_base_is_read_once_peft_has_converted_it(
    load: Load, tmp_path: Path, init: str, patterns: dict[str, Any]
) -> None:
    config = peft.LoraConfig(
        **PLAIN, target_modules=["q_proj", "v_proj"], init_lora_weights=init, task_type="CAUSAL_LM", **patterns
    )
    model = peft.get_peft_model(load("opt").model, config).eval()
    model.save_pretrained(tmp_path / "before")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterFormatError, match="path_initial_model_for_weight_conversion"):
        peft_format.read(tmp_path / "raw")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    assert_read(load("opt"), tmp_path / "converted", expected)
