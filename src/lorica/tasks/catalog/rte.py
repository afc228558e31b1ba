"""RTE: does the premise entail the hypothesis? (PASCAL challenges 1-3 and 5; prompt of MeZO.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

TASK = TaskSpec(
    labels=("entailment", "not_entailment"),
    texts=("a", "b"),
    prompts={
        "default": Prompt(
            '{a}\nDoes this mean that "{b}" is true? Yes or No?\n',
            {"entailment": "Yes", "not_entailment": "No"},
        )
    },
    hub=Hub("nyu-mll/glue", "rte", columns={"a": "sentence1", "b": "sentence2"}),
)
