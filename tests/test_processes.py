"""Two processes that share out the rows of every batch take the steps that one process takes with all of them."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from accelerate.state import AcceleratorState
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from lorica import config, files, processes, results, runs
from lorica.config import ReplayConfig, TrainConfig
from lorica.demo import language
from lorica.errors import (
    ConfigError,
    DriftError,
    FolderInUseError,
    InterruptedRunError,
    LostProcessError,
    OutputExistsError,
)
from lorica.processes import Processes
from lorica.runs.training import stretch_trainer
from lorica.tasks.batching import Batch, ChoiceBatch, HeadBatch, mapped, share
from lorica.training import fit
from test_resume import until

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

BASE = "model=demo batch_size=5 max_steps=24 learning_rate=1e-2 save_steps=8 eval_steps=10"
SIZES = "task.num_train=61 task.num_dev=20 task.num_eval=20"
ZO = "trainer=zo zo.branches=1 zo.epsilon=1e-2"
ADAPTIVE = (
    "adapter.kind=xgblora boosting.use_adaptive_merge=true boosting.patience=4 boosting.improvement_threshold=0.05 "
    "boosting.judge=probe boosting.probe_size=8"
)
RUNS = {
    "spsa": f"{ZO} zo.estimator=spsa",
    "one sided": "trainer=zo zo.estimator=one_sided zo.num_directions=3 zo.branches=3 gradient_accumulation_steps=2 "
    "zo.normalize=rms learning_rate=1e-3",
    "exact slope": "trainer=zo zo.estimator=forward_gradient zo.num_directions=2 max_steps=12",
    "accuracy": f"{ZO} zo.objective=accuracy zo.epsilon=0.1",
    "zeroth-order adaptive": f"{ZO} {ADAPTIVE} learning_rate=0.2",
    "backprop": "trainer=backprop gradient_accumulation_steps=2",
    "head": "trainer=backprop task.kind=classification",
    "boosted": "trainer=backprop adapter.kind=xgblora boosting.steps_per_iteration=15",
    "adaptive": f"trainer=backprop {ADAPTIVE}",
    "full": "trainer=zo adapter.kind=full max_steps=12 learning_rate=2e-4",
}
Hook = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder / "topic"


def words_for(data: Path, folder: Path, *more: str) -> list[str]:
    """BASE, what differs from it, and the places."""
    words = " ".join([BASE, SIZES, *more]).split()
    given = dict(word.split("=", 1) for word in words)
    return [*(f"{key}={value}" for key, value in given.items()), f"task.path={data}", f"output_dir={folder}"]


def train(words: list[str]) -> Path:
    return runs.train(config.read(TrainConfig, words), Console(quiet=True)).run.path


@dataclass
class Pair:
    """Two processes that are started once, and train together as often as they are asked to."""

    jobs: list[Any]
    results: Any

    def __call__(self, words: list[str], hook: Hook | None = None) -> list[str]:
        """What each came to: its run's folder, or the name and text of its error."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for queue in self.jobs:
            queue.put((port, words, hook))
        found = dict(self.results.get(timeout=300) for _ in self.jobs)
        return [found[rank] for rank in range(2)]


@pytest.fixture(scope="module")
def together() -> Iterator[Pair]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorica.runs", "transformers.models.llama.modeling_llama"])  # once for both
    pair = Pair([context.Queue() for _ in range(2)], context.Queue())
    processes = [context.Process(target=_works, args=(rank, pair.jobs[rank], pair.results)) for rank in range(2)]
    for process in processes:
        process.start()
    yield pair
    for queue, process in zip(pair.jobs, processes, strict=True):
        queue.put(None)
        process.join()


def _works(rank: int, jobs: Any, results: Any) -> None:
    """Take part in what is asked for until there is nothing more; a hook's patches last for one job."""
    while (job := jobs.get()) is not None:
        port, words, hook = job
        with pytest.MonkeyPatch.context() as patch:
            there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for name, value in there.items():
                patch.setenv(name, str(value))
            AcceleratorState._reset_state(reset_partial_state=True)  # a process has one for its life
            try:
                if hook is not None:
                    hook(patch)
                results.put((rank, str(train(words))))
            except BaseException as error:
                results.put((rank, f"{type(error).__name__}: {error}"))


