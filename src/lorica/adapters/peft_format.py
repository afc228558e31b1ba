"""Adapter folders in PEFT's format, read and written without importing peft.

A folder from elsewhere is untrusted: only JSON and safetensors are read, every key must be a factor or a declared head,
shapes are checked in the file's header before anything is allocated, and no pattern of the file is run as a regex.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorica import files
from lorica.adapters.adapter import Adapter, Head
from lorica.adapters.delta import LowRank, zero
from lorica.errors import AdapterFormatError, DataError, MissingPathError, ShapeError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_LIMIT_BYTES = 1 << 20
HEADER_LIMIT_BYTES = 8 << 20
KEY_LIMIT = 1000  # characters
PREFIX = "base_model.model."
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

Profile = Literal["peft", "portable"]
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


def read(folder: Path) -> Adapter:
    """The adapter in a PEFT folder, its scale from lora_alpha, rank_pattern, alpha_pattern and use_rslora.

    Raises MissingPathError if a file is not there, AdapterFormatError for anything that cannot be read faithfully:
    the message names the file, the key and the reason.
    """
    config = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    if not path.exists() and any(folder.glob("adapter_model.bin")):
        raise AdapterFormatError(f"{folder} holds a pickle, adapter_model.bin: convert it to safetensors first")
    shapes = read_header(path)
    declared = _declared_heads(config)
    modules, heads = _sorted_keys(shapes, declared, path)
    scales = _scales(config, {module: shapes[keys["A"]][0] for module, keys in modules.items()})
    tensors = _load(path)
    updates = {
        module: LowRank(tensors[keys["A"]], tensors[keys["B"]], scales[module]) for module, keys in modules.items()
    }
    found: dict[str, Head] = {
        module: {part: tensors[key] for part, key in parts.items()} for module, parts in heads.items()
    }
    adapter = Adapter(updates, found, config.get("base_model_name_or_path"))
    if not adapter.is_finite():
        raise AdapterFormatError(f"{path} holds NaN or infinity")
    return adapter


@dataclass(frozen=True)
class Settings:
    """What an adapter's config says beside its factors, and a merge of it hands on."""

    task_type: str | None
    fan_in_fan_out: bool


def settings(folder: Path) -> Settings:
    """The settings of a PEFT folder. Raises as `read` does."""
    config = _read_config(folder / CONFIG_FILE)
    task_type = config.get("task_type")
    return Settings(task_type if isinstance(task_type, str) else None, config.get("fan_in_fan_out") is True)


def write(adapter: Adapter, folder: Path, **options: Any) -> None:
    """Write the adapter as a PEFT folder, replacing `folder` in one rename; options as of `write_into`."""
    with files.staged_folder(folder) as staging:
        write_into(adapter, staging, **options)


def write_into(
    adapter: Adapter,
    folder: Path,
    *,
    profile: Profile = "peft",
    layout: Layout | None = None,
    task_type: str | None = None,
    dropout: float = 0.0,
    fan_in_fan_out: bool = False,
) -> None:
    """Write an adapter's two files into a folder that is there, after everything that can be refused has been.

    `peft` keeps every module's own rank and alpha (rank_pattern, alpha_pattern). `portable` is what the inference
    servers' loaders read: one rank, lora_alpha = rank, scale folded into B, suffix targets, and every layer of a target
    type present, zero-filled; it needs `layout` and cannot carry heads (ShapeError).
    """
    if profile == "portable":
        adapter = _portable(adapter, layout or {})
    if not adapter.is_finite():
        raise AdapterFormatError("the adapter holds NaN or infinity: nothing was written")
    adapter = _without_rank_zero(adapter)
    if task_type == "SEQ_CLS" and not adapter.heads:
        task_type = None  # under it PEFT insists on a head
    config = _config(adapter, layout, task_type, dropout, fan_in_fan_out)
    tensors = {}
    for path, update in adapter.updates.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = update.A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = update.B
    for path, head in adapter.heads.items():
        tensors |= {f"{PREFIX}{path}.{part}": tensor for part, tensor in head.items()}
    tensors = _apart(tensors)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU; those that share memory are copied, for safetensors refuses them."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, given in tensors.items():
        tensor = given.detach().cpu()
        storage = tensor.untyped_storage()
        if not tensor.is_contiguous() or storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        taken.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found


