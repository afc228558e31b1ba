"""MNLI: does a premise of any genre entail or contradict a hypothesis? (Williams et al. 2018; prompt of LM-BFF.)"""

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
        "nyu-mll/glue",
        "mnli",
        splits={"train": "train", "test": "validation_matched"},
        columns={"a": "premise", "b": "hypothesis"},
    ),
)
