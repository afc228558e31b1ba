"""How an example is asked: rendered by a template and tokenised once, its answer's tokens known exactly."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorica.errors import ConfigError, ModelError
from lorica.tasks.base import Example, Prompt, Task

Tokens = tuple[int, ...]
LABEL_PLACE = "{label}"
TERMINATOR = "\n"  # ends an answer that is generated


@dataclass(frozen=True)
class Choice:
    """A prompt and its options: `prompts[i]` are the tokens before option i, all the same unless a token spans both.

    A prompt that is answered in words of the model's own has one option, the answer that it is trained on. Options that
    are to be calibrated stand behind a `content_free` prompt too.
    """

    prompts: tuple[Tokens, ...]
    options: tuple[Tokens, ...]
    label: int
    truncated: bool = False
    example: Example | None = field(default=None, repr=False, compare=False)
    content_free: Choice | None = field(default=None, repr=False, compare=False)

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
    example: Example | None = field(default=None, repr=False, compare=False)

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
    """Every example tokenised. What is too long loses tokens of the prompt's passage alone, from its start.

    The passage is the field that is longest in the mean. The answer, the question and the rest of the prompt stay
    whole; an encoder's input loses tokens from the end of its longer text. Raises ModelError if the tokenizer cannot
    say which characters a token covers, ConfigError for a length that leaves no room for what must stay.
    """
    if task.kind == "classification":
        return list(_encode_texts(task, examples, tokenizer, max_length))
    assert task.prompt is not None
    asked = [ask(task, example) for example in examples]
    room = Room(max_length, task.max_new_tokens, is_encoder_decoder, _longest_field(asked))
    rows = _choices(asked, tokenizer, room)
    return list(_with_content_free(task.prompt, rows, asked, tokenizer, room)) if task.sfc else list(rows)


@dataclass(frozen=True)
class Asked:
    """An example as text: its prompt, what may follow it, and where in the prompt each field stands."""

    example: Example
    prompt: str
    options: tuple[str, ...]
    places: tuple[tuple[int, int], ...]


def ask(task: Task, example: Example) -> Asked:
    """The example as its task's prompt puts it; of a generated answer, the first right one is what follows."""
    assert task.prompt is not None
    before, _ = _around_label(task.prompt.template)
    text, places = example.opening, []
    for literal, name in _places(before):
        text += literal
        if name is not None:
            places.append((len(text), len(text) + len(example.fields[name])))
            text += example.fields[name]
    if task.kind == "generation":
        options = [answer_text(example)]
    elif example.options:
        options = [option.text for option in example.options]
    else:
        options = option_texts(task.prompt, task.labels, example.fields)
    return Asked(example, text, tuple(options), tuple(places))


def answer_text(example: Example) -> str:
    """What a model is to write behind the prompt: the first right answer and the end of its line."""
    answer = ", ".join(example.golds[0])
    return f" {answer}{TERMINATOR}" if answer else TERMINATOR


def render(template: str, fields: Mapping[str, str]) -> str:
    """The template with its {field} places filled; a field's own braces are left as they are."""
    return "".join(text + ("" if name is None else fields[name]) for text, name in _places(template))


def fields_of(template: str) -> list[str]:
    """The fields that a template names. Raises ConfigError for a place that is more than a field's name."""
    places = _places("".join(_around_label(template)))
    return [name for _, name in places if name is not None]


def _around_label(template: str) -> tuple[str, str]:
    """What stands before a template's {label} place, without the space that goes with the word, and behind it."""
    before, place, behind = template.partition(LABEL_PLACE)
    return (before.removesuffix(" ") if place else before), behind


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


def option_texts(prompt: Prompt, labels: Sequence[str], fields: Mapping[str, str] | None = None) -> list[str]:
    """What follows the prompt for each label: its word, and what the template has behind its {label} place.

    A space stands before the word unless the template ends in white space there.
    """
    before, behind = _around_label(prompt.template)
    space = "" if before[-1:].isspace() else " "
    return [space + prompt.verbalizer[label] + render(behind, fields or {}) for label in labels]


@dataclass(frozen=True)
class Parts:
    """One option's tokens and those before it, and for each of the latter where its last character ends, if known."""

    prompt: Tokens
    option: Tokens
    ends: tuple[int, ...] | None