def _without_rank_zero(adapter: Adapter) -> Adapter:
    """PEFT knows no rank 0: an update of none becomes a zero of rank 1."""
    updates = {path: _padded(each, 1) if each.rank == 0 else each for path, each in adapter.updates.items()}
    return Adapter(updates, adapter.heads, adapter.base_model)


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file, from its header alone, checked against the file's size."""
    try:
        with files.open_regular(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size_bytes - 8, HEADER_LIMIT_BYTES):
                raise AdapterFormatError(f"{path} is truncated or no safetensors file: header of {length} bytes")
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except DataError as error:
        raise AdapterFormatError(str(error)) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, AdapterFormatError):
            raise
        raise AdapterFormatError(f"{path} is corrupt: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise AdapterFormatError(f"{path} is corrupt: its header is no table of tensors")
    header.pop("__metadata__", None)
    return {key: _checked_shape(path, key, entry, size_bytes - 8 - length) for key, entry in header.items()}


def _checked_shape(path: Path, key: str, entry: Any, data_bytes: int) -> tuple[int, ...]:
    try:
        shape = tuple(operator.index(size) for size in entry["shape"])
        start, end = map(operator.index, entry["data_offsets"])
        dtype = str(entry["dtype"])
    except (TypeError, KeyError, ValueError):
        raise AdapterFormatError(f"{path} is corrupt: the header's entry for {key!r} is not a tensor") from None
    if dtype not in ITEM_BYTES:
        raise AdapterFormatError(f"{path}: {key!r} has dtype {dtype}, a factor is one of {', '.join(ITEM_BYTES)}")
    fits = 0 <= start <= end <= data_bytes and all(size >= 0 for size in shape)
    if not fits or math.prod(shape) * ITEM_BYTES[dtype] != end - start:
        raise AdapterFormatError(f"{path} is truncated or corrupt: {key!r} does not fit into the file")
    return shape


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise AdapterFormatError(f"the key {twice[0]!r} is given twice")
    return dict(pairs)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise MissingPathError(f"no adapter folder {str(path.parent)!r}")
    try:
        with files.open_regular(path, CONFIG_LIMIT_BYTES) as file:
            config = json.loads(file.read(), object_pairs_hook=_without_duplicates)
    except DataError as error:
        raise AdapterFormatError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path} is not JSON that can be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterFormatError(f"{path}: peft_type is {found!r}, only LORA adapters are read")
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise AdapterFormatError(f"{path}: base_model_name_or_path must be a name")
    _refuse_what_is_no_update(path, config)
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


def _declared_heads(config: Mapping[str, Any]) -> list[str]:
    declared = config.get("modules_to_save") or []
    if not isinstance(declared, list) or not all(isinstance(name, str) and name for name in declared):
        raise AdapterFormatError(f"modules_to_save={declared!r} must be a list of module names")
    return declared


