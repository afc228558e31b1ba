"""WinoGrande: which of two fillers makes sense of a sentence? (Sakaguchi et al. 2020; scored with what follows it.)"""

from collections.abc import Mapping
from typing import Any

from lorica.tasks.base import Hub, Option, Prompt, TaskSpec


def parted(fields: Mapping[str, str]) -> Mapping[str, str]:
    """Adds {before} and {behind}: the sentence on either side of its gap `_`."""
    before, gap, behind = fields["sentence"].partition("_")
    if not gap:
        raise ValueError("its sentence has no gap _")
    return {**fields, "before": before.rstrip(), "behind": behind}


def filled(row: Mapping[str, Any]) -> list[Option]:
    """The two fillers, each with the rest of the sentence."""
    return [Option(f" {row[option]}{row['behind']}", row[option]) for option in ("option1", "option2")]


TASK = TaskSpec(
    labels=("1", "2"),
    texts=("sentence", "option1", "option2"),
    prompts={"default": Prompt("{before}")},
    hub=Hub("allenai/winogrande", "winogrande_xl", label_column="answer"),
    prepare=parted,
    options=filled,
    metrics=("accuracy",),
    train_as="lm",
)
