"""Tasks on one body, and what is computed once: views as good as models loaded alone, baselines and subsets kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

import tiny
from lorica import cli, config, models
from lorica.adapters import injection
from lorica.adapters.adapter import Adapter
from lorica.config import MergeConfig
from lorica.demo import language
from lorica.models import Base
from lorica.runs import ready
from lorica.runs.bodies import sharing
from lorica.runs.merging.evaluation import Arena, open_arenas
from lorica.runs.sources import Source, resolve

Folder = Callable[..., Path]


@pytest.fixture(
    scope="module", params=["bert", "roberta", "opt", "gpt2", "llama", "bart", "t5", "no head", "no pooler"]
)
def checkpoint(request: pytest.FixtureRequest, tiny_models: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifiers of three classes, a checkpoint without a head, and one without its body's pooler either."""
    if request.param == "no head":
        return tiny_models("llama")
    if request.param != "no pooler":
        return tiny_models(request.param, "classification")
    folder = tmp_path_factory.mktemp("masked")
    words = tiny.tokenizer("classification")
    words.save_pretrained(folder)
    transformers.BertForMaskedLM(tiny.config("bert", len(words))).save_pretrained(folder)
    return folder


def alone(folder: Path, num_labels: int | None) -> Base:
    return models.load(str(folder), kind="classification", num_labels=num_labels, seed=4)


def logits(base: Base) -> Tensor:
    tokens = torch.arange(4, 24).reshape(2, 10)
    tokens[:, -1] = 2  # BART reads its sentence off the end token
    with torch.no_grad():
        found: Tensor = base.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return found


def adapted(base: Base) -> Adapter:
    return tiny.adapter(base.model, models.target_modules(base, "all-linear"))


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_view_is_the_model_loaded_alone(checkpoint: Path, num_labels: int) -> None:
    view, expected = sharing(alone(checkpoint, None), num_labels, seed=4), alone(checkpoint, num_labels)
    assert torch.equal(logits(view), logits(expected)) and logits(view).shape == (2, num_labels)
    assert (view.heads, view.new, view.kind) == (expected.heads, expected.new, expected.kind)
    assert models.fingerprint(view) == models.fingerprint(expected)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in view.model.parameters())
    assert not any(module.training for module in view.model.modules())


def test_views_share_the_body_and_nothing_of_the_heads(checkpoint: Path) -> None:
    base = alone(checkpoint, None)
    views = [sharing(base, 3) for _ in range(2)]
    places = [{name: value.data_ptr() for name, value in view.model.state_dict().items()} for view in views]
    own = {name for name in places[0] if any(name.startswith(head + ".") for head in base.heads)}
    assert own and {name for name, place in places[0].items() if place != places[1][name]} == own


def test_an_adapter_on_the_body_shows_in_every_view_and_leaves_no_trace(checkpoint: Path) -> None:
    base = alone(checkpoint, None)
    views = [sharing(base, num_labels, seed=4) for num_labels in (2, 3)]
    before = [logits(view) for view in views]
    live = injection.inject(views[0].model, adapted(base))
    for view, num_labels, bare in zip(views, (2, 3), before, strict=True):
        expected = alone(checkpoint, num_labels)
        injection.inject(expected.model, adapted(base))
        assert torch.equal(logits(view), logits(expected)) and not torch.equal(logits(view), bare)
    injection.remove(live)
    assert all(torch.equal(logits(view), bare) for view, bare in zip(views, before, strict=True))
    assert not any(parameter.requires_grad for view in views for parameter in view.model.parameters())


def test_a_model_without_a_head_is_its_own_view(tiny_models: Folder) -> None:
    base = models.load(str(tiny_models("opt")), kind="causal")
    assert sharing(base, 2) is base


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Two finished runs of the embedded model as a classifier."""
    folder = tmp_path_factory.mktemp("shared")
    language.write_tasks(folder / "data")
    for task in ("topic", "sentiment"):
        words = ("model=demo", "model.kind=classification", f"task.path={folder / 'data' / task}", "task.num_eval=60")
        out = f"output_dir={folder / 'runs' / task}"
        done = CliRunner().invoke(cli.app, ["train", *words, "max_steps=4", "batch_size=8", "adapter.rank=2", out])
        assert done.exit_code == 0, done.output
    return resolve(["topic", "sentiment"], folder / "runs")


def arenas(sources: list[Source], **tree: object) -> list[Arena]:
    return open_arenas(sources, config.check(MergeConfig, {"device": "cpu", **tree}), "dev")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks of the evaluations that really run from now on."""
    calls: list[str] = []
    evaluate = ready.evaluate

    def spy(model: object, task: object, *rest: object, **options: object) -> object:
        calls.append(task.name)  # type: ignore[attr-defined]
        return evaluate(model, task, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ready, "evaluate", spy)
    return calls


