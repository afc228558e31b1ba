"""CR: is a sentence of a customer's review positive? (Hu and Liu 2004; prompt in LM-BFF's style.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {"negative": "terrible", "positive": "great"}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("text",),
    prompts={"default": Prompt("{text} It was", LABEL_WORDS)},
    hub=Hub("SetFit/CR", splits={"train": "train", "test": "test"}, label_column="label_text"),
)
