"""Tiny random models of seven families, a tokenizer and adapters for them: made on the spot, the same each time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from lorica.adapters import lora
from lorica.adapters.adapter import Adapter
from lorica.adapters.delta import LowRank

KINDS = {
    "opt": "causal",
    "llama": "causal",
    "gpt2": "causal",
    "qwen2": "causal",
    "bert": "classification",
    "roberta": "classification",
    "t5": "seq2seq",
    "bart": "seq2seq",
}
FAMILIES = ("opt", "llama", "gpt2", "qwen2", "bert", "roberta", "t5")
CLASSES = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "classification": transformers.AutoModelForSequenceClassification,
}
WIDTH = 32
NUM_LABELS = 3
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # RoBERTa and OPT want padding at 1
LETTERS = "abcdefghijklmnopqrstuvwxyz.,?:!"
WORDS = ("good", "bad", "great", "the", "film", "was")  # one token each behind a space; any other word is its letters


def save(folder: Path, family: str, kind: str | None = None, seed: int = 0) -> Path:
    """A checkpoint of `family` with its tokenizer in `folder`, as transformers would save it."""
    kind = kind or KINDS[family]
    words = tokenizer(kind)
    words.save_pretrained(folder)
    model(family, kind, len(words), seed).save_pretrained(folder)
    return folder


def model(family: str, kind: str, num_tokens: int, seed: int = 0) -> Any:
    """A random model in eval mode; no bias is zero and no norm is one, so that a term left out shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = CLASSES[kind].from_config(config(family, num_tokens))
        for parameter in made.parameters():
            _roughen(parameter.data)
    return made.eval()


def _roughen(value: Tensor) -> None:
    if value.dim() == 1:
        value.add_(torch.randn_like(value) * 0.2)
    else:
        value.normal_(0.0, 1 / math.sqrt(WIDTH))


def config(family: str, num_tokens: int) -> Any:
    """A transformers config: two layers, width 32, four heads."""
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    shared = {**ids, "vocab_size": num_tokens, "num_labels": NUM_LABELS}
    layers = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    if family == "opt":
        return transformers.OPTConfig(**shared, **layers, ffn_dim=48, word_embed_proj_dim=WIDTH)
    if family == "llama":
        return transformers.LlamaConfig(**shared, **layers, intermediate_size=48, num_key_value_heads=2)
    if family == "qwen2":
        return transformers.Qwen2Config(**shared, **layers, intermediate_size=48, num_key_value_heads=2)
    if family == "bert":
        return transformers.BertConfig(**shared, **layers, intermediate_size=48)
    if family == "roberta":
        return transformers.RobertaConfig(**shared, **layers, intermediate_size=48)
    if family == "gpt2":
        return transformers.GPT2Config(**shared, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=128)
    if family == "bart":
        sides = ("encoder", "decoder")
        halves = {f"{side}_{name}": size for side in sides for name, size in (("layers", 2), ("attention_heads", 4))}
        widths = {f"{side}_ffn_dim": 48 for side in sides}
        return transformers.BartConfig(**shared, **halves, **widths, d_model=WIDTH, max_position_embeddings=128)
    assert family == "t5", family
    start = {"decoder_start_token_id": 1}
    return transformers.T5Config(**shared, **start, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4)


def tokenizer(kind: str) -> Any:
    """Byte-pair encoding over small letters with WORDS merged whole, special tokens as the kind has them."""
    pieces, merges = [*SPECIAL, "▁", *LETTERS], []
    for word in WORDS:
        for end in range(len(word)):
            merges.append(("▁" + word[:end], word[end]))
            pieces.append("▁" + word[: end + 1])
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges)), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = _post_processor(kind)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _post_processor(kind: str) -> Any:
    single = {"causal": "<s> $A", "seq2seq": "$A </s>", "classification": "<s> $A </s>"}[kind]
    return processors.TemplateProcessing(
        single=single, pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )


def adapter(
    base: nn.Module, paths: Sequence[str], *, rank: int = 2, alpha: float = 4, seed: int = 1, heads: Sequence[str] = ()
) -> Adapter:
    """A random adapter whose B is not zero, for the modules at `paths`; its heads are random too."""
    generator = torch.Generator().manual_seed(seed)
    updates = {path: update(_shape(base, path), rank, alpha / rank, generator) for path in paths}
    values = {path: _random_like(base.get_submodule(path).state_dict(), generator) for path in heads}
    return Adapter(updates, values)


def update(shape: tuple[int, int], rank: int, scale: float, generator: torch.Generator) -> LowRank:
    """A random update of a matrix of `shape` (out, in)."""
    A = torch.randn(rank, shape[1], generator=generator) / math.sqrt(shape[1])
    return LowRank(A, torch.randn(shape[0], rank, generator=generator) * 0.3, scale)


def inputs(base: Any, *, rows: int = 3, length: int = 7, seed: int = 5) -> dict[str, Tensor]:
    """Random tokens without padding, for a forward pass of any family."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(SPECIAL), base.config.vocab_size, (rows, length), generator=generator)
    made = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return made | ({"decoder_input_ids": tokens[:, :3]} if base.config.is_encoder_decoder else {})


@torch.no_grad()
def logits(base: Any, given: Mapping[str, Tensor] | None = None) -> Tensor:
    """The model's logits on `given`, or on its random inputs, in float32."""
    found: Tensor = base(**(given or inputs(base))).logits
    return found.float()


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return float(torch.linalg.vector_norm((found - expected).double()) / torch.linalg.vector_norm(expected.double()))


def _shape(base: nn.Module, path: str) -> tuple[int, int]:
    shape = lora.features(base.get_submodule(path))
    assert shape is not None, path
    return shape


def _random_like(values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.randn(value.shape, generator=generator) * 0.3 for name, value in values.items()}