def test_arenas_of_one_model_load_it_once(sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = models.load
    monkeypatch.setattr(models, "load", lambda *words, **options: loads.append(words) or load(*words, **options))
    opened = arenas(sources)
    assert len(loads) == 1
    bodies = [arena.ready.base.model.base_model for arena in opened]
    assert bodies[0] is bodies[1]
    for arena in opened:
        head = arena.ready.base.heads[0]
        live = arena.ready.base.model.get_submodule(head)
        given = arena.source.adapter.heads[head]
        assert all(torch.equal(value, given[name]) for name, value in live.state_dict().items())
        assert not any(parameter.requires_grad for parameter in arena.ready.base.model.parameters())


def test_baselines_are_evaluated_once(sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    first = [(each.base, each.single) for each in arenas(sources)]
    assert len(calls) == 4
    again = [(each.base, each.single) for each in arenas(sources)]
    assert len(calls) == 4 and len(list(Path("artifacts/baselines").iterdir())) == 4
    for then, now in zip(first, again, strict=True):
        for was, found in zip(then, now, strict=True):
            assert (was.predictions == found.predictions).all() and was.loss == found.loss
    assert [each.recovered(each.single.predictions).merged for each in arenas(sources)] == [
        each.recovered(each.single.predictions).single for each in arenas(sources)
    ]


def test_baselines_are_not_shared_by_other_examples_or_another_adapter(
    sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    (whole,) = arenas(sources[:1])
    (part,) = arenas(sources[:1], eval_subset={"max_samples": 20})
    assert len(whole.base.predictions) != len(part.base.predictions) == 20
    other = Source(sources[0].name, sources[1].folder, sources[0].run, sources[0].adapter)
    (foreign,) = arenas([other])
    assert len(foreign.single.predictions) == len(whole.base.predictions)
    assert len(calls) == 3


SPOILT = {
    "torn": lambda text: text[: len(text) // 2],
    "no JSON object": lambda text: "[1, 2]",
    "too deep": lambda text: "[" * 100_000,
    "one short": lambda text: _changed(text, lambda value: value["predictions"].pop()),
    "no such class": lambda text: _changed(
        text, lambda value: value["predictions"].append(99) or value["predictions"].pop(0)
    ),
    "a flag for a class": lambda text: _changed(
        text, lambda value: value["predictions"].append(True) or value["predictions"].pop(0)
    ),
    "no loss": lambda text: _changed(text, lambda value: value.update(loss=None)),
    "of another key": lambda text: text.replace('"base"', '"own adapter"'),
}


def _changed(text: str, change: Callable[[dict[str, object]], object]) -> str:
    tree = json.loads(text)
    change(tree["value"])
    return json.dumps(tree)


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_a_file_that_cannot_be_trusted_is_made_anew(
    spoil: Callable[[str], str], sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    (arena,) = arenas(sources[:1], eval_subset={"max_samples": 20})
    expected = arena.base
    (file,) = Path("artifacts/baselines").iterdir()
    whole = file.read_text()
    file.write_text(spoil(whole))
    calls = counted(monkeypatch)
    (arena,) = arenas(sources[:1], eval_subset={"max_samples": 20})
    assert (arena.base.predictions == expected.predictions).all() and arena.base.loss == expected.loss
    assert len(calls) == 1 and file.read_text() == whole


def test_the_examples_of_a_subset_are_kept(sources: list[Source]) -> None:
    subset = {"max_samples": 20, "stratified": True, "seed": 3}
    (first,) = arenas(sources[:1], eval_subset=subset)
    (file,) = Path("artifacts/subsets").iterdir()
    kept = json.loads(file.read_text())
    assert len(set(kept["value"])) == 20
    kept["value"] = list(range(20))
    file.write_text(json.dumps(kept))
    (again,) = arenas(sources[:1], eval_subset=subset)
    assert again.rows == arenas(sources[:1], eval_subset={"max_samples": 20, "shuffle": False})[0].rows != first.rows
    kept["value"] = [0] * 20
    file.write_text(json.dumps(kept))
    assert arenas(sources[:1], eval_subset=subset)[0].rows == first.rows
    arenas(sources[:1], eval_subset={**subset, "seed": 4})
    assert len(list(Path("artifacts/subsets").iterdir())) == 2
