"""SST-2: is a sentence of a film review positive? (Socher et al. 2013; prompt of MeZO.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

TASK = TaskSpec(
    labels=("negative", "positive"),
    texts=("text",),
    prompts={"default": Prompt("{text} It was", {"negative": "terrible", "positive": "great"}, " It was")},
    stripped=("text",),  # GLUE's sentences end in a space
    hub=Hub("stanfordnlp/sst2", columns={"text": "sentence"}),
)
