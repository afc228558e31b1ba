"""QNLI: does a sentence answer a question? (Wang et al. 2018; prompt of LM-BFF.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {"entailment": "Yes", "not_entailment": "No"}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("a", "b"),
    prompts={
        "default": Prompt("{a} ? {label} , {b}", LABEL_WORDS),
        "instruction": Prompt("{a}\n{b}\nDoes the sentence answer the question? Yes or No?\n", LABEL_WORDS),
    },
    uncut=("a",),
    hub=Hub("nyu-mll/glue", "qnli", columns={"a": "question", "b": "sentence"}),
)
