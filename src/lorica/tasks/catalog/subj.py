"""SUBJ: is a sentence about a film an opinion or a fact? (Pang and Lee 2004; prompt in LM-BFF's style.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {"subjective": "subjective", "objective": "objective"}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("text",),
    prompts={"default": Prompt("{text} It was", LABEL_WORDS)},
    hub=Hub("SetFit/subj", splits={"train": "train", "test": "test"}, label_column="label_text"),
)
