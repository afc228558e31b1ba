"""COPA: which of two sentences is the cause, or the effect, of a third? (Roemmele et al. 2011; prompt of MeZO.)"""

from collections.abc import Mapping
from typing import Any

from lorica.tasks.base import Hub, Option, Prompt, TaskSpec

CONJUNCTIONS = {"effect": "so", "cause": "because"}


def opened(fields: Mapping[str, str]) -> Mapping[str, str]:
    """Adds {opening}, the premise without its full stop, and the {conjunction} of what is asked for."""
    if fields["question"] not in CONJUNCTIONS:
        raise ValueError(f"its question is {fields['question']!r}, and must be {' or '.join(CONJUNCTIONS)}")
    return {
        **fields,
        "opening": fields["premise"].strip().removesuffix("."),
        "conjunction": CONJUNCTIONS[fields["question"]],
    }


def continuations(row: Mapping[str, Any]) -> list[Option]:
    """The two choices as they go on after the conjunction."""
    return [Option(f" {within_a_sentence(row[choice])}", row[choice]) for choice in ("choice1", "choice2")]


def within_a_sentence(text: str) -> str:
    """The text with its first word in small letters, unless that is "I"."""
    first, space, rest = text.strip().partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


TASK = TaskSpec(
    labels=("choice1", "choice2"),
    texts=("premise", "choice1", "choice2", "question"),
    prompts={"default": Prompt("{opening} {conjunction}", content_free="{conjunction}")},
    hub=Hub("aps/super_glue", "copa"),
    prepare=opened,
    options=continuations,
    metrics=("accuracy",),
    train_as="lm",
)
