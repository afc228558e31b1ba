"""Where a zeroth-order run begins: A along what tells the classes apart, a head as a linear probe."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lorica import config, files, runs
from lorica.adapters import peft_format
from lorica.adapters.adapter import Adapter
from lorica.adapters.informed import ALONE, FIRST
from lorica.config import TrainConfig
from lorica.demo import language
from lorica.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

STEP = ("batch_size=8", "max_steps=1", "learning_rate=0", "adapter.rank=3", "adapter.alpha=3")
SIZES = ("task.num_train=160", "task.num_dev=40", "task.num_eval=120")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder


def begun(
    run: Path, *words: str, step: tuple[str, ...] = STEP, sizes: tuple[str, ...] = SIZES
) -> tuple[Adapter, float]:
    """What a run whose step moves nothing begins with, and its accuracy."""
    whole = ["model=demo", *step, *sizes, *words, f"output_dir={run}"]
    found = runs.train(config.read(TrainConfig, whole), Console(file=io.StringIO()))
    return peft_format.read(found.run.adapter), found.evaluation.metrics["accuracy"].value


def test_two_classes_leave_one_long_row(data: Path, tmp_path: Path) -> None:
    adapter, _ = begun(tmp_path / "run", "trainer=zo", f"task.path={data / 'sentiment'}")
    for update in adapter.updates.values():
        lengths = update.A.norm(dim=1)
        assert lengths[0] == pytest.approx(FIRST, rel=1e-2)  # kept in bfloat16
        assert (lengths[1:] < 0.1).all()
        assert not update.B.any()


def test_several_classes_leave_one_row_less(data: Path, tmp_path: Path) -> None:
    adapter, _ = begun(tmp_path / "run", "trainer=zo", f"task.path={data / 'topic'}", "adapter.targets=all-linear")
    asked, _ = begun(
        *(tmp_path / "asked", "trainer=zo", f"task.path={data / 'topic'}"),
        *("adapter.targets=all-linear", "adapter.init=discriminant"),
    )
    for path, update in adapter.updates.items():
        lengths = update.A.norm(dim=1)
        assert lengths[0] == pytest.approx(FIRST, rel=1e-2)
        assert torch.equal(asked.updates[path].A, update.A)


def test_a_head_begins_as_a_linear_probe(data: Path, tmp_path: Path) -> None:
    words = (f"task.path={data / 'sentiment'}", "task.kind=classification")
    _, seen = begun(tmp_path / "seen", "trainer=zo", *words)
    _, drawn = begun(tmp_path / "drawn", "trainer=zo", "adapter.init=kaiming", *words)
    _, probed = begun(tmp_path / "probe", "adapter.kind=linear_probe", *words, step=())
    assert seen > drawn + 0.1
    assert seen == pytest.approx(probed, abs=0.1)


def test_what_is_looked_at_is_counted_and_the_same_again(data: Path, tmp_path: Path) -> None:
    words = ("trainer=zo", f"task.path={data / 'sentiment'}")
    one, again = (begun(tmp_path / name, *words)[0] for name in ("one", "again"))
    assert all(torch.equal(again.updates[path].A, update.A) for path, update in one.updates.items())
    (step,) = files.read_records(tmp_path / "one" / "training_loss.jsonl")
    assert step["forwards"] == 160 // 8 + 8


def test_both_factors_and_backprop_begin_at_random(data: Path, tmp_path: Path) -> None:
    drawn, _ = begun(tmp_path / "drawn", "adapter.init=kaiming", f"task.path={data / 'sentiment'}")
    for name, words in (("both", ["trainer=zo", "zo.train=both"]), ("backprop", [])):
        adapter, _ = begun(tmp_path / name, *words, f"task.path={data / 'sentiment'}")
        assert all(torch.equal(adapter.updates[path].A, update.A) for path, update in drawn.updates.items())


def test_a_task_without_classes_begins_at_random_unless_it_is_asked_for_them(tmp_path: Path) -> None:
    row = {"premise": "The man fell.", "choice1": "He broke a leg.", "choice2": "I laughed.", "question": "effect"}
    lines = [json.dumps({**row, "label": number % 2, "idx": number}) + "\n" for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    words = ["trainer=zo", "task=copa", f"task.files.train={tmp_path / 'rows.jsonl'}"]
    few = ("task.num_train=16", "task.num_dev=8", "task.num_eval=8")
    adapter, _ = begun(tmp_path / "run", *words, sizes=few)
    drawn, _ = begun(tmp_path / "drawn", *words, "adapter.init=kaiming", sizes=few)
    for path, update in drawn.updates.items():
        torch.testing.assert_close(adapter.updates[path].A, ALONE * update.A)
    with pytest.raises(ConfigError, match="copa has none that all its examples share") as caught:
        begun(tmp_path / "refused", *words, "adapter.init=discriminant", sizes=few)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists()
