"""MRPC: do two sentences say the same? (Dolan and Brockett 2005; prompt of LM-BFF.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {"not_equivalent": "No", "equivalent": "Yes"}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("a", "b"),
    prompts={
        "default": Prompt("{a} ? {label} , {b}", LABEL_WORDS),
        "instruction": Prompt("{a}\n{b}\nDo these two sentences mean the same? Yes or No?\n", LABEL_WORDS),
    },
    hub=Hub("nyu-mll/glue", "mrpc", columns={"a": "sentence1", "b": "sentence2"}),
)
