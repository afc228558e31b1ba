"""AG News: which of four topics is a news item about? (Zhang et al. 2015; prompt in LM-BFF's style.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {"World": "world", "Sports": "sports", "Business": "business", "Sci/Tech": "technology"}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("text",),
    prompts={"default": Prompt("{text} It was", LABEL_WORDS)},
    hub=Hub("fancyzhx/ag_news", splits={"train": "train", "test": "test"}),
)
