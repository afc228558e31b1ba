"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): trained keys and values that every layer sees before the prompt.

A prefix comes and goes as PEFT's own folder. It is live as a module of the model whose values enter by the model's own
cache of past keys and values, so that no layer is touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorica import files, randomness
from lorica.adapters import outline, peft_config
from lorica.adapters.outline import WEIGHTS_FILE
from lorica.adapters.peft_config import CONFIG_FILE
from lorica.adapters.safetensors_header import read_header
from lorica.errors import AdapterFormatError, ShapeError

PEFT_TYPE, KEY = "PREFIX_TUNING", "prompt_embeddings"
NAME = "prefix"  # of the module in the model
WIDTH = 512  # of the network that makes a prefix, at most
NewCache = Callable[[Tensor], Any]


@dataclass(frozen=True, eq=False)
class Prefix:
    """`values` (layers, 2, heads, tokens, dim), keys before values; float32."""

    values: Tensor
    base_model: str | None = None

    @property
    def num_tokens(self) -> int:
        return self.values.shape[3]


class Direct(nn.Module):
    """A prefix whose values are the parameters themselves; (G, *shape) values are those of G branches."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        return self.values


class Reparameterized(nn.Module):
    """A prefix made by a network of one hidden layer, which trains more steadily than the values themselves.

    What the network makes is added to `start`, and is zero at first: the prefix begins there whatever is drawn.
    """

    def __init__(self, start: Tensor, seed: int) -> None:
        super().__init__()
        layers, pair, heads, num_tokens, dim = start.shape
        width = min(WIDTH, heads * dim)
        draw = randomness.torch_generator(seed, "prefix network")
        self.register_buffer("start", start.clone())
        self.tokens = nn.Parameter(torch.empty(num_tokens, width).normal_(generator=draw))
        self.hidden = nn.Parameter(torch.empty(width, width).normal_(0.0, width**-0.5, generator=draw))  # (out, in)
        self.out = nn.Parameter(torch.zeros(layers * pair * heads * dim, width))  # (out, in)

    def forward(self) -> Tensor:
        start: Tensor = self.start  # type: ignore[assignment]
        made = (self.tokens @ self.hidden.T).tanh() @ self.out.T  # (tokens, layers · 2 · heads · dim)
        return start + _as_values(made, start.shape)


@dataclass(frozen=True)
class LivePrefix:
    """A prefix on a model."""

    model: nn.Module
    module: Direct | Reparameterized
    hook: RemovableHandle
    base_model: str | None

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter; all fp32."""
        return {f"{NAME}.{name}": parameter for name, parameter in self.module.named_parameters()}

    def set_training(self, training: bool) -> None:
        """A prefix has no dropout."""

    def set_dropout_generator(self, generator: torch.Generator) -> None:
        """A prefix has no dropout."""

    def state(self) -> dict[str, Tensor]:
        """Name -> value of every parameter, copied."""
        return {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Write a state into the live parameters."""
        self.module.load_state_dict(dict(state))

    @torch.no_grad()
    def extract(self) -> Prefix:
        """The prefix as it stands, as plain values."""
        return Prefix(self.module().detach().clone(), self.base_model)


def lay_on(
    model: nn.Module, prefix: Prefix, new_cache: NewCache, *, reparameterize: bool = False, seed: int = 0
) -> LivePrefix:
    """Put the prefix before everything that the model reads, and freeze the model.

    `new_cache` makes the model's own cache of values (rows, layers, 2, heads, tokens, dim).
    """
    device = next(model.parameters()).device
    start = prefix.values.to(device, torch.float32)
    module = Reparameterized(start, seed).to(device) if reparameterize else Direct(start)
    model.requires_grad_(False)
    model.add_module(NAME, module)

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, _with_prefix(module(), kwargs, new_cache)

    return LivePrefix(model, module, model.register_forward_pre_hook(begin, with_kwargs=True), prefix.base_model)


def remove(live: LivePrefix) -> None:
    """Take the prefix off its model."""
    live.hook.remove()
    delattr(live.model, NAME)


def _with_prefix(values: Tensor, inputs: Mapping[str, Any], new_cache: NewCache) -> dict[str, Any]:
    """The model's inputs, begun after the prefix: it takes the first positions, and every token may look at it.

    A past that is given has the prefix already: it is that of a prompt which is gone on from.
    """
    mask: Tensor = inputs["attention_mask"]
    num_rows, num_tokens = len(mask), values.shape[-2]
    found = {**inputs, "attention_mask": torch.cat([mask.new_ones(num_rows, num_tokens), mask], dim=1)}
    if "position_ids" in inputs:
        found["position_ids"] = inputs["position_ids"] + num_tokens
    if inputs.get("past_key_values") is None:
        found["past_key_values"] = new_cache(_per_row(values, num_rows))
    return found


def _per_row(values: Tensor, num_rows: int) -> Tensor:
    """(rows, layers, 2, heads, tokens, dim); those of (G, ...) values hold the G branches' rows one after the other."""
    if values.dim() == 5:
        return values.expand(num_rows, *values.shape)
    if num_rows % len(values):
        raise ShapeError(f"{num_rows} rows cannot be shared out to {len(values)} branches")
    return values.repeat_interleave(num_rows // len(values), dim=0)


def write(prefix: Prefix, folder: Path) -> None:
    """Write the prefix as a PEFT folder, replacing `folder` in one rename."""
    if not torch.isfinite(prefix.values).all():
        raise AdapterFormatError("the prefix holds NaN or infinity: nothing was written")
    layers, _, heads, num_tokens, dim = prefix.values.shape
    config = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": prefix.base_model,
        "inference_mode": True,
        "num_virtual_tokens": num_tokens,
        "num_layers": layers,
        "num_attention_heads": heads,  # as PEFT counts them: those of keys and values
        "token_dim": heads * dim,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * dim,
        "prefix_projection": False,
    }
    flat = prefix.values.permute(3, 0, 1, 2, 4).reshape(num_tokens, -1)  # (tokens, layers · 2 · heads · dim)
    with files.staged_folder(folder) as staging:
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file({KEY: flat.cpu().contiguous()}, staging / WEIGHTS_FILE, metadata={"format": "pt"})


def is_prefix(folder: Path) -> bool:
    """Whether a PEFT folder says that it holds a prefix."""
    return peft_config.read_any(folder).get("peft_type") == PEFT_TYPE


def read(folder: Path) -> Prefix:
    """The prefix in a PEFT folder, its sizes checked before anything is allocated.

    Raises MissingPathError if a file is not there, AdapterFormatError for what is no prefix of a causal model.
    """
    config, path = peft_config.read_any(folder), folder / WEIGHTS_FILE
    if config.get("peft_type") != PEFT_TYPE:
        raise AdapterFormatError(f"{folder}: peft_type is {config.get('peft_type')!r}, and no prefix")
    layers, heads, num_tokens, width = (
        _size(folder, config, name) for name in ("num_layers", "num_attention_heads", "num_virtual_tokens", "token_dim")
    )
    if config.get("num_transformer_submodules", 1) != 1 or width % heads:
        raise AdapterFormatError(f"{folder}: only prefixes of causal models are read, of heads of one size")
    base_model = config.get("base_model_name_or_path")
    if not isinstance(base_model, str | None):
        raise AdapterFormatError(f"{folder}: base_model_name_or_path must be a name")
    if not path.exists() and any(folder.glob("adapter_model.bin")):
        raise AdapterFormatError(f"{folder} holds a pickle, adapter_model.bin: convert it to safetensors first")
    shapes = read_header(path)
    if shapes != {KEY: (num_tokens, layers * 2 * width)}:
        raise AdapterFormatError(
            f"{path} holds {shapes}, and the config asks for {KEY} {num_tokens, layers * 2 * width}"
        )
    flat = outline.tensors_of(path)[KEY].float()
    if not torch.isfinite(flat).all():
        raise AdapterFormatError(f"{path} holds NaN or infinity")
    return Prefix(_as_values(flat, (layers, 2, heads, num_tokens, width // heads)).contiguous(), base_model)


def _size(folder: Path, config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise AdapterFormatError(f"{folder}: {name}={value!r} must be a positive integer")
    return value


def _as_values(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(tokens, layers · 2 · heads · dim), as PEFT keeps it, as (layers, 2, heads, tokens, dim)."""
    layers, pair, heads, num_tokens, dim = shape
    return flat.view(num_tokens, layers, pair, heads, dim).permute(1, 2, 3, 0, 4)
