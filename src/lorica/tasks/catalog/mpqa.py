"""MPQA: is a phrase of the news positive? (Wiebe et al. 2005; prompt in LM-BFF's style.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {"negative": "terrible", "positive": "great"}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("text",),
    prompts={"default": Prompt("{text} It was", LABEL_WORDS)},
    hub=Hub("jxm/mpqa", splits={"train": "train", "dev": "dev", "test": "test"}, columns={"text": "sentence"}),
)
