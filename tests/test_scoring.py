"""Scores of padded batches with shared prompts are those of one option at a time, alone (MATH section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.errors import LoricaError
from lorica.evaluation.evaluate import evaluate
from lorica.evaluation.scoring import Collate, score_all
from lorica.models import Base
from lorica.tasks import batching, objectives
from lorica.tasks.base import Example, Prompt, Task
from lorica.tasks.batching import Batch, ChoiceBatch, collate
from lorica.tasks.prompting import Choice, Classified, Encoded, encode
from lorica.tasks.templates import option_texts, render

Load = Callable[..., Base]

TEXTS = ("the film", "a", "i saw the film, twice: bad? great!", "good good bad film of the year", "the worst, x")
ANSWERS = {
    "one token": {"0": "good", "1": "bad", "2": "great"},
    "several tokens": {"0": "good", "1": "rather bad", "2": "the great film!"},
    "all of two tokens": {"0": "good.", "1": "bad.", "2": "great."},
}

families = pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "t5", "bart"])
answers = pytest.mark.parametrize("answers", ANSWERS)
templates = pytest.mark.parametrize("template", ["{text} was", "{text} it was "], ids=["open", "ends in a space"])


def choice(answers: str = "several tokens", template: str = "{text} was") -> Task:
    examples = [Example({"text": text}, index % 3) for index, text in enumerate(TEXTS)]
    prompt = Prompt(template, ANSWERS[answers])
    return Task("tiny", "choice", ("0", "1", "2"), ("text",), prompt, ("accuracy",), {"test": examples})


def encoded(base: Base, task: Task, max_length: int = 100) -> list[Encoded]:
    return encode(
        task, task.splits["test"], base.tokenizer, max_length=max_length, is_encoder_decoder=base.kind == "seq2seq"
    )


def collator(base: Base, *, gold_only: bool = False) -> Collate:
    start = base.model.config.decoder_start_token_id if base.kind == "seq2seq" else None
    return partial(collate, pad_token_id=base.tokenizer.pad_token_id, gold_only=gold_only, decoder_start_token_id=start)


@torch.no_grad()
def reference(base: Base, task: Task) -> Tensor:
    """(n, options): each option alone, batch of one, no padding, all logits, the log-probabilities summed by hand."""
    assert task.prompt is not None
    options = option_texts(task.prompt, task.labels)
    prompts = [render(task.prompt.template, example.fields) for example in task.splits["test"]]
    alone = _alone_of_encoder_decoder if base.kind == "seq2seq" else _alone_of_decoder
    return torch.tensor([[alone(base, prompt, option) for option in options] for prompt in prompts])


def _alone_of_decoder(base: Base, prompt: str, option: str) -> float:
    whole = base.tokenizer(prompt + option)["input_ids"]
    prompt_alone = base.tokenizer(prompt)["input_ids"]
    before = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_alone, whole, strict=False)))
    log_p = base.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(dim=-1)  # (t, vocabulary)
    steps = [float(log_p[at - 1, whole[at]]) for at in range(before, len(whole))]
    return sum(steps) / len(steps)


def _alone_of_encoder_decoder(base: Base, prompt: str, option: str) -> float:
    answer = base.tokenizer(option, add_special_tokens=False)["input_ids"]
    source = torch.tensor([base.tokenizer(prompt)["input_ids"]])
    written = torch.tensor([[base.model.config.decoder_start_token_id, *answer[:-1]]])
    log_p = base.model(input_ids=source, decoder_input_ids=written).logits[0].double().log_softmax(dim=-1)
    return sum(float(log_p[at, token]) for at, token in enumerate(answer)) / len(answer)


def assert_scores(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    assert float(expected.std()) > 0.05, "all options score alike, so the comparison says nothing"
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=0)


@families
@answers
@templates
def test_scores_of_a_batch_are_those_of_each_option_alone(load: Load, family: str, answers: str, template: str) -> None:
    base, task = load(family), choice(answers, template)
    batch = collator(base)(encoded(base, task))
    assert isinstance(batch, ChoiceBatch)
    assert batch.one_token == (answers == "one token")
    with torch.no_grad():
        assert_scores(objectives.scores(base.model, batch), reference(base, task))


@answers
@pytest.mark.parametrize("shared", [True, False], ids=["prompts read once", "a row an option"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_padding_on_either_side_changes_no_score(
    load: Load, family: str, padding_side: str, shared: bool, answers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are padded on the left, and options that go on from them on the right, whichever the tokenizer says."""
    base, task = load(family), choice(answers)
    base.tokenizer.padding_side = padding_side
    if not shared:
        monkeypatch.setattr(batching, "_share_prompts", lambda rows, gold_only: False)
    batch = collator(base)(encoded(base, task))
    assert not batch.inputs["attention_mask"][:, 0].all() and batch.inputs["attention_mask"][:, -1].all()
    assert ("continuation_mask" in batch.inputs) == (shared and answers != "one token")
    if answers == "several tokens" and shared:
        assert batch.inputs["continuation_mask"][:, -1].any() and not batch.inputs["continuation_mask"].all()
    with torch.no_grad():
        assert_scores(objectives.scores(base.model, batch), reference(base, task))


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "t5", "bart"])
def test_options_share_their_prompt_and_its_gradient(load: Load, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(family)
    task = choice("several tokens", "i saw the film, twice, and {text} was")
    shared = collator(base)(encoded(base, task))
    monkeypatch.setattr(batching, "_share_prompts", lambda rows, gold_only: False)
    apart = collator(base)(encoded(base, task))
    assert len(apart.inputs["input_ids"]) == 3 * len(shared.inputs["input_ids"])
    found, expected = (_scores_and_gradient(base, batch) for batch in (shared, apart))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_without_a_cache_reads_each_prompt_for_each_option(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("opt")
    batch = collator(base)(encoded(base, choice()))
    expected = objectives.scores(base.model, batch)
    names = objectives._accepted(base.model) - {"past_key_values"}
    monkeypatch.setattr(objectives, "_accepted", lambda model: names)
    torch.testing.assert_close(objectives.scores(base.model, batch), expected, rtol=1e-4, atol=1e-5)


def _scores_and_gradient(base: Base, batch: Batch) -> tuple[Tensor, Tensor]:
    """The scores, and the gradient of the first matrix that any token meets behind the embedding."""
    weight = next(each for name, each in base.model.named_parameters() if each.dim() == 2 and "emb" not in name)
    weight.requires_grad_(True)
    found = objectives.scores(base.model, batch)
    return found.detach(), torch.autograd.grad(found.square().sum(), weight)[0]


@families
@answers
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_score_all_restores_the_order(load: Load, family: str, answers: str, batch_size: int) -> None:
    base, task = load(family), choice(answers)
    found = score_all(base.model, encoded(base, task), collator(base), batch_size=batch_size)
    assert_scores(found, reference(base, task))


@pytest.mark.parametrize("num_tokens", [1, 60, 10_000])
def test_a_batch_has_no_more_tokens_than_pay(load: Load, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("opt")
    rows = encoded(base, choice("one token"))
    expected = score_all(base.model, rows, collator(base), batch_size=4)
    monkeypatch.setattr(batching, "MAX_TOKENS", {"cpu": num_tokens})
    shapes = []

    def spy(rows: Sequence[Encoded]) -> Batch:
        batch = collator(base)(rows)
        shapes.append(batch.inputs["input_ids"].shape)
        return batch

    found = score_all(base.model, rows, spy, batch_size=4)
    assert all(rows == 1 or rows * length <= num_tokens for rows, length in shapes)
    assert max(rows for rows, _ in shapes) == {1: 1, 60: 3, 10_000: 4}[num_tokens]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_score_all_scores_in_eval_mode_and_puts_the_modes_back(load: Load) -> None:
    base, task = load("opt"), choice()
    base.model.train()
    base.model.lm_head.eval()
    modes = [module.training for module in base.model.modules()]
    state = torch.get_rng_state()
    assert_scores(score_all(base.model, encoded(base, task), collator(base), batch_size=2), reference_in_eval(base))
    assert [module.training for module in base.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def reference_in_eval(base: Base) -> Tensor:
    modes = {module: module.training for module in base.model.modules()}
    base.model.eval()
    found = reference(base, choice())
    for module, training in modes.items():
        module.training = training
    return found


@families
@answers
def test_the_language_model_loss_is_the_gold_answers(load: Load, family: str, answers: str) -> None:
    base, task = load(family), choice(answers)
    rows = encoded(base, task)
    gold = reference(base, task)[range(len(rows)), [row.label for row in rows]]
    batch = collator(base, gold_only=True)(rows)
    with torch.no_grad():
        torch.testing.assert_close(objectives.losses(base.model, batch, "lm"), -gold.float(), atol=1e-4, rtol=0)
        mean = objectives.mean_loss(base.model, batch, "lm")
    assert float(mean) == pytest.approx(-float(gold.mean()), abs=1e-4)


def test_the_classification_loss_is_the_cross_entropy_of_the_scores(load: Load) -> None:
    base, task = load("opt"), choice()
    batch = collator(base)(encoded(base, task))
    expected = F.cross_entropy(reference(base, task).float(), batch.labels, reduction="none")
    with torch.no_grad():
        torch.testing.assert_close(objectives.losses(base.model, batch, "classification"), expected, atol=1e-4, rtol=0)


def classified(base: Base, texts: Sequence[str] = ("text", "more"), max_length: int = 100) -> list[Encoded]:
    rows = [Example({"text": text, "more": text[::-1]}, index % 3) for index, text in enumerate(TEXTS)]
    task = Task("tiny", "classification", ("0", "1", "2"), tuple(texts), None, ("accuracy",), {"test": rows})
    return encode(task, rows, base.tokenizer, max_length=max_length)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("texts", [("text",), ("text", "more")], ids=["one text", "two texts"])
def test_a_heads_scores_are_those_of_each_example_alone(load: Load, family: str, texts: tuple[str, ...]) -> None:
    base = load(family)
    expected = []
    for text in TEXTS:
        given = base.tokenizer(*[text if name == "text" else text[::-1] for name in texts], return_tensors="pt")
        with torch.no_grad():
            expected.append(base.model(**given).logits[0])
    found = score_all(base.model, classified(base, texts), collator(base), batch_size=2)
    assert_scores(found, torch.stack(expected))


@families
def test_truncation_keeps_the_answer_and_the_prompts_end(load: Load, family: str) -> None:
    base, task = load(family), choice()
    whole, cut = encoded(base, task), encoded(base, task, max_length=20)
    for long, short in zip(whole, cut, strict=True):
        assert isinstance(long, Choice)
        assert isinstance(short, Choice)
        assert short.options == long.options
        assert short.truncated == (_read_at_once(base, long) > 20)
        assert _read_at_once(base, short) <= 20
        if short.truncated:
            kept = short.prompts[0][1:] if base.kind == "causal" else short.prompts[0]
            assert long.prompts[0][-len(kept) :] == kept
            assert base.kind == "seq2seq" or short.prompts[0][0] == base.tokenizer.bos_token_id
    assert 0 < sum(row.truncated for row in cut) < len(cut)


def _read_at_once(base: Base, row: Choice) -> int:
    """The tokens that share one input: an encoder-decoder's options do not take room from its prompt."""
    return max(map(len, row.prompts)) if base.kind == "seq2seq" else row.length


def test_truncation_of_an_encoders_input_is_counted(load: Load) -> None:
    base = load("bert")
    whole, cut = classified(base), classified(base, max_length=20)
    for long, short in zip(whole, cut, strict=True):
        assert isinstance(short, Classified)
        assert short.length <= 20
        assert short.truncated == (long.length > 20)
    assert 0 < sum(row.truncated for row in cut) < len(cut)


def test_an_evaluation_counts_what_was_truncated(load: Load) -> None:
    base, task = load("opt"), choice()
    rows = encoded(base, task, max_length=20)
    found = evaluate(base.model, task, "test", rows, collator(base), batch_size=2)
    assert found.num_truncated == sum(row.truncated for row in rows) > 0
    assert found.metrics["accuracy"].n == len(rows)
    labels = torch.tensor([row.label for row in rows])
    assert found.metrics["accuracy"].value == pytest.approx(
        float((found.scores.argmax(dim=1) == labels).float().mean())
    )
    assert found.loss == pytest.approx(float(F.cross_entropy(found.scores, labels)))


def test_a_length_that_leaves_no_prompt_is_refused(load: Load) -> None:
    with pytest.raises(LoricaError, match="leaves no room"):
        encoded(load("opt"), choice(), max_length=3)