@pytest.fixture(scope="module")
def unbroken(together: Pair, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What the pair leaves of a run by these words that nothing stops; made when first asked for."""

    @functools.cache
    def folder(more: str) -> Path:
        run = tmp_path_factory.mktemp("unbroken") / "run"
        here, there = together(words_for(data, run, more))
        assert here == there == str(run), here
        return run

    return folder


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in files.read_records(run / "training_loss.jsonl")]


def without_seconds(run: Path, name: str) -> list[dict[str, Any]]:
    return [{**line, "seconds": None} for line in files.read_records(run / name)]


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_take_the_steps_of_one(
    unbroken: Callable[[str], Path], data: Path, tmp_path: Path, name: str
) -> None:
    alone = train(words_for(data, tmp_path / "alone", RUNS[name]))
    two = unbroken(RUNS[name])
    assert losses(two) == pytest.approx(losses(alone), rel=1e-5)
    assert max(losses(two)) - min(losses(two)) > 0.05, "steps that change nothing would agree too"
    for one, other in zip(*(without_seconds(each, "training_loss.jsonl") for each in (alone, two)), strict=True):
        assert {**one, "loss": None, "trend_t": None} == {**other, "loss": None, "trend_t": None}
    if (alone / "ledger.jsonl").exists():
        rounds = [
            [(line["reason"], line["last_step"], line["accepted"]) for line in ledger(run)] for run in (alone, two)
        ]
        assert rounds[0] == rounds[1] and len(rounds[0]) > 1
    place = "model" if name == "full" else "adapter"
    (left,) = (alone / place).glob("*.safetensors")
    there = load_file(two / place / left.name)
    for key, expected in load_file(left).items():
        torch.testing.assert_close(there[key], expected, rtol=1e-3, atol=2e-4)
    for part in ("eval_loss.jsonl", "eval_results_test.json", "README.md", f"best_{place}", "record.json"):
        assert (two / part).exists(), part
    if "trainer=zo" in RUNS[name]:
        assert runs.replay(str(two), config.read(ReplayConfig, [])).is_identical


def ledger(run: Path) -> list[dict[str, Any]]:
    return files.read_records(run / "ledger.jsonl")


def counts_what_is_exchanged(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let this process write down the size of every tensor that it exchanges."""
    rank, original = os.environ["RANK"], dist.all_reduce

    def counted(values: Tensor, *rest: Any, **options: Any) -> Any:
        with (folder / f"exchanged-{rank}").open("a") as file:
            file.write(f"{values.dtype} {values.numel()}\n")
        return original(values, *rest, **options)

    patch.setattr(dist, "all_reduce", counted)


@pytest.mark.parametrize(("name", "numbers"), [("spsa", 2), ("one sided", 3), ("exact slope", 4)])
def test_a_zeroth_order_step_exchanges_its_losses_once_and_nothing_else(
    together: Pair, data: Path, tmp_path: Path, name: str, numbers: int
) -> None:
    words = words_for(data, tmp_path / "run", RUNS[name], "max_steps=10")
    together(words, functools.partial(counts_what_is_exchanged, folder=tmp_path))
    for rank in (0, 1):
        lines = (tmp_path / f"exchanged-{rank}").read_text().splitlines()
        assert lines == [f"torch.float64 {numbers + 1}"] * 10, "the losses, and the wish to stop"


def strays(patch: pytest.MonkeyPatch, every: int) -> None:
    """Let one process's parameters go their own way at step 8, and be compared every so many."""
    original, num_steps = fit.apply, itertools.count(1)

    def apply(optimizer: Any, trainable: Any, *rest: Any) -> None:
        original(optimizer, trainable, *rest)
        if next(num_steps) == 8 and os.environ["RANK"] == "1":
            next(iter(trainable.values())).data.view(-1)[0].add_(1e-6)

    patch.setattr(fit, "apply", apply)
    patch.setattr(stretch_trainer, "SEGMENT", every)


@pytest.mark.parametrize(
    ("every", "more", "told"),
    [(5, "", 10), (100, "max_steps=12", 12), (100, "adapter.kind=xgblora boosting.steps_per_iteration=9", 9)],
)
def test_drift_is_an_error_that_names_the_step(
    together: Pair, data: Path, tmp_path: Path, every: int, more: str, told: int
) -> None:
    """Also where a run or a round ends before it is looked for again."""
    words = words_for(data, tmp_path / "run", ZO, "max_steps=15 eval_steps=null zo.warm_start_steps=0", more)
    found = together(words, functools.partial(strays, every=every))
    assert all(each.startswith(f"{DriftError.__name__}: step {told}: ") for each in found), found


def is_stopped(patch: pytest.MonkeyPatch, rank: str, step: int) -> None:
    """Let one process get a signal after a step."""
    original = fit._told

    def told(progress: fit.Progress, *rest: Any) -> fit.Step:
        if progress.step == step and os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(progress, *rest)

    patch.setattr(fit, "_told", told)


@pytest.mark.parametrize(("name", "rank"), [("spsa", "1"), ("adaptive", "0"), ("adaptive", "1")])
def test_a_signal_to_any_stops_all_and_all_go_on(
    together: Pair, unbroken: Callable[[str], Path], data: Path, tmp_path: Path, name: str, rank: str
) -> None:
    more = f"{RUNS[name]} adapter.dropout=0.1" if name == "adaptive" else RUNS[name]
    whole = unbroken(more)
    found = together(words_for(data, tmp_path / "run", more), functools.partial(is_stopped, rank=rank, step=19))
    stopped = f"{InterruptedRunError.__name__}: stopped at step "
    assert all(each.startswith(stopped) for each in found) and found[0] == found[1], found
    assert found[0].startswith((f"{stopped}19;", f"{stopped}20;"))
    run = Path(together([f"resume={tmp_path / 'run'}"])[0])
    for part in ("training_loss.jsonl", "eval_loss.jsonl"):
        assert without_seconds(run, part) == without_seconds(whole, part)
    contents = [(each / "adapter" / "adapter_model.safetensors").read_bytes() for each in (run, whole)]
    assert contents[0] == contents[1]
    assert together([f"resume={run}"]) == [str(run), str(run)], "a finished run is left as it is"


def test_what_cannot_be_shared_out_is_refused(together: Pair, data: Path, tmp_path: Path) -> None:
    found = together(words_for(data, tmp_path / "run", ZO, "zo.objective=macro_f1"))
    assert all(each.startswith(f"{ConfigError.__name__}: zo.objective=macro_f1") for each in found), found
    assert not (tmp_path / "run").exists()


def test_what_the_first_is_refused_ends_the_others_with_a_line(together: Pair, data: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    found = together(words_for(data, tmp_path, ZO))
    assert found[0].startswith(f"{OutputExistsError.__name__}: output_dir=")
    assert found[1].startswith(f"{LostProcessError.__name__}: another process")


def goes_alone(patch: pytest.MonkeyPatch, gate: Path | None) -> None:
    """Let a process be a run of its own; with a `gate` both have found the folder empty before either goes on."""
    patch.setenv("WORLD_SIZE", "1")
    original, rank = results.new_run, int(os.environ["RANK"])

    def new_run(*words: Any) -> Any:
        run = original(*words)
        if gate is not None:
            (gate / str(rank)).touch()
            until((gate / str(1 - rank)).exists)
        return run

    patch.setattr(results, "new_run", new_run)


@pytest.mark.parametrize("meet", [False, True])
def test_of_two_that_start_in_one_folder_one_wins(together: Pair, data: Path, tmp_path: Path, meet: bool) -> None:
    run, words = tmp_path / "run", ("trainer=backprop max_steps=5 eval_steps=null",)
    hook = functools.partial(goes_alone, gate=tmp_path if meet else None)
    lost, won = sorted(together(words_for(data, run, *words), hook), key=str(run).__eq__)
    assert won == str(run), lost
    assert lost.startswith(
        FolderInUseError.__name__ if meet else (FolderInUseError.__name__, OutputExistsError.__name__)
    )
    assert str(run) in lost and "\n" not in lost
    assert losses(run) == losses(train(words_for(data, tmp_path / "alone", *words)))
    assert (run / "record.json").exists() and files.read_json(run / "trainer_state.json")["step"] == 5


def test_a_folder_that_another_has_taken_and_left_meanwhile_is_let_be(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, original = words_for(data, tmp_path / "run", "trainer=backprop max_steps=1 eval_steps=null"), results.new_run

    def new_run(*given: Any) -> Any:
        found = original(*given)
        monkeypatch.setattr(results, "new_run", original)
        train(words)
        return found

    monkeypatch.setattr(results, "new_run", new_run)
    with pytest.raises(OutputExistsError, match="another run has taken"):
        train(words)
    assert len(losses(tmp_path / "run")) == 1 and (tmp_path / "run" / "record.json").exists()


@pytest.mark.parametrize(
    ("size", "told"), [("2", "WORLD_SIZE=2 without RANK, MASTER_ADDR, MASTER_PORT"), ("0", "'0'"), ("many", "'many'")]
)
def test_half_a_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, size: str, told: str) -> None:
    for name in processes.MEETING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match=told), processes.joined():
        pass


def shards(patch: pytest.MonkeyPatch, told: Path | None = None) -> None:
    """Set accelerate up for FSDP, and note that the base was sharded for it."""
    original = fsdp.fully_shard

    def noted(module: Any, **options: Any) -> Any:
        if told is not None:
            (told / "sharded").touch()
        return original(module, **options)

    patch.setenv("ACCELERATE_USE_FSDP", "true")
    patch.setattr(fsdp, "fully_shard", noted)


@pytest.mark.parametrize("name", ["boosted", "head"])
def test_a_base_in_parts_is_trained_as_a_whole_one(together: Pair, data: Path, tmp_path: Path, name: str) -> None:
    words = (RUNS[name], "max_steps=20 boosting.steps_per_iteration=8" if name == "boosted" else "max_steps=20")
    alone = train(words_for(data, tmp_path / "alone", *words))
    found = together(words_for(data, tmp_path / "two", *words), functools.partial(shards, told=tmp_path))
    assert found == [str(tmp_path / "two")] * 2
    assert (tmp_path / "sharded").exists()
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=1e-5)
    results = [files.read_json(run / "eval_results_test.json") for run in (alone, tmp_path / "two")]
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("words", ["adapter.kind=full", "compile=true", "trainer=zo"])
def test_what_needs_the_base_whole_is_refused_where_it_is_in_parts(
    together: Pair, data: Path, tmp_path: Path, words: str
) -> None:
    found = together(words_for(data, tmp_path / "run", "trainer=backprop", words), shards)
    assert all(each.startswith(f"{ConfigError.__name__}: accelerate is set up for FSDP") for each in found), found
    assert not (tmp_path / "run").exists()


