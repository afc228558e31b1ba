"""How well an answer in words agrees with the right ones: exact match and F1 as SQuAD and as DROP define them.

MATH section 4. Sources: SQuAD 2.0's evaluation (Rajpurkar et al. 2018), DROP's (Dua et al. 2019).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from lorica.tasks.base import Gold

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, golds: Sequence[Gold]) -> float:
    """1 if the answer is, normalised, one of the right ones; an empty one is right where there is no answer."""
    return max(float(normalised(answer) == normalised(text)) for text in _texts(golds))


def f1(answer: str, golds: Sequence[Gold]) -> float:
    """The F1 of the answer's words, each as often as it comes, against those of the right answer that is nearest."""
    return max(_word_f1(normalised(answer).split(), normalised(text).split()) for text in _texts(golds))


def drop_exact_match(answer: str, golds: Sequence[Gold]) -> float:
    """1 if the answer's spans are, normalised, those of one of the right answers, in any order."""
    return max(drop_agreement(_spans(answer, gold), gold)[0] for gold in golds)


def drop_f1(answer: str, golds: Sequence[Gold]) -> float:
    """The F1 of the answer's spans against those of the right answer that is nearest."""
    return max(drop_agreement(_spans(answer, gold), gold)[1] for gold in golds)


ANSWER_METRICS: dict[str, Callable[[str, Sequence[Gold]], float]] = {
    "exact_match": exact_match,
    "f1": f1,
    "drop_exact_match": drop_exact_match,
    "drop_f1": drop_f1,
}


def normalised(text: str) -> str:
    """In small letters, without punctuation and articles, words one space apart."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def drop_agreement(spans: Sequence[str], gold: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) of spans against a right answer's, as DROP has it.

    F1 is that of sets of words, in the best pairing of the spans; spans that no number agrees in score nothing, and
    the mean is over the spans of the side that has more. It is rounded to two decimals, as DROP's is.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # 0.6 s that other metrics need not

    found, right = ([_drop_normalised(span) for span in side] for side in (spans, gold))
    exact = float(len(found) == len(right) and {*found} == {*right})
    bags = [[{*span.split()} for span in side] for side in (found, right)]
    agreement = np.array([[_bag_f1(one, other) for other in bags[1]] for one in bags[0]])
    rows, columns = linear_sum_assignment(-agreement)
    return exact, round(float(agreement[rows, columns].sum()) / max(agreement.shape), 2)


def _texts(golds: Sequence[Gold]) -> list[str]:
    """The right answers; one of which nothing stays normalised is none, as SQuAD has it, unless all are."""
    texts = [", ".join(gold) for gold in golds]
    return [text for text in texts if normalised(text)] or [""]


def _word_f1(answer: Sequence[str], gold: Sequence[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    shared = (Counter(answer) & Counter(gold)).total()
    return 2 * shared / (len(answer) + len(gold))


def _spans(answer: str, gold: Gold) -> list[str]:
    """The answer's spans. Several are written with commas, and a comma may be of one: so where one is right, one."""
    return [answer] if len(gold) == 1 else answer.split(", ")


def _drop_normalised(text: str) -> str:
    """Word by word, a hyphen parting words too: numbers as floats, the rest without punctuation; no articles."""
    words = [_drop_word(word) for word in re.split("[ -]", text.lower())]
    return " ".join(" ".join(words).split())


def _drop_word(word: str) -> str:
    bare = word if _is_number(word) else word.translate(PUNCTUATION)
    return ARTICLES.sub(" ", str(float(bare)) if _is_number(bare) else bare)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _bag_f1(answer: set[str], gold: set[str]) -> float:
    """F1 of two sets of words; nothing where the right one has numbers, and the answer none of them."""
    numbers = {word for word in gold if _is_number(word)}
    if numbers and not numbers & answer:
        return 0.0
    if not answer or not gold:  # as DROP has it: what is empty is wholly precise, or wholly recalled
        return float(answer == gold)
    return 2 * len(answer & gold) / (len(answer) + len(gold))