def _sorted_keys(
    keys: Mapping[str, tuple[int, ...]], declared: Sequence[str], path: Path
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Module -> its factors' keys, and head -> its parameters' keys. Any other key is an error."""
    modules: dict[str, dict[str, str]] = {}
    heads: dict[str, dict[str, str]] = {}
    for key in keys:
        if len(key) > KEY_LIMIT:
            raise AdapterFormatError(f"{path}: a key of {len(key)} characters is neither a factor nor a head")
        name = key.removeprefix(PREFIX)
        factor = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?(?:\.weight)?", name)
        if factor:
            if factor[2] in modules.setdefault(factor[1], {}):
                raise AdapterFormatError(f"{path}: lora_{factor[2]} of {factor[1]} is given twice")
            modules[factor[1]][factor[2]] = key
            continue
        if "lora_embedding_" in name:
            raise AdapterFormatError(f"{path}: {key!r} adapts an embedding: only linear modules are read")
        if "lora_magnitude_vector" in name:
            raise AdapterFormatError(f"{path}: {key!r}: {REFUSED['use_dora']}")
        head, part = _split_head(name, declared)
        if not head or "base_layer" in name:
            raise AdapterFormatError(f"{path}: {key!r} is neither a factor nor a head named in modules_to_save")
        if part in heads.setdefault(head, {}):
            raise AdapterFormatError(f"{path}: {head}.{part} is given twice")
        heads[head][part] = key
    for module, factors in modules.items():
        _check_factors(path, module, [keys[factors[letter]] if letter in factors else None for letter in "AB"])
    return modules, heads


def _split_head(name: str, declared: Sequence[str]) -> tuple[str, str]:
    """("classifier", "dense.weight") for a parameter of a declared head; ("", "") for any other name."""
    name = re.sub(r"\.modules_to_save(\.default)?", "", name)
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if any(module == head or module.endswith("." + head) for head in declared):
            return module, ".".join(parts[end:])
    return "", ""


def _check_factors(path: Path, module: str, shapes: Sequence[tuple[int, ...] | None]) -> None:
    A, B = shapes
    if A is None or B is None:
        raise AdapterFormatError(f"{path}: {module} has no lora_{'A' if A is None else 'B'}")
    if len(A) == 4 or len(B) == 4:
        raise AdapterFormatError(f"{path}: {module} is a convolution: only linear modules are read")
    if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        raise AdapterFormatError(f"{path}: {module} has A {A} and B {B}: they must be (r, in) and (out, r)")
    if A[0] == 0:
        raise AdapterFormatError(f"{path}: {module} has rank 0")


def _scales(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
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


def _load(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping: it has no iterator
    except SafetensorError as error:
        raise AdapterFormatError(f"{path} is corrupt: {error}") from None


def _config(
    adapter: Adapter, layout: Layout | None, task_type: str | None, dropout: float, fan_in_fan_out: bool
) -> dict[str, Any]:
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
    if layout is not None and set(_of_suffixes(suffixes, layout)) == set(paths):
        return suffixes
    return sorted(paths)


def _of_suffixes(suffixes: Sequence[str], layout: Layout) -> list[str]:
    return [path for path in layout if path.rpartition(".")[2] in suffixes]


def _portable(adapter: Adapter, layout: Layout) -> Adapter:
    if adapter.heads:
        raise ShapeError(
            f"profile=portable cannot carry the head {', '.join(adapter.heads)}: the loaders that it is for refuse "
            "heads; use profile=peft"
        )
    unknown = [path for path in adapter.updates if path not in layout]
    if unknown:
        raise ShapeError(f"profile=portable needs the base's layout, and it has no {unknown[0]}")
    suffixes = {path.rpartition(".")[2] for path in adapter.updates}
    rank = max((update.rank for update in adapter.updates.values()), default=1)
    updates = {
        path: _padded(adapter.updates.get(path) or zero(layout[path]), rank)
        for path in _of_suffixes(list(suffixes), layout)
    }
    return Adapter(updates, {}, adapter.base_model)


def _padded(update: LowRank, rank: int) -> LowRank:
    """The same update at `rank` and scale 1: scale folded into B, missing directions zero."""
    missing = rank - update.rank
    A = torch.cat([update.A, update.A.new_zeros(missing, update.shape[1])])  # (rank, in)
    B = torch.cat([update.scaled_B(), update.B.new_zeros(update.shape[0], missing)], dim=1)  # (out, rank)
    return LowRank(A, B)
