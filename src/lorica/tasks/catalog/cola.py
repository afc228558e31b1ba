"""CoLA: is a sentence good English? (Warstadt et al. 2019; prompt in LM-BFF's style.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {"unacceptable": "incorrect", "acceptable": "correct"}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("text",),
    prompts={"default": Prompt("{text} It was", LABEL_WORDS)},
    hub=Hub("nyu-mll/glue", "cola", columns={"text": "sentence"}),
)
