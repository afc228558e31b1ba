"""QQP: do two questions ask the same? (Iyer et al. 2017; prompt of LM-BFF.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {"not_duplicate": "No", "duplicate": "Yes"}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("a", "b"),
    prompts={
        "default": Prompt("{a} ? {label} , {b}", LABEL_WORDS),
        "instruction": Prompt("{a}\n{b}\nDo these two questions ask the same? Yes or No?\n", LABEL_WORDS),
    },
    hub=Hub("nyu-mll/glue", "qqp", columns={"a": "question1", "b": "question2"}),
)
