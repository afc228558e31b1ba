"""Solved examples before a prompt: as many as there is room for, never a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorica import randomness
from lorica.tasks.base import Example, Task, draw
from lorica.tasks.prompting import Choice, ask, encode

UNBOUNDED = 1 << 30  # tokens


def sets_of(
    pool: Sequence[Example], size: int, num_examples: int, *, seed: int, stratified: bool = False
) -> list[list[Example]]:
    """A set of demonstrations for each of `num_examples`, each drawn anew from the pool.

    Stratified, each holds each label's share.
    """
    labels = [each.label for each in pool]
    generators = (randomness.python_generator(seed, "demonstrations", number) for number in range(num_examples))
    return [[pool[index] for index in draw(labels, size, generator, stratified)] for generator in generators]


def demonstrated(
    task: Task,
    examples: Sequence[Example],
    sets: Sequence[Sequence[Example]],
    tokenizer: Any,
    *,
    max_length: int,
    is_encoder_decoder: bool = False,
) -> tuple[list[Example], int]:
    """(the examples behind their demonstrations, how many demonstrations found no room in `max_length` tokens).

    Demonstrations are joined by blank lines. Where they are too long, the first ones are left out.
    """
    texts = {id(each): solved(task, each) for those in sets for each in those}
    sizes = {
        key: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for key, text in texts.items()
    }
    kept = [_about_fitting([sizes[id(each)] for each in those], max_length) for those in sets]
    done = list(examples)
    waiting = list(range(len(examples)))
    while waiting:
        for index in waiting:
            shown = sets[index][len(sets[index]) - kept[index] :]
            opening = "".join(f"{texts[id(each)]}\n\n" for each in shown)
            done[index] = replace(examples[index], opening=opening)
        rows = encode(
            task,
            [done[index] for index in waiting],
            tokenizer,
            max_length=UNBOUNDED,
            is_encoder_decoder=is_encoder_decoder,
        )
        long = [_length(row, task, is_encoder_decoder) > max_length for row in rows if isinstance(row, Choice)]
        waiting = [index for index, is_long in zip(waiting, long, strict=True) if is_long and kept[index]]
        for index in waiting:
            kept[index] -= 1
    return done, sum(map(len, sets)) - sum(kept)


def solved(task: Task, example: Example) -> str:
    """The example as its prompt puts it, with the right answer behind it."""
    asked = ask(task, example)
    return (asked.prompt + asked.options[example.label]).strip()


def _about_fitting(sizes: Sequence[int], max_length: int) -> int:
    """How many of the last demonstrations to begin with: a few too many, as tokens may join where texts do."""
    total = 0
    for count, size in enumerate(reversed(sizes)):
        total += size
        if total > 1.1 * max_length:
            return count
    return len(sizes)


def _length(row: Choice, task: Task, is_encoder_decoder: bool) -> int:
    """The tokens that must find room at once."""
    answer = 0 if is_encoder_decoder else max(task.max_new_tokens, *map(len, row.options))
    return max(map(len, row.prompts)) + answer
