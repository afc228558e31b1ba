"""Templates of prompts: texts with {field} places, and with a {label} place for the word of an answer."""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping, Sequence

from lorica.errors import ConfigError
from lorica.tasks.base import Prompt

LABEL_PLACE = "{label}"


def render(template: str, fields: Mapping[str, str]) -> str:
    """The template with its {field} places filled; a field's own braces are left as they are."""
    return filled("", template, fields)[0]


def filled(opening: str, template: str, fields: Mapping[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """(the opening, and the template with its places filled; where each field begins and ends)"""
    text, places = opening, []
    for literal, name in _places(template):
        text += literal
        if name is not None:
            places.append((len(text), len(text) + len(fields[name])))
            text += fields[name]
    return text, places


def fields_of(template: str) -> list[str]:
    """The fields that a template names. Raises ConfigError for a place that is more than a field's name."""
    places = _places("".join(around_label(template)))
    return [name for _, name in places if name is not None]


def ending_of(template: str) -> str:
    """What stands behind the last field of a template, as far as its {label} place."""
    before, _ = around_label(template)
    places = reversed(_places(before))
    return "".join(reversed([text for text, _ in itertools.takewhile(lambda place: place[1] is None, places)]))


def option_texts(prompt: Prompt, labels: Sequence[str], fields: Mapping[str, str] | None = None) -> list[str]:
    """What follows the prompt for each label: its word, and what the template has behind its {label} place.

    A space stands before the word unless the template ends in white space there.
    """
    before, behind = around_label(prompt.template)
    space = "" if before[-1:].isspace() else " "
    return [space + prompt.verbalizer[label] + render(behind, fields or {}) for label in labels]


def around_label(template: str) -> tuple[str, str]:
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
