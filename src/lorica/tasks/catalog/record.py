"""ReCoRD: which name of a news story fills the gap of a sentence about it? (Zhang et al. 2018; prompt of MeZO.)"""

from collections.abc import Mapping
from typing import Any

from lorica.tasks.base import Gold, Hub, Option, Prompt, TaskSpec, texts_in

GAP = "@placeholder"


def itemised(fields: Mapping[str, str]) -> Mapping[str, str]:
    """The passage's highlights as items of a list, which the query goes on with."""
    return {**fields, "passage": fields["passage"].replace("@highlight\n", "- ")}


def filled(row: Mapping[str, Any]) -> list[Option]:
    """The query with each name in its gap."""
    if GAP not in row["query"]:
        raise ValueError(f"its query has no {GAP}")
    return [Option(f" {row['query'].replace(GAP, name)}", name) for name in dict.fromkeys(texts_in(row, "entities"))]


def right_names(row: Mapping[str, Any]) -> list[Gold]:
    """Every name that counts as right."""
    return [(name,) for name in dict.fromkeys(texts_in(row, "answers"))]


TASK = TaskSpec(
    labels=(),
    texts=("passage", "query"),
    prompts={"default": Prompt("{passage}\n-", content_free="-")},
    hub=Hub("aps/super_glue", "record"),
    prepare=itemised,
    options=filled,
    golds=right_names,
    metrics=("accuracy", "f1", "exact_match"),
    train_as="lm",
)
