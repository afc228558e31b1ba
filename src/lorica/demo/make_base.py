"""Remake the demo base: `python -m lorica.demo.make_base OUT` trains a tokenizer, then a small Llama.

Seeded from end to end; the last bits of the weights still depend on the processor and the torch build.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorica.demo.language import corpus, label_words

SEED = 7
VOCABULARY = 1536
TOKENIZER_PASSAGES = 20_000
NUM_STEPS = 3000
ROWS = 8
ROW_TOKENS = 128
PEAK_LR = 5e-3
WARMUP_STEPS = 100
# Near 1/sqrt(hidden): with less, words that share a place in the grammar never part into their classes.
INIT_STD = 0.07


def make_base(out: str | Path, *, seed: int = SEED, num_steps: int = NUM_STEPS) -> None:
    """Train tokenizer and model on the demo corpus and save both, the weights in fp16, under `out`."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = train_tokenizer(islice(corpus(seed), TOKENIZER_PASSAGES))
    model = new_model(tokenizer, generator)
    pretrain(model, token_rows(tokenizer, corpus(seed + 1)), num_steps=num_steps)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)


def train_tokenizer(passages: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: starts every text with <bos>, reads any text, knows each label word as one token.

    Raises ValueError if a label word came out in pieces.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # A prefix space makes the first word of a text the same token as that word anywhere else.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(passages, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<bos> $A",
                pair="<bos> $A $B",
                special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))],
            ),
        ]
    )
    _check_label_words(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=256,
    )


def _check_label_words(tokenizer: Tokenizer) -> None:
    broken = [word for word in label_words() if len(tokenizer.encode(word, add_special_tokens=False).ids) > 1]
    if broken:
        raise ValueError(f"label words in pieces: {', '.join(broken)}; raise VOCABULARY above {VOCABULARY}")


def new_model(tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> LlamaForCausalLM:
    """An untrained Llama of about a million parameters, its matrices drawn from `generator`."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=32, **ids)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, INIT_STD, generator=generator)
    return model


def token_rows(tokenizer: PreTrainedTokenizerFast, passages: Iterator[str]) -> Iterator[torch.Tensor]:
    """Passages laid end to end and cut into batches of int64 (ROWS, ROW_TOKENS)."""
    tokens: list[int] = []
    size = ROWS * ROW_TOKENS
    while True:
        while len(tokens) < size:
            tokens += [*tokenizer(next(passages))["input_ids"], tokenizer.eos_token_id]
        yield torch.tensor(tokens[:size]).view(ROWS, ROW_TOKENS)
        tokens = tokens[size:]


def pretrain(model: LlamaForCausalLM, batches: Iterator[torch.Tensor], *, num_steps: int) -> None:
    """Next-token training in place: AdamW, a short warm-up, then a cosine down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.05)
    model.train()
    for step, batch in enumerate(islice(batches, num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * _schedule(step, num_steps)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == num_steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)
    model.eval()


def _schedule(step: int, num_steps: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m lorica.demo.make_base OUT")
    make_base(sys.argv[1])
