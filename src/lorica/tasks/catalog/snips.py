"""SNIPS: which of seven requests is put to an assistant? (Coucke et al. 2018; prompt in LM-BFF's style.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LABEL_WORDS = {
    "AddToPlaylist": "playlist",
    "BookRestaurant": "restaurant",
    "GetWeather": "weather",
    "PlayMusic": "music",
    "RateBook": "rating",
    "SearchCreativeWork": "search",
    "SearchScreeningEvent": "cinema",
}

TASK = TaskSpec(
    labels=tuple(LABEL_WORDS),
    texts=("text",),
    prompts={"default": Prompt("{text} It was", LABEL_WORDS)},
    hub=Hub("benayas/snips", splits={"train": "train", "test": "test"}, label_column="category"),
)
