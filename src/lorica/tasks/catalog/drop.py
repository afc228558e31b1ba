"""DROP: a question about a passage whose answer is to be worked out (Dua et al. 2019; prompt of MeZO).

The hub's rows hold the spans of all who answered in one list, so there each span counts as an answer of its own.
"""

from collections.abc import Mapping
from typing import Any

from lorica.tasks.base import Gold, Hub, Prompt, TaskSpec, texts_in


def right_spans(row: Mapping[str, Any]) -> list[Gold]:
    """Every answer that counts as right, each the spans that it consists of."""
    if "answers_spans" in row:
        return [(span,) for span in dict.fromkeys(texts_in(row["answers_spans"], "spans"))]
    return [tuple(texts_in(row, "answers"))]


TASK = TaskSpec(
    labels=(),
    texts=("passage", "question"),
    prompts={"default": Prompt("Passage: {passage}\nQuestion: {question}\nAnswer:")},
    hub=Hub("ucinlp/drop"),
    stripped=("question",),
    golds=right_spans,
    metrics=("drop_f1", "drop_exact_match"),
    train_as="lm",
    uncut=("question",),
    max_new_tokens=50,
)
