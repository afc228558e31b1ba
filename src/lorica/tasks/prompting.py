"""How an example is asked: rendered by a template and tokenised once, its answer's tokens known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorica.errors import ConfigError, ModelError
from lorica.tasks.base import Example, Prompt, Task
from lorica.tasks.templates import around_label, fields_of, filled, option_texts, render

Tokens = tuple[int, ...]
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

    The passage is the field that is longest in the mean, of those that the task lets be cut; where the prompt has none
    of these, it stands behind the label's word. The answer, the question and the rest of the prompt stay whole; an
    encoder's input loses tokens from the end of its longer text. Raises ModelError if the tokenizer cannot
    say which characters a token covers, ConfigError for a length that leaves no room for what must stay.
    """
    if task.kind == "classification":
        return list(_encode_texts(task, examples, tokenizer, max_length))
    assert task.prompt is not None
    asked = [ask(task, example) for example in examples]
    room = Room(max_length, task.max_new_tokens, is_encoder_decoder, _passage(task, asked))
    rows = _choices(asked, tokenizer, room)
    return list(_with_content_free(task.prompt, rows, asked, tokenizer, room)) if task.sfc else list(rows)


@dataclass(frozen=True)
class Asked:
    """An example as text: its prompt, what may follow it, and where in the prompt each field stands.

    The places of the fields `behind` a label's word are counted from the end of the text, below 0.
    """

    example: Example
    prompt: str
    options: tuple[str, ...]
    places: tuple[tuple[int, int], ...]
    behind: tuple[tuple[int, int], ...] = ()


def ask(task: Task, example: Example) -> Asked:
    """The example as its task's prompt puts it; of a generated answer, the first right one is what follows."""
    assert task.prompt is not None
    before, behind = around_label(task.prompt.template)
    text, places = filled(example.opening, before, example.fields)
    if task.kind == "generation":
        options = [answer_text(example)]
    elif example.options:
        options = [option.text for option in example.options]
    else:
        options = option_texts(task.prompt, task.labels, example.fields)
    after, places_behind = filled("", behind, example.fields)
    from_end = tuple((start - len(after), end - len(after)) for start, end in places_behind)
    return Asked(example, text, tuple(options), tuple(places), from_end)


def answer_text(example: Example) -> str:
    """What a model is to write behind the prompt: the first right answer and the end of its line."""
    answer = ", ".join(example.golds[0])
    return f" {answer}{TERMINATOR}" if answer else TERMINATOR


@dataclass(frozen=True)
class Parts:
    """One option's tokens and those before it, and for each where its last character ends, if known."""

    prompt: Tokens
    option: Tokens
    ends: tuple[int, ...] | None