def test_torchrun_starts_it(data: Path, tmp_path: Path) -> None:
    words = words_for(data, tmp_path / "run", ZO, "max_steps=6 eval_steps=null")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, "-m", "lorica", "train", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path / "run")) == 1, "one process speaks"
    assert losses(tmp_path / "run") == pytest.approx(
        losses(train(words_for(data, tmp_path / "alone", ZO, "max_steps=6 eval_steps=null"))), rel=1e-5
    )


def batches() -> dict[str, Batch]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(9, (5, 7), generator=generator)
    labels = torch.randint(3, (5,), generator=generator)
    by_option = torch.randint(9, (15, 7), generator=generator)
    return {
        "head": HeadBatch({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, labels),
        "one token": ChoiceBatch({"input_ids": tokens}, torch.randint(9, (5, 3), generator=generator), labels, 3, True),
        "several tokens": ChoiceBatch({"input_ids": by_option}, by_option[:, :2], labels, 3, False),
    }


@pytest.mark.parametrize("name", list(batches()))
@pytest.mark.parametrize("num", [1, 2, 3, 7])
def test_shares_are_the_batch_dealt_out(name: str, num: int) -> None:
    whole = batches()[name]
    shares = [share(whole, rank, num) for rank in range(num)]
    assert sum(each.weight for each in shares) == pytest.approx(1)
    for tensor in _tensors(whole):
        at = next(i for i, each in enumerate(_tensors(whole)) if each is tensor)
        per = len(tensor) // 5
        parts = [_tensors(each.batch)[at] for each in shares]
        for rank, part in enumerate(parts):
            expected = tensor.view(5, per, *tensor.shape[1:])[rank::num].flatten(0, 1)
            assert torch.equal(part, expected) if rank < 5 else shares[rank].weight == 0 and len(part) == per
    assert [each.weight for each in shares] == [len(range(rank, 5, num)) / 5 for rank in range(num)]


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(batch, lambda tensor: (found.append(tensor), tensor)[1])
    return found


def test_alone_nothing_is_exchanged() -> None:
    alone, values = Processes(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    alone.wants_stop = True
    assert alone.summed(values) is values and not alone.stops
    assert alone.of_first("a") == "a" and alone.gathered("a") == ["a"]
    alone.wait()
