"""Steps with compiled blocks: the losses and gradients of steps without, and what cannot be compiled is said."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.torch_version import TorchVersion

import tiny
from lorica import config, files, models, runs
from lorica.adapters import injection
from lorica.adapters.branches import blocks_of
from lorica.adapters.injection import Live
from lorica.config import ReplayConfig, TrainConfig
from lorica.demo import language
from lorica.errors import ConfigError, ModelError
from lorica.models import Base
from lorica.optim.backprop import Estimate, Estimator, backprop
from lorica.optim.compiled import CompiledBlocks, check_compiler
from lorica.optim.directions import Directions
from lorica.optim.probes import Probing
from lorica.optim.zeroth_order import ZerothOrder
from lorica.runs.training import stretch_trainer
from lorica.tasks.batching import Batch, ChoiceBatch
from lorica.tasks.objectives import LossModule

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
Load = Callable[..., Base]
# rows, tokens, padding of the first row
FIRST, LATER = [(4, 7, 0), (4, 7, 3)], [(3, 9, 0), (5, 6, 2), (7, 4, 0), (2, 11, 5)]
LAST = [(6, 5, 1), (3, 13, 0), (9, 8, 4)]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Code is kept for the whole process, and counted."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@dataclass
class Counting:
    """A backend that runs what it is handed as it is, and counts how often it is handed something."""

    num_compiled: int = 0

    def __call__(self, graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.num_compiled += 1
        return graph.forward


@dataclass
class Setup:
    """A tiny model with an adapter, as a run trains it."""

    live: Live
    objective: LossModule
    said: list[str] = field(default_factory=list)

    def compiled(self, backend: Any, **options: Any) -> CompiledBlocks:
        return CompiledBlocks(blocks_of(self.live.model), self.said.append, backend=backend, **options)

    def estimate(self, estimator: Estimator, batch: Batch) -> tuple[float, Tensor]:
        """The loss, and the gradient as one vector."""
        found = estimator(self.objective, self.live.trainable(), [batch], 0)
        gradients = [parameter.grad for parameter in self.live.trainable().values()]
        return found.loss, torch.cat([each.flatten() for each in gradients if each is not None])


def setup(base: Base, dropout: float = 0.0) -> Setup:
    adapter = tiny.adapter(base.model, models.target_modules(base, "standard"))
    live = injection.inject(base.model, adapter, dropout)
    live.set_training(dropout > 0)
    live.set_dropout_generator(torch.Generator())
    return Setup(live, LossModule(base.model, "classification"))


def spsa() -> Estimator:
    return ZerothOrder("spsa", 1e-2, Directions(), probing=Probing())


def batch_of(model: Any, rows: int, length: int, num_padded: int = 0) -> ChoiceBatch:
    inputs = tiny.inputs(model, rows=rows, length=length, seed=rows)
    inputs["attention_mask"][0, :num_padded] = 0
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return ChoiceBatch(inputs, torch.tensor([[5, 6]]).expand(rows, -1), torch.arange(rows) % 2, 2, one_token=True)


def check_agree(found: tuple[float, Tensor], expected: tuple[float, Tensor], tolerance: float = 1e-5) -> None:
    assert abs(found[0] - expected[0]) < tolerance
    assert expected[1].abs().max() > 1e-3, "nothing would be compared"
    assert tiny.relative(found[1], expected[1]) < tolerance


@pytest.mark.parametrize("trainer", [spsa, lambda: backprop], ids=["zo", "backprop"])
@pytest.mark.parametrize("family", ["opt", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_compiled_step_is_the_step_and_other_lengths_soon_compile_nothing(
    load: Load, family: str, trainer: Callable[[], Estimator]
) -> None:
    case, backend, plain = setup(load(family)), Counting(), trainer()
    compiled = case.compiled(backend).around(trainer())
    names = list(case.live.model.state_dict())
    again = int(family == "llama" and trainer is spsa)  # padded, its first code is of that many rows alone
    for shapes, versions in ((FIRST, None), (LATER, again), (LAST, 0)):
        before = backend.num_compiled
        for shape in shapes:
            batch = batch_of(case.live.model, *shape)
            check_agree(case.estimate(compiled, batch), case.estimate(plain, batch))
            assert list(case.live.model.state_dict()) == names
            assert not any("forward" in vars(block) for block in blocks_of(case.live.model))
        more = backend.num_compiled - before
        assert more > 0 if versions is None else more == versions
    assert not case.said


@pytest.mark.slow
def test_gradients_go_through_code_that_was_differentiated_beforehand(load: Load) -> None:
    case = setup(load("opt"))
    batch = batch_of(case.live.model, 4, 7, 2)
    compiled = case.compiled("aot_eager").around(backprop)
    check_agree(case.estimate(compiled, batch), case.estimate(backprop, batch))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [spsa, lambda: backprop], ids=["zo", "backprop"])
def test_torchs_own_compiler_makes_the_same_step(load: Load, trainer: Callable[[], Estimator]) -> None:
    case = setup(load("opt"))
    batch = batch_of(case.live.model, 4, 7, 2)
    compiled = case.compiled("inductor").around(trainer())
    # Fused, sums are taken in another order; a slope divides the difference by 2ε.
    check_agree(case.estimate(compiled, batch), case.estimate(trainer(), batch), tolerance=1e-4)


def test_hooks_on_a_block_come_and_go(load: Load) -> None:
    case, backend = setup(load("opt")), Counting()
    compiled = case.compiled(backend).around(loss_alone)
    batch = batch_of(case.live.model, 4, 7)
    first = blocks_of(case.live.model)[0]
    for hooked in (False, True, False):
        hook = first.register_forward_hook(lambda module, inputs, output: output * 2) if hooked else None
        expected = loss_alone(case.objective, {}, [batch], 0).loss
        assert compiled(case.objective, {}, [batch], 0).loss == expected
        if hook is not None:
            hook.remove()
    assert backend.num_compiled == 1, "blocks of one build share their code"


@torch.no_grad()
def loss_alone(objective: LossModule, trainable: Any, batches: Sequence[Batch], step: int) -> Estimate:
    return Estimate(float(objective(batches[0])), num_forwards=1)


def test_too_many_versions_are_told_once_and_the_steps_go_on(load: Load) -> None:
    case, backend = setup(load("opt")), Counting()
    compiled = case.compiled(backend, max_versions=1).around(loss_alone)
    for shape in (*FIRST, *LATER):
        batch = batch_of(case.live.model, *shape)
        expected = loss_alone(case.objective, {}, [batch], 0)
        assert compiled(case.objective, {}, [batch], 0) == expected
    assert backend.num_compiled == 1
    assert len(case.said) == 1 and "1 versions" in case.said[0] and "uncompiled" in case.said[0]


def test_options_that_go_on_from_a_cache_are_told_once_and_not_compiled(load: Load) -> None:
    case, backend = setup(load("opt")), Counting()
    batch = batch_of(case.live.model, 4, 7)
    more = torch.full((8, 1), 5)
    inputs = {**batch.inputs, "continuation_ids": more, "continuation_mask": torch.ones_like(more)}
    longer = replace(batch, inputs=inputs, targets=torch.full((8, 2), 6), one_token=False)
    compiled = case.compiled(backend).around(loss_alone)
    for _ in range(2):
        assert compiled(case.objective, {}, [longer], 0) == loss_alone(case.objective, {}, [longer], 0)
    assert backend.num_compiled == 0
    assert len(case.said) == 1 and "several tokens" in case.said[0]
    compiled(case.objective, {}, [batch], 0)
    assert backend.num_compiled == 1, "other batches are"


def test_a_block_that_cannot_be_compiled_is_an_error_in_one_line_and_the_block_is_left_as_it_was(load: Load) -> None:
    case = setup(load("opt"), dropout=0.5)
    with pytest.raises(ModelError, match=r"compile=true.*do not compile") as caught:
        case.estimate(case.compiled(Counting()).around(backprop), batch_of(case.live.model, 4, 7))
    assert "\n" not in str(caught.value)
    assert not any("forward" in vars(block) for block in blocks_of(case.live.model))


def test_what_the_compiler_says_is_told_in_one_line(load: Load) -> None:
    def broken(graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        raise RuntimeError("No working C++ compiler found")

    case = setup(load("opt"))
    with pytest.raises(ModelError, match="No working C\\+\\+ compiler found") as caught:
        case.estimate(case.compiled(broken).around(backprop), batch_of(case.live.model, 4, 7))
    assert "\n" not in str(caught.value)


def test_without_a_compiler_no_run_begins(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"compile=true.*no-such-compiler"):
        train(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("CXX", sys.executable)  # which is there
    check_compiler()
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0"))
    with pytest.raises(ConfigError, match=r"compile=true.*2\.6\.0"):
        check_compiler()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["adapter.kind=prefix"], ["adapter.kind=prefix", "cache"]),
        (["adapter.kind=full", "trainer=zo"], ["adapter.kind=full", "zo"]),
        (["trainer=zo", "zo.estimator=forward_gradient"], ["forward_gradient"]),
        (["adapter.dropout=0.1"], ["adapter.dropout=0.1"]),
        (["model.quantization=int8"], ["model.quantization=int8"]),
        (["--xgblora", "boosting.ensemble=true"], ["boosting.ensemble=true"]),
        (["adapter.kind=linear_probe"], ["adapter.kind=linear_probe", "no steps"]),
        (["trainer=none"], ["trainer=none"]),
    ],
)
def test_what_does_not_go_with_compiled_blocks_is_refused(words: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.read(TrainConfig, [*words, "compile=true"])
    assert all(part in str(caught.value) for part in ["compile", *told]), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["adapter.kind=full"], ["trainer=zo", "adapter.dropout=0.1"], ["--xgblora"]])
def test_what_goes_with_compiled_blocks_is_not(words: list[str]) -> None:
    assert config.read(TrainConfig, [*words, "compile=true"]).compile


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    language.write_tasks(folder)
    return folder / "topic"


def train(data: Path, folder: Path, *more: str, model: str = "demo", compile: bool = True) -> tuple[Path, str]:
    """The run's folder, and what it said."""
    said = io.StringIO()
    sizes = ["task.num_train=32", "task.num_dev=8", "task.num_eval=8", "batch_size=4", "adapter.rank=2"]
    words = [f"model={model}", f"compile={compile}", "learning_rate=1e-2", "eval_steps=2", *sizes, *more]
    cfg = config.read(TrainConfig, [*words, f"task.path={data}", f"output_dir={folder}"])
    return runs.train(cfg, Console(file=said, width=500)).run.path, said.getvalue()


