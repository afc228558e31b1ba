"""How an example is asked: rendered by a template and tokenised once, its answer's tokens known exactly."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorica.errors import ConfigError, ModelError
from lorica.tasks.base import Example, Prompt, Task

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """A prompt and its options: `prompts[i]` are the tokens before option i, all the same unless a token spans both."""

    prompts: tuple[Tokens, ...]
    options: tuple[Tokens, ...]
    label: int
    truncated: bool = False

    @property
    def is_one_token(self) -> bool:
        """Whether one forward pass over the prompt scores every option."""
        return all(len(option) == 1 for option in self.options) and len(set(self.prompts)) == 1

    @property
    def length(self) -> int:
        return max(len(prompt) + len(option) for prompt, option in zip(self.prompts, self.options, strict=True))


@dataclass(frozen=True)
class Classified:
    """An encoder's input, one or two texts with the tokenizer's special tokens around them."""

    tokens: Tokens
    types: Tokens
    label: int
    truncated: bool = False

    @property
    def length(self) -> int:
        return len(self.tokens)


Encoded = Choice | Classified


def encode(
    task: Task,
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_length: int,
    is_encoder_decoder: bool = False,
) -> list[Encoded]:
    """Every example tokenised. Long prompts lose tokens from their start, long encoder inputs from their longer text.

    Raises ModelError if the tokenizer cannot say which characters a token covers, ConfigError for a template that names
    a field that the data lacks.
    """
    if task.kind == "classification":
        return list(_encode_texts(task, examples, tokenizer, max_length))
    assert task.prompt is not None
    prompts = [render(task.prompt.template, example.fields) for example in examples]
    options = option_texts(task.prompt, task.labels)
    if is_encoder_decoder:
        rows = _encode_apart(prompts, options, tokenizer)
    else:
        rows = _encode_joined(prompts, options, tokenizer)
    return [
        _truncated(Choice(prompts, options, example.label), max_length, tokenizer, is_encoder_decoder)
        for (prompts, options), example in zip(rows, examples, strict=True)
    ]


def render(template: str, fields: Mapping[str, str]) -> str:
    """The template with its {field} places filled; a field's own braces are left as they are."""
    return "".join(text + ("" if name is None else fields[name]) for text, name in _places(template))


def fields_of(template: str) -> list[str]:
    """The fields that a template names. Raises ConfigError for a place that is more than a field's name."""
    return [name for _, name in _places(template) if name is not None]


def _places(template: str) -> list[tuple[str, str | None]]:
    """(text, the field behind it). Only plain names: format codes and attribute access are refused."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"task.template={template!r} cannot be read: {error}") from None
    for _, name, form, conversion in parsed:
        if name is not None and (form or conversion or not name.isidentifier()):
            raise ConfigError(f"task.template has {{{name}}}: a place is a plain field name in braces")
    return [(text, name) for text, name, _, _ in parsed]


def option_texts(prompt: Prompt, labels: Sequence[str]) -> list[str]:
    """What follows the prompt for each label: its word, after a space unless the template ends in white space."""
    space = "" if prompt.template[-1:].isspace() else " "
    return [space + prompt.verbalizer[label] for label in labels]


def _encode_joined(
    prompts: Sequence[str], options: Sequence[str], tokenizer: Any
) -> list[tuple[tuple[Tokens, ...], tuple[Tokens, ...]]]:
    """Prompt and option tokenised as one text; a token that ends behind the prompt's last character is the option's."""
    if not tokenizer.is_fast:
        raise ModelError("the tokenizer has no offsets (it is a slow one): choice tasks need a fast tokenizer")
    texts = [prompt + option for prompt in prompts for option in options]
    encoded = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    rows = []
    for index, prompt in enumerate(prompts):
        split = [
            _split_at(
                encoded["input_ids"][row],
                encoded["offset_mapping"][row],
                encoded["special_tokens_mask"][row],
                len(prompt),
            )
            for row in range(index * len(options), (index + 1) * len(options))
        ]
        rows.append((tuple(before for before, _ in split), tuple(after for _, after in split)))
    return rows


def _split_at(
    tokens: Sequence[int], offsets: Sequence[tuple[int, int]], special: Sequence[int], at: int
) -> tuple[Tokens, Tokens]:
    """(prompt, option) tokens; special tokens behind the option (an end token) belong to neither."""
    first = next((i for i, (_, end) in enumerate(offsets) if end > at), None)
    if first is None:
        raise ConfigError("an option's word has no token of its own: change task.verbalizer")
    last = next(i for i in range(len(tokens), first, -1) if not special[i - 1])
    return tuple(tokens[:first]), tuple(tokens[first:last])


def _encode_apart(
    prompts: Sequence[str], options: Sequence[str], tokenizer: Any
) -> list[tuple[tuple[Tokens, ...], tuple[Tokens, ...]]]:
    """For an encoder-decoder: the prompt is read by the encoder, the option written by the decoder."""
    answers = tuple(tuple(tokenizer(option, add_special_tokens=False)["input_ids"]) for option in options)
    return [((tuple(ids),) * len(options), answers) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]


def _truncated(choice: Choice, max_length: int, tokenizer: Any, is_encoder_decoder: bool) -> Choice:
    """The choice in at most `max_length` tokens; an encoder-decoder's options do not take room from the prompt."""
    longest = 0 if is_encoder_decoder else max(len(option) for option in choice.options)
    if max(len(prompt) for prompt in choice.prompts) + longest <= max_length:
        return choice
    if max_length - longest < 2:
        raise ConfigError(f"max_length={max_length} leaves no room for a prompt before an answer of {longest} tokens")
    prompts = tuple(_without_start(prompt, max_length - longest, tokenizer) for prompt in choice.prompts)
    return Choice(prompts, choice.options, choice.label, truncated=True)


def _without_start(prompt: Tokens, length: int, tokenizer: Any) -> Tokens:
    """The last tokens of the prompt, behind the start token if it has one."""
    start = prompt[:1] if prompt[:1] == (tokenizer.bos_token_id,) else ()
    return start + prompt[max(len(start), len(prompt) - (length - len(start))) :]


def _encode_texts(task: Task, examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Classified]:
    columns = [[example.fields[text] for example in examples] for text in task.texts]
    whole = tokenizer(*columns, verbose=False)["input_ids"]
    cut = tokenizer(*columns, truncation=True, max_length=max_length, verbose=False)
    types = cut.get("token_type_ids") or [[]] * len(examples)
    return [
        Classified(
            tuple(cut["input_ids"][i]),
            tuple(types[i]),
            example.label,
            len(whole[i]) > len(cut["input_ids"][i]),
        )
        for i, example in enumerate(examples)
    ]
