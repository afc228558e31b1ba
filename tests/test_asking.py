"""Options of the examples' own, label words inside a prompt, and what a prompt that is too long loses."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from lorica.errors import ConfigError
from lorica.evaluation.evaluate import evaluate
from lorica.evaluation.scoring import score_all
from lorica.models import Base
from lorica.tasks import batching, objectives
from lorica.tasks.base import Example, Option, Prompt, Task
from lorica.tasks.batching import ChoiceBatch, collate
from lorica.tasks.prompting import Choice, ask, encode

Load = Callable[..., Base]
WORDS = {
    "one token": ("good", "bad", "great", "film"),
    "several tokens": ("good", "rather bad", "the great film!", "a, b"),
}
families = pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "t5", "bart"])
answers = pytest.mark.parametrize("answers", WORDS)


def own_options(answers: str, counts: Sequence[int] = (2, 4, 1, 3), golds: bool = False) -> Task:
    generator = random.Random(0)
    examples = []
    for number, count in enumerate(counts):
        words = generator.sample(WORDS[answers], count)
        options = tuple(Option(f" {word}", word) for word in words)
        label = generator.randrange(count)
        right = ((words[label],), (words[0],)) if golds else ()
        examples.append(Example({"text": "the film " * number + "i saw"}, label, options, right))
    metrics = ("accuracy", "f1", "exact_match") if golds else ("accuracy",)
    return Task("tiny", "choice", (), ("text",), Prompt("{text} was"), metrics, {"test": examples}, "lm")


def rows_of(base: Base, task: Task, max_length: int = 100) -> list[Choice]:
    kind = {"is_encoder_decoder": base.kind == "seq2seq"}
    rows = encode(task, task.splits["test"], base.tokenizer, max_length=max_length, **kind)
    return [row for row in rows if isinstance(row, Choice)]


def collator(base: Base, **options: int) -> partial:
    start = base.model.config.decoder_start_token_id if base.kind == "seq2seq" else None
    return partial(collate, pad_token_id=base.tokenizer.pad_token_id, decoder_start_token_id=start, **options)


@torch.no_grad()
def alone(base: Base, prompt: Sequence[int], option: Sequence[int]) -> float:
    """The mean log-probability of one option's tokens, in a batch of one without padding."""
    if base.kind == "seq2seq":
        written = [base.model.config.decoder_start_token_id, *option[:-1]]
        logits = base.model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([written])).logits[0]
    else:
        logits = base.model(input_ids=torch.tensor([[*prompt, *option]])).logits[0, len(prompt) - 1 :]
    log_p = logits.double().log_softmax(dim=-1)
    return sum(float(log_p[at, token]) for at, token in enumerate(option)) / len(option)


