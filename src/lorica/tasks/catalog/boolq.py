"""BoolQ: a yes-or-no question about a passage (Clark et al. 2019; prompt of MeZO)."""

from collections.abc import Mapping

from lorica.tasks.base import Hub, Prompt, TaskSpec


def capitalised(fields: Mapping[str, str]) -> Mapping[str, str]:
    """Adds {Question}: the question with a capital letter and without its question mark, which the template sets."""
    question = fields["question"].strip().rstrip("?").rstrip()
    return {**fields, "Question": question[:1].upper() + question[1:]}


TASK = TaskSpec(
    labels=("no", "yes"),
    texts=("question", "passage"),
    prompts={"default": Prompt("{passage} {Question}?\n", {"no": "No", "yes": "Yes"})},
    hub=Hub("google/boolq", label_column="answer", columns={"passage": "passage", "question": "question"}),
    prepare=capitalised,
    uncut=("question", "Question"),
)