@pytest.mark.parametrize("trainer", ["zo", pytest.param("backprop", marks=pytest.mark.slow)])
def test_only_the_first_round_of_a_run_compiles_and_the_run_is_the_uncompiled_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_models: Callable[..., Path], trainer: str
) -> None:
    words = ["--xgblora", f"trainer={trainer}", "boosting.steps_per_iteration=3", "train_as=lm"]
    train_opt = partial(train, data, model=str(tiny_models("opt")))
    plain, _ = train_opt(tmp_path / "plain", *words, "max_steps=6", compile=False)
    backend, counts = Counting(), []
    monkeypatch.setenv("CXX", sys.executable)  # which is not called
    monkeypatch.setattr(stretch_trainer, "CompiledBlocks", partial(CompiledBlocks, backend=backend))
    for num_steps in (3, 6):
        run, said = train_opt(tmp_path / str(num_steps), *words, f"max_steps={num_steps}")
        counts.append(backend.num_compiled)
        assert "compile=true" not in said
    assert counts[0] == counts[1] > 0, "neither evaluations nor the second round compile anything"
    losses = [[step["loss"] for step in files.read_records(each / "training_loss.jsonl")] for each in (plain, run)]
    assert losses[0] == losses[1] and len(losses[0]) == 6, "what runs as it was traced rounds as it did"
    if trainer == "zo":
        assert runs.replay(str(run), ReplayConfig()).is_identical
