"""Merges beside mergekit's, which has an environment of its own, and what PEFT's merges do that ours must not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.errors import ConfigError
from lorica.merging import method as methods
from lorica.merging.merge import prepare
from lorica.merging.method import Module, Site, Update

pytestmark = [
    pytest.mark.peers,
    # PEFT asks transformers for a property by the name that it had before it was renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

MERGEKIT = Path(__file__).parents[1] / ".venv-mergekit" / "bin" / "python"
THEIR_TIES = """
import json, sys
import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import PerInputValues, TensorGroup
from safetensors.torch import load_file, save_file

def per_input(value):
    return PerInputValues(list(enumerate(value)))

merged = {}
for name, case in json.loads(sys.argv[1]).items():
    deltas = [load_file(sys.argv[2])[each] for each in case["deltas"]]
    tensors, ids = [torch.zeros_like(deltas[0]), *deltas], ["base", *range(len(deltas))]
    group = TensorGroup.from_tensors(tensors, ids=ids, base_index=0)
    options = {"weight": per_input(case["weights"]), "density": per_input([case["density"]] * len(deltas))}
    shared = {"lambda": case["lambda"], "normalize": True, "rescale": False, "int8_mask": False}
    merged[name] = registry.get("ties").merge_group(group, **options, **shared)
save_file(merged, sys.argv[3])
"""


def deltas() -> dict[str, Tensor]:
    """Three updates, and two that disagree with equal force about half of their entries."""
    generator = torch.Generator().manual_seed(0)
    made = {f"random{at}": torch.randn(31, 17, generator=generator) for at in range(3)}
    opposed = made["random0"].clone()
    opposed[::2] *= -1
    return {**made, "opposed": opposed}


def ties(deltas: Sequence[Tensor], weights: Sequence[float], **params: Any) -> Tensor:
    """The mergekit preset's merge of one module."""
    method = methods.load("ties", {"preset": "mergekit", **params}, len(deltas))
    names = tuple(str(at) for at in range(len(deltas)))
    made = method(Module(Site("layers.0.q", names), list[Update](deltas), weights))
    assert isinstance(made, Tensor)
    return made


def test_the_mergekit_preset_is_mergekits_ties(tmp_path: Path) -> None:
    if not MERGEKIT.exists():
        pytest.skip("mergekit is not installed: make peers")
    three, two = ["random0", "random1", "random2"], ["random0", "opposed"]
    cases: dict[str, dict[str, Any]] = {
        f"{len(names)} adapters, density {density}, weights {weights}": {
            "deltas": names,
            "weights": weights,
            "density": density,
            "lambda": scale,
        }
        for names, weights, scale in (
            (three, [1.0, 1.0, 1.0], 1.0),
            (three, [1.0, 0.5, 2.0], 0.7),
            (three, [1.0, -0.5, 0.25], 1.0),
            (two, [0.5, 0.5], 1.0),
            (two, [1.0, -1.0], 1.0),
        )
        for density in (0.1, 0.5, 0.99)
    }
    save_file(deltas(), tmp_path / "deltas")
    command = [str(MERGEKIT), "-c", THEIR_TIES, json.dumps(cases), str(tmp_path / "deltas"), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    for name, expected in load_file(tmp_path / "merged").items():
        case = cases[name]
        given = {"density": case["density"], "lambda": case["lambda"]}
        found = ties([deltas()[each] for each in case["deltas"]], case["weights"], **given)
        assert expected.any()
        assert (found - expected).norm() <= 2e-6 * expected.norm(), name


PATH = "model.layers.0.self_attn.q_proj"


def folder(where: Path, **options: Any) -> Path:
    """A PEFT folder of a tiny Llama's adapter of rank 4, as PEFT writes it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.get_peft_model(tiny.model("llama", "causal", 40), config).save_pretrained(where)
    return where


def merged_by_peft(where: Path, weights: Sequence[float], combination_type: str) -> Tensor:
    """The update of one module that PEFT makes of the same adapter, given it twice."""
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(tiny.model("llama", "causal", 40), where, "first")
    model.load_adapter(where, "second")
    model.add_weighted_adapter(["first", "second"], list(weights), "merged", combination_type=combination_type)
    made: Tensor = model.base_model.model.get_submodule(PATH).get_delta_weight("merged").detach()
    return made


def merged_by_lorica(where: Path, weights: Sequence[float], method: str) -> Tensor:
    adapters = {name: peft_format.read(where) for name in ("first", "second")}
    chosen = methods.load(method, {}, 2)
    update = prepare(adapters, chosen, weights=weights if chosen.uses_weights else None).module(PATH).update
    assert isinstance(update, LowRank)
    return update.dense()


def times(made: Tensor, adapter: Adapter) -> float:
    """How many times the adapter's own update `made` is."""
    own = adapter.updates[PATH].dense()
    factor = float((made * own).sum() / own.square().sum())
    assert (made - factor * own).norm() <= 1e-5 * made.norm()
    return factor


@pytest.mark.parametrize("method", ["uniform", "uniform_delta", "uniform_scalar_delta", "weighted_delta_n"])
def test_an_adapter_half_and_half_with_itself_is_itself(tmp_path: Path, method: str) -> None:
    where = folder(tmp_path / "adapter")
    assert times(merged_by_peft(where, [0.5, 0.5], "linear"), peft_format.read(where)) == pytest.approx(2.0, abs=1e-5)
    assert times(merged_by_lorica(where, [0.5, 0.5], method), peft_format.read(where)) == pytest.approx(1.0, abs=1e-5)


def test_an_rslora_adapter_half_and_half_with_itself_is_itself(tmp_path: Path) -> None:
    """PEFT hands rslora on to the merge, whose scale is then √r for what has its scale in the factors already."""
    where = folder(tmp_path / "adapter", use_rslora=True)
    exact, own = [0.5, 0.5], peft_format.read(where)
    assert times(merged_by_peft(where, exact, "cat"), own) == pytest.approx(8**0.5, abs=1e-5)
    assert times(merged_by_lorica(where, exact, "uniform_scalar_delta"), own) == pytest.approx(1.0, abs=1e-5)


def test_a_weight_too_few_is_an_error(tmp_path: Path) -> None:
    """PEFT leaves out the adapters that the weights do not reach."""
    where = folder(tmp_path / "adapter")
    assert times(merged_by_peft(where, [0.5], "cat"), peft_format.read(where)) == pytest.approx(0.5, abs=1e-5)
    with pytest.raises(ConfigError, match="give one each"):
        merged_by_lorica(where, [0.5], "uniform_scalar_delta")
