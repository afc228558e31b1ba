"""TREC: what does a question ask for? (Li and Roth 2002; prompt in LM-BFF's style.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {
    "ABBR": "abbreviation",
    "ENTY": "entity",
    "DESC": "description",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("text",),
    prompts={"default": Prompt("{text} It was", LABEL_WORDS)},
    hub=Hub(
        "SetFit/TREC-QC",
        splits={"train": "train", "test": "test"},
        label_column="label_coarse_original",
    ),
)
