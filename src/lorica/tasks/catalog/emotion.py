"""Emotion: which of six emotions does a tweet show? (Saravia et al. 2018; prompt in LM-BFF's style.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

EMOTIONS = ("sadness", "joy", "love", "anger", "fear", "surprise")

TASK = TaskSpec(
    labels=EMOTIONS,
    texts=("text",),
    prompts={"default": Prompt("{text} It was", {emotion: emotion for emotion in EMOTIONS})},
    hub=Hub("dair-ai/emotion", splits={"train": "train", "dev": "validation", "test": "test"}),
)
