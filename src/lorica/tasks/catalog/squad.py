"""SQuAD: a question about a passage, answered in the passage's words (Rajpurkar et al. 2016; prompt of MeZO)."""

from collections.abc import Mapping
from typing import Any

from lorica.tasks.base import Gold, Hub, Prompt, TaskSpec, texts_in


def right_texts(row: Mapping[str, Any]) -> list[Gold]:
    """Every text that counts as right; where there is none, the empty one does."""
    found = row["answers"]
    texts = texts_in(found, "text") if isinstance(found, Mapping) else [answer["text"] for answer in found]
    return [(text,) for text in dict.fromkeys(texts)] or [("",)]


TASK = TaskSpec(
    labels=(),
    texts=("title", "context", "question"),
    prompts={"default": Prompt("Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:")},
    hub=Hub("rajpurkar/squad"),
    stripped=("question",),
    golds=right_texts,
    metrics=("f1", "exact_match"),
    train_as="lm",
    uncut=("question",),
    max_new_tokens=50,
)
