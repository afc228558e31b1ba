"""Answers that a model writes are the likeliest tokens one after the other, whatever stands beside them in a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lorica.evaluation.evaluate import evaluate
from lorica.evaluation.generation import answer_all, ends_of, greedy
from lorica.models import Base
from lorica.runs.training.prefix import draw, lay_on
from lorica.tasks import objectives
from lorica.tasks.base import Example, Prompt, Task
from lorica.tasks.batching import collate
from lorica.tasks.prompting import Choice, encode

Load = Callable[..., Base]
TEXTS = ("the film", "a", "i saw the film, twice: bad? great!", "good good bad film of the year", "the worst, x")
MOST = 6
families = pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "t5", "bart"])


def written(golds: tuple[str, ...] = ("good film",)) -> Task:
    examples = [Example({"text": text}, 0, golds=tuple((gold,) for gold in golds)) for text in TEXTS]
    metrics = ("f1", "exact_match")
    return Task("tiny", "generation", (), ("text",), Prompt("{text} was"), metrics, {"test": examples}, "lm", MOST)


def rows_of(base: Base, task: Task, max_length: int = 100) -> list[Choice]:
    kind = {"is_encoder_decoder": base.kind == "seq2seq"}
    rows = encode(task, task.splits["test"], base.tokenizer, max_length=max_length, **kind)
    return [row for row in rows if isinstance(row, Choice)]


def collator(base: Base) -> partial:
    start = base.model.config.decoder_start_token_id if base.kind == "seq2seq" else None
    return partial(collate, pad_token_id=base.tokenizer.pad_token_id, decoder_start_token_id=start)


@torch.no_grad()
def alone(base: Base, prompt: tuple[int, ...], ends: list[int]) -> list[int]:
    """One prompt, no padding, no cache: all is read again for each token."""
    source, found = torch.tensor([prompt]), [] if base.kind == "causal" else [base.model.config.decoder_start_token_id]
    opening = len(found)
    while len(found) - opening < MOST and (len(found) == opening or found[-1] not in ends):
        if base.kind == "seq2seq":
            logits = base.model(input_ids=source, decoder_input_ids=torch.tensor([found])).logits
        else:
            tokens = torch.cat([source, torch.tensor([found], dtype=torch.long)], dim=1)
            mask = torch.ones_like(tokens)
            logits = base.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        found.append(int(logits[0, -1].argmax()))
    return found[opening:]


def read(found: Tensor, ends: list[int]) -> list[list[int]]:
    """Each row as far as its first end."""
    rows = []
    for row in found.tolist():
        stop = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: stop + 1])
    return rows


def asked(base: Base, rows: list[Choice]) -> dict[str, Tensor]:
    return collator(base)([Choice(row.prompts, ((0,),), 0) for row in rows]).inputs


@torch.no_grad()
@families
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
def test_a_batch_writes_what_each_prompt_alone_does(
    load: Load, family: str, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(family)
    rows = rows_of(base, written())
    free = [alone(base, row.prompts[0], []) for row in rows]
    ends = [free[0][2], free[1][-1]]  # one row ends early, so that others go on beside it
    expected = [alone(base, row.prompts[0], ends) for row in rows]
    assert len({len(row) for row in expected}) > 1, "all end at once, so nothing is padded"
    if not cached:
        names = objectives._accepted(base.model) - {"past_key_values"}
        monkeypatch.setattr(objectives, "_accepted", lambda model: names)
    found = torch.stack([*greedy(base.model, asked(base, rows), torch.tensor(ends), MOST)], dim=1)
    assert read(found, ends) == expected
    for row, own in zip(found.tolist(), expected, strict=True):
        assert set(row[len(own) :]) <= {ends[0]}, "a row goes on behind its end"


@torch.no_grad()
def test_a_prefix_is_read_before_every_prompt(load: Load) -> None:
    base = load("opt")
    rows = rows_of(base, written())
    bare = [alone(base, row.prompts[0], []) for row in rows]
    lay_on(base, draw(base, 3, init="real_activations", seed=0))
    expected = [alone(base, row.prompts[0], []) for row in rows]
    assert expected != bare
    found = torch.stack([*greedy(base.model, asked(base, rows), torch.tensor([-1]), MOST)], dim=1)
    assert found.tolist() == expected


@families
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_answers_come_back_in_the_order_of_the_rows(load: Load, family: str, batch_size: int) -> None:
    base = load(family)
    rows = rows_of(base, written())
    found = answer_all(base.model, rows, collator(base), base.tokenizer, batch_size=batch_size, max_new_tokens=MOST)
    ends = ends_of(base.tokenizer)
    texts = [base.tokenizer.decode(alone(base, row.prompts[0], ends), skip_special_tokens=True) for row in rows]
    assert found == [text.partition("\n")[0].strip() for text in texts] and len(set(found)) > 1


def test_an_answer_ends_with_its_line_or_the_text() -> None:
    class Words:
        eos_token_id = 3
        texts = ("a", "b\n", "\n", "</s>", "\n\n")

        def __len__(self) -> int:
            return len(self.texts)

        def batch_decode(self, rows: list[list[int]]) -> list[str]:
            return ["".join(self.texts[token] for token in row) for row in rows]

    assert ends_of(Words()) == [3, 1, 2, 4]


def test_a_written_answer_is_evaluated_by_its_text_and_its_loss_is_the_golds(load: Load) -> None:
    base, task = load("opt"), written()
    rows, make_batch = rows_of(base, task), collator(base)
    found = evaluate(base.model, task, "test", rows, make_batch, batch_size=2, tokenizer=base.tokenizer)
    gold_only = partial(make_batch, gold_only=True)
    with torch.no_grad():
        expected = objectives.mean_loss(base.model, gold_only(rows), "lm")
    assert found.loss == pytest.approx(float(expected), abs=1e-5)
    assert found.metrics["exact_match"].value == 0.0 and found.answers is not None
    right = written(golds=(found.answers[0],))
    again = evaluate(
        base.model, right, "test", rows_of(base, right), make_batch, batch_size=2, tokenizer=base.tokenizer
    )
    share = sum(answer == found.answers[0] for answer in found.answers) / len(TEXTS)
    assert again.metrics["exact_match"].value == pytest.approx(share) and share > 0
    assert again.metrics["f1"].low <= again.metrics["f1"].value <= again.metrics["f1"].high


def test_a_prompt_leaves_room_for_its_answer(load: Load) -> None:
    base = load("opt")
    for row in rows_of(base, written(), max_length=24):
        assert len(row.prompts[0]) <= 24 - max(MOST, len(row.options[0]))


def test_an_encoder_decoder_learns_to_end_its_answer(load: Load) -> None:
    base = load("t5")
    assert rows_of(base, written())[0].options[0][-1] == base.tokenizer.eos_token_id
