"""A base model and its tokenizer, loaded as asked: kind, dtype and code trust are the user's to state."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers.models.auto import modeling_auto

from lorica import randomness, swaps
from lorica.adapters import injection, lora
from lorica.adapters.injection import Placement
from lorica.errors import (
    ConfigError,
    LoricaError,
    MissingExtraError,
    MissingPathError,
    ModelError,
    TargetError,
)

Kind = Literal["causal", "seq2seq", "classification"]

CLASSES: dict[Kind, type[Any]] = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "classification": transformers.AutoModelForSequenceClassification,
}
TASK_TYPES: dict[Kind, str] = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOT_A_CHECKPOINT = ["*/*", "*.bin", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.pt", "*.pth", "consolidated*"]
DEMO_BASE = Path(__file__).parent / "demo" / "base"

# How transformers' families call the projections of their attention. A fused projection stands for all it holds.
FUSED_QKV = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv")
QUERY = ("q_proj", "query", "q", "q_lin", "query_proj")
KEY = ("k_proj", "key", "k", "k_lin", "key_proj")
VALUE = ("v_proj", "value", "v", "v_lin", "value_proj")
OUTPUT = (
    *("o_proj", "out_proj", "o", "out_lin", "attn.c_proj"),
    *("attention.output.dense", "self_attention.dense", "attention.dense"),
)
PRESETS = {"standard": (*FUSED_QKV, *QUERY, *VALUE), "extended": (*FUSED_QKV, *QUERY, *KEY, *VALUE, *OUTPUT)}


@dataclass(frozen=True)
class Base:
    """A loaded base model: `heads` are its task head's modules, `new` the parameters that its checkpoint lacked."""

    model: Any  # a transformers PreTrainedModel
    tokenizer: Any
    kind: Kind
    name: str
    heads: tuple[str, ...] = ()
    new: tuple[str, ...] = ()

    @property
    def untouched(self) -> tuple[str, ...]:
        """Modules that no preset adapts: heads and the output embedding."""
        return (*self.heads, *output_embedding(self.model))

    @property
    def has_drawn_head(self) -> bool:
        """Whether its task head is of random numbers, since its checkpoint has none."""
        return any(name.startswith(f"{head}.") for head in self.heads for name in self.new)


def load(
    name: str,
    *,
    kind: Kind,
    num_labels: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    quantization: str = "none",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    seed: int = 0,
) -> Base:
    """Load a checkpoint from a local folder or the hub, with `seed` for the head that the checkpoint lacks.

    Without `num_labels` a classifier has as many classes as its checkpoint says.
    Raises MissingPathError for a folder that is not there, ModelError for a checkpoint that is corrupt, incomplete or
    of another kind, MissingExtraError if quantisation needs a library that is not installed.
    """
    source = locate(name)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    options: dict[str, Any] = {**common, "dtype": DTYPES[dtype]}
    if attention is not None:
        options["attn_implementation"] = attention
    if kind == "classification":
        # A head for another number of labels is drawn anew; `_check_complete` lets nothing but a head be new.
        options |= {"ignore_mismatched_sizes": True, **({} if num_labels is None else {"num_labels": num_labels})}
    if quantization == "int8":
        options["quantization_config"] = int8()
    with _one_line(name), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **common)
        model, info = CLASSES[kind].from_pretrained(source, output_loading_info=True, **options)
    _complete_padding(model, tokenizer)
    heads = head_modules(model) if kind == "classification" else ()
    new = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    _check_complete(name, model, new, heads)
    missing_inside = {key.rpartition(".")[0] for key in new if not any(key.startswith(head + ".") for head in heads)}
    draw_new(model, new, seed)
    # Frozen from the start: torch picks its matmul by requires_grad, so a base that an adapter froze later would round
    # its logits otherwise than the same base alone.
    model.to(device).eval().requires_grad_(False)
    swaps.swap_slow_modules(model, attention=attention is None)
    return Base(model, tokenizer, kind, name, (*heads, *sorted(missing_inside)), tuple(new))


