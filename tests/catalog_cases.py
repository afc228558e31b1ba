"""Made-up rows of every catalog task as its hub repository has them, and how the first of them is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorica.tasks.sources import CATALOG


@dataclass(frozen=True)
class Case:
    """Rows of a task as its hub repository has them, and how the first of them is asked there."""

    rows: Sequence[Mapping[str, Any]]
    prompt: str
    options: Sequence[str]
    names: Sequence[str] | None = None  # of the label numbers, where the repository tells them
    of_names: str = "label"
    splits: Sequence[str] = ("train", "validation")
    names_of_options: Sequence[str] = field(default=())


# What is right of each task's first row, as it stands behind the prompt.
RIGHT = {
    **dict.fromkeys(("boolq", "cb", "multirc", "rte", "wic", "wsc"), "Yes"),
    **dict.fromkeys(("mnli", "mrpc", "qnli", "qqp", "snli"), " Yes , An animal moves."),
    **dict.fromkeys(("cr", "mpqa", "mr", "sst2", "sst5"), " great"),
    "ag_news": " sports",
    "banking77": " card arrival",
    "clinc150": " account blocked",
    "cola": " correct",
    "copa": " he broke a leg.",
    "drop": " 5\n",
    "emotion": " joy",
    "langid": " German",
    "record": " Then dog ate.",
    "snips": " music",
    "squad": " the dog\n",
    "squad_v2": "\n",
    "subj": " subjective",
    "trec": " human",
    "winogrande": " Bob ate.",
}


def single(words: Sequence[str], rows: Sequence[Mapping[str, Any]], text: str = "a fine film.", **more: Any) -> Case:
    return Case(rows, f"{text} It was", [f" {word}" for word in words], **more)


def nli(names: Sequence[str], rows: Sequence[Mapping[str, Any]], words: Sequence[str]) -> Case:
    return Case(rows, "A dog runs. ?", [f" {word} , An animal moves." for word in words], names)


PASSAGE = "The dog ate. It was fed by Ann.\n@highlight\nAnn fed the dog\n@highlight\nBob did not"
THREE = ("Yes", "Maybe", "No")
CASES = {
    "sst2": single(
        ("terrible", "great"),
        [{"idx": 0, "sentence": "a fine film. ", "label": 1}, {"idx": 1, "sentence": "dull. ", "label": 0}],
        names=("negative", "positive"),
    ),
    "sst5": single(
        ("terrible", "bad", "okay", "good", "great"),
        [
            {"text": "a fine film.", "label": 4, "label_text": "very positive"},
            {"text": "so so.", "label": 2, "label_text": "neutral"},
        ],
        splits=("train", "validation", "test"),
    ),
    "mr": single(
        ("terrible", "great"),
        [{"text": "a fine film.", "label": 1}, {"text": "dull.", "label": 0}],
        names=("neg", "pos"),
        splits=("train", "validation", "test"),
    ),
    "cr": single(
        ("terrible", "great"),
        [
            {"text": "a fine film.", "label": 1, "label_text": "positive"},
            {"text": "it broke.", "label": 0, "label_text": "negative"},
        ],
        splits=("train", "test"),
    ),
    "mpqa": single(
        ("terrible", "great"),
        [{"sentence": "a fine film.", "label": 1}, {"sentence": "is afraid", "label": 0}],
        splits=("train", "dev", "test"),
    ),
    "subj": single(
        ("subjective", "objective"),
        [
            {"text": "a fine film.", "label": 1, "label_text": "subjective"},
            {"text": "a man leaves home.", "label": 0, "label_text": "objective"},
        ],
        splits=("train", "test"),
    ),
    "trec": single(
        ("abbreviation", "entity", "description", "human", "location", "number"),
        [
            {"text": "Who was Ann ?", "label": 3, "label_coarse": 3, "label_coarse_original": "HUM"},
            {"text": "What is it ?", "label": 0, "label_coarse": 0, "label_coarse_original": "DESC"},
        ],
        "Who was Ann ?",
        splits=("train", "test"),
    ),
    "cola": single(
        ("incorrect", "correct"),
        [{"sentence": "a fine film.", "label": 1, "idx": 0}, {"sentence": "fine a film.", "label": 0, "idx": 1}],
        names=("unacceptable", "acceptable"),
    ),
    "emotion": single(
        ("sadness", "joy", "love", "anger", "fear", "surprise"),
        [{"text": "a fine film.", "label": 1}, {"text": "i am sad", "label": 0}],
        names=("sadness", "joy", "love", "anger", "fear", "surprise"),
        splits=("train", "validation", "test"),
    ),
    "snips": single(
        ("playlist", "restaurant", "weather", "music", "rating", "search", "cinema"),
        [{"text": "play a song", "category": "PlayMusic"}, {"text": "will it rain", "category": "GetWeather"}],
        "play a song",
        splits=("train", "test"),
    ),
    "ag_news": single(
        ("world", "sports", "business", "technology"),
        [{"text": "They won.", "label": 1}, {"text": "Shares fell.", "label": 2}],
        "They won.",
        names=("World", "Sports", "Business", "Sci/Tech"),
        splits=("train", "test"),
    ),
    "rte": Case(
        [
            {"sentence1": "A dog runs.", "sentence2": "An animal moves.", "label": 0},
            {"sentence1": "A dog runs.", "sentence2": "A cat sits.", "label": 1},
        ],
        'A dog runs.\nDoes this mean that "An animal moves." is true? Yes or No?\n',
        ("Yes", "No"),
        ("entailment", "not_entailment"),
    ),
    "cb": Case(
        [
            {"premise": "A dog runs.", "hypothesis": "an animal moves", "label": 0},
            {"premise": "A dog runs.", "hypothesis": "a dog sits", "label": 1},
        ],
        'Suppose A dog runs. Can we infer that "an animal moves"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        ("entailment", "contradiction", "neutral"),
    ),
    "boolq": Case(
        [
            {"passage": "Dogs run.", "question": "do dogs run", "answer": True},
            {"passage": "Dogs run.", "question": "do dogs fly", "answer": False},
        ],
        "Dogs run. Do dogs run?\n",
        ("No", "Yes"),
    ),
    "wsc": Case(
        [
            {"text": "Ann fed the dog and She left.", "span1_text": "Ann", "span2_text": "She", "label": 1},
            {"text": "Ann fed the dog and it left.", "span1_text": "Ann", "span2_text": "it", "label": 0},
        ],
        'Ann fed the dog and She left.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
        ("No", "Yes"),
        ("False", "True"),
    ),
    "wic": Case(
        [
            {"word": "run", "sentence1": "Dogs run.", "sentence2": "I run.", "label": 1},
            {"word": "run", "sentence1": "Dogs run.", "sentence2": "A run of luck.", "label": 0},
        ],
        'Does the word "run" have the same meaning in these two sentences? Yes, No?\nDogs run.\nI run.\n',
        ("No", "Yes"),
        ("False", "True"),
    ),
    "multirc": Case(
        [
            {"paragraph": "Ann fed the dog.", "question": "Who ate?", "answer": "the dog", "label": 1},
            {"paragraph": "Ann fed the dog.", "question": "Who ate?", "answer": "Ann", "label": 0},
        ],
        'Ann fed the dog.\nQuestion: Who ate?\nI found this answer "the dog". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        ("False", "True"),
    ),
    "qnli": nli(
        ("entailment", "not_entailment"),
        [
            {"question": "A dog runs.", "sentence": "An animal moves.", "label": 0},
            {"question": "Who ran?", "sentence": "A cat sat.", "label": 1},
        ],
        ("Yes", "No"),
    ),
    "qqp": nli(
        ("not_duplicate", "duplicate"),
        [
            {"question1": "A dog runs.", "question2": "An animal moves.", "label": 1},
            {"question1": "Who ran?", "question2": "Who sat?", "label": 0},
        ],
        ("No", "Yes"),
    ),
    "mrpc": nli(
        ("not_equivalent", "equivalent"),
        [
            {"sentence1": "A dog runs.", "sentence2": "An animal moves.", "label": 1},
            {"sentence1": "A dog runs.", "sentence2": "A cat sat.", "label": 0},
        ],
        ("No", "Yes"),
    ),
    "mnli": Case(
        [
            {"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": 0},
            {"premise": "A dog runs.", "hypothesis": "A dog sits.", "label": 2},
        ],
        "A dog runs. ?",
        [f" {word} , An animal moves." for word in THREE],
        ("entailment", "neutral", "contradiction"),
        splits=("train", "validation_matched", "validation_mismatched"),
    ),
    "snli": Case(
        [
            {"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": 0},
            {"premise": "A dog runs.", "hypothesis": "A cat or so.", "label": -1},
            {"premise": "A dog runs.", "hypothesis": "A dog sits.", "label": 2},
        ],
        "A dog runs. ?",
        [f" {word} , An animal moves." for word in THREE],
        ("entailment", "neutral", "contradiction"),
        splits=("train", "validation", "test"),
    ),
    "copa": Case(
        [
            {
                "premise": "The man fell.",
                "choice1": "He broke a leg.",
                "choice2": "I laughed.",
                "label": 0,
                "question": "effect",
                "idx": 0,
            },
            {
                "premise": "The man fell.",
                "choice1": "He sat.",
                "choice2": "It was icy.",
                "label": 1,
                "question": "cause",
                "idx": 1,
            },
        ],
        "The man fell so",
        (" he broke a leg.", " I laughed."),
        ("choice1", "choice2"),
    ),
    "winogrande": Case(
        [
            {"sentence": "Ann fed Bob so _ ate.", "option1": "Ann", "option2": "Bob", "answer": "2"},
            {"sentence": "Ann fed Bob so _ left.", "option1": "Ann", "option2": "Bob", "answer": "1"},
        ],
        "Ann fed Bob so",
        (" Ann ate.", " Bob ate."),
    ),
    "record": Case(
        [
            {
                "passage": PASSAGE,
                "query": "Then @placeholder ate.",
                "entities": ["Ann", "Bob", "dog"],
                "answers": ["dog"],
            },
            {
                "passage": PASSAGE,
                "query": "So @placeholder slept.",
                "entities": ["Ann", "Bob"],
                "answers": ["Bob", "Ann"],
            },
        ],
        "The dog ate. It was fed by Ann.\n- Ann fed the dog\n- Bob did not\n-",
        (" Then Ann ate.", " Then Bob ate.", " Then dog ate."),
    ),
    "squad": Case(
        [
            {
                "title": "Dogs",
                "context": "Ann fed the dog.",
                "question": " Who ate?",
                "answers": {"text": ["the dog", "dog", "the dog"], "answer_start": [8, 12, 8]},
            },
            {
                "title": "Dogs",
                "context": "Ann fed the dog.",
                "question": "Who fed it?",
                "answers": {"text": ["Ann"], "answer_start": [0]},
            },
        ],
        "Title: Dogs\nContext: Ann fed the dog.\nQuestion: Who ate?\nAnswer:",
        (" the dog\n",),
    ),
    "squad_v2": Case(
        [
            {
                "title": "Dogs",
                "context": "Ann fed the dog.",
                "question": "Who slept?",
                "answers": {"text": [], "answer_start": []},
            },
            {
                "title": "Dogs",
                "context": "Ann fed the dog.",
                "question": "Who fed it?",
                "answers": {"text": ["Ann"], "answer_start": [0]},
            },
        ],
        "Title: Dogs\nContext: Ann fed the dog.\nQuestion: Who slept?\nAnswer:",
        ("\n",),
    ),
    "drop": Case(
        [
            {
                "passage": "Ann has 3 dogs and Bob 2.",
                "question": "How many dogs? ",
                "answers_spans": {"spans": ["5", "5 dogs"], "types": ["number", "span"]},
            },
            {
                "passage": "Ann has 3 dogs and Bob 2.",
                "question": "Who has 2?",
                "answers_spans": {"spans": ["Bob"], "types": ["span"]},
            },
        ],
        "Passage: Ann has 3 dogs and Bob 2.\nQuestion: How many dogs?\nAnswer:",
        (" 5\n",),
    ),
    "langid": Case(
        [{"labels": "de", "text": "das ist gut"}, {"labels": "zh", "text": "bu hao"}],
        "das ist gut It was",
        (" German", " Chinese"),
        splits=("train", "validation", "test"),
    ),
    "banking77": Case(
        [
            {"text": "where is my card", "label": 11, "label_text": "card_arrival"},
            {"text": "it was undone", "label": 53, "label_text": "reverted_card_payment?"},
        ],
        "where is my card It was",
        (),
        splits=("train", "test"),
        names_of_options=("card arrival", "reverted card payment", "refund not showing up"),
    ),
    "clinc150": Case(
        [
            {"text": "is my account blocked", "intent": 1},
            {"text": "what is the sky made of", "intent": 150},
            {"text": "wake me", "intent": 2},
        ],
        "is my account blocked It was",
        (),
        (*CATALOG.load("clinc150", "TASK").labels, "oos"),
        "intent",
        splits=("train", "validation", "test"),
        names_of_options=("account blocked", "what are your hobbies"),
    ),
}
