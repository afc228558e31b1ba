"""The order of a run's batches: every row once an epoch, batch k by its number, each class by its share if asked."""

from __future__ import annotations

import itertools
import random

import pytest

from lorica.tasks.batching import TrainingStream

NUM_ROWS, BATCH_SIZE = 1003, 8
DRAW = random.Random(0)
CLASSES = [DRAW.choices((0, 1, 2), (6, 3, 1))[0] for _ in range(NUM_ROWS)]
LENGTHS = [DRAW.randint(5, 60) + 20 * label for label in CLASSES]  # so that sorting by length sorts by class too
KINDS = [
    pytest.param(*kind, id=f"bucketing={kind[0]} stratified={bool(kind[1])}")
    for kind in itertools.product((True, False), (None, CLASSES))
]


def stream(bucketing: bool = True, classes: list[int] | None = None, seed: int = 3) -> TrainingStream:
    return TrainingStream(LENGTHS, BATCH_SIZE, seed, bucketing, classes)


def first(batches: TrainingStream, count: int, start: int = 0) -> list[list[int]]:
    return list(itertools.islice(batches.indices(start), count))


@pytest.mark.parametrize(("bucketing", "classes"), KINDS)
def test_an_epoch_holds_every_row_once_in_an_order_of_its_own(bucketing: bool, classes: list[int] | None) -> None:
    made = stream(bucketing, classes)
    epochs = [
        list(itertools.chain(*first(made, made.batches_per_epoch, made.batches_per_epoch * epoch))) for epoch in (0, 1)
    ]
    assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert first(made, 5) != first(stream(bucketing, classes, seed=4), 5)


@pytest.mark.parametrize(("bucketing", "classes"), KINDS)
def test_a_batch_is_found_by_its_number(bucketing: bool, classes: list[int] | None) -> None:
    whole = first(stream(bucketing, classes), 300)
    assert first(stream(bucketing, classes), 170, start=130) == whole[130:]


@pytest.mark.parametrize("bucketing", [True, False])
def test_every_batch_holds_each_class_by_its_share(bucketing: bool) -> None:
    plain, stratified = (
        [
            abs(sum(CLASSES[row] == label for row in batch) - CLASSES.count(label) / NUM_ROWS * len(batch))
            for batch in first(stream(bucketing, classes), 125)
            for label in range(3)
        ]
        for classes in (None, CLASSES)
    )
    assert max(stratified) < 2 < max(plain)
    assert sum(each**2 for each in stratified) < 0.3 * sum(each**2 for each in plain)


def test_what_is_stratified_is_padded_less_than_what_is_drawn_at_random() -> None:
    padded = {
        kind: sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in first(stream(*kind), 125))
        for kind in ((True,), (False,))
    }
    spread = sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in first(stream(True, CLASSES), 125))
    assert padded[True,] < spread < padded[False,]
