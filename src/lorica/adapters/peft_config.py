"""An adapter's config in PEFT's format: what of it is refused, what it says of the factors, and how a new one is made.

A config from elsewhere is untrusted: no pattern in it is run as a regex.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorica import files
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank
from lorica.adapters.safetensors_header import without_duplicates
from lorica.errors import AdapterFormatError, DataError, MissingPathError

CONFIG_FILE = "adapter_config.json"
LIMIT_BYTES = 1 << 20

Layout = Mapping[str, tuple[int, int]]  # path of every linear module of the base -> (out, in)

# What changes the meaning of the factors, and so cannot be left out of account: key of the config -> why it is refused,
# and what to do.
WITHOUT_IT = "fuse it into its base with PEFT's merge_and_unload, or train it again without"
REFUSED = {
    "use_dora": (
        f"DoRA rescales the columns of W0 + s·B·A, so what it adds is no low-rank update and needs W0: {WITHOUT_IT}"
    ),
    "lora_bias": f"the biases beside B are no updates of a weight: {WITHOUT_IT}",
    "layer_replication": "it repeats the base's layers, so the modules are not those of the base: run it with PEFT",
    "target_parameters": "adapters on bare parameters (experts) are not read: train one on linear modules alone",
    "trainable_token_indices": f"retrained token embeddings are no low-rank updates: {WITHOUT_IT}",
    "alora_invocation_tokens": "aLoRA acts only behind its tokens and is no update of the weight: run it with PEFT",
    "arrow_config": "Arrow routes each token to other adapters: name those adapters themselves",
    "use_qalora": "QA-LoRA pools its inputs and is no update of the weight: run it with PEFT, or train without it",
    "use_bdlora": "BD-LoRA keeps the blocks of its factors, not the factors: run it with PEFT, or train without it",
    "kasa_config": f"KaSA has cut the smallest singular values off the base: {WITHOUT_IT}",
    "monteclora_config": "MonteCLoRA keeps its sampler among the factors: train it again without",
    "megatron_config": "megatron layouts are not read: save the adapter from PEFT without megatron",
}
BIAS = f"the base's biases were trained too, and they are no updates of a weight: {WITHOUT_IT}"
CONVERSION = (
    "it took B0·A0 out of the base, so the update is B·A - B0·A0, and this folder does not hold B0·A0: convert it "
    "where it was trained, with PEFT's save_pretrained(path_initial_model_for_weight_conversion=FOLDER OF THE ADAPTER "
    "AS IT WAS BEFORE TRAINING)"
)
# Inits that rewrite the base: how the name begins -> why it is refused, and what to do.
REWRITES_BASE = {
    **dict.fromkeys(("pissa", "olora", "corda", "lora_ga"), CONVERSION),
    "loftq": "it put a quantised base in the place of the base, and the factors are for that one: train it again from "
    "another init",
}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a LoRA's folder. Raises as `read_any` does, and AdapterFormatError for what is no LoRA's."""
    path, config = folder / CONFIG_FILE, read_any(folder)
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(f"{path}: peft_type is {config.get('peft_type')!r}, only LORA adapters are read")
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise AdapterFormatError(f"{path}: base_model_name_or_path must be a name")
    _refuse_what_is_no_update(path, config)
    return config


def read_any(folder: Path) -> dict[str, Any]:
    """The config of a PEFT folder of any kind. Raises MissingPathError, or AdapterFormatError for what is no config."""
    path = folder / CONFIG_FILE
    if not path.parent.is_dir():
        raise MissingPathError(f"no adapter folder {str(path.parent)!r}")
    try:
        with files.open_regular(path, LIMIT_BYTES) as file:
            config = json.loads(file.read(), object_pairs_hook=without_duplicates)
    except DataError as error:
        raise AdapterFormatError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path} is not JSON that can be read: {error}") from None
    if not isinstance(config, dict):
        raise AdapterFormatError(f"{path}: peft_type is {type(config).__name__!r}, only LORA adapters are read")
    return config