def _encode_joined(asked: Sequence[Asked], tokenizer: Any, start: int | None) -> list[list[Parts]]:
    """Prompt and option tokenised as one text; a token that ends behind the prompt's last character is the option's.

    A prompt without a token of its own is the `start` token, if there is one.
    """
    if not tokenizer.is_fast:
        raise ModelError("the tokenizer has no offsets (it is a slow one): choice tasks need a fast tokenizer")
    texts = [each.prompt + option for each in asked for option in each.options]
    encoded = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    whole = zip(encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    return [[_split_at(*next(whole), at=len(each.prompt), start=start) for _ in each.options] for each in asked]


def _split_at(
    tokens: Sequence[int], offsets: Sequence[tuple[int, int]], special: Sequence[int], *, at: int, start: int | None
) -> Parts:
    """The parts of a text; special tokens behind the option (an end token) belong to neither."""
    first = next((i for i, (_, end) in enumerate(offsets) if end > at), None)
    if first is None:
        raise ConfigError("an option's word has no token of its own: change task.verbalizer")
    if first == 0 and start is None:
        raise ConfigError("a prompt has no token that could predict its option: let task.template begin with a word")
    last = next(i for i in range(len(tokens), first, -1) if not special[i - 1])
    if first == 0 and start is not None:
        return Parts((start,), tuple(tokens[:last]), None)
    return Parts(tuple(tokens[:first]), tuple(tokens[first:last]), tuple(end for _, end in offsets[:last]))


def _encode_apart(asked: Sequence[Asked], tokenizer: Any, *, ends: bool) -> list[list[Parts]]:
    """For an encoder-decoder: the prompt is read by the encoder, the option written by the decoder.

    An answer that `ends` has the tokenizer's end token, as the decoder's vocabulary may have no end of a line.
    """
    fast = tokenizer.is_fast
    read = tokenizer([each.prompt for each in asked], return_offsets_mapping=fast, verbose=False)
    prompts = [tuple(ids) for ids in read["input_ids"]]
    reach = [tuple(end for _, end in row) for row in read["offset_mapping"]] if fast else [None] * len(prompts)
    texts = dict.fromkeys(option for each in asked for option in each.options)
    written = {text: tuple(tokenizer(text, add_special_tokens=ends, verbose=False)["input_ids"]) for text in texts}
    return [
        [Parts(prompt, written[option], reached) for option in each.options]
        for each, prompt, reached in zip(asked, prompts, reach, strict=True)
    ]


@dataclass(frozen=True)
class Room:
    """How many tokens an input may have, `answer` of them at least left to what follows the prompt.

    An encoder-decoder's answers do not take room from the prompt. Of the fields only that of the number `passage`, in
    their order in the template, may be cut. `start` is the token that stands for a prompt without any, where there may
    be such.
    """

    max_length: int
    answer: int
    is_encoder_decoder: bool
    passage: int | None
    start: int | None = None

    def is_behind(self, asked: Asked) -> bool:
        """Whether what may be cut stands behind the label's word, and takes room from the prompt."""
        return not self.is_encoder_decoder and self.passage is not None and self.passage >= len(asked.places)


def _passage(task: Task, asked: Sequence[Asked]) -> int | None:
    """The number of the field that may be cut: the longest over all prompts, or else behind the label's word."""
    assert task.prompt is not None
    names = fields_of(task.prompt.template)
    columns = zip(*((*each.places, *each.behind) for each in asked), strict=True)
    totals = [sum(end - start for start, end in places) for places in columns]
    num_before = len(asked[0].places) if asked else 0
    for numbers in (range(num_before), range(num_before, len(totals))):
        free = [number for number in numbers if names[number] not in task.uncut]
        if free:
            return max(free, key=totals.__getitem__)
    return None


def _choices(asked: Sequence[Asked], tokenizer: Any, room: Room) -> list[Choice]:
    if room.is_encoder_decoder:
        rows = _encode_apart(asked, tokenizer, ends=room.answer > 0)
    else:
        rows = _encode_joined(asked, tokenizer, room.start)
    return [_choice(each, parts, room) for each, parts in zip(asked, rows, strict=True)]


def _with_content_free(
    prompt: Prompt, rows: Sequence[Choice], asked: Sequence[Asked], tokenizer: Any, room: Room
) -> list[Choice]:
    """The rows, each with its options behind the prompt that says nothing; rows that share all of that share it."""
    empty = [replace(each, prompt=render(prompt.content_free, each.example.fields), places=()) for each in asked]
    distinct = {(each.prompt, each.options): each for each in empty}
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    made = _choices(list(distinct.values()), tokenizer, replace(room, passage=None, start=start))
    of = dict(zip(distinct, made, strict=True))
    return [replace(row, content_free=of[each.prompt, each.options]) for row, each in zip(rows, empty, strict=True)]


def _choice(asked: Asked, parts: Sequence[Parts], room: Room) -> Choice:
    """The example in at most as many tokens as there is room for."""
    longest = 0 if room.is_encoder_decoder else max(room.answer, *(len(part.option) for part in parts))
    length = room.max_length - longest  # of the prompt
    is_long = max(len(part.prompt) for part in parts) > length
    if is_long:
        parts = _cut_behind(asked, parts, room) if room.is_behind(asked) else _cut_before(asked, parts, room, length)
    prompts, options = tuple(part.prompt for part in parts), tuple(part.option for part in parts)
    return Choice(prompts, options, asked.example.label, is_long, asked.example)


def _cut_before(asked: Asked, parts: Sequence[Parts], room: Room, length: int) -> list[Parts]:
    """The parts with prompts of `length` tokens at most."""
    if length < 2:
        taken = room.max_length - length
        raise ConfigError(f"max_length={room.max_length} leaves no room for a prompt before {taken} tokens of answer")
    place = (0, 0) if room.passage is None else (*asked.places, *asked.behind)[room.passage]
    return [_without_start_of(place, part, max(0, len(part.prompt) - length)) for part in parts]


def _cut_behind(asked: Asked, parts: Sequence[Parts], room: Room) -> list[Parts]:
    """The parts in as many tokens as there are for both, each without the same of what stands behind its word."""
    assert room.passage is not None
    start, end = asked.behind[room.passage - len(asked.places)]
    surplus = max(len(part.prompt) + len(part.option) for part in parts) - room.max_length
    lengths = [len(asked.prompt) + len(option) for option in asked.options]
    return [
        _without_start_of((length + start, length + end), part, surplus)
        for length, part in zip(lengths, parts, strict=True)
    ]


def _without_start_of(place: tuple[int, int], part: Parts, surplus: int) -> Parts:
    """The parts without the first `surplus` of those tokens that end inside `place`."""
    if part.ends is None:
        raise ModelError("the tokenizer has no offsets (it is a slow one), and a prompt is too long: raise max_length")
    inside = [index for index, end in enumerate(part.ends) if place[0] < end <= place[1]]
    if surplus > len(inside):
        raise ConfigError(
            f"a prompt finds no room: it has {surplus} tokens more than task.max_length, or the model, leaves beside "
            f"its answer, and its passage, which alone may be cut, has {len(inside)}"
        )
    dropped, at = {*inside[:surplus]}, len(part.prompt)
    whole = [token for token in enumerate(part.prompt + part.option) if token[0] not in dropped]
    return Parts(
        tuple(token for index, token in whole if index < at),
        tuple(token for index, token in whole if index >= at),
        None,
    )


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
