"""A config from YAML files, `key=value` words and flags; every mistake told in one line that names key and value.

`read(TrainConfig, ["run.yaml", "learning_rate=1e-4", "--lora_r", "8"])` gives a checked, frozen config. Words win over
YAML; two words that set one key to different values contradict each other and are an error.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from lorica import files, plugins
from lorica.config.flags import FLAGS, Flag, warn_of_older
from lorica.config.schema import Section
from lorica.errors import ConfigError, MissingPathError, UnknownNameError

CONFIG_LIMIT_BYTES = 1 << 20
ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=")
KIND_OF_VALUE = re.compile(r"function-.*|constrained-.*|(literal|list)\[.*|str|int|float|bool", re.DOTALL)
AnyConfig = TypeVar("AnyConfig", bound=Section)


def read(schema: type[AnyConfig], words: Sequence[str], beneath: Mapping[str, Any] | None = None) -> AnyConfig:
    """A checked config from YAML paths, `key=value` words and flags, all laid over what lies `beneath`.

    Raises ConfigError (bad value, contradiction), UnknownNameError (unknown key), MissingPathError (no such file).
    """
    tree: dict[str, Any] = copy.deepcopy(dict(beneath or {}))
    given: dict[str, tuple[str, Any]] = {}
    for source, key, value in _assignments(schema, words):
        if key is None:
            _merge(tree, value)
            continue
        if key in given and given[key][1] != value:
            raise ConfigError(f"{given[key][0]} and {source} contradict each other: both set {key}, drop one")
        given[key] = (source, value)
    for key, (_, value) in given.items():
        set_key(tree, key, value)
    return check(schema, tree)


def targets_apart(schema: type[Section], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(bare words, which name what a verb is asked about; all others, for `read`), each in their order.

    A bare word behind a flag that takes several values is one of them. Raises as `read` does for an unknown flag.
    """
    known, flags = keys(schema), {**FLAGS, **schema.flags}
    targets: list[str] = []
    others: list[str] = []
    queue = list(words)
    while queue:
        word, behind = queue[0], queue[1:]
        if word == "--config":
            behind = behind[1:]
        elif word.startswith("--"):
            _flag(word, behind, known, flags)
        elif not ASSIGNMENT.match(word) and not word.endswith((".yaml", ".yml")):
            targets.append(word)
            queue = behind
            continue
        others += queue[: len(queue) - len(behind)]
        queue = behind
    return targets, others


def check(schema: type[AnyConfig], tree: Any) -> AnyConfig:
    """`tree` (nested dicts) as a config, its first mistake told in one line that names the key and the value."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise _first_mistake(schema, error) from None


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Lay a dotted key's value over `tree`, nested dicts, as a word on the command line is laid over a YAML file."""
    _merge(tree, _nested(key, value))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as nested dicts, by YAML 1.2's rules: `no` is a word, 1e-5 a number, a key given twice an error."""
    with files.open_regular(path, CONFIG_LIMIT_BYTES) as file:
        try:
            tree = yaml.load(file, Loader=_Yaml)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} is not YAML that can be read: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, not keys and values")
    return tree


def dump(config: Section) -> str:
    """The config as YAML that `read` gives back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def keys(schema: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a schema, with its type: sections and leaves."""
    beside = schema.also if issubclass(schema, Section) else None
    found: dict[str, Any] = keys(beside, prefix) if beside else {}
    for name, field in schema.model_fields.items():
        section = _section_of(field.annotation)
        found[prefix + name] = bool if field.annotation is bool else field.annotation
        if section is not None:
            found |= keys(section, f"{prefix}{name}.")
    return found


def documented(schema: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, what it means) of every leaf of a schema, sections in place of their names."""
    rows = []
    for name, field in schema.model_fields.items():
        section = _section_of(field.annotation)
        if section is not None:
            rows += documented(section, f"{prefix}{name}.")
        else:
            default = "" if field.is_required() else str(field.get_default(call_default_factory=True))
            rows.append((prefix + name, default, field.description or ""))
    return rows


def _section_of(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _assignments(schema: type[Section], words: Sequence[str]) -> Iterator[tuple[str, str | None, Any]]:
    """(what the user typed, key, value) for each word; key is None for a YAML file's whole tree."""
    known = keys(schema)
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--config" and queue:
            word = queue.pop(0)
        if word.startswith("--"):
            yield _flag(word, queue, known, {**FLAGS, **schema.flags})
        elif ASSIGNMENT.match(word):
            key, text = word.split("=", 1)
            yield word, _known(key, known), _value(text)
        elif word.endswith((".yaml", ".yml")):
            if not Path(word).is_file():
                raise MissingPathError(f"no config file {word!r}")
            yield word, None, read_yaml(Path(word))
        else:
            raise ConfigError(f"cannot read {word!r}: give FILE.yaml, key=value or --flag VALUE")


