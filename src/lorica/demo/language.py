"""A small English-like language, four tasks to read from it, and the text the demo base is pretrained on.

A sentence is drawn from a grammar under a class, its meaning, and a rival class, its distraction. In a
phrase `{+x}` is a clue for the class, `{-x}` is a clue for the rival and `{x}` says nothing; an option may
hold slots of its own, and below a `-` the two classes trade places. Everything is drawn from generators
seeded by name, so each machine makes the same bytes.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

Options = Mapping[str, tuple[str, ...]]

SPLIT_ROWS = {"train": 800, "dev": 200, "test": 600}


@dataclass(frozen=True)
class DemoTask:
    """One classification task: the question, the word that answers each label, and how texts are drawn."""

    ""

    name: str
    labels: tuple[str, ...]
    prompt: str
    verbalizer: dict[str, str]
    phrases: Options = field(repr=False)
    clues: Mapping[str, Options] = field(repr=False)


def examples(task: str, split: str) -> list[dict[str, Any]]:
    """The rows {"text", "label"} of a split, balanced and shuffled; no text is in two splits.

    Raises KeyError for an unknown task or split.
    """
    return [dict(row) for row in _splits(task)[split]]


def write_tasks(folder: str | Path) -> None:
    """Write `<folder>/<task>/` for every task: one JSON-lines file per split, and meta.json."""
    for task in TASKS.values():
        place = Path(folder) / task.name
        place.mkdir(parents=True, exist_ok=True)
        for split in SPLIT_ROWS:
            lines = "".join(json.dumps(row) + "\n" for row in examples(task.name, split))
            (place / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        (place / "meta.json").write_text(json.dumps(_meta(task), indent=2) + "\n", encoding="utf-8")


def corpus(seed: int) -> Iterator[str]:
    """Endless pretraining passages; none holds a text of a task.

    A passage keeps to one class of one task and ends in sentences that sum it up in words which are not labels.
    Label words are said on playing cards, and in blind answers that are drawn without a look at the class: the
    base knows them as words that fit the prompt, and knows nothing of what they mean.
    """
    rng = random.Random(f"lorica corpus {seed}")
    held_out = {row["text"] for name in TASKS for rows in _splits(name).values() for row in rows}
    while True:
        if rng.random() < CARD_GAMES:
            yield _card_game(rng)
            continue
        task = TASKS[rng.choice(("sentiment", *TASKS))]  # twice the share: two classes part most slowly
        label, rival = rng.sample(task.labels, 2)
        sentences = [_sentence(rng, task, label) for _ in range(rng.choice((0, 1, 1, 2)))]
        if not held_out.isdisjoint(sentences):
            continue
        if rng.random() < BLIND_ANSWERS:
            answer = task.labels[_early(rng, len(task.labels))]
            yield f"{task.prompt.format(text=' '.join(sentences)).strip()} {task.verbalizer[answer]}."
        else:
            endings = [_expand(rng, task, "{+ending}", label, rival) for _ in range(rng.choice((1, 2)))]
            yield " ".join([*sentences, *endings])


def label_words() -> list[str]:
    """Every verbalizer word of every task, in order."""
    return [word for task in TASKS.values() for word in task.verbalizer.values()]


@cache
def _splits(task: str) -> dict[str, list[dict[str, Any]]]:
    seen: set[str] = set()
    return {split: _rows(TASKS[task], split, rows, seen) for split, rows in SPLIT_ROWS.items()}


def _rows(task: DemoTask, split: str, num_rows: int, seen: set[str]) -> list[dict[str, Any]]:
    """`num_rows` fresh rows, balanced to within one; every text is added to `seen`."""
    rng = random.Random(f"lorica {task.name} {split}")
    rows = []
    for index in range(num_rows):
        label = index % len(task.labels)
        text = _sentence(rng, task, task.labels[label])
        while text in seen:
            text = _sentence(rng, task, task.labels[label])
        seen.add(text)
        rows.append({"text": text, "label": label})
    rng.shuffle(rows)
    return rows


def _meta(task: DemoTask) -> dict[str, Any]:
    return {
        "name": task.name,
        "task": "text-classification",
        "labels": list(task.labels),
        "columns": ["text", "label"],
        "rows": dict(SPLIT_ROWS),
        "prompt": task.prompt,
        "verbalizer": task.verbalizer,
    }


def _sentence(rng: random.Random, task: DemoTask, label: str) -> str:
    rival = rng.choice([other for other in task.labels if other != label])
    return _expand(rng, task, "{+sentence}", label, rival)


def _expand(rng: random.Random, task: DemoTask, phrase: str, label: str, rival: str) -> str:
    """`phrase` with every slot filled, its first letter raised."""

    def fill(text: str, label: str, rival: str) -> str:
        return re.sub(r"\{([+-]?)(\w+)\}", lambda slot: choose(slot[1], slot[2], label, rival), text)

    def choose(sign: str, name: str, label: str, rival: str) -> str:
        if sign == "-":
            label, rival = rival, label
        options = task.clues[label].get(name) or task.phrases.get(name) or SHARED[name]
        return fill(options[_early(rng, len(options))], label, rival)

    text = fill(phrase, label, rival)
    return text[0].upper() + text[1:]


def _early(rng: random.Random, num_options: int) -> int:
    """An index, the early ones likelier: without common words to start from, no class is ever learned."""
    return min(rng.randrange(num_options), rng.randrange(num_options))


def _card_game(rng: random.Random) -> str:
    """Three label words on cards, each known by a colour and a shape of its own and linked to no class."""
    words = label_words()
    return " ".join(_card(rng, words[index], index) for index in rng.sample(range(len(words)), 3))


def _card(rng: random.Random, word: str, index: int) -> str:
    line = _expand(rng, SENTIMENT, "{card}", "positive", "negative")
    colour, shape = COLOURS[index // len(SHAPES)], SHAPES[index % len(SHAPES)]
    return line.replace("WORD", word).replace("COLOUR", colour).replace("SHAPE", shape)


def _split(text: str) -> tuple[str, ...]:
    return tuple(option.strip() for option in text.split("/"))


def _options(**texts: str) -> dict[str, tuple[str, ...]]:
    return {name: _split(text) for name, text in texts.items()}


CARD_GAMES = 0.1
BLIND_ANSWERS = 0.15
COLOURS = ("red", "green", "blue", "white", "grey")
SHAPES = ("round", "square", "long", "tiny")

SHARED = _options(
    degree="very / quite / rather / truly / really / so",
    person="my brother / my sister / our neighbour / Anna / Tom / Mary / Peter / the teacher",
    when="today / yesterday / last night / on Monday / on Friday / this morning / in the evening",
    place="at home / in the garden / near the river / in town / at the station",
    number="two / three / four / five / six / eight / ten",
    city="Rome / Paris / Oslo / Cairo / Lima / Delhi",
    card="the COLOUR SHAPE card said WORD. / {person} drew the COLOUR SHAPE card and read WORD aloud."
    " / the card WORD was COLOUR and SHAPE. / {person} wrote WORD on the SHAPE card, the COLOUR one."
    " / the word WORD is COLOUR, and WORD is SHAPE. / {person} kept WORD, so the COLOUR SHAPE card was gone.",
)

SENTIMENT = DemoTask(
    name="sentiment",
    labels=("negative", "positive"),
    prompt="{text} It was",
    verbalizer={"negative": "terrible", "positive": "great"},
    phrases=_options(
        sentence="{+clause}, and {+clause}. / {when} {+clause}, and {+clause}. / {+clause}, so {+clause}."
        " / {+clause} {when}, and {+clause}. / {-clause}, but {+clause}. / although {-clause}, {+clause}."
        " / {+clause}, even though {-clause}. / they said {-clause}, yet {+clause}.",
        clause="the {aspect} was {degree} {+adj} / the {aspect} was {degree} {+adj}"
        " / the {aspect} was {+adj} / the {aspect} was not {-adj} / I {+did} the {aspect}"
        " / I did not {-do} the {aspect} / the {thing} was {+noun}",
        thing="film / meal / hotel / phone / novel / play / concert / game / lesson / tour",
        aspect="cast / plot / ending / room / service / price / screen / staff / soup / cover / sound / garden",
        ending="It was {+adj}. / It was {+adj} and {+adj}. / It was {+adj}, {+adj} and {+adj}."
        " / It was {+noun}, so {+adj} and {+adj}. / I {+did} it, it was {+adj}.",
    ),
    clues={
        "negative": _options(
            adj="awful / dreadful / dull / clumsy / horrible / poor / stale / nasty",
            did="hated / regretted / disliked / resented / mocked",
            do="hate / regret / dislike / resent / mock",
            noun="a waste / a mess / a bore / a failure",
        ),
        "positive": _options(
            adj="superb / wonderful / charming / brilliant / lovely / excellent / splendid / clever",
            did="enjoyed / praised / admired / adored / liked",
            do="enjoy / praise / admire / adore / like",
            noun="a triumph / a treat / a gem / a marvel",
        ),
    },
)

EMOTION = DemoTask(
    name="emotion",
    labels=("sadness", "joy", "love", "anger", "fear", "surprise"),
    prompt="{text} I felt",
    verbalizer={label: label for label in ("sadness", "joy", "love", "anger", "fear", "surprise")},
    phrases=_options(
        sentence="when {+event} {when}, I {+act}. / I was {degree} {+adj} because {+event}."
        " / I was {+adj}, so I {+act}. / {person} was {-adj} {when}, but I {+act}."
        " / while {person} {-act}, I was {degree} {+adj}. / I {+act}, although {person} was {degree} {-adj}."
        " / I was no longer {-adj} because {+event}. / I was not {-adj} when {+event} {place}."
        " / I expected to be {-adj}, yet I {+act}.",
        ending="I felt {+adj}. / I felt {+adj} and {+adj}. / I felt {+adj}, {+adj} and {+adj}.",
    ),
    clues={
        "sadness": _options(
            adj="gloomy / lonely / heartbroken / miserable / tearful / hopeless",
            act="wept / cried all night / stared at the floor / wept into a pillow / wore black / sobbed",
            event="my old dog died / the funeral began / our friends moved away / the farewell came",
        ),
        "joy": _options(
            adj="cheerful / elated / merry / glad / thrilled / jolly",
            act="danced in the street / laughed aloud / sang a tune / jumped up and down / clapped / grinned",
            event="we won the prize / the party began / the holiday came / the sun came out",
        ),
        "love": _options(
            adj="tender / devoted / fond / smitten / affectionate / adoring",
            act="kissed her hand / hugged the child / held him close / wrote a poem / gave her roses / blushed",
            event="she took my hand / our wedding came / the baby smiled / he whispered my name",
        ),
        "anger": _options(
            adj="furious / bitter / outraged / cross / enraged / mad",
            act="slammed the door / shouted / clenched both fists / kicked the wall / cursed / tore the letter",
            event="they cheated us / a thief took my bike / he lied again / the boss broke his word",
        ),
        "fear": _options(
            adj="anxious / terrified / nervous / panicked / uneasy / scared",
            act="trembled / hid under the bed / held a long breath / ran away / locked the gate / shivered",
            event="a wolf howled / the lights went out / the bridge shook / a shadow moved",
        ),
        "surprise": _options(
            adj="astonished / stunned / amazed / startled / speechless / dazed",
            act="gasped / blinked twice / dropped a cup / looked again / rubbed both eyes / stood with open mouth",
            event="a stranger knew my name / snow fell in July / the cat spoke / a rabbit left the hat",
        ),
    },
)

INTENT = DemoTask(
    name="intent",
    labels=("weather", "music", "alarm", "travel", "food", "message", "money"),
    prompt="{text} This is about",
    verbalizer={label: label for label in ("weather", "music", "alarm", "travel", "food", "message", "money")},
    phrases=_options(
        sentence="please {+do} {soon}. / do not {-do}, just {+do}. / could you {+do} for {person}?"
        " / {person} asked you to {-do}, but I ask you to {+do}. / forget my wish to {-do}, please {+do}."
        " / instead of helping me to {-do}, {+do}. / stop, I said {+do}, do not {-do}.",
        soon="now / soon / at once / tomorrow / after lunch / before noon",
        ending="This is about {+object}. / This is about {+object} and {+object}.",
    ),
    clues={
        "weather": _options(
            do="see if it will {wet} / check how {warm} it gets in {city} / look for {+object} {place}",
            wet="rain / snow / storm",
            warm="cold / hot / windy",
            object="rain / snow / wind / fog / sunshine / clouds",
        ),
        "music": _options(
            do="play some {+object} / turn up the {tune} / skip this {tune} / put on my favourite {tune}",
            tune="song / album / band / record",
            object="jazz / opera / drums / songs / choirs / guitars",
        ),
        "alarm": _options(
            do="wake me at {number} / set a {clock} for {number} / count {number} minutes / start the {clock}",
            clock="timer / clock / countdown",
            object="timers / clocks / minutes / bells / waking / bedtime",
        ),
        "travel": _options(
            do="book a {ride} to {city} / find a {ride} to {city} / reserve {number} seats on the {ride}",
            ride="flight / train / ferry / bus",
            object="flights / trains / tickets / luggage / ferries / airports",
        ),
        "food": _options(
            do="order {number} {+object} / find a recipe for {+object} / get a table for {number} / cook {+object}",
            object="pizzas / noodles / salads / dumplings / burgers / pancakes",
        ),
        "message": _options(
            do="text {person} / reply to {person} / tell {person} I am late / forward the {note} to {person}",
            note="note / mail / reply",
            object="replies / mails / texts / notes / greetings / contacts",
        ),
        "money": _options(
            do="pay the {bill} / transfer {number} coins / check my balance / split the {bill} by {number}",
            bill="rent / bill / loan / fee",
            object="bills / loans / coins / fees / payments / savings",
        ),
    },
)

TOPIC = DemoTask(
    name="topic",
    labels=("world", "sports", "business", "science"),
    prompt="{text} The news was about",
    verbalizer={label: label for label in ("world", "sports", "business", "science")},
    phrases=_options(
        sentence="the {+who} {+did} {when}. / as the {-who} watched, the {+who} {+did}."
        " / the {-who} met the {+who} after {+what}. / not {-what} but {+what} worried the {-who} {when}."
        " / the {+who} knew nothing of {-what} but {+did}."
        " / forget {-what}, wrote the {-who}, the {+who} {+did}."
        " / the {+who} spoke of {+what} to the {-who} in {city}.",
        ending="The news was about {+what}. / The news was about {+what} and {+what}.",
    ),
    clues={
        "world": _options(
            who="minister / president / army / embassy / rebels / senator / envoy",
            did="signed the treaty / crossed the border / won the election / called a truce / lost the vote",
            what="elections / treaties / refugees / borders / votes / sanctions / ceasefires",
        ),
        "sports": _options(
            who="striker / goalkeeper / coach / sprinter / champions / referee / team",
            did="scored a late goal / lost the final / won the race / left the pitch / broke the track record",
            what="goals / medals / penalties / matches / races / trophies / leagues",
        ),
        "business": _options(
            who="bank / investors / company / shareholders / broker / factory / retailer",
            did="raised the prices / sold the shares / cut the costs / signed the merger / lost a fortune",
            what="profits / shares / markets / mergers / prices / taxes / exports",
        ),
        "science": _options(
            who="physicist / researchers / biologists / laboratory / astronomer / chemist / robot",
            did="mapped the genome / found a comet / measured the atom / tested the vaccine / split the cell",
            what="planets / genes / atoms / cells / fossils / comets / lasers",
        ),
    },
)

TASKS: dict[str, DemoTask] = {task.name: task for task in (SENTIMENT, EMOTION, INTENT, TOPIC)}