@torch.no_grad()
@families
@answers
@pytest.mark.parametrize("apart", [False, True], ids=["as it comes", "a row an option"])
def test_examples_may_have_different_numbers_of_options(
    load: Load, family: str, answers: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(family)
    rows = rows_of(base, own_options(answers))
    if apart and answers == "several tokens":
        monkeypatch.setattr(batching, "_share_prompts", lambda rows, gold_only: False)
    batch = collator(base)(rows)
    assert isinstance(batch, ChoiceBatch) and batch.one_token == (answers == "one token")
    found = objectives.scores(base.model, batch)
    for row, scores in zip(rows, found.tolist(), strict=True):
        expected = [alone(base, prompt, option) for prompt, option in zip(row.prompts, row.options, strict=True)]
        assert scores[: len(expected)] == pytest.approx(expected, abs=1e-4)
        assert scores[len(expected) :] == [-float("inf")] * (4 - len(expected))


@families
@answers
def test_options_that_are_not_there_play_no_part_in_the_loss(load: Load, family: str, answers: str) -> None:
    base = load(family)
    rows, make_batch = rows_of(base, own_options(answers)), collator(base)
    weight = base.model.get_input_embeddings().weight.requires_grad_(True)
    found = objectives.losses(base.model, make_batch(rows), "classification")
    expected = torch.cat([objectives.losses(base.model, make_batch([row]), "classification") for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    gradients = [torch.autograd.grad(each.mean(), weight)[0] for each in (found, expected)]
    assert float(gradients[1].abs().max()) > 1e-4
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)
    entropy, taken = objectives.entropies(base.model, make_batch(rows), "classification")
    assert torch.isfinite(entropy).all() and taken.sum(dim=1).tolist() == pytest.approx([1.0] * len(rows))


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_all_scores_come_back_in_the_order_of_the_rows(load: Load, batch_size: int) -> None:
    base = load("opt")
    rows, make_batch = rows_of(base, own_options("several tokens")), collator(base)
    found = score_all(base.model, rows, make_batch, batch_size=batch_size)
    torch.testing.assert_close(found, objectives.scores(base.model, make_batch(rows)), atol=1e-4, rtol=0)


def test_an_option_is_right_by_its_answer_or_by_its_number() -> None:
    options = tuple(Option(f" {word}", word) for word in "abc")
    assert [Example({}, 1, options, (("b",), ("c",))).is_right(number) for number in range(3)] == [False, True, True]
    assert [Example({}, 1, options).is_right(number) for number in range(3)] == [False, True, False]


def test_any_right_answer_counts(load: Load) -> None:
    base, task = load("opt"), own_options("several tokens", golds=True)
    rows = rows_of(base, task)
    found = evaluate(base.model, task, "test", rows, collator(base), batch_size=2)
    assert found.scores is not None and found.answers is not None
    best = found.scores.argmax(dim=1).tolist()
    examples = task.splits["test"]
    assert list(found.answers) == [each.options[at].answer for each, at in zip(examples, best, strict=True)]
    right = [at in (0, each.label) for each, at in zip(examples, best, strict=True)]
    assert found.metrics["accuracy"].value == found.metrics["exact_match"].value == sum(right) / len(right)
    assert sum(right) > 0 and found.metrics["f1"].value >= found.metrics["exact_match"].value
    labels = torch.tensor([row.label for row in rows])
    assert found.loss == pytest.approx(float(F.cross_entropy(found.scores, labels)))


def test_batches_keep_every_option_behind_every_prompt_within_the_longest_row(load: Load) -> None:
    base, limit = load("opt"), 24
    examples = [
        Example({"text": "the film " * 20}, 0, tuple(Option(f" {'x' * size}{end}", end) for end in "ab"))
        for size in (1, 12, 3, 8, 5)
    ]
    task = Task("tiny", "choice", (), ("text",), Prompt("{text} was"), ("accuracy",), {"test": examples}, "lm")
    rows = rows_of(base, task, limit)
    widths: list[int] = []
    went_on: list[bool] = []

    def watched(batch: Sequence[Choice]) -> ChoiceBatch:
        made = collator(base, max_length=limit)(batch)
        went_on.append("continuation_ids" in made.inputs)
        more = made.inputs.get("continuation_ids", made.inputs["input_ids"][:, :0])
        widths.append(made.inputs["input_ids"].shape[1] + more.shape[1])
        return made

    found = score_all(base.model, rows, watched, batch_size=4)
    assert max(widths) <= limit and len(found) == len(rows)
    assert went_on == [True] * len(went_on)
    together = collator(base, max_length=limit)(rows)
    assert together.inputs["input_ids"].shape[1] <= limit and "continuation_ids" not in together.inputs
    expected = [alone(base, row.prompts[0], row.options[0]) for row in rows]
    assert found[:, 0].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_label_word_may_stand_inside_the_prompt(load: Load) -> None:
    prompt = Prompt("{a} ? {label} , {b}", {"no": "bad", "yes": "good"})
    examples = [Example({"a": "the film", "b": "i saw"}, 1)]
    task = Task("tiny", "choice", ("no", "yes"), ("a", "b"), prompt, ("accuracy",), {"test": examples})
    asked = ask(task, examples[0])
    assert (asked.prompt, asked.options) == ("the film ?", (" bad , i saw", " good , i saw"))
    base = load("opt")
    (row,) = rows_of(base, task)
    whole = base.tokenizer("the film ? good , i saw")["input_ids"]
    assert [*row.prompts[1], *row.options[1]] == whole


QUESTION = "title: {title} text: {text} who? {question} so:"


def passages(*texts: str) -> Task:
    examples = [Example({"title": "a film", "text": text, "question": "great film?"}, 0) for text in texts]
    prompt = Prompt(QUESTION, {"no": "bad", "yes": "good"})
    return Task("tiny", "choice", ("no", "yes"), ("text",), prompt, ("accuracy",), {"test": examples})


@families
def test_a_long_prompt_loses_the_start_of_its_passage_alone(load: Load, family: str) -> None:
    base = load(family)
    (whole,) = rows_of(base, passages("x " * 30 + "the end was good"), 200)
    (cut,) = rows_of(base, passages("x " * 30 + "the end was good"), 60)
    assert cut.truncated and not whole.truncated and cut.options == whole.options
    assert len(cut.prompts[0]) == 60 - (0 if base.kind == "seq2seq" else 1)
    text = base.tokenizer.decode(cut.prompts[0], skip_special_tokens=True)
    assert "title: a film text:" in text and text.endswith("the end was good who? great film? so:")
    assert text.count("x") < base.tokenizer.decode(whole.prompts[0], skip_special_tokens=True).count("x")


def test_a_passage_may_go_wholly_and_nothing_but_it(load: Load) -> None:
    base, task = load("opt"), passages("x " * 30 + "film")
    (without,) = rows_of(base, passages(""), 200)
    least = without.length
    (cut,) = rows_of(base, task, least)
    assert cut.prompts == without.prompts
    with pytest.raises(ConfigError, match="finds no room"):
        rows_of(base, task, least - 1)


def test_what_stays_whole_is_not_the_passage_however_long_it_is(load: Load) -> None:
    base = load("opt")
    example = Example({"a": "who was " * 9, "b": "x " * 9 + "film"}, 0)
    task = Task("tiny", "choice", ("no",), ("a",), Prompt("{a} so {b} ?", {"no": "bad"}), (), {"test": [example]})
    limit = rows_of(base, task, 200)[0].length - 10
    (cut,) = rows_of(base, replace(task, uncut=("a",)), limit)
    text = base.tokenizer.decode(cut.prompts[0], skip_special_tokens=True)
    assert cut.truncated and text.startswith(example.fields["a"]) and text.endswith("film ?") and text.count("x") < 9
    (other,) = rows_of(base, task, limit)
    assert base.tokenizer.decode(other.prompts[0], skip_special_tokens=True).endswith(f"so {example.fields['b']} ?")


def pair(b: str) -> Task:
    prompt = Prompt("{a} ? {label} , {b} !", {"no": "rather bad", "yes": "good"})
    examples = [Example({"a": "who i saw", "b": b}, 1)]
    return Task("tiny", "choice", ("no", "yes"), ("a", "b"), prompt, (), {"test": examples}, uncut=("a",))


def test_a_passage_behind_the_labels_word_is_cut_there(load: Load) -> None:
    base = load("opt")
    (whole,), (cut,) = (rows_of(base, pair("x " * 30 + "the end"), limit) for limit in (200, 60))
    assert cut.truncated and cut.length == 60 and cut.prompts == whole.prompts
    lost = {len(long) - len(short) for long, short in zip(whole.options, cut.options, strict=True)}
    assert lost == {whole.length - 60}, "each option is shorter by the same"
    for option, word in zip(cut.options, ("rather bad", "good"), strict=True):
        text = base.tokenizer.decode(option)
        assert text.startswith(f"{word} ,") and text.endswith("x the end !")
    with pytest.raises(ConfigError, match="finds no room"):
        rows_of(base, pair("x"), 20)


def test_a_question_that_finds_no_room_is_an_error(load: Load) -> None:
    with pytest.raises(ConfigError, match="finds no room"):
        rows_of(load("opt"), passages("x", "the film " * 9), 20)


def test_a_prompt_without_a_token_is_an_error(load: Load) -> None:
    base = load("gpt2")
    base.tokenizer.backend_tokenizer.post_processor = type(base.tokenizer.backend_tokenizer.post_processor)(
        single="$A", pair="$A $B", special_tokens=[]
    )
    task = Task(
        "tiny",
        "choice",
        ("no",),
        ("a",),
        Prompt("{a}", {"no": "bad"}),
        ("accuracy",),
        {"test": [Example({"a": ""}, 0)]},
    )
    with pytest.raises(ConfigError, match="begin with a word"):
        rows_of(base, task)


@torch.no_grad()
@families
@answers
def test_a_calibrated_score_is_what_the_prompt_adds(load: Load, family: str, answers: str) -> None:
    base = load(family)
    task = replace(own_options(answers), sfc=True, prompt=Prompt("{text} was", content_free="x"))
    rows = rows_of(base, task)
    found = evaluate(base.model, task, "test", rows, collator(base), batch_size=2).scores
    bare = rows_of(base, replace(task, sfc=False, prompt=Prompt("x")))
    assert found is not None
    for row, free, scores in zip(rows, bare, found.tolist(), strict=True):
        for prompt, before, option, score in zip(row.prompts, free.prompts, row.options, scores, strict=False):
            expected = (alone(base, prompt, option) - alone(base, before, option)) * len(option)
            assert score == pytest.approx(expected, abs=1e-4)
        assert scores[len(row.options) :] == [-float("inf")] * (4 - len(row.options))


def test_a_prompt_that_says_nothing_is_the_start_token(load: Load) -> None:
    base, task = load("gpt2"), replace(own_options("several tokens"), sfc=True)
    with_start = rows_of(base, task)
    base.tokenizer.backend_tokenizer.post_processor = type(base.tokenizer.backend_tokenizer.post_processor)(
        single="$A", pair="$A $B", special_tokens=[]
    )
    for row, before in zip(rows_of(base, task), with_start, strict=True):
        assert row.prompts[0] == before.prompts[0][1:] and row.content_free == before.content_free
        assert row.content_free is not None and row.content_free.prompts[0] == (base.tokenizer.bos_token_id,)


def test_prompts_that_say_nothing_are_encoded_once(load: Load) -> None:
    base = load("opt")
    task = passages(*["the film"] * 5)
    rows = rows_of(base, replace(task, sfc=True))
    assert len({id(row.content_free) for row in rows}) == 1
    assert rows[0].content_free is not None and rows[0].content_free.prompts[0] == (base.tokenizer.bos_token_id,)
