"""MultiRC: is an answer to a question about a paragraph right? (Khashabi et al. 2018; prompt of MeZO.)

Every answer is an example of its own; accuracy and F1a are over answers.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lorica.tasks.base import Hub, Prompt, TaskSpec


def answers(row: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The answers of a paragraph's row, one after the other; a row that is one answer, as the hub has it, stays it."""
    if "questions" not in row:
        yield dict(row)
        return
    for asked in row["questions"]:
        for answer, label in asked["answers"]:
            yield {"paragraph": row["paragraph"], "question": asked["question"], "answer": answer, "label": label}


TASK = TaskSpec(
    labels=("false", "true"),
    texts=("paragraph", "question", "answer"),
    prompts={
        "default": Prompt(
            '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
            {"false": "No", "true": "Yes"},
        )
    },
    hub=Hub("aps/super_glue", "multirc", labels=("false", "true")),
    rows=answers,
    uncut=("question", "answer"),
    metrics=("accuracy", "f1a"),
)
