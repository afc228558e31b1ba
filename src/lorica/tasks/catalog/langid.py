"""Language identification: in which language is a sentence? (Leipzig corpora, Goldhahn et al. 2012; LM-BFF's style.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "fi": "Finnish", "fr": "French", "hi": "Hindi", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "sw": "Swahili", "th": "Thai", "tr": "Turkish",
    "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip

TASK = TaskSpec(
    labels=tuple(LANGUAGES),
    texts=("text",),
    prompts={"default": Prompt("{text} It was", LANGUAGES)},
    hub=Hub(
        "papluca/language-identification",
        splits={"train": "train", "dev": "validation", "test": "test"},
        label_column="labels",
    ),
    labels_vary=True,
)