def _refuse_what_is_no_update(path: Path, config: Mapping[str, Any]) -> None:
    for key, reason in REFUSED.items():
        if config.get(key):
            raise AdapterFormatError(f"{path}: {key} is set: {reason}")
    if config.get("bias", "none") != "none":
        raise AdapterFormatError(f"{path}: bias={config['bias']!r}: {BIAS}")
    init = str(config.get("init_lora_weights", True))
    for name, reason in REWRITES_BASE.items():
        if init.lower().startswith(name):
            raise AdapterFormatError(f"{path}: init_lora_weights={init!r}: {reason}")


def declared_heads(config: Mapping[str, Any]) -> list[str]:
    """The modules that were trained whole and stand in the folder beside the factors."""
    declared = config.get("modules_to_save") or []
    if not isinstance(declared, list) or not all(isinstance(name, str) and name for name in declared):
        raise AdapterFormatError(f"modules_to_save={declared!r} must be a list of module names")
    return declared


def scales(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Module -> scale, for modules whose factors have these ranks."""
    rank_of = _lookup(config, "rank_pattern", config.get("r"))
    alpha_of = _lookup(config, "alpha_pattern", config.get("lora_alpha"))
    return {module: _scale(config, module, rank, rank_of(module), alpha_of(module)) for module, rank in ranks.items()}


def _scale(config: Mapping[str, Any], module: str, rank: int, stated: Any, alpha: Any) -> float:
    if stated != rank:
        raise AdapterFormatError(f"{module} holds factors of rank {rank}, but the config says r={stated!r}")
    if not isinstance(alpha, int | float) or not -1e9 < alpha < 1e9:
        raise AdapterFormatError(f"lora_alpha={alpha!r} for {module}: it must be a number")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _lookup(config: Mapping[str, Any], name: str, default: Any) -> Callable[[str], Any]:
    """The value that a pattern gives a module: the first pattern that matches, found without trying them all."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise AdapterFormatError(f"{name}={patterns!r} must map module names to numbers")
    whole: dict[str, tuple[int, Any]] = {}
    ends: dict[str, tuple[int, Any]] = {}
    for order, (pattern, value) in enumerate(patterns.items()):
        literal = pattern.replace("\\.", ".").removesuffix("$")
        plain = literal.removeprefix("^")
        if not re.fullmatch(r"[\w.-]+", plain):
            raise AdapterFormatError(f"{name} has {pattern!r}: only plain module names are read, no regex is run")
        (ends if plain == literal else whole).setdefault(plain, (order, value))

    def find(module: str) -> Any:
        parts = module.split(".")
        found = [ends[end] for end in (".".join(parts[at:]) for at in range(len(parts))) if end in ends]
        return min([*found, whole.get(module, (len(patterns), default))], key=lambda each: each[0])[1]

    return find


def new_config(
    adapter: Adapter, layout: Layout | None, task_type: str | None, dropout: float, fan_in_fan_out: bool
) -> dict[str, Any]:
    """The config of an adapter that PEFT loads as it is: each module's own rank and alpha by patterns."""
    ranks = {path: update.rank for path, update in adapter.updates.items()}
    alphas = {path: _alpha(update) for path, update in adapter.updates.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 1.0
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(path, ranks): each for path, each in ranks.items() if each != rank},
        "alpha_pattern": {_pattern(path, ranks): each for path, each in alphas.items() if each != alpha},
        "lora_dropout": dropout,
        "target_modules": _targets(list(adapter.updates), layout),
        "modules_to_save": list(adapter.heads) or None,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _pattern(path: str, paths: Iterable[str]) -> str:
    """The path as a pattern, anchored where it would match another module's end too."""
    return f"^{path}" if any(other.endswith("." + path) for other in paths) else path


def _alpha(update: LowRank) -> float:
    """lora_alpha for which alpha / rank is the update's scale, an integer where it is one."""
    alpha = update.scale * update.rank
    return int(alpha) if alpha == int(alpha) else alpha


def _targets(paths: list[str], layout: Layout | None) -> list[str]:
    """Suffixes, if they pick just these paths out of the base's modules; else the paths themselves."""
    suffixes = sorted({path.rpartition(".")[2] for path in paths})
    if layout is not None and set(of_suffixes(suffixes, layout)) == set(paths):
        return suffixes
    return sorted(paths)


def of_suffixes(suffixes: Sequence[str], layout: Layout) -> list[str]:
    """The paths of the layout that end with one of the suffixes."""
    return [path for path in layout if path.rpartition(".")[2] in suffixes]
