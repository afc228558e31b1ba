"""Every file in merging/methods/ says what it is, and its options are checked before anything is computed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import annotated_types
import pytest

from lorica.errors import ConfigError, UnknownNameError
from lorica.merging.method import METHODS, load

NAMES = METHODS.names()


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is_and_where_it_is_from(name: str) -> None:
    summary, *rest = documentation(name).splitlines()
    assert METHODS.summary(name) == summary
    assert 0 < len(summary) <= 120
    assert summary.endswith(".")
    assert not rest[0], "the summary is one line"
    assert any(line.startswith("Source: ") for line in rest)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_listed_as_text(name: str) -> None:
    listed = METHODS.options(name, "merge")
    parameters = options(name)
    assert [option for option, _ in listed] == [each.removesuffix("_") for each in parameters]
    for (option, text), parameter in zip(listed, parameters.values(), strict=True):
        assert text, f"{name} has no default for {option}"
        assert eval(text, vars(module(name))) == parameter.default


@pytest.mark.parametrize("name", NAMES)
def test_survey_and_check_take_the_options_of_merge(name: str) -> None:
    settled = load(name, {}, num_adapters(name)).options
    for function in (METHODS.load(name, each, default=None) for each in ("survey", "check")):
        if function is not None:
            inspect.signature(function).bind(None, **settled)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_points_to_is_there(name: str) -> None:
    approximated = METHODS.load(name, "APPROXIMATES", default=None)
    assert approximated is None or approximated in NAMES
    for alias, (option, convert) in METHODS.load(name, "ALIASES", default={}).items():
        assert option in dict(METHODS.options(name, "merge"))
        load(name, {alias: 0.5}, num_adapters(name))
        assert isinstance(convert(0.5), float)


@pytest.mark.parametrize("name", NAMES)
def test_case_and_hyphens_do_not_matter(name: str) -> None:
    assert load(name.upper().replace("_", "-"), {}, num_adapters(name)).name == name


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_method_is_refused(name: str) -> None:
    said = refused(UnknownNameError, f"{name}x", {}, 2)
    assert f"unknown merge method '{name}x'" in said
    assert name in said


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_refused(name: str) -> None:
    said = refused(UnknownNameError, name, {"no_such_option": 1}, num_adapters(name))
    assert f"method {name}" in said
    assert "no_such_option" in said


@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_does_not_fit_is_refused(name: str) -> None:
    hints = get_type_hints(METHODS.load(name, "merge"), include_extras=True)
    for parameter in options(name):
        option = parameter.removesuffix("_")
        for value in unfit(hints[parameter]):
            said = refused(ConfigError, name, {option: value}, num_adapters(name))
            assert f"method {name}: {option}=" in said, (option, value)


@pytest.mark.parametrize("name", [each for each in NAMES if METHODS.load(each, "NUM_ADAPTERS", default=None)])
def test_another_number_of_adapters_is_refused(name: str) -> None:
    needed = num_adapters(name)
    for given in (needed - 1, needed + 1):
        said = refused(ConfigError, name, {}, given)
        assert said == f"method={name} merges {needed} adapters, and was given {given}"


def documentation(name: str) -> str:
    found = inspect.getdoc(module(name))
    assert found, f"{name} has no docstring"
    return found


def module(name: str) -> Any:
    return inspect.getmodule(METHODS.load(name, "merge"))


def options(name: str) -> Mapping[str, inspect.Parameter]:
    """The keyword-only parameters of the method's `merge`."""
    parameters = inspect.signature(METHODS.load(name, "merge")).parameters
    return {key: each for key, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}


def num_adapters(name: str) -> int:
    found: int = METHODS.load(name, "NUM_ADAPTERS", default=3)
    return found


def refused(error: type[ConfigError], name: str, params: Mapping[str, Any], num_adapters: int) -> str:
    """What the refusal says, in one line."""
    with pytest.raises(error) as caught:
        load(name, params, num_adapters)
    assert "\n" not in str(caught.value)
    return str(caught.value)


OUTSIDE: dict[type, Callable[[Any], float]] = {
    annotated_types.Ge: lambda bound: bound.ge - 1,
    annotated_types.Gt: lambda bound: bound.gt,
    annotated_types.Le: lambda bound: bound.le + 1,
    annotated_types.Lt: lambda bound: bound.lt,
}


def unfit(annotation: Any) -> Iterator[Any]:
    """Values of the wrong type, not in the Literal, not finite, and on the wrong side of each bound."""
    yield object()
    inner = get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
    if get_origin(inner) is Literal:
        yield "no such choice"
    if inner in (float, int):
        yield from (math.nan, math.inf, "many")
    for bound in getattr(annotation, "__metadata__", ()):
        yield OUTSIDE[type(bound)](bound)