def locate(name: str) -> str:
    """The folder or hub name that `name` stands for; `demo` is the embedded model."""
    if name == "demo":
        return str(DEMO_BASE)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingPathError(f"model.name={name!r} is a folder without a config.json: no transformers checkpoint")
        return str(path)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local or (path.parent != Path() and path.parent.is_dir()):
        raise MissingPathError(f"model.name={name!r}: there is no such folder")
    return name


def read_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The checkpoint's transformers config, without its weights."""
    with _one_line(name), quiet():
        return transformers.AutoConfig.from_pretrained(
            locate(name), revision=revision, trust_remote_code=trust_remote_code
        )


def checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """The folder of the checkpoint's files; what the hub's cache does not hold of them is downloaded."""
    source = locate(name)
    if Path(source).is_dir():
        return Path(source)
    with _one_line(name):
        return Path(huggingface_hub.snapshot_download(source, revision=revision, ignore_patterns=NOT_A_CHECKPOINT))


def on_meta(
    name: str,
    *,
    kind: Kind | None = None,
    num_labels: int | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """The base model on the meta device, without weights and tokenizer; its family's kind where none is given."""
    config = read_config(name, revision, trust_remote_code)
    kind = kind or natural_kind(config)
    if kind == "classification" and num_labels is not None:
        config.num_labels = num_labels
    with torch.device("meta"), quiet():
        model = CLASSES[kind].from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    return Base(model.eval(), None, kind, name, head_modules(model) if kind == "classification" else ())


def with_tokenizer(base: Base, revision: str | None = None, trust_remote_code: bool = False) -> Base:
    """A base on the meta device with the tokenizer that `load` would give it."""
    with _one_line(base.name), quiet():
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = transformers.AutoTokenizer.from_pretrained(locate(base.name), **options)
    _complete_padding(base.model, tokenizer)
    return replace(base, tokenizer=tokenizer)


def placements(
    name: str, *, kind: Kind | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> dict[str, Placement]:
    """How the checkpoint keeps the weight of every linear module, told by its config alone."""
    model = on_meta(name, kind=kind, revision=revision, trust_remote_code=trust_remote_code).model
    return injection.placements(model, model.base_model_prefix)


def natural_kind(config: Any) -> Kind:
    """The kind that a checkpoint is used as when the user does not say: by its family."""
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "classification"
    return "causal"


def target_modules(base: Base, targets: str | Sequence[str]) -> list[str]:
    """Paths of the modules that a preset (standard, extended, all-linear), names or a regex choose (MATH section 1)."""
    if targets == "all-linear":
        return list(injection.linear_modules(base.model, base.untouched))
    if not isinstance(targets, str) or targets not in PRESETS:
        return injection.find_targets(base.model, targets, base.untouched)
    linear = injection.linear_modules(base.model, base.untouched)
    found = [path for path in linear if any(path == end or path.endswith("." + end) for end in PRESETS[targets])]
    if not found:
        names = sorted({path.rpartition(".")[2] for path in linear})
        raise TargetError(
            f"adapter.targets={targets}: this model's attention has other names; choose from {', '.join(names)}"
        )
    return found


def output_embedding(model: Any) -> tuple[str, ...]:
    """The path of the output embedding (lm_head), if the model has one."""
    embedding = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return tuple(path for path, module in model.named_modules() if embedding is not None and module is embedding)


def head_modules(model: Any) -> tuple[str, ...]:
    """The top modules outside the body of a classification model: its head."""
    tops = {name.partition(".")[0] for name, _ in model.named_parameters()}
    return tuple(sorted(tops - {model.base_model_prefix}))


def longest_input(base: Base) -> int:
    """The most tokens that the model can read at once; a million where neither model nor tokenizer states a limit."""
    stated = (getattr(base.model.config, "max_position_embeddings", None), base.tokenizer.model_max_length)
    return min([1_000_000, *(limit for limit in stated if isinstance(limit, int) and limit > 0)])


# Families whose layers take a past that was not computed from tokens, and place what follows by position_ids and mask.
TAKE_A_PREFIX = ("gpt2", "llama", "opt", "qwen2")


@torch.no_grad()
def past(base: Base, tokens: Tensor) -> Tensor:
    """(layers, 2, heads, tokens, dim) float32: the keys and values that a causal model makes of one row of tokens (t,).

    Raises ModelError for a model that would not take such a past as a prefix.
    """
    family = base.model.config.model_type
    if base.kind != "causal" or family not in TAKE_A_PREFIX:
        raise ModelError(
            f"adapter.kind=prefix: {base.name} is a {base.kind} model of the family {family}, and a prefix is known to "
            f"work for causal models of {', '.join(TAKE_A_PREFIX)}: use adapter.kind=lora"
        )
    layers = base.model(input_ids=tokens[None].to(base.model.device), use_cache=True).past_key_values.layers
    return torch.stack([torch.cat([layer.keys, layer.values]) for layer in layers]).float()


def cache(base: Base, values: Tensor) -> Any:
    """The model's cache of a past (rows, layers, 2, heads, tokens, dim), in its dtype."""
    pairs = values.to(base.model.dtype).permute(1, 2, 0, 3, 4, 5)  # (layers, 2, rows, heads, tokens, dim)
    return transformers.DynamicCache([(pair[0], pair[1]) for pair in pairs])


def is_transposed(base: Base, paths: Iterable[str]) -> bool:
    """Whether one of the modules keeps its weight as (in, out), which PEFT's config must say (fan_in_fan_out)."""
    return any(lora.is_transposed(base.model.get_submodule(path)) for path in paths)


def fingerprint(base: Base) -> str:
    """A hash of the base's parameters: names, shapes, dtypes and a sample of 64 numbers of each."""
    digest = hashlib.sha256()
    for name, parameter in base.model.state_dict().items():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def checksum(base: Base) -> str:
    """SHA-256 of every bit of the base's parameters and of their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, parameter in base.model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def choose_device(device: str) -> str:
    """`auto` as the best device there is; anything else must be usable (ConfigError)."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def int8() -> Any:
    """How a base is loaded in int8. Raises MissingExtraError without the library that does it."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingExtraError("model.quantization=int8 needs bitsandbytes: pip install bitsandbytes") from None
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """A loader's failure as one line that names the model."""
    try:
        yield
    except LoricaError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()
        raise ModelError(
            f"model.name={name!r} cannot be loaded: {first[0] if first else type(error).__name__}"
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading report: what matters of it is checked here and raised or told in lorica's words."""
    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _complete_padding(model: Any, tokenizer: Any) -> None:
    """Decoder-only checkpoints often have no padding token; padded positions are masked, so any token will do."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError("the tokenizer has no padding, end or unknown token: set one in tokenizer_config.json")
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _check_complete(name: str, model: Any, missing: Sequence[str], heads: Sequence[str]) -> None:
    """A classification head may be new, and a pooler with it; anything else that is missing is a broken checkpoint."""
    allowed = (*heads, f"{model.base_model_prefix}.pooler") if heads else ()
    lacking = [key for key in missing if not any(key.startswith(root + ".") for root in allowed)]
    if lacking:
        raise ModelError(
            f"model.name={name!r}: the checkpoint lacks {lacking[0]} ({len(lacking)} in all): wrong kind or incomplete"
        )


@torch.no_grad()
def draw_new(model: Any, new: Sequence[str], seed: int) -> None:
    """Draw the new matrices from `seed`: transformers took them from the global generator. New vectors stay."""
    std = getattr(model.config, "initializer_range", None) or 0.02
    for name, parameter in model.named_parameters():
        if name in new and parameter.dim() >= 2:
            generator = randomness.torch_generator(seed, "head", name)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
