"""MR: is a sentence of a film review positive? (Pang and Lee 2005; prompt in LM-BFF's style.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {"negative": "terrible", "positive": "great"}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("text",),
    prompts={"default": Prompt("{text} It was", LABEL_WORDS)},
    hub=Hub(
        "cornell-movie-review-data/rotten_tomatoes",
        splits={"train": "train", "dev": "validation", "test": "test"},
        labels=("negative", "positive"),
    ),
)
