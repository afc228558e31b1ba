"""SST-5: how positive is a sentence of a film review? (Socher et al. 2013; prompt in LM-BFF's style.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {
    "very negative": "terrible",
    "negative": "bad",
    "neutral": "okay",
    "positive": "good",
    "very positive": "great",
}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("text",),
    prompts={"default": Prompt("{text} It was", LABEL_WORDS)},
    hub=Hub(
        "SetFit/sst5",
        splits={"train": "train", "dev": "validation", "test": "test"},
        label_column="label_text",
    ),
)
