"""Which rows of a task are in which batch: batch k is a function of seed, task and k, so fitting resumes by number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count

from lorica import randomness
from lorica.merging.fitting.options import Strategy
from lorica.merging.fitting.problem import FittingTask
from lorica.tasks.batching import TrainingStream

EXPONENTS = {"uniform": 0.0, "sqrt_inverse": 0.5, "inverse": 1.0}


def batches(task: FittingTask, strategy: Strategy, batch_size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """The rows of batch `start`, `start` + 1, and so on without end.

    none: pass after pass in shuffled order, rows of similar length together. The others draw with replacement: uniform
    gives every row the same chance, inverse and sqrt_inverse a chance that falls with its label's frequency, or the
    root of that; balanced has of every label as many rows in each batch, but for a remainder that goes round.
    """
    labels = [row.label for row in task.rows]
    if strategy == "none":
        lengths = [row.length for row in task.rows]
        yield from TrainingStream(lengths, batch_size, randomness.key(seed, task.name)).indices(start)
    elif strategy == "balanced":
        yield from _balanced(labels, batch_size, seed, task.name, start)
    else:
        frequency = Counter(labels)
        chances = [frequency[label] ** -EXPONENTS[strategy] for label in labels]
        for number in count(start):
            generator = randomness.python_generator(seed, "sampling", task.name, number)
            yield generator.choices(range(len(labels)), chances, k=batch_size)


def _balanced(labels: Sequence[int], batch_size: int, seed: int, task: str, start: int) -> Iterator[list[int]]:
    by_label = {label: [row for row, own in enumerate(labels) if own == label] for label in sorted(set(labels))}
    rows = list(by_label.values())
    for number in count(start):
        generator = randomness.python_generator(seed, "sampling", task, number)
        turns = range(number * batch_size, (number + 1) * batch_size)
        yield [generator.choice(rows[turn % len(rows)]) for turn in turns]
