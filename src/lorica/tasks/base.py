"""Examples, the task that they belong to, and the splits and subsets that a run takes of them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorica import files, randomness
from lorica.errors import ConfigError, DataError

Kind = Literal["choice", "classification", "generation"]
TrainAs = Literal["classification", "lm"]
Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
Gold = tuple[str, ...]  # an answer that counts as right: the spans that it consists of, one but for DROP


@dataclass(frozen=True)
class Option:
    """What may follow an example's prompt, as it stands there, and the answer that it gives."""

    text: str
    answer: str


@dataclass(frozen=True)
class Example:
    """One row: the fields that templates name, and what is right.

    `label` is the number of its label, or of its first right option where it brings `options` of its own. `golds` are
    the answers that count as right where they are told by their text. `opening` stands before its prompt:
    demonstrations.
    """

    fields: Mapping[str, str]
    label: int
    options: tuple[Option, ...] = ()
    golds: tuple[Gold, ...] = ()
    opening: str = ""

    def is_right(self, number: int) -> bool:
        """Whether the option, or label, of this number is right."""
        if self.options and self.golds:
            return (self.options[number].answer,) in self.golds
        return number == self.label


@dataclass(frozen=True)
class Prompt:
    """A template with {field} places, and the word that stands for each label.

    The word stands at the template's {label} place; without one it follows the template, after a space unless the
    template ends in white space. The verbalizer is empty where the examples bring their own options or answers.
    `content_free` is the template of a prompt that says nothing, against which options are calibrated.
    """

    template: str
    verbalizer: Mapping[str, str] = field(default_factory=dict)
    content_free: str = ""


@dataclass(frozen=True)
class Hub:
    """Where a task lives on the hub: `columns` maps our field to theirs, `splits` our split to theirs, if not as usual.

    `labels` are our names for their label numbers, where theirs are others. Rows whose label is `left_out`, by their
    name or number, are none of the task's: unlabelled pairs, questions of no class.
    """

    repository: str
    config: str | None = None
    splits: Mapping[Split, str] = field(default_factory=lambda: {"train": "train", "test": "validation"})
    columns: Mapping[str, str] = field(default_factory=dict)
    label_column: str = "label"
    labels: tuple[str, ...] | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSpec:
    """A task of the catalog. `texts` are the fields that an encoder reads; the first prompt is the default.

    What a row of the data needs beside its columns:

    - `rows` gives the examples that one row holds (MultiRC's answers to its questions).
    - `stripped` are the fields that are asked without the white space around them.
    - `prepare` may add fields that a template needs (BoolQ's capitalised question).
    - `options` are what may follow an example's prompt, where that is not the label words.
    - `golds` are the answers that count as right; with them a row has no label.

    What these functions raise as KeyError, TypeError, ValueError or AttributeError is told as the row's fault.
    `uncut` are the fields that no prompt loses a token of: a question, an answer.
    `max_new_tokens` is the length of an answer that is generated, and 0 where none is. With `labels_vary` the data may
    hold some of the labels alone, and says which.
    """

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    prompts: Mapping[str, Prompt]
    hub: Hub | None = None
    rows: Callable[[Mapping[str, Any]], Iterable[dict[str, Any]]] | None = None
    stripped: tuple[str, ...] = ()
    prepare: Callable[[Mapping[str, str]], Mapping[str, str]] | None = None
    options: Callable[[Mapping[str, Any]], Sequence[Option]] | None = None
    golds: Callable[[Mapping[str, Any]], Sequence[Gold]] | None = None
    metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    train_as: TrainAs = "classification"
    uncut: tuple[str, ...] = ()
    max_new_tokens: int = 0
    labels_vary: bool = False
    source: str = ""

    @property
    def kind(self) -> Kind:
        """How it is asked by a prompt."""
        return "generation" if self.max_new_tokens else "choice"

    @property
    def has_label_words(self) -> bool:
        """Whether an answer is a label's word, and not an option or an answer of the example's own."""
        return self.options is None and self.golds is None


@dataclass(frozen=True)
class Task:
    """A task ready to run: every split's examples, and how it is asked. `train_as` is its natural loss.

    With `sfc` an option's score is what the prompt adds to it: surface-form calibration. `uncut` are the fields that no
    prompt loses a token of.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    prompt: Prompt | None
    metrics: tuple[str, ...]
    splits: Mapping[Split, Sequence[Example]]
    train_as: TrainAs = "classification"
    max_new_tokens: int = 0
    sfc: bool = False
    uncut: tuple[str, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of every example and what is right of it: two tasks with one fingerprint hold the same data."""
        digest = hashlib.sha256(json.dumps(self.labels).encode())
        for split in SPLITS:
            for example in self.splits.get(split, ()):
                more = [[asdict(option) for option in example.options], example.golds]
                row = [split, dict(example.fields), example.label, *(more if any(more) else ())]
                digest.update(json.dumps(row).encode())
        return digest.hexdigest()[:16]