def _encode_joined(asked: Sequence[Asked], tokenizer: Any) -> list[list[Parts]]:
    """Prompt and option tokenised as one text; a token that ends behind the prompt's last character is the option's."""
    if not tokenizer.is_fast:
        raise ModelError("the tokenizer has no offsets (it is a slow one): choice tasks need a fast tokenizer")
    texts = [each.prompt + option for each in asked for option in each.options]
    encoded = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    whole = zip(encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    return [[_split_at(*next(whole), at=len(each.prompt)) for _ in each.options] for each in asked]


def _split_at(tokens: Sequence[int], offsets: Sequence[tuple[int, int]], special: Sequence[int], *, at: int) -> Parts:
    """The parts of a text; special tokens behind the option (an end token) belong to neither."""
    first = next((i for i, (_, end) in enumerate(offsets) if end > at), None)
    if first is None:
        raise ConfigError("an option's word has no token of its own: change task.verbalizer")
    if first == 0:
        raise ConfigError("a prompt has no token that could predict its option: let task.template begin with a word")
    last = next(i for i in range(len(tokens), first, -1) if not special[i - 1])
    return Parts(tuple(tokens[:first]), tuple(tokens[first:last]), tuple(end for _, end in offsets[:first]))


def _encode_apart(asked: Sequence[Asked], tokenizer: Any, *, ends: bool) -> list[list[Parts]]:
    """For an encoder-decoder: the prompt is read by the encoder, the option written by the decoder.

    An answer that `ends` has the tokenizer's end token, as the decoder's vocabulary may have no end of a line.
    """
    fast = tokenizer.is_fast
    read = tokenizer([each.prompt for each in asked], return_offsets_mapping=fast, verbose=False)
    prompts = [tuple(ids) for ids in read["input_ids"]]
    reach = [tuple(end for _, end in row) for row in read["offset_mapping"]] if fast else [None] * len(prompts)
    texts = dict.fromkeys(option for each in asked for option in each.options)
    written = {text: tuple(tokenizer(text, add_special_tokens=ends)["input_ids"]) for text in texts}
    return [
        [Parts(prompt, written[option], reached) for option in each.options]
        for each, prompt, reached in zip(asked, prompts, reach, strict=True)
    ]


@dataclass(frozen=True)
class Room:
    """How many tokens an input may have, `answer` of them at least left to what follows the prompt.

    An encoder-decoder's answers do not take room from the prompt. Of the prompt's fields only that of the number
    `passage` may be cut.
    """

    max_length: int
    answer: int
    is_encoder_decoder: bool
    passage: int | None


def _longest_field(asked: Sequence[Asked]) -> int | None:
    """The number of the field that is longest over all prompts; None if they have none."""
    totals = [
        sum(end - start for start, end in places) for places in zip(*(each.places for each in asked), strict=True)
    ]
    return totals.index(max(totals)) if totals else None


def _choices(asked: Sequence[Asked], tokenizer: Any, room: Room) -> list[Choice]:
    if room.is_encoder_decoder:
        rows = _encode_apart(asked, tokenizer, ends=room.answer > 0)
    else:
        rows = _encode_joined(asked, tokenizer)
    return [_choice(each, parts, room) for each, parts in zip(asked, rows, strict=True)]


def _with_content_free(
    prompt: Prompt, rows: Sequence[Choice], asked: Sequence[Asked], tokenizer: Any, room: Room
) -> list[Choice]:
    """The rows, each with its options behind the prompt that says nothing; rows that share all of that share it."""
    empty = [replace(each, prompt=render(prompt.content_free, each.example.fields), places=()) for each in asked]
    distinct = {(each.prompt, each.options): each for each in empty}
    made = _choices(list(distinct.values()), tokenizer, replace(room, passage=None))
    of = dict(zip(distinct, made, strict=True))
    return [replace(row, content_free=of[each.prompt, each.options]) for row, each in zip(rows, empty, strict=True)]


def _choice(asked: Asked, parts: Sequence[Parts], room: Room) -> Choice:
    """The example in at most as many tokens as there is room for."""
    longest = 0 if room.is_encoder_decoder else max(room.answer, *(len(part.option) for part in parts))
    prompts, length = [part.prompt for part in parts], room.max_length - longest
    is_long = max(map(len, prompts)) > length
    if is_long and length < 2:
        raise ConfigError(f"max_length={room.max_length} leaves no room for a prompt before {longest} tokens of answer")
    if is_long:
        place = (0, 0) if room.passage is None else asked.places[room.passage]
        prompts = [_without_start_of(place, part, length) for part in parts]
    options = tuple(part.option for part in parts)
    return Choice(tuple(prompts), options, asked.example.label, is_long, asked.example)


def _without_start_of(place: tuple[int, int], part: Parts, length: int) -> Tokens:
    """The prompt in `length` tokens at most, without the first of those tokens that end inside `place`."""
    if part.ends is None:
        raise ModelError("the tokenizer has no offsets (it is a slow one), and a prompt is too long: raise max_length")
    surplus = max(0, len(part.prompt) - length)
    inside = [index for index, end in enumerate(part.ends) if place[0] < end <= place[1]]
    if surplus > len(inside):
        raise ConfigError(
            f"a prompt of {len(part.prompt)} tokens finds no room in the {length} that task.max_length, or the model, "
            f"leaves beside its answer: its passage, which alone may be cut, has {len(inside)}"
        )
    dropped = {*inside[:surplus]}
    return tuple(token for index, token in enumerate(part.prompt) if index not in dropped)


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
            example,
        )
        for i, example in enumerate(examples)
    ]
