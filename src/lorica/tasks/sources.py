"""A task found by its name: from the catalog, the hub, a local folder, or the user's own files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorica import plugins
from lorica.errors import ConfigError, DataError, UnknownNameError
from lorica.plugins import Catalogue
from lorica.tasks.base import Hub, Kind, Prompt, Split, Task, TaskSpec, complete_splits
from lorica.tasks.examples import Reading, read_examples
from lorica.tasks.rows import Raw, read_files, read_folder, read_hub, read_meta
from lorica.tasks.templates import LABEL_PLACE, ending_of

CATALOG = Catalogue("lorica.tasks.catalog", "task")
ALIASES = {"topic": ("ag_news",), "intent": ("clinc150", "banking77")}  # by what is asked, not by the data's name
MAX_LABELS = 1000


def load_task(
    name: str | None,
    *,
    kind: Kind,
    path: str | None = None,
    more_files: Mapping[Split, str] | None = None,
    columns: Mapping[str, str] | None = None,
    label_column: str = "label",
    labels: Sequence[str] | None = None,
    prompt: str | None = None,
    template: str | None = None,
    verbalizer: Mapping[str, str] | None = None,
    sfc: bool = False,
    num_dev: int | None = None,
    num_eval: int | None = None,
    seed: int = 0,
) -> Task:
    """The task called `name`, read and checked: every row has the fields that are asked for and a known label.

    `name` is a catalog task, `hub:OWNER/NAME[:CONFIG]` or `file:TRAIN_FILE` (JSONL, CSV or Parquet; further splits in
    `more_files`); `path` reads a catalog task, or one described by its meta.json, from a local folder, `more_files`
    with a train split reads a catalog task from files. A `kind` of choice is by prompt: the task itself says whether
    its answer is chosen or generated. Raises UnknownNameError, MissingPathError or DataError, in one line that names
    the row, and ConfigError for a task that has no labels to classify by.
    """
    name, spec = _spec_of(name, path)
    columns = dict(columns or {})
    if kind == "classification" and spec is not None and (spec.options or not spec.labels):
        raise ConfigError(f"{name} has no labels that all its examples share, and a head needs them: it goes by prompt")
    if sfc and (kind == "classification" or (spec is not None and spec.kind == "generation")):
        raise ConfigError(f"task.sfc calibrates the options behind a prompt, and {name} has none: drop it")
    if labels and spec is not None and spec.golds is not None:
        raise ConfigError(f"task.labels names labels, and {name}'s answers are its examples' own: drop it")
    raw, hub = _read(name, spec, path, more_files or {}, label_column)
    if hub is not None:
        columns, label_column = {**hub.columns, **columns}, hub.label_column
    if spec is not None and spec.hub is not None:
        raw = raw.without(spec.hub.left_out, label_column)
    names = _label_names(name, labels, spec, raw, label_column)
    asked = _prompt(name, kind, spec, raw, prompt, template, verbalizer, names)
    texts = spec.texts if spec else tuple(columns) or ("text",)
    reading = Reading(spec, columns, label_column, raw.labels or names, names, texts, asked)
    splits = {split: read_examples(rows, reading) for split, rows in raw.splits.items()}
    whole = complete_splits(splits, num_dev=num_dev, num_eval=num_eval, seed=seed)
    if spec is None:
        return Task(name, kind, names, texts, asked, ("accuracy", "macro_f1"), whole, sfc=sfc)
    kind = kind if kind == "classification" else spec.kind
    return Task(
        name, kind, names, texts, asked, spec.metrics, whole, spec.train_as, spec.max_new_tokens, sfc, spec.uncut
    )


def _read(
    name: str, spec: TaskSpec | None, path: str | None, more_files: Mapping[Split, str], label_column: str
) -> tuple[Raw, Hub | None]:
    """(the task's rows, where in the hub they are from if they are)"""
    from_files = spec is not None and path is None and "train" in more_files
    if more_files and not (name.startswith("file:") or from_files):
        raise ConfigError(f"task.files goes with task.name=file:TRAIN_FILE, and the task is {name}: drop one of them")
    if name.startswith("file:"):
        return read_files({"train": name.removeprefix("file:"), **more_files}), None
    if from_files:
        return read_files(more_files), None
    if path is not None:
        return read_folder(Path(path)), None
    if name.startswith("hub:"):
        repository, _, config = name.removeprefix("hub:").partition(":")
        hub = Hub(repository, config or None, splits={}, label_column=label_column)
        return read_hub(hub, None), hub
    assert spec is not None and spec.hub is not None
    return read_hub(spec.hub, None if spec.labels_vary else spec.labels), spec.hub


def _spec_of(name: str | None, path: str | None) -> tuple[str, TaskSpec | None]:
    """The task's name and its catalog entry; a local folder may bring its own description instead."""
    if name is None and path is None:
        raise ConfigError("task.name is not given: name a task of `lorica list`, hub:OWNER/NAME or file:PATH")
    if name is None:
        assert path is not None
        meta = read_meta(Path(path))
        name = str(meta.get("name") or Path(path).name)
        if "prompt" in meta:
            return name, None
    if name.startswith(("file:", "hub:")):
        return name, None
    meant = _meant(name)
    if len(meant) == 1:
        return meant[0], CATALOG.load(meant[0], "TASK")
    if meant:
        raise UnknownNameError(f"the task {name!r} is more than one: name {' or '.join(meant)}")
    if path is None:
        raise UnknownNameError(plugins.unknown("task", name, CATALOG.names()) + " (or hub:OWNER/NAME, or file:PATH)")
    return name, None


def called(name: str) -> str:
    """The catalog's name for what is written in another way; another name stays as it is."""
    meant = _meant(name)
    return meant[0] if len(meant) == 1 else name


def _meant(name: str) -> tuple[str, ...]:
    """The catalog tasks that a name may mean, whatever its case, hyphens and underscores."""
    wanted = bare(name)
    return tuple(each for each in CATALOG.names() if bare(each) == wanted) or ALIASES.get(wanted, ())


def bare(name: str) -> str:
    """The name without case, hyphens and underscores, by which names are matched."""
    return name.lower().replace("-", "").replace("_", "")


def _label_names(
    name: str, given: Sequence[str] | None, spec: TaskSpec | None, raw: Raw, label_column: str
) -> tuple[str, ...]:
    """The task's labels: as the user says, else as the catalog does, else as the data does, else those that occur."""
    if given is not None:
        return tuple(given)
    if spec is not None and not spec.labels_vary:
        left_out = spec.hub.left_out if spec.hub else ()
        if spec.labels and raw.labels is not None and set(raw.labels) - {*left_out} != set(spec.labels):
            strange, lacking = {*raw.labels} - {*spec.labels, *left_out}, {*spec.labels} - {*raw.labels}
            raise DataError(
                f"the data's labels are not those of {name}: {', '.join(sorted(strange)) or 'none'} too many, "
                f"{', '.join(sorted(lacking)) or 'none'} missing"
            )
        return spec.labels
    if raw.labels is not None:
        return raw.labels
    occurring = {str(row[label_column]) for row in _rows(raw, "train") if row.get(label_column) is not None}
    if not 2 <= len(occurring) <= MAX_LABELS:
        raise DataError(
            f"the column task.label_column={label_column!r} holds {len(occurring)} different labels: name the column, "
            "or the labels in task.labels"
        )
    return tuple(sorted(occurring))


def _rows(raw: Raw, split: Split) -> list[dict[str, Any]]:
    return [row for _, row in raw.splits.get(split, [])]


def _prompt(
    name: str,
    kind: Kind,
    spec: TaskSpec | None,
    raw: Raw,
    version: str | None,
    template: str | None,
    verbalizer: Mapping[str, str] | None,
    labels: Sequence[str],
) -> Prompt | None:
    """The prompt of a task that goes by one: the user's own template, the version asked for, or the first there is.

    A template of the user's own says nothing in what stands behind its last field.
    """
    if kind == "classification":
        for key, given in (("prompt", version), ("template", template), ("verbalizer", verbalizer)):
            if given is not None:
                raise ConfigError(f"task.{key} is of a prompt, and {name} goes by a head here: drop it")
        return None
    prompts = dict(spec.prompts) if spec else {"default": raw.prompt} if raw.prompt else {}
    if version is not None and version not in prompts:
        raise UnknownNameError(plugins.unknown("task.prompt", version, prompts))
    base = prompts[version] if version else next(iter(prompts.values()), None)
    if base is None and template is None:
        raise ConfigError(f"{name} has no prompt: give task.template, or task.kind=classification")
    if spec is not None and not spec.has_label_words:
        _check_wordless(name, template, verbalizer)
    words = verbalizer or (base.verbalizer if base else {label: label for label in labels})
    if spec is None or spec.has_label_words:
        _check_words(words, labels, [*labels, *(base.verbalizer if base else ())])
    if template is not None:
        return Prompt(template, words, ending_of(template))
    assert base is not None
    return Prompt(base.template, words, base.content_free)


def _check_wordless(name: str, template: str | None, verbalizer: Mapping[str, str] | None) -> None:
    """Raise ConfigError for words, or a place of theirs, in a task that has none for its labels."""
    if verbalizer is not None:
        raise ConfigError(f"task.verbalizer has words for labels, and {name}'s answers are its examples' own: drop it")
    if template is not None and LABEL_PLACE in template:
        raise ConfigError(f"task.template has {LABEL_PLACE}, and {name}'s answers are its examples' own: end before it")


def _check_words(words: Mapping[str, str], labels: Sequence[str], known: Collection[str]) -> None:
    """Raise ConfigError unless each label has a word that no other has; UnknownNameError for a word of no label."""
    strange = [label for label in words if label not in known]
    if strange:
        raise UnknownNameError(plugins.unknown("label in task.verbalizer", strange[0], known))
    lacking = [label for label in labels if not words.get(label, "").strip()]
    if lacking:
        raise ConfigError(f"task.verbalizer has no word for the label {lacking[0]!r}: it has {', '.join(words)}")
    of_word: dict[str, str] = {}
    for label in labels:
        other = of_word.setdefault(words[label], label)
        if other != label:
            raise ConfigError(
                f"task.verbalizer has {words[label]!r} for {other!r} and for {label!r}: give each its own"
            )