def _flag(word: str, queue: list[str], known: dict[str, Any], flags: Mapping[str, Flag]) -> tuple[str, str | None, Any]:
    name, has_value, text = word.removeprefix("--").partition("=")
    name = name.replace("-", "_")
    flag = flags.get(name)
    if (flag is None or not _is_known(flag.key, known)) and name in known:
        flag = Flag(name)
    if flag is None or not _is_known(flag.key, known):
        names = [each for each, flag in flags.items() if _is_known(flag.key, known)]
        raise UnknownNameError(plugins.unknown("flag", f"--{name}", [f"--{each}" for each in (*names, *known)]))
    if _is_list(known.get(flag.key)) and not has_value:
        return word, flag.key, _next_values(word, queue)
    switch = flag.constant is not None or flag.always is not None or known.get(flag.key) is bool
    if not has_value:
        text = _next_value(word, queue, switch)
    if flag.always is not None:
        if text.lower() != "true":
            raise ConfigError(f"{word} {text}: {flag.always}; drop it")
        return word, None, {}
    if flag.constant is not None:
        if text.lower() != "true":
            raise ConfigError(f"{word} is a switch: it takes no value but true, and was given {text!r}")
        return f"{word}", flag.key, flag.constant
    if flag.deprecated:
        warn_of_older(f"the flag --{name}", f"{flag.key}=VALUE")
    return f"{word} {text}", flag.key, (flag.words or {}).get(text, _value(text))


def _is_list(annotation: Any) -> bool:
    """Whether a key takes a list, or may."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return any(get_origin(each) is list for each in members)


def _next_value(word: str, queue: list[str], switch: bool) -> str:
    if switch:
        return queue.pop(0) if queue and queue[0].lower() in ("true", "false") else "true"
    if not queue or queue[0].startswith("--"):
        raise ConfigError(f"{word} needs a value")
    return queue.pop(0)


def _next_values(word: str, queue: list[str]) -> list[Any]:
    """`--adapters a b c`, or `--adapters [a, b, c]`: the words up to the next flag or assignment."""
    texts = []
    while queue and not (queue[0].startswith("--") or ASSIGNMENT.match(queue[0])):
        texts.append(queue.pop(0))
    values = [_value(text) for text in texts]
    if not values:
        raise ConfigError(f"{word} needs one value or more")
    return values[0] if isinstance(values[0], list) and len(values) == 1 else values


def _known(key: str, known: dict[str, Any]) -> str:
    if _is_known(key, known):
        return key
    raise UnknownNameError(plugins.unknown("key", key, known))


def _is_known(key: str, known: dict[str, Any]) -> bool:
    """Whether the schema has the key, or it names something in one of the schema's dicts."""
    parts = key.split(".")
    parents = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return key in known or any("dict[" in str(known.get(parent)) for parent in parents)


def _value(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Yaml) if text.strip() else text
    except yaml.YAMLError:
        return text


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _merge(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Lay `other` over `tree`; where one side has a bare name for a section and the other keys, both stay."""
    for key, value in other.items():
        here = tree.get(key)
        if isinstance(here, str) and isinstance(value, dict):
            here = tree[key] = {"name": here}
        if isinstance(here, dict) and isinstance(value, dict):
            _merge(here, value)
        elif isinstance(here, dict) and isinstance(value, str) and key in ("model", "task"):
            here["name"] = value
        else:
            tree[key] = value


def _first_mistake(schema: type[Section], error: ValidationError) -> ConfigError:
    errors = error.errors(include_url=False)
    first, key = errors[0], _key(errors[0]["loc"])
    if first["type"] == "extra_forbidden":
        return UnknownNameError(plugins.unknown("key", key, keys(schema)))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return ConfigError(message)
    # One for each kind of value that the key takes.
    wrong = [f"{each['msg'][0].lower()}{each['msg'][1:]}" for each in errors if _key(each["loc"]) == key]
    return ConfigError(f"{key}={first['input']!r}: {', or '.join(wrong)}")


def _key(place: Sequence[int | str]) -> str:
    """The key at a place in a config, without pydantic's names for the kinds of value that it takes."""
    return ".".join(str(part) for part in place if not KIND_OF_VALUE.fullmatch(str(part)))


class _Yaml(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: PyYAML's own read `no` as False and 1e-5 as text."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)
