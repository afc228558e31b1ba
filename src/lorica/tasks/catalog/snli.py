"""SNLI: does a picture's caption entail or contradict a hypothesis? (Bowman et al. 2015; prompt of LM-BFF.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("a", "b"),
    prompts={
        "default": Prompt("{a} ? {label} , {b}", LABEL_WORDS),
        "instruction": Prompt('{a}\nDoes this mean that "{b}" is true? Yes, No, or Maybe?\n', LABEL_WORDS),
    },
    hub=Hub(
        "stanfordnlp/snli",
        splits={"train": "train", "dev": "validation", "test": "test"},
        columns={"a": "premise", "b": "hypothesis"},
        left_out=("-1", "-"),
    ),
)