def texts_in(row: Mapping[str, Any], column: str) -> list[str]:
    """The texts, or numbers, of the list in a column. Raises TypeError for anything else that stands there."""
    found = row[column]
    if isinstance(found, str) or not all(isinstance(each, str | int | float) for each in found):
        raise TypeError(f"{column} must be a list of texts")
    return [str(each) for each in found]


def complete_splits(
    found: Mapping[Split, Sequence[Example]], *, num_dev: int | None, num_eval: int | None, seed: int
) -> dict[Split, list[Example]]:
    """Train, dev and test from what a source has.

    A source without a labelled test split is tested on its dev split, and dev is cut from train (as MeZO does); one
    with train alone has both cut from it. A cut is seeded, and disjoint from what stays. Raises DataError for an empty
    split.
    """
    splits: dict[Split, list[Example]] = {name: list(rows) for name, rows in found.items()}
    if "train" not in splits:
        raise DataError(f"the task has no train split: found {', '.join(splits) or 'none'}")
    if "test" not in splits and "dev" in splits:
        splits["test"] = splits.pop("dev")
    if "test" not in splits:
        splits["train"], splits["test"] = _cut(splits["train"], num_eval or 1000, seed, "test")
    if "dev" not in splits:
        splits["train"], splits["dev"] = _cut(splits["train"], num_dev or 500, seed, "dev")
    for name, rows in splits.items():
        if not rows:
            raise DataError(f"the {name} split is empty: give more data, or a smaller num_dev and num_eval")
    return splits


def _cut(rows: list[Example], size: int, seed: int, name: str) -> tuple[list[Example], list[Example]]:
    """(what stays, what is cut off), both in their old order. At most half of the rows are cut off."""
    size = min(size, len(rows) // 2)
    taken = set(randomness.python_generator(seed, "cut", name).sample(range(len(rows)), size))
    stays = [row for index, row in enumerate(rows) if index not in taken]
    return stays, [rows[index] for index in sorted(taken)]


def subset(task: Task, split: Split, size: int | None, *, seed: int, stratified: bool) -> list[Example]:
    """`size` examples of a split, drawn with `seed`; all of them, in order, if `size` is None or not smaller.

    Stratified keeps each label's share. The indices are cached on disk by the data's fingerprint and the options, so a
    subset stays the same under a later version of the drawing code. ConfigError if there are fewer than `size` to train
    on; of the other splits `size` is the most that is looked at.
    """
    rows = list(task.splits[split])
    if split == "train" and size is not None and size > len(rows):
        raise ConfigError(f"{size} examples of {task.name}'s {split} split were asked for, and it has {len(rows)}")
    if size is None or size >= len(rows):
        return rows
    name = f"{task.fingerprint}-{split}-{size}-{seed}-{'stratified' if stratified else 'plain'}.json"
    path = cache_folder() / "subsets" / name
    indices = _cached_indices(path, len(rows), size)
    if indices is None:
        indices = draw(
            [row.label for row in rows], size, randomness.python_generator(seed, "subset", split), stratified
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, indices)
    return [rows[index] for index in indices]


def draw(labels: Sequence[int], size: int, generator: random.Random, stratified: bool) -> list[int]:
    """`size` indices without repetition; stratified: each label's share to within one example."""
    order = generator.sample(range(len(labels)), len(labels))
    if not stratified:
        return order[:size]
    return sorted(order, key=_stratified_rank(labels, order))[:size]


def _stratified_rank(labels: Sequence[int], order: Sequence[int]) -> Callable[[int], float]:
    """The n-th example of a label in `order` ranks at n / (the label's count): a prefix holds every label's share."""
    counts: dict[int, int] = {}
    nth: dict[int, int] = {}
    for index in order:
        counts[labels[index]] = counts.get(labels[index], 0) + 1
        nth[index] = counts[labels[index]]
    return lambda index: (nth[index] - 0.5) / counts[labels[index]]


def cache_folder() -> Path:
    """Where derived data is kept: LORICA_CACHE, or the user's cache folder."""
    given = os.environ.get("LORICA_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "lorica"


def _cached_indices(path: Path, num_rows: int, size: int) -> list[int] | None:
    if not path.is_file():
        return None
    indices = json.loads(path.read_text("utf-8"))
    whole = isinstance(indices, list) and len(set(indices)) == size and all(0 <= each < num_rows for each in indices)
    return indices if whole else None
